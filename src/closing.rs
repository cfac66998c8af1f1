//! Descriptors that may be slow to close, or never be closed: they are given to a process that may be thrown away.
//!
//! Who closes a file last waits for its filesystem, and who closes a socket last closes what lies in its queue (unix(7),
//! `SCM_RIGHTS`). A descriptor that is under way to another process is held by the kernel. So whoever has given it away may
//! close its own, or end, and waits for nobody.

use crate::wire::receiver::{FromReceiver, ToReceiver};
use crate::wire::socket;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that does not answer for so long is thrown away.
pub const LIMIT: Duration = Duration::from_secs(2);
/// It ends when it has had nothing to do for so long.
pub const IDLE: Duration = Duration::from_secs(10);
/// So many may be on their way out. Then the last one's queue is all that there is.
pub const MOST_LEAVING: usize = 4;

/// Fewer than `SCM_MAX_FD`, net/scm.h.
const MOST_AT_ONCE: usize = 200;

/// Starts `turnstile receiver`, and returns it with our end of its socket.
pub fn start(program: &Path) -> io::Result<(Child, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut command = Command::new(program);
    command.arg("receiver").stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    Ok((command.spawn()?, ours))
}

/// Gives some of them away, or none.
pub fn give(receiver: &OwnedFd, fds: &mut Vec<OwnedFd>) -> bool {
    let few = fds.len() - fds.len().min(MOST_AT_ONCE);
    let raw: Vec<_> = fds[few..].iter().map(|fd| fd.as_raw_fd()).collect();
    let sent = socket::encode(&ToReceiver::Close).and_then(|bytes| socket::send(receiver, &bytes, &raw));
    if sent.is_ok() {
        fds.truncate(few);
    }
    sent.is_ok()
}

/// A broker's or a keeper's own, for what is not one user's.
#[derive(Debug)]
pub struct Closing {
    program: PathBuf,
    running: Option<Running>,
    leaving: Vec<Child>,
    /// Nobody could be given them yet. They are not closed here.
    waiting: mem::ManuallyDrop<Vec<OwnedFd>>,
    /// Messages that have gone to processes, and those that need not be waited for any more.
    given: u64,
    done: u64,
}

#[derive(Debug)]
struct Running {
    child: Child,
    socket: OwnedFd,
    unanswered: u64,
    /// When it was last given something or answered.
    since: Instant,
}

impl Closing {
    pub fn new(program: PathBuf) -> Closing {
        Closing {
            program,
            running: None,
            leaving: Vec::new(),
            waiting: mem::ManuallyDrop::default(),
            given: 0,
            done: 0,
        }
    }

    pub fn close(&mut self, fd: OwnedFd) {
        self.waiting.push(fd);
    }

    /// A Unix socket, which is mostly empty.
    pub fn close_socket(&mut self, socket: OwnedFd) {
        if let Err(laden) = socket::close_unless_laden(socket) {
            self.close(laden);
        }
    }

    /// Of all that is to be closed by now: see [`Closing::has_closed`].
    pub fn mark(&mut self) -> u64 {
        self.go_on();
        self.given + u64::from(!self.waiting.is_empty())
    }

    /// All that was to be closed when the mark was made is closed, or has taken too long.
    pub fn has_closed(&self, mark: u64) -> bool {
        self.done >= mark
    }

    /// Something is to be read there when something has been closed.
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.running.as_ref().map(|r| &r.socket)
    }

    /// There is something that this has to be called again for.
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || self.running.is_some() || !self.leaving.is_empty()
    }

    /// Gives away what can be given away, and throws away a process that does not answer.
    pub fn go_on(&mut self) {
        self.leaving.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        self.hear();
        let stuck = |r: &Running| r.unanswered != 0 && r.since.elapsed() >= LIMIT;
        let idle = |r: &Running| r.unanswered == 0 && r.since.elapsed() >= IDLE;
        if self.leaving.len() < MOST_LEAVING
            && let Some(mut running) = self.running.take_if(|r| stuck(r) || idle(r))
        {
            let _ = running.child.kill();
            self.done += running.unanswered;
            self.leaving.push(running.child);
        }
        while !self.waiting.is_empty() && self.give() {}
    }

    fn give(&mut self) -> bool {
        if self.running.is_none() {
            let Ok((child, socket)) = start(&self.program) else { return false };
            self.running = Some(Running { child, socket, unanswered: 0, since: Instant::now() });
        }
        let Some(running) = &mut self.running else { return false };
        if !give(&running.socket, &mut self.waiting) {
            return false;
        }
        if running.unanswered == 0 {
            running.since = Instant::now();
        }
        running.unanswered += 1;
        self.given += 1;
        true
    }

    fn hear(&mut self) {
        while let Some(running) = &mut self.running {
            match socket::receive(&running.socket).and_then(|p| p.decode::<FromReceiver>()) {
                Ok(_) => {
                    running.unanswered = running.unanswered.saturating_sub(1);
                    self.done += 1;
                    running.since = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    let Some(running) = self.running.take() else { return };
                    self.done += running.unanswered;
                    self.leaving.push(running.child);
                }
            }
        }
    }
}
