//! What is kept: sessions and databases as the broker has said, with their descriptors.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use turnstile::lock::SeatId;
use turnstile::lock::table::Table;
use turnstile::planted::planted;
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::gate::Gate;
use turnstile::segment::hold::Hold;
use turnstile::segment::layout::{CHECKPOINTER, CLOSED, STATE};
use turnstile::segment::liveness;
use turnstile::segment::mapping::ControlMap;
use turnstile::segment::names::Place;
use turnstile::segment::supervision::{self, Office};
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
}

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
                let new = Database { kept, fds: given.collect(), hold, home, wal, seats };
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

    /// No broker is there: a database whose members are all dead, have left or rest is let go, and its gate opened.
    pub fn drop_what_is_nobodys(&mut self) {
        // Nobody comes: whoever knocks is to be told so.
        self.listener.take_if(|(_, _, since)| since.elapsed() >= LISTENS);
        if planted("keeper-keeps-for-ever") {
            return;
        }
        let dead: Vec<u64> = self.sessions.iter().filter(|(_, s)| s.is_dead()).map(|(n, _)| *n).collect();
        let alive =
            |seat: &KeptSeat| self.sessions.contains_key(&seat.session) && !dead.contains(&seat.session);
        let mut unused = Vec::new();
        for (number, db) in &mut self.databases {
            if let Some([a, b]) = &db.hold
                && let (Ok(a), Ok(b)) = (a.try_clone(), b.try_clone())
            {
                Hold::of(a, b).has_rung();
            }
            if !db.is_used(alive) && !db.is_checkpointed() {
                unused.push(*number);
            }
        }
        for number in unused {
            if let Some(db) = self.databases.remove(&number) {
                db.let_go();
            }
        }
        let in_use =
            |session: u64| self.databases.values().any(|d| d.seats.values().any(|s| s.session == session));
        let idle: Vec<u64> = self.sessions.keys().copied().filter(|s| !in_use(*s)).collect();
        for session in idle {
            self.sessions.remove(&session);
        }
    }
}

impl Database {
    fn map(&self) -> Option<ControlMap> {
        ControlMap::open(self.fds.first()?, self.kept.nonce, true).ok()
    }

    /// A seat of a living member is in use. If all that are left rest, they are closed: closed means closed.
    fn is_used(&self, alive: impl Fn(&KeptSeat) -> bool) -> bool {
        let mut living: Vec<&KeptSeat> = self.seats.values().filter(|s| alive(s)).collect();
        if self.kept.guest.is_some() {
            return !living.is_empty();
        }
        let Some(map) = self.map() else { return !living.is_empty() };
        let Some(table) = map.control().map(Table::of) else { return !living.is_empty() };
        living.retain(|s| table.count(s.seat) == s.count);
        let given_up = |s: &KeptSeat| {
            let state = table.seat(s.seat).map_or(CLOSED, |w| w.state.load(SeqCst) & STATE);
            s.role == Role::ReadWrite && state == CLOSED
        };
        let rests = |s: &KeptSeat| s.role == Role::ReadWrite && table.rests(s.seat);
        if !living.iter().all(|s| given_up(s) || rests(s)) {
            return true;
        }
        // One that is taken in use again at this very moment stays.
        !living.iter().all(|s| given_up(s) || table.close_resting(s.seat))
    }

    /// The dead broker's checkpointer, which is about to end, may still write into it.
    fn is_checkpointed(&self) -> bool {
        let held = |control| supervision::is_held(control, Office::Checkpointer);
        self.kept.guest.is_none()
            && self.fds.first().is_some_and(held)
            && !planted("gate-opened-over-a-checkpoint")
    }

    /// Opens the gate, and lets everything go.
    fn let_go(self) {
        if self.kept.guest.is_some() {
            return;
        }
        let map = self.map();
        let Some(table) = map.as_ref().and_then(|m| m.control()).map(Table::of) else { return };
        // A seat that was never told of here, or given out again since, is somebody's who may live: the gate is left to
        // who holds it.
        let is_this = |seat: SeatId| self.seats.get(&seat).is_some_and(|s| s.count == table.count(seat));
        if !table.members.iter().all(|seat| seat == CHECKPOINTER || is_this(seat)) {
            return;
        }
        if let Some(map) = &map {
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
