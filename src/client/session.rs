//! One process's session with a broker, shared by all its SQLite connections and threads. It outlives the broker: when
//! the link is down, the next one that has something to say connects again and says which seats are this process's.

use super::Lost;
use super::config::Believed;
use super::fork;
use super::greeting::{self, ConnectError};
use super::host::HostFd;
use super::joining::lock;
use super::link::{Answer, Link, PROMPT};
use super::shared::Shared;
use crate::lock::takeover::Holds;
use crate::wire::keeper::{KeptHome, Token};
use crate::wire::message::{Claim, SeatKey, ToBroker};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Between two tries to connect again, where nobody listens.
const PAUSE: Duration = Duration::from_millis(2);
/// How long a seat of the socket lane waits for the next broker: about as long as it takes to be started.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Session {
    current: Mutex<Current>,
    /// What this process has from the session. Not locked while the current link is asked for.
    pub(super) had: Mutex<Had>,
    /// Locked by this process for life; the kernel frees it at exit and exec.
    pub(super) liveness: HostFd,
    path: PathBuf,
    /// Whose brokers are spoken to, this one and the next ones.
    pub(super) believed: Believed,
    next_id: AtomicU64,
    epoch: u64,
}

/// The link, and what the next broker is told when it is down.
#[derive(Debug)]
pub(super) struct Current {
    pub link: Arc<Link>,
    pub broker_pid: i32,
    /// By which a broker knows the session. More than one while it is not known which of them it has heard of.
    pub tokens: Vec<Token>,
    /// In vain.
    tried: Option<Instant>,
    /// Nobody came within [`PATIENCE`]: not waited for again, until somebody does.
    impatient: bool,
}

/// The seats, and the segments that can be handed back: by the database's number.
#[derive(Debug, Default)]
pub(super) struct Had {
    pub seats: BTreeMap<SeatKey, Claim>,
    pub segments: BTreeMap<u32, (Weak<Shared>, KeptHome)>,
}

impl Session {
    /// Connects and introduces this process, if the broker is of somebody who is believed.
    pub fn open(path: &Path, believed: &Believed) -> Result<Session, ConnectError> {
        let io_error = |e: io::Error| ConnectError::Io(path.to_owned(), e);
        let liveness = greeting::liveness_memfd().map_err(io_error)?;
        let welcome = greeting::greet(path, believed, liveness.as_fd(), PROMPT)?;
        let current = Current {
            link: Arc::new(Link::new(welcome.socket).map_err(io_error)?),
            broker_pid: welcome.broker_pid,
            tokens: vec![welcome.token],
            tried: None,
            impatient: false,
        };
        Ok(Session {
            current: Mutex::new(current),
            had: Mutex::default(),
            liveness: HostFd::new(liveness).map_err(io_error)?,
            path: path.to_owned(),
            believed: believed.clone(),
            next_id: AtomicU64::new(1),
            epoch: fork::epoch(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn broker_pid(&self) -> i32 {
        match self.is_inherited() {
            true => 0,
            false => lock(&self.current).broker_pid,
        }
    }

    pub fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A forked child has a session of its own. (And its copy of a lock may be held by nobody who is there.)
    fn is_inherited(&self) -> bool {
        self.epoch != fork::epoch()
    }

    /// The link: the one that stands, or a new one.
    pub fn link(&self) -> Result<Arc<Link>, Lost> {
        if self.is_inherited() {
            return Err(Lost);
        }
        let mut current = lock(&self.current);
        self.renew(&mut current)?;
        Ok(Arc::clone(&current.link))
    }

    fn renew(&self, current: &mut Current) -> Result<(), Lost> {
        if !current.link.is_down() {
            return Ok(());
        }
        if current.tried.is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(Lost);
        }
        let renewed = self.reconnect(current);
        current.tried = renewed.is_err().then(Instant::now);
        current.impatient &= renewed.is_err();
        renewed
    }

    /// As [`Session::link`], but waits for the next broker, once: a seat that cannot do without one.
    pub fn link_patiently(&self, go_on: impl Fn() -> bool) -> Result<Arc<Link>, Lost> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.link() {
                Ok(link) => return Ok(link),
                Err(Lost) if self.is_inherited() || !go_on() || lock(&self.current).impatient => {
                    return Err(Lost);
                }
                Err(Lost) if Instant::now() >= end => {
                    lock(&self.current).impatient = true;
                    return Err(Lost);
                }
                Err(Lost) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Gone, and nobody is there to go on with.
    pub fn is_lost(&self) -> bool {
        self.link().is_err()
    }

    /// It is known to be down.
    pub fn was_lost(&self) -> bool {
        self.is_inherited() || lock(&self.current).link.was_down()
    }

    /// Sends a message that has no answer.
    pub fn send(&self, message: &ToBroker, fds: &[i32]) -> Result<(), Lost> {
        self.link()?.send(message, fds).or_else(|Lost| self.link()?.send(message, fds))
    }

    /// Sends it only over a link that stands: it tells a broker what the next one finds out by itself.
    pub fn send_if_up(&self, message: &ToBroker) {
        if !self.is_inherited() {
            let link = Arc::clone(&lock(&self.current).link);
            if !link.was_down() {
                let _ = link.send(message, &[]);
            }
        }
    }

    /// Sends a request that the broker answers at once.
    pub fn ask(&self, message: &ToBroker, id: u64, fds: &[i32]) -> Result<Answer, Lost> {
        self.link()?.ask(message, id, fds)
    }

    /// Changes what this process has, if `link` still is the one over which the broker said so: what was said over one
    /// that is down the next broker may have taken back.
    pub(super) fn note<T>(&self, link: &Arc<Link>, change: impl FnOnce(&mut Had) -> T) -> Result<T, Lost> {
        if self.is_inherited() {
            return Err(Lost);
        }
        let current = lock(&self.current);
        match Arc::ptr_eq(&current.link, link) {
            true => Ok(change(&mut lock(&self.had))),
            false => Err(Lost),
        }
    }

    /// Changes what this process has, and returns the link over which the broker is to be told, if it stands. If not,
    /// the next broker is told the new state of things.
    pub(super) fn give<T>(&self, change: impl FnOnce(&mut Had) -> T) -> (T, Option<Arc<Link>>) {
        if self.is_inherited() {
            return (change(&mut Had::default()), None);
        }
        let current = lock(&self.current);
        let link = (!current.link.was_down()).then(|| Arc::clone(&current.link));
        (change(&mut lock(&self.had)), link)
    }

    /// The seat is this process's, as far as is known.
    pub(super) fn has(&self, seat: SeatKey, count: u32) -> bool {
        !self.is_inherited() && lock(&self.had).seats.get(&seat).is_some_and(|c| c.count == count)
    }

    /// Locks of a seat of the socket lane.
    pub(super) fn holds(had: &mut Had, seat: SeatKey, change: impl FnOnce(&mut Holds)) {
        if let Some(holds) = had.seats.get_mut(&seat).and_then(|c| c.holds.as_mut()) {
            change(holds);
        }
    }
}
