//! What is kept: sessions and databases as the broker has said, with their descriptors.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use turnstile::closing::Closing;
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
use turnstile::wire::socket;

struct Session {
    kept: KeptSession,
    pidfd: OwnedFd,
    liveness: OwnedFd,
}

struct Database {
    kept: KeptDatabase,
    fds: Vec<OwnedFd>,
    hold: Option<[OwnedFd; 2]>,
    /// What holds its gate cannot ring any more.
    deaf: bool,
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

pub struct Store {
    closing: Closing,
    /// Other users' members have sent some of what is kept: what is let go is closed elsewhere.
    foreign: bool,
    /// Of what held gates that are open: closed when the files are.
    ends: Vec<(u64, OwnedFd)>,
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

impl Default for Store {
    fn default() -> Store {
        let closing = Closing::new("/proc/self/exe".into());
        Store {
            closing,
            foreign: false,
            ends: Vec::new(),
            listener: None,
            sessions: BTreeMap::new(),
            databases: BTreeMap::new(),
        }
    }
}

impl Store {
    pub fn is_empty(&self) -> bool {
        self.databases.is_empty() && self.listener.is_none() && self.ends.is_empty()
    }

    /// One more thing to keep, or one less.
    pub fn keep(&mut self, kept: Kept, fds: Vec<OwnedFd>) {
        let mut given = fds.into_iter();
        match kept {
            Kept::Session(kept) => {
                if let (Some(pidfd), Some(liveness)) = (given.next(), given.next()) {
                    self.foreign |= kept.uid != 0 && kept.uid != geteuid().as_raw();
                    self.sessions.insert(kept.session, Session { kept, pidfd, liveness });
                }
            }
            Kept::SessionGone(session) => self.forget_session(session),
            Kept::Database(kept) => {
                let (hold, home, wal, seats) = (None, None, None, BTreeMap::new());
                let number = kept.database;
                let new = Database {
                    kept,
                    fds: given.collect(),
                    hold,
                    deaf: false,
                    home,
                    wal,
                    seats,
                    looked_after: None,
                };
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
                    let before = std::mem::replace(&mut db.wal, given.next());
                    before.into_iter().for_each(|wal| self.close(wal));
                }
            }
            Kept::DatabaseGone(database) => {
                if let Some(mut db) = self.databases.remove(&database) {
                    self.close_database(&mut db);
                }
            }
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

    fn forget_session(&mut self, number: u64) {
        if let Some(session) = self.sessions.remove(&number) {
            self.close(session.liveness);
        }
    }

    fn close(&mut self, fd: OwnedFd) {
        if self.foreign && !planted("closed-by-the-keeper") {
            self.closing.close(fd);
        }
    }

    fn close_socket(&mut self, socket: OwnedFd) {
        if self.foreign && !planted("closed-by-the-keeper") {
            self.closing.close_socket(socket);
        }
    }

    fn close_database(&mut self, db: &mut Database) {
        db.fds.drain(..).chain(db.wal.take()).for_each(|fd| self.close(fd));
        if let Some([_member, broker]) = db.hold.take() {
            self.close_end(broker);
        }
    }

    /// Members have the other one, and may have put something into this. And they see by it that the files are closed.
    fn close_end(&mut self, end: OwnedFd) {
        let mark = self.closing.mark();
        self.ends.push((mark, end));
    }

    pub fn is_closing(&self) -> bool {
        self.closing.is_busy()
    }

    /// Gives away what is to be closed.
    pub fn close_elsewhere(&mut self) {
        self.closing.go_on();
        let closed = self.ends.extract_if(.., |(mark, _)| self.closing.has_closed(*mark));
        for (_, end) in closed.collect::<Vec<_>>() {
            self.close_socket(end);
        }
        self.closing.go_on();
    }

    pub fn closing_socket(&self) -> Option<&OwnedFd> {
        self.closing.socket()
    }

    pub fn closing(&mut self) -> &mut Closing {
        &mut self.closing
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
        let ends = self.databases.values().filter(|d| !d.deaf).filter_map(|d| d.hold.as_ref());
        living.chain(ends.map(|[_, broker]| broker)).chain(self.closing.socket())
    }

    /// No broker is there: a database whose members are all dead, have left or rest is let go, and its gate opened. True: to
    /// be looked at again soon. `spare`: a descriptor that may be closed if there is no room for another.
    pub fn drop_what_is_nobodys(&mut self, spare: &mut Option<OwnedFd>) -> bool {
        // Nobody comes: whoever knocks is to be told so.
        if let Some((_, socket, _)) = self.listener.take_if(|(_, _, since)| since.elapsed() >= LISTENS) {
            // Whoever has knocked may have said something already.
            // Of whomever.
            self.foreign = true;
            socket::end_listening(&socket).into_iter().for_each(|socket| self.close_socket(socket));
        }
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
                // It is looked at as often as everything else is.
                db.deaf = hold::is_deaf(broker);
            }
            match db.judge(&fate, spare) {
                Verdict::Stays => {}
                verdict => verdicts.push((*number, verdict)),
            }
        }
        for (number, verdict) in verdicts {
            let Some(mut db) = self.databases.remove(&number) else { continue };
            let (files, end) = db.seconds();
            if let Verdict::Opens(office) = verdict {
                db.open(office);
            }
            files.into_iter().for_each(|fd| self.close(fd));
            end.into_iter().for_each(|end| self.close_end(end));
            self.close_database(&mut db);
        }
        let in_use =
            |session: u64| self.databases.values().any(|d| d.seats.values().any(|s| s.session == session));
        let idle: Vec<u64> = self.sessions.keys().copied().filter(|s| !in_use(*s)).collect();
        for session in idle {
            self.forget_session(session);
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

    /// Another descriptor of each file, and of the end that members do not have; if there is room for it. It is closed after
    /// the first.
    fn seconds(&self) -> (Vec<OwnedFd>, Option<OwnedFd>) {
        let end = self.hold.as_ref().and_then(|[_, broker]| broker.try_clone().ok());
        (self.fds.iter().filter_map(|fd| fd.try_clone().ok()).collect(), end)
    }

    /// Opens the gate, and lets everything go.
    fn open(&mut self, _office: Held) {
        if let Some(map) = &self.map() {
            map.poison();
        }
        let mut fds = self.fds.drain(..).skip(2);
        if let (Some(database), Some([a, b])) = (fds.next(), self.hold.take())
            && let Some(gate) = Gate::adopt(database, fds.next(), Hold::of(a, b))
        {
            gate.open();
        }
    }
}
