//! One socket to the broker, shared by the threads of a session.
//!
//! Many threads may wait for answers at once and no thread is ours: whichever waiter finds the socket free reads
//! it, keeps its own answer and leaves the others' for them.

use super::Lost;
use super::host::{HostFd, LowDescriptors};
use crate::wire::message::{FromBroker, ToBroker};
use crate::wire::socket;
use nix::poll::PollFlags;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a broker may take to answer what it answers at once.
pub(super) const PROMPT: Duration = Duration::from_secs(10);
/// How often a waiting thread looks at its deadline and its interrupt flag.
const SLICE: Duration = Duration::from_millis(10);

/// An answer and the descriptors that came with it.
pub type Answer = (FromBroker, Vec<OwnedFd>);

#[derive(Debug, Default)]
struct Inbox {
    /// Some thread is reading the socket.
    reading: bool,
    answers: HashMap<u64, VecDeque<Answer>>,
}

#[derive(Debug)]
pub struct Link {
    socket: HostFd,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    down: AtomicBool,
}

impl Link {
    pub fn new(socket: OwnedFd) -> io::Result<Link> {
        Ok(Link {
            socket: HostFd::new(socket)?,
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            down: AtomicBool::new(false),
        })
    }

    /// Down for good. Also noticed here: a socket that the broker has closed while nobody was asking.
    pub fn is_down(&self) -> bool {
        if self.was_down() {
            return true;
        }
        let hung_up = match self.socket.get() {
            None => true,
            Some(fd) => {
                let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
                // SAFETY: one pollfd, not waited for.
                let n = unsafe { libc::poll(&mut poll, 1, 0) };
                n > 0 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
            }
        };
        if hung_up {
            self.lose();
        }
        hung_up
    }

    /// It is known to be down.
    pub fn was_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }

    /// Ends it for both sides: the broker must not grant what nobody will hear of.
    pub fn lose(&self) -> Lost {
        self.down.store(true, Ordering::Release);
        if let Some(fd) = self.socket.get() {
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        self.arrived.notify_all();
        Lost
    }

    fn socket(&self) -> Result<BorrowedFd<'_>, Lost> {
        if self.down.load(Ordering::Acquire) {
            return Err(Lost);
        }
        self.socket.get().ok_or_else(|| self.lose())
    }

    /// Sends a message that has no answer, or whose answer is waited for later.
    pub fn send(&self, message: &ToBroker, fds: &[i32]) -> Result<(), Lost> {
        let bytes = socket::encode(message).map_err(|_| self.lose())?;
        socket::send_within(self.socket()?, &bytes, fds, PROMPT).map_err(|_| self.lose())
    }

    /// Sends a request that the broker answers at once.
    pub fn ask(&self, message: &ToBroker, id: u64, fds: &[i32]) -> Result<Answer, Lost> {
        self.send(message, fds)?;
        self.answer_within(id, PROMPT)?.ok_or_else(|| self.lose())
    }

    /// Waits for the answer to `id` until it is there or `give_up` says so, which is asked every few
    /// milliseconds; `None`: gave up.
    pub fn await_answer(&self, id: u64, mut give_up: impl FnMut() -> bool) -> Result<Option<Answer>, Lost> {
        loop {
            if let Some(answer) = self.answer_within(id, SLICE)? {
                return Ok(Some(answer));
            }
            if give_up() {
                return Ok(None);
            }
        }
    }

    /// The answer to `id`, if it comes within `limit`.
    pub fn answer_within(&self, id: u64, limit: Duration) -> Result<Option<Answer>, Lost> {
        let end = Instant::now() + limit;
        let mut inbox = self.lock_inbox();
        loop {
            if let Some(answer) = take(&mut inbox, id) {
                return Ok(Some(answer));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if self.down.load(Ordering::Acquire) {
                return Err(Lost);
            }
            if inbox.reading {
                let waited = self.arrived.wait_timeout(inbox, left);
                inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            inbox.reading = true;
            drop(inbox);
            let received = self.read_one(left);
            inbox = self.lock_inbox();
            inbox.reading = false;
            self.arrived.notify_all();
            if let Some(answer) = received? {
                inbox.answers.entry(answer.0.id()).or_default().push_back(answer);
            }
        }
    }

    fn lock_inbox(&self) -> MutexGuard<'_, Inbox> {
        // Nothing panics while it is held; a poisoned inbox is still a whole inbox.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_one(&self, limit: Duration) -> Result<Option<Answer>, Lost> {
        let socket = self.socket()?;
        match socket::wait(socket, PollFlags::POLLIN, limit) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(_) => return Err(self.lose()),
        }
        let _low = LowDescriptors::occupy().map_err(|_| self.lose())?;
        match socket::receive(self.socket()?) {
            Ok(packet) => {
                let message = packet.decode().map_err(|_| self.lose())?;
                Ok(Some((message, packet.fds)))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => Err(self.lose()),
        }
    }
}

fn take(inbox: &mut Inbox, id: u64) -> Option<Answer> {
    let queue = inbox.answers.get_mut(&id)?;
    let answer = queue.pop_front();
    if queue.is_empty() {
        inbox.answers.remove(&id);
    }
    answer
}
