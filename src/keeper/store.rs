//! What is kept: sessions and databases as the broker has said, with their descriptors.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use turnstile::lock::SeatId;
use turnstile::lock::occupied::{Fate, Holder, Occupied};
use turnstile::lock::table::Table;
use turnstile::planted::planted;
use turnstile::segment::gate::Gate;
use turnstile::segment::hold::{self, Hold};
use turnstile::segment::liveness;
use turnstile::segment::mapping::ControlMap;
use turnstile::segment::names::Place;
use turnstile::segment::supervision::{self, Held, Office};
use turnstile::wire::keeper::{Kept, KeptDatabase, KeptHome, KeptSeat, KeptSession};
use turnstile::wire::message::Role;

struct Session {
    kept: KeptSession,
    pidfd: OwnedFd,
    liveness: OwnedFd,
}

struct Database {
    kept: KeptDatabase,
    fds: Vec<OwnedFd>,
    hold: Option<[OwnedFd; 2]>,
    home: Option<KeptHome>,
    wal: Option<OwnedFd>,
    seats: BTreeMap<SeatId, KeptSeat>,
    /// Since when a broker has been seen to look after it, although there is none here.
    looked_after: Option<Instant>,
}

/// What becomes of a database while there is no broker.
enum Verdict {
    /// Somebody may be in, or it cannot be told yet.
    Stays,
    /// It is others' to look after, or its members' alone: let go, and the gate left as it is.
    LeftAlone,
    /// Nobody is in: its gate is to be opened, as whoever holds this office.
    Opens(Held),
}

/// A broker that has just ended may still have its office for a moment. One that has it for longer is another one, which has
/// found the members.
const ENDS_WITHIN: Duration = Duration::from_secs(1);
/// How long the next broker may take to come for the socket.
const LISTENS: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Store {
    listener: Option<(Place, OwnedFd, Instant)>,
    sessions: BTreeMap<u64, Session>,
    databases: BTreeMap<u32, Database>,
}

impl Session {
    /// As the broker judges it (`broker/liveness.rs`): its process has ended, or its liveness byte is free. Its socket is
    /// closed in any case.
    fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let ended = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0);
        ended || liveness::owner(&self.liveness).is_none()
    }
}

impl Store {
    pub fn is_empty(&self) -> bool {
        self.databases.is_empty() && self.listener.is_none()
    }

    /// One more thing to keep, or one less.
    pub fn keep(&mut self, kept: Kept, fds: Vec<OwnedFd>) {
        let mut given = fds.into_iter();
        match kept {
            Kept::Session(kept) => {
                if let (Some(pidfd), Some(liveness)) = (given.next(), given.next()) {
                    self.sessions.insert(kept.session, Session { kept, pidfd, liveness });
                }
            }
            Kept::SessionGone(session) => drop(self.sessions.remove(&session)),
            Kept::Database(kept) => {
                let (hold, home, wal, seats) = (None, None, None, BTreeMap::new());
                let number = kept.database;
                let new = Database { kept, fds: given.collect(), hold, home, wal, seats, looked_after: None };
                self.databases.insert(number, new);
            }
            Kept::Hold(database) => {
                if let (Some(db), Some(a), Some(b)) =
                    (self.databases.get_mut(&database), given.next(), given.next())
                {
                    db.hold = Some([a, b]);
                }
            }
            Kept::Home(database, home) => {
                if let Some(db) = self.databases.get_mut(&database) {
                    db.home = Some(home);
                }
            }
            Kept::Wal(database) => {
                if let Some(db) = self.databases.get_mut(&database) {
                    db.wal = given.next();
                }
            }
            Kept::DatabaseGone(database) => drop(self.databases.remove(&database)),
            Kept::Seat(seat) => {
                if let Some(db) = self.databases.get_mut(&seat.database) {
                    db.seats.insert(seat.seat, seat);
                }
            }
            Kept::Listener(place) => {
                self.listener = given.next().map(|fd| (place, fd, Instant::now()));
            }
            Kept::SeatGone(key) => {
                if let Some(db) = self.databases.get_mut(&key.database) {
                    db.seats.remove(&key.seat);
                }
            }
        }
    }

    /// All of it, in an order in which it can be kept again.
    pub fn for_each(&self, mut give: impl FnMut(Kept, &[&OwnedFd]) -> io::Result<()>) -> io::Result<()> {
        if let Some((place, socket, _)) = &self.listener {
            give(Kept::Listener(*place), &[socket])?;
        }
        for s in self.sessions.values() {
            give(Kept::Session(s.kept.clone()), &[&s.pidfd, &s.liveness])?;
        }
        for (number, db) in &self.databases {
            give(Kept::Database(db.kept.clone()), &db.fds.iter().collect::<Vec<_>>())?;
            if let Some([a, b]) = &db.hold {
                give(Kept::Hold(*number), &[a, b])?;
            }
            if let Some(home) = &db.home {
                give(Kept::Home(*number, home.clone()), &[])?;
            }
            if let Some(wal) = &db.wal {
                give(Kept::Wal(*number), &[wal])?;
            }
            for seat in db.seats.values() {
                give(Kept::Seat(seat.clone()), &[])?;
            }
        }
        Ok(())
    }

    /// The next broker has come.
    pub fn forget_listener(&mut self) {
        self.listener = None;
    }

    /// What tells of a member's end: pidfds that have not fired, and the ends at which members ring.
    pub fn watched(&self) -> impl Iterator<Item = &OwnedFd> {
        let living = self.sessions.values().filter(|s| !s.is_dead()).map(|s| &s.pidfd);
        living.chain(self.databases.values().filter_map(|d| d.hold.as_ref()).map(|[_, broker]| broker))
    }

    /// No broker is there: a database whose members are all dead, have left or rest is let go, and its gate opened. True: to
    /// be looked at again soon. `spare`: a descriptor that may be closed if there is no room for another.
    pub fn drop_what_is_nobodys(&mut self, spare: &mut Option<OwnedFd>) -> bool {
        // Nobody comes: whoever knocks is to be told so.
        self.listener.take_if(|(_, _, since)| since.elapsed() >= LISTENS);
        if planted("keeper-keeps-for-ever") {
            return false;
        }
        let dead: BTreeSet<u64> =
            self.sessions.iter().filter(|(_, s)| s.is_dead()).map(|(n, _)| *n).collect();
        let fate = |seat: &KeptSeat| match self.sessions.contains_key(&seat.session) {
            true if dead.contains(&seat.session) => Fate::Dead,
            true => Fate::Lives,
            // Never told of, or told of in vain.
            false => Fate::Unknown,
        };
        let mut verdicts = Vec::new();
        for (number, db) in &mut self.databases {
            if let Some([_, broker]) = &db.hold {
                hold::has_rung(broker);
            }
            match db.judge(&fate, spare) {
                Verdict::Stays => {}
                verdict => verdicts.push((*number, verdict)),
            }
        }
        for (number, verdict) in verdicts {
            let Some(db) = self.databases.remove(&number) else { continue };
            if let Verdict::Opens(office) = verdict {
                db.open(office);
            }
        }
        let in_use =
            |session: u64| self.databases.values().any(|d| d.seats.values().any(|s| s.session == session));
        let idle: Vec<u64> = self.sessions.keys().copied().filter(|s| !in_use(*s)).collect();
        for session in idle {
            self.sessions.remove(&session);
        }
        self.databases.values().any(|db| db.looked_after.is_some())
    }
}

impl Database {
    fn map(&self) -> Option<ControlMap> {
        ControlMap::open(self.fds.first()?, self.kept.nonce, true).ok()
    }

    /// Who is in, as far as the kernel, the segment and the records can say.
    fn occupied(&self, fate: &impl Fn(&KeptSeat) -> Fate) -> Occupied {
        let map = self.map();
        let Some(table) = map.as_ref().and_then(|m| m.control()).map(Table::of) else {
            // No gate, or one that cannot be looked behind.
            let fates: Vec<Fate> = self.seats.values().map(fate).collect();
            return match fates.contains(&Fate::Lives) {
                true => Occupied::BySomebody,
                false => Occupied::ByStrangers,
            };
        };
        let is_this = |seat: &KeptSeat| table.count(seat.seat) == seat.count;
        let holder = |seat: SeatId| match self.seats.get(&seat) {
            Some(kept) if is_this(kept) => Holder { fate: fate(kept), writes: kept.role == Role::ReadWrite },
            // Given out again since, or never told of here.
            _ if table.members.has(seat) => Holder::UNKNOWN,
            _ => Holder { fate: Fate::Dead, ..Holder::UNKNOWN },
        };
        let seats = || self.seats.keys().copied().chain(table.members.iter());
        match table.occupied(seats(), holder) {
            // Closed means closed.
            Occupied::ByNobody if !table.close_all_at_rest(seats()) => Occupied::BySomebody,
            occupied => occupied,
        }
    }

    fn judge(&mut self, fate: &impl Fn(&KeptSeat) -> Fate, spare: &mut Option<OwnedFd>) -> Verdict {
        let occupied = self.occupied(fate);
        if occupied == Occupied::BySomebody || self.is_checkpointed() {
            return Verdict::Stays;
        }
        let Some(control) = self.fds.first().filter(|_| self.kept.guest.is_none()) else {
            return Verdict::LeftAlone;
        };
        // Who opens a gate is the only one who looks after the segment: a broker that found the members may let somebody in.
        let mut office = supervision::take(control, Office::Broker);
        if office.is_err() && spare.take().is_some() {
            office = supervision::take(control, Office::Broker);
        }
        match office {
            Ok(Some(office)) => match self.occupied(fate) {
                Occupied::BySomebody => Verdict::Stays,
                Occupied::ByStrangers => Verdict::LeftAlone,
                Occupied::ByNobody => Verdict::Opens(office),
            },
            Ok(None) => match self.looked_after.get_or_insert_with(Instant::now).elapsed() < ENDS_WITHIN {
                true => Verdict::Stays,
                false => Verdict::LeftAlone,
            },
            // No room for a descriptor, say: the next time.
            Err(_) => Verdict::Stays,
        }
    }

    /// The dead broker's checkpointer, which is about to end, may still write into it.
    fn is_checkpointed(&self) -> bool {
        let held = |control| supervision::is_held(control, Office::Checkpointer);
        self.kept.guest.is_none()
            && self.fds.first().is_some_and(held)
            && !planted("gate-opened-over-a-checkpoint")
    }

    /// Opens the gate, and lets everything go.
    fn open(self, _office: Held) {
        if let Some(map) = &self.map() {
            map.poison();
        }
        let mut fds = self.fds.into_iter().skip(2);
        if let (Some(database), Some([a, b])) = (fds.next(), self.hold)
            && let Some(gate) = Gate::adopt(database, fds.next(), Hold::of(a, b))
        {
            gate.open();
        }
    }
}
