//! What the last broker of this socket left to its keeper: taken back before anybody is listened to.

use super::database::{Database, Home, Identity, Seat, Segment, State};
use super::keeping::{Keeping, keeper_path};
use super::liveness::{self, peer_of};
use super::server::{KEEPER_SOCKET, Server};
use super::session::{self, SILENT_LOOKS, Session};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::gate::Gate;
use crate::segment::hold::Hold;
use crate::segment::layout::{CHECKPOINTER, LAYOUT_VERSION};
use crate::segment::mapping::ControlMap;
use crate::segment::names::Place;
use crate::segment::supervision::{self, Office};
use crate::wire::keeper::{
    FromKeeper, Greeting, KEEPER_MAGIC, KEEPER_VERSION, Kept, KeptDatabase, KeptSeat, ToKeeper,
};
use crate::wire::message::{Role, SeatKey};
use crate::wire::socket::{self, Packet};
use nix::poll::PollFlags;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// How long the keeper may take to answer, and a broker that was killed to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a broker that is replaced may take to leave everything to its keeper.
const REPLACED_WITHIN: Duration = Duration::from_secs(10);

/// Whose a seat is that nobody has claimed yet.
pub const NOBODY: u64 = 0;

#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    #[error(
        "members of another version's broker are still in ({0}): this build cannot take their databases over. Start \
         that version again, or end those programs first"
    )]
    OtherVersion(String),
    #[error("the broker before has not ended yet")]
    Occupied,
    #[error("cannot replace the broker (pid {0}): {1}")]
    Irreplaceable(i32, io::Error),
    #[error(
        "cannot replace the broker: it is in another pid namespace, where no signal from here goes. End it with SIGUSR2 \
         there (`docker kill --signal USR2`), which leaves its databases to their members, and start without --replace"
    )]
    OutOfSight,
    #[error("user {1} listens on {0}: it is no broker of ours, and is not replaced")]
    Anothers(String, u32),
}

/// A keeper that has given everything back, and what that is.
pub struct Left {
    keeper: OwnedFd,
    pid: i32,
    kept: Vec<(Kept, Vec<OwnedFd>)>,
    /// On which the last broker listened.
    pub listener: Option<(Place, OwnedFd)>,
}

/// Databases are numbered from here. A member that hands a database back knows it by the number that a broker before
/// gave it, which must not be another's by now.
pub fn first_number() -> io::Result<u32> {
    let bytes = session::random::<4>().map_err(io::Error::other)?;
    Ok(u32::from_ne_bytes(bytes) >> 2 | 1)
}

fn receive(socket: &OwnedFd, end: Instant) -> io::Result<Packet> {
    loop {
        match socket::receive(socket) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                socket::wait(socket, PollFlags::POLLIN, left)?;
            }
            other => return other,
        }
    }
}

/// The keeper of this broker's socket and what it says first. Another user's process may listen there in its place
/// (the directory may be anybody's): it is not believed.
fn keeper_of(broker: &Path) -> io::Result<Option<(OwnedFd, Greeting)>> {
    let path = keeper_path(broker);
    let socket = match socket::connect_to(&path) {
        Ok(socket) => socket,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let uid = peer_of(&socket)?.uid;
    if uid != nix::unistd::geteuid().as_raw() && !planted("keeper-is-anyone") {
        tracing::error!(path = %path.display(), uid, "another user's process listens there: it is no keeper of ours");
        return Ok(None);
    }
    match receive(&socket, Instant::now() + PATIENCE).and_then(|p| p.decode::<Greeting>()) {
        Ok(greeting) if greeting.magic == KEEPER_MAGIC => Ok(Some((socket, greeting))),
        // It ended as we knocked: nothing was left.
        Err(e) if has_ended(&e) => Ok(None),
        Err(e) => Err(e),
        Ok(_) => Err(io::Error::other(format!("{}: not a keeper", path.display()))),
    }
}

fn same_version(greeting: Greeting) -> Result<(), TakeoverError> {
    if greeting.version == KEEPER_VERSION && greeting.layout == LAYOUT_VERSION {
        return Ok(());
    }
    let theirs = format!("segments of layout {}, kept as {}", greeting.layout, greeting.version);
    let ours = format!("this one: {LAYOUT_VERSION} and {KEEPER_VERSION}");
    Err(TakeoverError::OtherVersion(format!("{theirs}; {ours}")))
}

/// Asks the keeper for everything. `None`: there is none, so nothing was left.
pub fn take_back(broker: &Path) -> Result<Option<Left>, super::ServeError> {
    let end = Instant::now() + PATIENCE;
    loop {
        let Some((keeper, greeting)) = keeper_of(broker)? else { return Ok(None) };
        same_version(greeting)?;
        // Nobody else has the lock of this socket: its broker is on its way out.
        if greeting.occupied && Instant::now() >= end {
            return Err(TakeoverError::Occupied.into());
        }
        if !greeting.occupied {
            match all_of(keeper, greeting.pid) {
                // It has ended, or could not send all of it. That it says nothing does not mean that nothing was left.
                Err(e) if has_ended(&e) && Instant::now() < end => {}
                left => return Ok(Some(left?)),
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn has_ended(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(e.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

fn all_of(keeper: OwnedFd, pid: i32) -> io::Result<Left> {
    socket::send_within(&keeper, &socket::encode(&ToKeeper::GiveBack)?, &[], PATIENCE)?;
    let (mut kept, mut listener) = (Vec::new(), None);
    loop {
        let packet = receive(&keeper, Instant::now() + PATIENCE)?;
        if packet.fds_lost {
            return Err(io::Error::other("too many open files for what the last broker left"));
        }
        match packet.decode()? {
            FromKeeper::Kept(Kept::Listener(place)) => {
                listener = packet.fds.into_iter().next().map(|fd| (place, fd));
            }
            FromKeeper::Kept(one) => kept.push((one, packet.fds)),
            FromKeeper::All => return Ok(Left { keeper, pid, kept, listener }),
            FromKeeper::Done(_) | FromKeeper::Lost => {} // not asked, nor told anything yet
        }
    }
}

/// Asks the broker that serves `broker` to leave everything to its keeper, if this build can take it over. Returns how
/// long that may take.
pub fn replace(broker: &Path) -> Result<Duration, super::ServeError> {
    if let Some((_, greeting)) = keeper_of(broker)? {
        same_version(greeting)?;
    }
    let Ok(socket) = socket::connect_to(broker) else { return Ok(REPLACED_WITHIN) };
    let peer = peer_of(&socket)?;
    if peer.uid != nix::unistd::geteuid().as_raw() && !planted("replaced-is-anyone") {
        return Err(TakeoverError::Anothers(broker.display().to_string(), peer.uid).into());
    }
    if let Err(e) = liveness::signal(&peer, nix::sys::signal::Signal::SIGUSR2) {
        let seen = |e: nix::Error| TakeoverError::Irreplaceable(peer.pid, e.into());
        return Err(if peer.pid == 0 { TakeoverError::OutOfSight } else { seen(e) }.into());
    }
    tracing::info!(pid = peer.pid, "replacing the broker");
    Ok(REPLACED_WITHIN)
}

/// A database as it comes, piece by piece.
struct Piece {
    kept: KeptDatabase,
    fds: Vec<OwnedFd>,
    hold: Option<Hold>,
    home: Option<Home>,
    wal: Option<OwnedFd>,
    seats: Vec<KeptSeat>,
}

impl Piece {
    fn state(self: &mut Piece) -> io::Result<State> {
        if let Some(reason) = self.kept.guest.take() {
            // The turns were in the last broker's own memory: nobody has one.
            return Ok(State::Guest { reason, turns: ControlMap::private()? });
        }
        let incomplete = || io::Error::other("not all of it was kept");
        let mut fds = std::mem::take(&mut self.fds).into_iter();
        let (Some(control), Some(wal_index), Some(database)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(incomplete());
        };
        let hold = self.hold.take().ok_or_else(incomplete)?;
        let segment = Segment::adopt(control, wal_index, self.kept.nonce)?;
        match Gate::adopt(database, fds.next(), hold) {
            Some(gate) => Ok(State::Gated { gate, segment: Box::new(segment) }),
            None => {
                segment.control.poison();
                Err(io::Error::other("its gate does not stand any more"))
            }
        }
    }
}

impl Server {
    /// Goes on where the last broker ended.
    pub(super) fn adopt(&mut self, left: Left) {
        let mut pieces: BTreeMap<u32, Piece> = BTreeMap::new();
        for (kept, fds) in left.kept {
            let mut fds = fds.into_iter();
            match kept {
                Kept::Session(kept) => {
                    let (Some(pidfd), Some(liveness)) = (fds.next(), fds.next()) else { continue };
                    self.next_session = self.next_session.max(kept.session + 1);
                    let session = Session::adopted(kept, pidfd, liveness);
                    self.users.arrived(session.peer.uid);
                    self.sessions.insert(session.id, session);
                }
                Kept::Database(kept) => {
                    let (hold, home, wal, seats) = (None, None, None, Vec::new());
                    let number = kept.database;
                    pieces.insert(number, Piece { kept, fds: fds.collect(), hold, home, wal, seats });
                }
                Kept::Hold(number) => {
                    if let (Some(piece), Some(a), Some(b)) = (pieces.get_mut(&number), fds.next(), fds.next())
                    {
                        piece.hold = Some(Hold::of(a, b));
                    }
                }
                Kept::Home(number, home) => {
                    let directory = Identity { device: home.device, inode: home.inode };
                    if let Some(piece) = pieces.get_mut(&number) {
                        piece.home = Some(Home { directory, name: home.name });
                    }
                }
                Kept::Wal(number) => {
                    if let Some(piece) = pieces.get_mut(&number) {
                        piece.wal = fds.next();
                    }
                }
                Kept::Seat(seat) => {
                    if let Some(piece) = pieces.get_mut(&seat.database) {
                        piece.seats.push(seat);
                    }
                }
                Kept::SessionGone(_) | Kept::DatabaseGone(_) | Kept::SeatGone(_) | Kept::Listener(_) => {}
            }
        }
        let _ = self.epoll.add(&left.keeper, EpollEvent::new(EpollFlags::EPOLLIN, KEEPER_SOCKET));
        self.keeping = Keeping::taken_over(left.keeper, left.pid);
        if self.listener.is_given() {
            self.keeping.leave_socket();
        }
        for (number, piece) in pieces {
            self.adopt_database(number, piece);
        }
        let ids: Vec<u64> = self.sessions.keys().copied().collect();
        for id in ids {
            match self.sessions[&id].seats.is_empty() {
                true => self.drop_session(id),
                false => self.watch_pidfd(id),
            }
        }
        self.silent_until = Some(Instant::now() + SILENT_LOOKS);
        self.clear_what_left();
        self.offer_adopted();
        tracing::info!(databases = self.databases.len(), sessions = self.sessions.len(), "took over");
    }

    fn adopt_database(&mut self, number: u32, mut piece: Piece) {
        let identity = Identity { device: piece.kept.device, inode: piece.kept.inode };
        let state = match piece.state() {
            Ok(state) => state,
            Err(e) => {
                tracing::error!(database = number, ?identity, "cannot take over: {e}");
                self.keeping.database_gone(number);
                return;
            }
        };
        // Who was the first has not been kept: one of those who are in.
        let founder =
            piece.seats.iter().find_map(|s| self.sessions.get(&s.session)).map_or(0, |s| s.peer.uid);
        let mut db = Database::new(identity, founder, state);
        db.home = piece.home;
        for kept in piece.seats {
            let key = SeatKey { database: number, seat: kept.seat };
            // A seat that was given up, or never reached its client.
            if !db.is_guest() && !db.table().members.has(kept.seat) {
                self.keeping.seat_gone(key);
                continue;
            }
            // Given out again since, and the keeper was not told: somebody's who will come back.
            if !db.is_guest() && db.table().count(kept.seat) != kept.count && !planted("stale-seats-believed")
            {
                continue;
            }
            let mut seat = Seat::of(kept.session, kept.role, kept.library, kept.sqlite_version, kept.count);
            seat.socket_lane = kept.socket_lane;
            match self.sessions.get_mut(&kept.session) {
                Some(session) => drop(session.seats.insert(key)),
                None => seat.session = NOBODY,
            }
            db.seats.insert(key.seat, seat);
        }
        if let Some(wal) = piece.wal {
            db.checkpoints.adopt_wal(wal);
        }
        self.take_charge(number, db);
    }

    /// A database that another broker has looked after.
    pub(super) fn take_charge(&mut self, number: u32, mut db: Database) {
        if !db.is_guest() {
            // Seats that only the segment knows of: a client's that has not come back yet.
            let unknown: Vec<_> = db.table().members.iter().filter(|s| *s != CHECKPOINTER).collect();
            for seat in unknown {
                let count = db.table().count(seat);
                let of_nobody = || Seat::of(NOBODY, Role::ReadWrite, 0, String::new(), count);
                db.seats.entry(seat).or_insert_with(of_nobody);
            }
            db.lane().take_over();
            if let State::Gated { segment, .. } = &db.state {
                segment.control.go_on();
            }
            db.checkpoints.predecessor = true;
        }
        // Whoever waits has told the last broker.
        self.watched.insert(number);
        let waiting: Vec<_> = db.waiting().collect();
        self.next_database = self.next_database.max(number.saturating_add(1));
        self.add_database(number, db);
        for seat in waiting {
            self.look_for_cycle(SeatKey { database: number, seat }, Instant::now());
        }
    }

    /// Checkpoints what the last broker's checkpointer is not at work on any more.
    pub(super) fn offer_adopted(&mut self) {
        let gone = |db: &Database| match &db.state {
            State::Gated { segment, .. } => !supervision::is_held(&segment.control_fd, Office::Checkpointer),
            State::Guest { .. } => true,
        };
        let due = self.databases.iter().filter(|(_, d)| d.checkpoints.predecessor);
        let due: Vec<u32> =
            due.filter(|(_, d)| gone(d) || planted("two-checkpointers")).map(|(n, _)| *n).collect();
        for number in due {
            let Some(db) = self.databases.get_mut(&number) else { continue };
            db.checkpoints.predecessor = false;
            db.lane().remove(CHECKPOINTER);
            self.touched.insert(number);
            let has_wal = db.checkpoints.wal().is_some();
            if let Some(words) = db.checkpoint_words() {
                for word in [&words.duty, &words.brake] {
                    word.store(0, SeqCst);
                }
                if !has_wal {
                    words.wal_sent.store(0, SeqCst);
                }
                db.answer_writers();
            }
            self.offer_checkpoints(number);
            // Of all that was kept nobody may be left.
            self.drop_if_unused(number);
        }
    }
}

impl Seat {
    pub fn of(session: u64, role: Role, library: u64, sqlite_version: String, count: u32) -> Seat {
        Seat {
            session,
            role,
            sqlite_version,
            library,
            since: SystemTime::now(),
            socket_lane: role == Role::ReadOnly,
            heard: Instant::now(),
            request: None,
            count,
        }
    }
}
