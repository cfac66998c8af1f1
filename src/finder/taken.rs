//! A descriptor of another process, as this one gets it.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::fstat;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use turnstile::planted::planted;
use turnstile::segment::layout::LIVENESS_SIZE;
use turnstile::segment::names::Name;
use turnstile::segment::{hold, liveness, memfd};

/// As `/proc` says.
pub struct Who {
    /// Effective.
    pub uid: u32,
    pub program: String,
    /// The thread of that number has ended.
    pub ended: bool,
    /// Its first thread has ended, others live: their descriptors are not shown by its number.
    pub headless: bool,
}

pub fn who(pid: i32) -> io::Result<Who> {
    // A name may be any bytes.
    let status = fs::read(format!("/proc/{pid}/status"))?;
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let uid = field("Uid:").and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    let uid = uid.ok_or(io::ErrorKind::InvalidData)?;
    let word = |name: &str| field(name).unwrap_or_default().trim().to_owned();
    let ended = word("State:").starts_with(['Z', 'X']);
    let headless = ended && word("Threads:") != "1" && !planted("headless-is-dead");
    Ok(Who { uid, program: word("Name:"), ended, headless })
}

/// A thread of a headless process that has its descriptors.
pub fn living_thread(pid: i32) -> io::Result<i32> {
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let tid = entry?.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(tid) = tid.filter(|tid| *tid != pid) else { continue };
        if who(tid).is_ok_and(|thread| !thread.ended) {
            return Ok(tid);
        }
    }
    // The last has ended meanwhile.
    Err(io::Error::from_raw_os_error(libc::ESRCH))
}

/// A process that cannot become another one.
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

pub enum Taken {
    /// A sealed memfd.
    Memfd(OwnedFd),
    /// A socket that holds the gate of the segment with this nonce, made by this user.
    Hold(u64, OwnedFd),
    /// Another one.
    Socket,
    /// It may not be had, or has been closed.
    Refused,
    /// Neither: it must not be touched.
    Strange,
}

impl Process {
    pub fn open(pid: i32) -> Option<Process> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        // SAFETY: on success a new descriptor that belongs to us.
        let pidfd = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })?;
        Some(Process { pid, pidfd })
    }

    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// It is a liveness memfd, this process holds its byte, and has not ended.
    pub fn lives_by(&self, memfd: &OwnedFd) -> bool {
        let own = memfd::is_sealed_to(memfd, LIVENESS_SIZE) && liveness::owner(memfd) == Some(self.pid);
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        own && poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    /// A copy of its descriptor with this number, if that still is what it is taken for.
    pub fn take(&self, number: i32) -> Taken {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) };
        let Ok(fd) = Errno::result(fd) else { return Taken::Refused };
        // SAFETY: a new descriptor that belongs to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // Only a memfd, and only a socket, answers these.
        if memfd::is_sealed(&fd) {
            return Taken::Memfd(fd);
        }
        match socket_of(&fd) {
            Some(Some(nonce)) => Taken::Hold(nonce, fd),
            Some(None) => Taken::Socket,
            None => {
                mem::forget(fd);
                Taken::Strange
            }
        }
    }
}

/// `None`: no socket. `Some(None)`: not one that a broker of this user has made.
fn socket_of(fd: &OwnedFd) -> Option<Option<u64>> {
    let stream = option(fd, libc::SO_TYPE)? == libc::SOCK_STREAM;
    let unix = option(fd, libc::SO_DOMAIN)? == libc::AF_UNIX;
    // A peek moves where another one would begin, if somebody has asked for that (socket(7), SO_PEEK_OFF).
    let harmless = stream && unix && option(fd, libc::SO_PEEK_OFF).is_some_and(|offset| offset < 0);
    // Of a pair it is who has made it.
    let ours = || getsockopt(fd, PeerCredentials).is_ok_and(|c| is_own(c.uid()));
    Some((harmless && ours()).then(|| hold::whose(fd)).flatten())
}

fn option(fd: &OwnedFd, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int into `value`, which is as large as `length` says.
    let rc = unsafe {
        let out = (&raw mut value).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, out, &mut length)
    };
    (rc == 0).then_some(value)
}

/// What another user has made may be called as it likes.
fn is_own(uid: u32) -> bool {
    uid == nix::unistd::geteuid().as_raw() || planted("imitations-believed")
}

/// The memfd bears this name, and a broker of this user has made it.
pub fn is_ours(fd: &OwnedFd, name: Name) -> bool {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let named = link.is_ok_and(|l| l.to_str().and_then(Name::of_link) == Some(name));
    named && fstat(fd).is_ok_and(|st| is_own(st.st_uid))
}
