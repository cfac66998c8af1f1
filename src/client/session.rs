//! One process's connection to a broker, shared by all its SQLite connections and threads.
//!
//! Many threads may wait for answers at once and no thread is ours: whichever waiter finds the socket free reads
//! it, keeps its own answer and leaves the others' for them.

use super::Lost;
use super::host::{HostFd, LowDescriptors};
use crate::segment::layout::LIVENESS_SIZE;
use crate::segment::memfd;
use crate::wire::message::{
    FromBroker, Hello, HelloAnswer, Introduction, PROTOCOL_MAGIC, PROTOCOL_VERSION, ToBroker,
};
use crate::wire::socket::{self, Packet};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::PollFlags;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a broker may take to answer what it answers at once.
const PROMPT: Duration = Duration::from_secs(10);
/// How often a waiting thread looks at its deadline and its interrupt flag.
const SLICE: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there: a broker may be started.
    #[error("no broker listens on {}", .0.display())]
    Absent(PathBuf),
    #[error("may not connect to {}: {}", .0.display(), .1)]
    Forbidden(PathBuf, io::Error),
    /// Something listens that is not a turnstile broker, or not of this version.
    #[error("{}: {}", .0.display(), .1)]
    Stranger(PathBuf, String),
    #[error("{}: {}", .0.display(), .1)]
    Io(PathBuf, io::Error),
}

/// An answer and the descriptors that came with it.
pub type Answer = (FromBroker, Vec<OwnedFd>);

#[derive(Debug, Default)]
struct Inbox {
    /// Some thread is reading the socket.
    reading: bool,
    answers: HashMap<u64, VecDeque<Answer>>,
}

#[derive(Debug)]
pub struct Session {
    socket: HostFd,
    /// Locked by this process for life; the kernel frees it at exit and exec. Kept, never read.
    _liveness: HostFd,
    path: PathBuf,
    pub broker_pid: i32,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    next_id: AtomicU64,
    lost: AtomicBool,
}

impl Session {
    /// Connects and introduces this process.
    pub fn open(path: &Path) -> Result<Session, ConnectError> {
        let io_error = |e: io::Error| ConnectError::Io(path.to_owned(), e);
        let _low = LowDescriptors::occupy().map_err(io_error)?;
        let socket = connect(path)?;
        let liveness = liveness_memfd().map_err(io_error)?;
        let introduce = socket::encode(&ToBroker::Introduce(introduction())).map_err(io_error)?;
        let hello = Hello { magic: PROTOCOL_MAGIC, version: PROTOCOL_VERSION };
        let hello = socket::encode(&hello).map_err(io_error)?;
        // Both at once: each answer waited for is a tenth of a millisecond of a short process's life.
        // A broker that has no room for this user says so before it is asked, and closes.
        let sent = socket::send_within(&socket, &hello, &[], PROMPT)
            .and_then(|()| socket::send_within(&socket, &introduce, &[liveness.as_raw_fd()], PROMPT));
        greeted(path, &socket)?;
        sent.map_err(|e| unsent(path, e))?;
        let welcome = await_packet(path, &socket)?;
        let FromBroker::Welcome { broker_pid, .. } = welcome.decode().map_err(io_error)? else {
            return Err(ConnectError::Stranger(path.to_owned(), "it did not say welcome".into()));
        };
        Ok(Session {
            socket: HostFd::new(socket).map_err(io_error)?,
            _liveness: HostFd::new(liveness).map_err(io_error)?,
            path: path.to_owned(),
            broker_pid,
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            next_id: AtomicU64::new(1),
            lost: AtomicBool::new(false),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gone for good. Also noticed here: a socket that the broker has closed while nobody was asking.
    pub fn is_lost(&self) -> bool {
        if self.lost.load(Ordering::Acquire) {
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

    /// It is known to be gone.
    pub fn was_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Ends the session for both sides: the broker must not grant what nobody will hear of.
    pub fn lose(&self) -> Lost {
        self.lost.store(true, Ordering::Release);
        if let Some(fd) = self.socket.get() {
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        self.arrived.notify_all();
        Lost
    }

    fn socket(&self) -> Result<BorrowedFd<'_>, Lost> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Lost);
        }
        self.socket.get().ok_or_else(|| self.lose())
    }

    pub fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
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
            if self.lost.load(Ordering::Acquire) {
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

fn connect(path: &Path) -> Result<OwnedFd, ConnectError> {
    use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound, PermissionDenied, WouldBlock};
    let end = Instant::now() + PROMPT;
    loop {
        let error = match socket::connect_to(path) {
            Ok(fd) => return Ok(fd),
            Err(e) => e,
        };
        return Err(match error.kind() {
            NotFound | ConnectionRefused | NotADirectory => ConnectError::Absent(path.to_owned()),
            PermissionDenied => ConnectError::Forbidden(path.to_owned(), error),
            // The broker's backlog is full: it is there, and busy.
            WouldBlock if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            _ if error.raw_os_error() == Some(libc::EPROTOTYPE)
                || error.raw_os_error() == Some(libc::ENOTSOCK) =>
            {
                ConnectError::Stranger(
                    path.to_owned(),
                    "something else than a turnstile broker listens there".into(),
                )
            }
            _ => ConnectError::Io(path.to_owned(), error),
        });
    }
}

fn await_packet(path: &Path, socket: &OwnedFd) -> Result<Packet, ConnectError> {
    let stranger = |what: &str| ConnectError::Stranger(path.to_owned(), what.into());
    let end = Instant::now() + PROMPT;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(stranger("what listens there does not answer as a turnstile broker does"));
        }
        let ready = socket::wait(socket, PollFlags::POLLIN, left);
        if !ready.map_err(|e| ConnectError::Io(path.to_owned(), e))? {
            continue;
        }
        // A peer that closes with something of ours unread is told as an error, once, and before what it said.
        let received = match socket::receive(socket) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => socket::receive(socket),
            other => other,
        };
        return match received {
            Ok(packet) => Ok(packet),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            // A broker that exits while we knock: as if it had not been there.
            Err(e)
                if e.kind() == io::ErrorKind::UnexpectedEof || e.kind() == io::ErrorKind::ConnectionReset =>
            {
                Err(ConnectError::Absent(path.to_owned()))
            }
            Err(e) => Err(ConnectError::Io(path.to_owned(), e)),
        };
    }
}

/// A broker that exits while we knock is as if it had not been there.
fn unsent(path: &Path, e: io::Error) -> ConnectError {
    match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ConnectError::Absent(path.to_owned()),
        _ => ConnectError::Io(path.to_owned(), e),
    }
}

/// The answer to our hello.
fn greeted(path: &Path, socket: &OwnedFd) -> Result<(), ConnectError> {
    let stranger = |what: String| ConnectError::Stranger(path.to_owned(), what);
    let answer: HelloAnswer = await_packet(path, socket)?
        .decode()
        .map_err(|_| stranger("what listens there is not a turnstile broker".into()))?;
    match answer {
        HelloAnswer { magic, .. } if magic != PROTOCOL_MAGIC => {
            Err(stranger("what listens there is not a turnstile broker".into()))
        }
        HelloAnswer { refused: Some(reason), .. } => Err(stranger(reason)),
        HelloAnswer { version, .. } if version != PROTOCOL_VERSION => {
            Err(stranger(format!("the broker speaks protocol {version}, this extension {PROTOCOL_VERSION}")))
        }
        _ => Ok(()),
    }
}

/// A memfd whose first byte this process locks as long as it lives. POSIX locks go at exit and at exec and are
/// not inherited by a child, which is just what is to be known.
fn liveness_memfd() -> io::Result<OwnedFd> {
    let fd = memfd::create(c"turnstile-liveness", LIVENESS_SIZE)?;
    // SAFETY: libc::flock is plain data for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_len = 1;
    fcntl(&fd, FcntlArg::F_SETLK(&lock))?;
    Ok(fd)
}

fn introduction() -> Introduction {
    let program = small_file("/proc/self/comm").unwrap_or_default().trim().to_owned();
    Introduction { program, pid: std::process::id() as i32, container: container_id() }
}

/// The container's id: 64 hexadecimal digits in a cgroup path.
fn container_id() -> Option<String> {
    let cgroup = small_file("/proc/self/cgroup")?;
    let mut words = cgroup.split(|c: char| !c.is_ascii_hexdigit());
    words.find(|w| w.len() == 64).map(|w| w[..12].to_owned())
}

/// A file of /proc in one read: nobody knows its size before, and growing a buffer takes four or five.
fn small_file(path: &str) -> Option<String> {
    let mut buffer = vec![0; 8192];
    let length = std::fs::File::open(path).and_then(|mut f| f.read(&mut buffer)).ok()?;
    buffer.truncate(length);
    String::from_utf8(buffer).ok()
}
