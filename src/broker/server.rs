//! The broker's loop: sockets, pidfds, signals and time, one thread.

use super::adopting::{self, TakeoverError};
use super::child::Checkpointer;
use super::closed::RecentlyClosed;
use super::cycles::Cycles;
use super::database::{Database, Identity};
use super::departing::Departure;
use super::forming::Forming;
use super::keeping::Keeping;
use super::limits::Users;
use super::listen::{ListenError, Listener, Lock};
use super::opening::{LOOK_AGAIN, Opening};
use super::options::Options;
use super::receiving::Receivers;
use super::searching::Searching;
use super::session::{Session, Stage};
use super::settling::Asked;
use super::shares::Shares;
use super::waits::WATCH_TICK;
use crate::planted::planted;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How often sessions without a socket, gates and long waits are looked at.
const TICK: Duration = Duration::from_millis(50);

/// How long a connection may take to say who it is.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// Connections accepted, or packets of one session read, in a round of the loop: nobody keeps the others out.
pub(super) const MOST_A_ROUND: usize = 32;

/// So many events are taken at once: the more, the better it is known who waits.
const MOST_EVENTS: usize = 1024;

pub(super) const LISTENER: u64 = 0;
pub(super) const SIGNALS: u64 = 1;
pub(super) const CHECKPOINTER_SOCKET: u64 = 2;
pub(super) const CHECKPOINTER_PIDFD: u64 = 3;
pub(super) const KEEPER_SOCKET: u64 = 4;
pub(super) const SEARCH_SOCKET: u64 = 5;
/// Epoll keys of a session: its socket's is `8 * id`, its pidfd's one more.
pub(super) const KEYS: u64 = 8;
/// And of a receiver, with a number of its own.
pub(super) const RECEIVER: u64 = 2;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    #[error("broker: {0}")]
    Io(#[from] io::Error),
}

impl From<nix::Error> for ServeError {
    fn from(e: nix::Error) -> ServeError {
        ServeError::Io(e.into())
    }
}

pub struct Server {
    pub(super) options: Options,
    pub(super) listener: Listener,
    pub(super) epoll: Epoll,
    pub(super) sessions: BTreeMap<u64, Session>,
    pub(super) databases: BTreeMap<u32, Database>,
    pub(super) forming: Vec<Forming>,
    /// By what they are: a look at all of them would be as long as others have databases.
    pub(super) numbers: BTreeMap<Identity, u32>,
    /// In which something has changed for which somebody may wait.
    pub(super) touched: BTreeSet<u32>,
    /// In which somebody has said that it waits.
    pub(super) watched: BTreeSet<u32>,
    /// Where the next look at those goes on.
    pub(super) watch_from: u32,
    pub(super) last_watch: Instant,
    /// At which the checkpointer is at work.
    pub(super) checkpointing: BTreeSet<u32>,
    /// Whose members may ask for a checkpoint again at the next tick.
    pub(super) paused: BTreeSet<u32>,
    /// How often waiting requests of a database were looked at again.
    pub(super) settled: u64,
    pub(super) shares: Shares,
    /// Sessions that were not served in this round, their user's slice being used up.
    pub(super) passed_over: BTreeSet<u64>,
    /// Sessions that are proven dead, and how they died.
    pub(super) dying: VecDeque<(u64, &'static str)>,
    /// Until then sessions that have fallen silent are looked at often.
    pub(super) silent_until: Option<Instant>,
    /// Lock requests and cancellations that have been read and not yet looked at.
    pub(super) requests: Vec<Asked>,
    /// Sessions whose requests have been put off to another round.
    pub(super) put_off: BTreeSet<u64>,
    /// Requests to open a wal-index that another seat's stands in the way of.
    pub(super) opening: Vec<Opening>,
    pub(super) last_opening: Instant,
    pub(super) cycles: Cycles,
    pub(super) checkpointer: Checkpointer,
    pub(super) closed: RecentlyClosed,
    pub(super) departing: Vec<Departure>,
    pub(super) keeping: Keeping,
    pub(super) searching: Searching,
    pub(super) receivers: Receivers,
    pub(super) next_session: u64,
    pub(super) next_database: u32,
    pub(super) started: Instant,
    pub(super) idle_since: Option<Instant>,
    pub(super) stopping: Option<Instant>,
    /// Everything is left to the keeper.
    pub(super) handing_over: bool,
    pub(super) users: Users,
    last_tick: Instant,
    last_second: Instant,
    /// The listener is not listened to until the next tick.
    pub(super) deaf: bool,
}

/// What whoever has started the broker may want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Clients are served from now on, and everything that the last broker left has been taken back.
    Listening,
    /// No more.
    Stopping,
}

/// Serves until a signal, or until idle for `idle_exit`.
pub fn serve(options: Options, tell: &dyn Fn(Phase)) -> Result<(), ServeError> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGUSR2);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let ready = options.ready;
    let mut server = Server::new(options)?;
    server.epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS))?;
    tracing::info!(socket = %server.listener.path().display(), pid = std::process::id(), "listening");
    if let Some(fd) = ready {
        // SAFETY: the number was given on the command line for exactly this; nothing else in this process has it.
        let ready = unsafe { OwnedFd::from_raw_fd(fd) };
        let _ = nix::unistd::write(&ready, b"+");
    }
    tell(Phase::Listening);
    server.run(&signals, tell)
}

/// Raises the limit of descriptors as far as this process may, and says how many those are.
pub fn raise_descriptor_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

impl Server {
    pub(super) fn new(options: Options) -> Result<Server, ServeError> {
        let patience =
            if options.replace { adopting::replace(&options.socket)? } else { Duration::from_millis(50) };
        let lock = Lock::take(&options.socket, options.everyone, patience)?;
        let mut left = adopting::take_back(&options.socket)?;
        let kept = left.as_mut().and_then(|l| l.listener.take());
        let listener = match (options.activated, kept) {
            // SAFETY: the number was passed to this process for exactly this; nothing else in it has it.
            (Some(fd), _) => Listener::given(lock, unsafe { OwnedFd::from_raw_fd(fd) })?,
            (None, Some(last)) => Listener::take_on(lock, options.everyone, last)?,
            (None, None) => Listener::bind(lock, options.everyone)?,
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener.socket, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let now = Instant::now();
        let closed = RecentlyClosed::new(options.reuse_wal);
        let mut server = Server {
            options,
            listener,
            epoll,
            sessions: BTreeMap::new(),
            databases: BTreeMap::new(),
            forming: Vec::new(),
            numbers: BTreeMap::new(),
            touched: BTreeSet::new(),
            watched: BTreeSet::new(),
            watch_from: 0,
            last_watch: now,
            checkpointing: BTreeSet::new(),
            paused: BTreeSet::new(),
            settled: 0,
            shares: Shares::default(),
            passed_over: BTreeSet::new(),
            dying: VecDeque::new(),
            silent_until: None,
            requests: Vec::new(),
            put_off: BTreeSet::new(),
            opening: Vec::new(),
            last_opening: now,
            cycles: Cycles::default(),
            checkpointer: Checkpointer::default(),
            closed,
            departing: Vec::new(),
            keeping: Keeping::default(),
            searching: Searching::default(),
            receivers: Receivers::default(),
            next_session: 1,
            next_database: adopting::first_number()?,
            started: now,
            idle_since: Some(now),
            stopping: None,
            handing_over: false,
            users: Users::default(),
            last_tick: now,
            last_second: now,
            deaf: false,
        };
        match left {
            Some(left) => server.adopt(left),
            // Killed, and its keeper too.
            None if server.listener.replaced => server.search(now, 1),
            None => {}
        }
        Ok(server)
    }

    fn run(&mut self, signals: &SignalFd, tell: &dyn Fn(Phase)) -> Result<(), ServeError> {
        let mut events = vec![EpollEvent::empty(); MOST_EVENTS];
        let mut told = false;
        loop {
            let timeout = self.timeout(Instant::now());
            self.hear(&mut events, timeout, Some(signals))?;
            let now = Instant::now();
            self.look_after(now);
            if self.stopping.is_some() && !std::mem::replace(&mut told, true) {
                tell(Phase::Stopping);
            }
            if self.may_exit(now) {
                self.let_go_of_all();
                return Ok(());
            }
        }
    }

    /// What has happened outside.
    pub(super) fn hear(
        &mut self,
        events: &mut [EpollEvent],
        timeout: EpollTimeout,
        signals: Option<&SignalFd>,
    ) -> io::Result<()> {
        self.shares.next_round(Instant::now());
        self.passed_over.clear();
        let n = match self.epoll.wait(events, timeout) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        self.dispatch(&events[..n], signals);
        if !self.requests.is_empty() {
            // A lock that was given back before one of these requests was sent is in some socket by now: seen first,
            // or a program that was told of a commit would meet a BUSY out of the past.
            let n = self.epoll.wait(events, EpollTimeout::ZERO).unwrap_or(0);
            self.dispatch(&events[..n], signals);
            self.answer_requests();
        }
        Ok(())
    }

    /// What is due.
    pub(super) fn look_after(&mut self, now: Instant) {
        self.limit_search(now);
        self.watch_checkpointer(now);
        self.try_forming(now);
        self.open_waiting();
        self.watch(now);
        if now.duration_since(self.last_tick) >= TICK {
            self.last_tick = now;
            self.tick(now);
        }
        self.settle_touched();
        self.close_elsewhere();
        self.keeping.watch(&self.epoll);
    }

    pub(super) fn uid_of(&self, session: u64) -> u32 {
        self.sessions.get(&session).map_or(0, |s| s.peer.uid)
    }

    /// A database is there from now on.
    pub(super) fn add_database(&mut self, number: u32, db: Database) {
        self.numbers.insert(db.identity, number);
        self.users.founded(db.founder);
        self.databases.insert(number, db);
    }

    /// It is not any more.
    pub(super) fn take_database(&mut self, number: u32) -> Option<Database> {
        let db = self.databases.remove(&number)?;
        self.numbers.remove(&db.identity);
        self.users.lost(db.founder);
        for set in [&mut self.touched, &mut self.watched, &mut self.checkpointing, &mut self.paused] {
            set.remove(&number);
        }
        Some(db)
    }

    fn timeout(&self, now: Instant) -> EpollTimeout {
        let mut due: Option<Instant> = None;
        let mut at = |t: Instant| due = Some(due.map_or(t, |d| d.min(t)));
        let anybody_waits = !self.watched.is_empty() || !self.cycles.is_empty();
        if anybody_waits {
            at(self.last_watch + WATCH_TICK);
        }
        if !self.opening.is_empty() {
            at(self.last_opening + LOOK_AGAIN);
        }
        if !self.requests.is_empty() || !self.touched.is_empty() || !self.dying.is_empty() {
            at(now);
        }
        if let Some(first) = self.forming.first() {
            at(first.next_try);
        }
        let anybody_silent =
            self.silent_until.is_some_and(|until| now < until || planted("silence-is-watched"));
        let looks = anybody_waits
            || anybody_silent
            || !self.paused.is_empty()
            || self.deaf
            || !self.departing.is_empty();
        if looks || self.stopping.is_some() {
            at(self.last_tick + TICK);
        } else {
            at(self.last_tick + Duration::from_secs(1));
        }
        let limits = [self.searching.limit(), self.next_look(), self.receivers.limit()];
        limits.into_iter().flatten().for_each(&mut at);
        if let (Some(since), Some(limit)) = (self.idle_since, self.options.idle_exit) {
            at(since + limit);
        }
        let left = due.map_or(Duration::from_secs(1), |d| d.saturating_duration_since(now));
        EpollTimeout::from(u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(1000))
    }

    fn tick(&mut self, now: Instant) {
        self.hear_again();
        self.searching.reap();
        self.limit_receivers(now);
        self.limit_departures(now);
        self.keeping.reap();
        if now.duration_since(self.last_second) >= Duration::from_secs(1) {
            self.last_second = now;
            self.users.tick();
            self.start_keeper_again();
        }
        let greeting = |s: &&Session| matches!(s.stage, Stage::Greeting | Stage::Introducing);
        let late = |s: &&Session| now.duration_since(s.since) > GREETING_LIMIT;
        let speechless: Vec<u64> =
            self.sessions.values().filter(greeting).filter(late).map(|s| s.id).collect();
        for id in speechless {
            self.end_session(id, "it does not introduce itself");
        }
        let let_go: Vec<u64> = self.sessions.values().filter(|s| s.let_go()).map(|s| s.id).collect();
        for id in let_go {
            self.dying.push_back((id, "it closed everything"));
        }
        self.clear_what_left();
        self.offer_adopted();
        for number in std::mem::take(&mut self.paused) {
            if let Some(db) = self.databases.get_mut(&number) {
                db.resume_checkpoints();
            }
        }
        self.look_at_gates(now);
    }
}
