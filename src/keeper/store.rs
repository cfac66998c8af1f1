//! What is kept: sessions and databases as the broker has said, with their descriptors.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use turnstile::closing::Closing;
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
}

/// How long the next broker may take to come for the socket.
const LISTENS: Duration = Duration::from_secs(10);

pub struct Store {
    closing: Closing,
    /// Other users' members have sent some of what is kept: what is let go is closed elsewhere.
    foreign: bool,
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
            listener: None,
            sessions: BTreeMap::new(),
            databases: BTreeMap::new(),
        }
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
                    self.foreign |= kept.uid != 0 && kept.uid != geteuid().as_raw();
                    self.sessions.insert(kept.session, Session { kept, pidfd, liveness });
                }
            }
            Kept::SessionGone(session) => self.forget_session(session),
            Kept::Database(kept) => {
                let (hold, home, wal, seats) = (None, None, None, BTreeMap::new());
                let number = kept.database;
                let new = Database { kept, fds: given.collect(), hold, deaf: false, home, wal, seats };
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
            // Members have the other end, and may have put something into it.
            self.close_socket(broker);
        }
    }

    pub fn is_closing(&self) -> bool {
        self.closing.is_busy()
    }

    /// Gives away what is to be closed.
    pub fn close_elsewhere(&mut self) {
        self.closing.go_on();
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
        living.chain(ends.map(|[_, broker]| broker))
    }

    /// No broker is there: a database whose members are all dead, have left or rest is let go, and its gate opened.
    pub fn drop_what_is_nobodys(&mut self) {
        // Nobody comes: whoever knocks is to be told so.
        if let Some((_, socket, _)) = self.listener.take_if(|(_, _, since)| since.elapsed() >= LISTENS) {
            // Whoever has knocked may have said something already.
            // Of whomever.
            self.foreign = true;
            socket::end_listening(&socket).into_iter().for_each(|socket| self.close_socket(socket));
        }
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
                let hold = Hold::of(a, b);
                hold.has_rung();
                // It is looked at as often as everything else is.
                db.deaf = hold.is_deaf();
            }
            if !db.is_used(alive) && !db.is_checkpointed() {
                unused.push(*number);
            }
        }
        for number in unused {
            if let Some(mut db) = self.databases.remove(&number) {
                let seconds = db.seconds();
                db.let_go();
                seconds.into_iter().for_each(|fd| self.close(fd));
                self.close_database(&mut db);
            }
        }
        let in_use =
            |session: u64| self.databases.values().any(|d| d.seats.values().any(|s| s.session == session));
        let idle: Vec<u64> = self.sessions.keys().copied().filter(|s| !in_use(*s)).collect();
        for session in idle {
            self.forget_session(session);
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

    /// Another descriptor of each file.
    fn seconds(&self) -> Vec<OwnedFd> {
        self.fds.iter().filter_map(|fd| fd.try_clone().ok()).collect()
    }

    /// Opens the gate, and lets everything go.
    fn let_go(&mut self) {
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
        let hold = self.hold.as_ref().and_then(|[a, b]| Some((a.try_clone().ok()?, b.try_clone().ok()?)));
        let mut fds = self.fds.drain(..).skip(2);
        if let (Some(database), Some((a, b))) = (fds.next(), hold)
            && let Some(gate) = Gate::adopt(database, fds.next(), Hold::of(a, b))
        {
            gate.open();
        }
    }
}
