//! The keeper: a child process that outlives the broker, and holds what the next one needs.
//!
//! It is told of each change before the client is, by messages that nobody waits for. So what a client knows the keeper
//! has been sent; and what the keeper knows and no client does is found out when the client comes back.

use super::database::{Database, Home, Seat, State};
use super::listen::Listener;
use super::outbox::Outbox;
use super::server::{KEEPER_SOCKET, Server};
use super::session::Session;
use crate::planted::planted;
use crate::wire::keeper::{FromKeeper, Kept, KeptDatabase, KeptHome, KeptSeat, KeptSession, ToKeeper};
use crate::wire::message::SeatKey;
use crate::wire::socket;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::SndBuf};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A keeper that ends so many times within [`DEATHS_WITHIN`] is not started again.
const DEATHS: usize = 4;
const DEATHS_WITHIN: Duration = Duration::from_secs(60);
/// For a few thousand changes that it has not read yet.
const ROOM: usize = 1 << 20;

/// The broker's end.
#[derive(Debug, Default)]
pub struct Keeping {
    socket: Option<OwnedFd>,
    outbox: Outbox,
    /// None: it is an older broker's child.
    child: Option<Child>,
    /// Processes that are about to end.
    leaving: Vec<Child>,
    pid: i32,
    deaths: Vec<Instant>,
    given_up: bool,
    /// It could not be started: out of descriptors, say. It is tried again.
    failed: bool,
    /// How many changes it has been told of.
    told: u64,
    /// How many answers it has been asked for.
    asked: u64,
    /// Something could not be sent to it, or not received by it.
    behind: Behind,
}

/// What the keeper has not been told, it will not know: it is told everything again, later and later as long as that is in
/// vain.
#[derive(Debug, Default)]
struct Behind {
    since: Option<Instant>,
    /// How often it has been told in vain.
    vain: u32,
}

impl Behind {
    const MOST_VAIN: u32 = 5;

    fn falls_behind(&mut self) {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.vain = (self.vain + 1).min(Behind::MOST_VAIN);
        }
    }

    fn is(&self) -> bool {
        self.since.is_some() && !planted("told-once")
    }

    fn is_due(&self, now: Instant) -> bool {
        let pause = Duration::from_millis(500) * 2u32.pow(self.vain);
        self.is() && self.since.is_some_and(|since| now.saturating_duration_since(since) >= pause)
    }
}

/// Where the next broker will knock.
pub fn keeper_path(broker: &Path) -> PathBuf {
    let mut name = broker.as_os_str().to_owned();
    name.push(".keeper");
    name.into()
}

impl Keeping {
    /// Processes that have ended are no zombies.
    pub fn reap(&mut self) {
        self.leaving.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    pub fn is_running(&self) -> bool {
        self.socket.is_some()
    }

    /// The keeper of the broker before, which has given everything back.
    pub fn taken_over(socket: OwnedFd, pid: i32) -> Keeping {
        let _ = setsockopt(&socket, SndBuf, &ROOM);
        Keeping { socket: Some(socket), pid, ..Keeping::default() }
    }

    /// An error: it will not hear of it. (Its end is seen at its socket.)
    fn tell(&mut self, message: &ToKeeper, fds: &[&OwnedFd]) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let bytes = socket::encode(message)?;
        self.outbox.send(socket, bytes, fds, usize::MAX)
    }

    fn keep(&mut self, kept: Kept, fds: &[&OwnedFd]) {
        self.told += 1;
        let left_out = planted("keeper-told-nothing") || planted("keeper-falls-behind") && self.told > 7;
        if !left_out && let Err(e) = self.tell(&ToKeeper::Keep(kept), fds) {
            self.falls_behind(&e.to_string());
        }
    }

    fn falls_behind(&mut self, why: &str) {
        if !self.behind.is() {
            tracing::warn!("the keeper is to be told everything again: {why}");
        }
        self.behind.falls_behind();
    }

    /// There may be more to send than the keeper has room for.
    pub fn watch(&self, epoll: &Epoll) {
        if let Some(socket) = &self.socket {
            let out = if self.outbox.is_empty() { EpollFlags::empty() } else { EpollFlags::EPOLLOUT };
            let _ = epoll.modify(socket, &mut EpollEvent::new(EpollFlags::EPOLLIN | out, KEEPER_SOCKET));
        }
    }

    /// Everything has been sent, or could not be within `limit`.
    pub fn flush_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let Some(socket) = &self.socket else { return false };
            match self.outbox.flush(socket) {
                Ok(true) => return true,
                Ok(false) if Instant::now() < end => {
                    let _ = socket::wait(socket, PollFlags::POLLOUT, Duration::from_millis(20));
                }
                // Too many descriptors under way, say.
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => return false,
            }
        }
    }

    /// A session that gets a seat.
    pub fn session(&mut self, session: &mut Session) {
        let (Some(pidfd), Some(liveness)) = (&session.peer.pidfd, session.liveness()) else { return };
        if self.socket.is_none() || session.kept {
            return;
        }
        let kept = KeptSession {
            session: session.id,
            token: session.token,
            uid: session.peer.uid,
            pid: session.peer.pid,
            who: session.who.clone(),
        };
        self.keep(Kept::Session(kept), &[pidfd, liveness]);
        session.kept = true; // in vain, all is told again
    }

    pub fn session_gone(&mut self, session: &Session) {
        if session.kept {
            self.keep(Kept::SessionGone(session.id), &[]);
        }
    }

    pub fn database(&mut self, number: u32, db: &Database) {
        let mut kept = KeptDatabase {
            database: number,
            device: db.identity.device,
            inode: db.identity.inode,
            guest: None,
            nonce: 0,
            shm: false,
        };
        match &db.state {
            State::Guest { reason, .. } => {
                kept.guest = Some(reason.clone());
                self.keep(Kept::Database(kept), &[]);
            }
            State::Gated { gate, segment } => {
                kept.nonce = segment.nonce;
                kept.shm = gate.shm().is_some();
                let mut fds = vec![&segment.control_fd, &segment.wal_index_fd, gate.database()];
                fds.extend(gate.shm());
                self.keep(Kept::Database(kept), &fds);
                self.keep(Kept::Hold(number), &[gate.hold().descriptor(), gate.hold().broker_end()]);
            }
        }
        if let Some(home) = &db.home {
            self.home(number, home);
        }
        if let Some(wal) = db.checkpoints.wal() {
            self.wal(number, wal);
        }
        for (id, seat) in &db.seats {
            self.seat(SeatKey { database: number, seat: *id }, seat);
        }
    }

    pub fn home(&mut self, number: u32, home: &Home) {
        let Home { directory, name } = home;
        let home = KeptHome { device: directory.device, inode: directory.inode, name: name.clone() };
        self.keep(Kept::Home(number, home), &[]);
    }

    pub fn wal(&mut self, number: u32, wal: &OwnedFd) {
        self.keep(Kept::Wal(number), &[wal]);
    }

    /// Asks it to say when it has done all that it was told. The number of its answer; `None`: there is no keeper.
    pub fn ask(&mut self) -> Option<u64> {
        self.asked += 1;
        let asked = self.tell(&ToKeeper::Ask(self.asked), &[]);
        self.socket.as_ref().filter(|_| asked.is_ok()).map(|_| self.asked)
    }

    pub fn database_gone(&mut self, number: u32) {
        self.keep(Kept::DatabaseGone(number), &[]);
    }

    pub fn seat(&mut self, key: SeatKey, seat: &Seat) {
        let kept = KeptSeat {
            database: key.database,
            seat: key.seat,
            session: seat.session,
            role: seat.role,
            library: seat.library,
            sqlite_version: seat.sqlite_version.clone(),
            socket_lane: seat.socket_lane,
            count: seat.count,
        };
        self.keep(Kept::Seat(kept), &[]);
    }

    /// Whoever knocks from now on is the next broker's.
    pub fn listener(&mut self, listener: &Listener) {
        // The service manager's waits for the next broker by itself.
        if !listener.is_given()
            && let Some(place) = listener.leads_to()
            && !planted("listener-not-handed-over")
        {
            self.keep(Kept::Listener(place), &[&listener.socket]);
        }
    }

    pub fn seat_gone(&mut self, key: SeatKey) {
        self.keep(Kept::SeatGone(key), &[]);
    }

    /// The broker's socket is the service manager's.
    pub fn leave_socket(&mut self) {
        if let Err(e) = self.tell(&ToKeeper::LeaveSocket, &[]) {
            self.falls_behind(&e.to_string());
        }
    }

    fn start(&mut self, program: &Path, broker: &Path, epoll: &Epoll) -> io::Result<()> {
        let listener = super::listen::listen_at(&keeper_path(broker), false)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let _ = setsockopt(&ours, SndBuf, &ROOM);
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        // It outlives us: whoever waits for the end of our output must not wait for its.
        let mut command = Command::new(program);
        command.arg("keeper").stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let mut child = command.spawn()?;
        let listen = ToKeeper::Listen { broker: std::path::absolute(broker)? };
        // It ends by itself when its broker's end is closed. Nobody could knock at one that has no listener.
        socket::send(&ours, &socket::encode(&listen)?, &[listener.as_raw_fd()]).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        epoll.add(&ours, EpollEvent::new(EpollFlags::EPOLLIN, KEEPER_SOCKET))?;
        tracing::info!(pid = child.id(), "keeper started");
        self.pid = child.id() as i32;
        (self.socket, self.child, self.outbox) = (Some(ours), Some(child), Outbox::default());
        self.behind = Behind::default();
        Ok(())
    }

    /// Its pid, for `status`.
    pub fn pid(&self) -> Option<i32> {
        self.socket.as_ref().map(|_| self.pid)
    }
}

impl Server {
    /// There is something to keep.
    pub(super) fn start_keeper(&mut self) {
        let Some(program) = self.options.keeper.clone() else { return };
        if self.keeping.is_running() || self.keeping.given_up || self.stopping.is_some() {
            return;
        }
        if let Err(e) = self.keeping.start(&program, &self.options.socket, &self.epoll) {
            if !self.keeping.failed {
                tracing::error!(
                    "no keeper: {e}; if the broker is killed meanwhile, members must end before it can serve them again"
                );
            }
            self.keeping.failed = true;
            return;
        }
        self.keeping.failed = false;
        self.tell_keeper();
    }

    /// Everything. What it knows already it replaces; what fails on the way makes it fall behind.
    fn tell_keeper(&mut self) {
        if self.listener.is_given() {
            self.keeping.leave_socket();
        }
        self.sessions.values_mut().for_each(|session| session.kept = false);
        for session in self.sessions.values_mut().filter(|s| !s.seats.is_empty()) {
            self.keeping.session(session);
            if self.keeping.behind.is() {
                return;
            }
        }
        for (number, db) in &self.databases {
            self.keeping.database(*number, db);
            if self.keeping.behind.is() {
                return;
            }
        }
    }

    /// Once a second: what could not be had then may be there now.
    pub(super) fn start_keeper_again(&mut self) {
        if self.keeping.failed && !planted("keeper-not-tried-again") {
            self.start_keeper();
        }
        self.tell_keeper_again(Instant::now(), false);
    }

    /// If it has fallen behind and it is time, or must be `at_once`.
    pub(super) fn tell_keeper_again(&mut self, now: Instant, at_once: bool) {
        let behind = &mut self.keeping.behind;
        if behind.is_due(now) || at_once && behind.is() {
            behind.since = None;
            self.tell_keeper();
        } else if !behind.is() {
            behind.vain = behind.vain.saturating_sub(1);
        }
    }

    /// An answer, room to write, or its end.
    pub(super) fn keeper_event(&mut self, flags: EpollFlags) {
        while let Some(Ok(packet)) = self.keeping.socket.as_ref().map(socket::receive) {
            match packet.decode() {
                Ok(FromKeeper::Done(number)) => self.keeper_answers(Some(number)),
                Ok(FromKeeper::Lost) => self.keeping.falls_behind("it is out of descriptors"),
                _ => {}
            }
        }
        if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP) {
            return self.keeper_ended();
        }
        if flags.contains(EpollFlags::EPOLLOUT)
            && let Some(socket) = &self.keeping.socket
            && let Err(e) = self.keeping.outbox.flush(socket)
        {
            self.keeping.outbox.lose_first();
            self.keeping.falls_behind(&e.to_string());
        }
    }

    fn keeper_ended(&mut self) {
        if let Some(socket) = self.keeping.socket.take() {
            let _ = self.epoll.delete(&socket);
        }
        if let Some(mut child) = self.keeping.child.take() {
            // It has closed its socket, so it has ended or is about to. What it had may keep it.
            let _ = child.kill();
            self.keeping.leaving.push(child);
            if planted("keeper-waited-for") {
                self.keeping.leaving.iter_mut().for_each(|child| drop(child.wait()));
            }
        }
        self.keeper_answers(None);
        let now = Instant::now();
        self.keeping.deaths.retain(|at| now.duration_since(*at) < DEATHS_WITHIN);
        self.keeping.deaths.push(now);
        if self.keeping.deaths.len() >= DEATHS {
            tracing::error!("the keeper ended {DEATHS} times within a minute: none is started any more");
            self.keeping.given_up = true;
        } else if self.stopping.is_none() {
            tracing::warn!("the keeper ended: another one is started");
            self.start_keeper();
        }
    }
}
