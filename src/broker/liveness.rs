//! Is the process behind a session alive? The kernel says.
//!
//! *Dead* is: its pidfd fired; or the byte it locked in its liveness memfd is free and its socket is closed (it
//! exec'ed). A closed socket alone proves nothing, a forked child may hold the other end; a pid alone proves
//! nothing, it may have been reused. Whoever cannot be proven dead keeps its seats.

use crate::planted::planted;
use crate::segment::liveness as byte;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `SO_PEERPIDFD`, asm-generic/socket.h (Linux 6.5).
const SO_PEERPIDFD: i32 = 77;

/// Who connected.
#[derive(Debug)]
pub struct Peer {
    pub uid: u32,
    /// As this pid namespace sees it; 0 when it does not.
    pub pid: i32,
    pub pidfd: Option<OwnedFd>,
}

/// Reads the peer's credentials and its pidfd from the socket.
pub fn peer_of(socket: impl AsFd) -> nix::Result<Peer> {
    let credentials = getsockopt(&socket, PeerCredentials)?;
    let pidfd = match planted("peers-by-number") {
        true => pidfd_of_child(credentials.pid()),
        false => peer_pidfd(&socket),
    };
    Ok(Peer { uid: credentials.uid(), pid: credentials.pid(), pidfd })
}

fn peer_pidfd(socket: impl AsFd) -> Option<OwnedFd> {
    // What kernels before 6.5 say.
    if planted("no-peerpidfd") {
        return None;
    }
    let mut fd: i32 = -1;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel writes one int into `fd`, which is as large as `length` says.
    let rc = unsafe {
        let out = (&raw mut fd).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, out, &mut length)
    };
    // SAFETY: on success `fd` is a new descriptor that belongs to us.
    (rc == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `pidfd_open`, for kernels without `SO_PEERPIDFD`: only for a pid that owns the session's liveness lock, so
/// that it is not somebody who inherited the number.
pub fn pidfd_of_owner(pid: i32, liveness: impl AsFd) -> Option<OwnedFd> {
    if pid <= 0 {
        return None;
    }
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: on success a new descriptor that belongs to us.
    let pidfd = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })?;
    (byte::owner(liveness) == Some(pid)).then_some(pidfd)
}

/// `pidfd_open` of a child of ours that has not been waited for: its number is its own.
pub fn pidfd_of_child(pid: i32) -> Option<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: on success a new descriptor that belongs to us.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A pidfd of a thread here, by its number (`PIDFD_THREAD`, Linux 6.9).
pub fn pidfd_of_thread(thread: u32) -> Option<OwnedFd> {
    // SAFETY: no memory is passed. PIDFD_THREAD is O_EXCL, linux/pidfd.h.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, thread, libc::O_EXCL) };
    // SAFETY: on success a new descriptor that belongs to us.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Signals a peer: by its pidfd where there is one, so that nobody else is met who has inherited the number.
pub fn signal(peer: &Peer, signal: nix::sys::signal::Signal) -> nix::Result<()> {
    let Some(pidfd) = &peer.pidfd else {
        let known = (peer.pid > 0).then(|| nix::unistd::Pid::from_raw(peer.pid));
        return nix::sys::signal::kill(known.ok_or(nix::errno::Errno::ESRCH)?, signal);
    };
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no memory is passed but a null siginfo, which means: as kill(2) would.
    let rc = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, none, 0) };
    nix::errno::Errno::result(rc).map(drop)
}
