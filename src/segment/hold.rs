//! How members hold the gate: a socket in whose queue the kernel keeps the gate's description.
//!
//! A process that closes any descriptor of a file loses its POSIX locks on that file (fcntl(2)). A member with a
//! descriptor of the gate's could let it go only while the gate stands, for afterwards a plain connection of the same
//! process may have locked the file. A descriptor in a queue is in no process's table (unix(7), `SCM_RIGHTS`): the
//! description, and so the gate, lives as long as anybody has the socket, and letting go of that harms nobody.
//!
//! The other end is the broker's and its keeper's. Members see by it that both are gone, and ring there when no broker is
//! left to hear that they leave.

use crate::planted::planted;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The broker's: the socket that members get, and the other end, by which they see that somebody sees to the gate.
#[derive(Debug)]
pub struct Hold {
    socket: OwnedFd,
    broker: OwnedFd,
}

impl Hold {
    /// One descriptor under way for each gate: the kernel counts them against `RLIMIT_NOFILE` of this user. `nonce`: of
    /// the segment that the gate is for.
    pub fn new(gate: impl AsFd, nonce: u64) -> nix::Result<Hold> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Of a stream socket, unlike of a datagram one, it is seen that the other end is gone.
        let (socket, broker) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
        let rights = [gate.as_fd().as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        // What members send there would be closed by whoever reads it. (Linux 6.16; see [`Hold::has_rung`] for others.)
        let never: libc::c_int = 0;
        // SAFETY: the kernel reads one int.
        let _ = unsafe {
            let value = (&raw const never).cast();
            let length = size_of_val(&never) as libc::socklen_t;
            match planted("descriptors-ring") || planted("no-passrights") {
                false => libc::setsockopt(broker.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, value, length),
                true => 0,
            }
        };
        let bytes = [MARK, &nonce.to_ne_bytes()].concat();
        sendmsg::<()>(broker.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(Hold { socket, broker })
    }

    /// As another process has made it.
    pub fn of(socket: OwnedFd, broker: OwnedFd) -> Hold {
        Hold { socket, broker }
    }

    pub fn descriptor(&self) -> &OwnedFd {
        &self.socket
    }

    /// The end that members do not have.
    pub fn broker_end(&self) -> &OwnedFd {
        &self.broker
    }
}

/// A member has rung at this end, the broker's, since it was last asked. Descriptors that it has sent stay where they are, and
/// whatever comes behind them: it is asked again then.
pub fn has_rung(broker: impl AsFd) -> bool {
    /// Nobody has so much to say.
    const MOST: usize = 64;
    let broker = broker.as_fd();
    let mut rung = false;
    for _ in 0..MOST {
        if is_laden(broker) && !planted("descriptors-ring") {
            return rung;
        }
        // One byte: with the first byte of what they came with descriptors are received, and closed.
        if !nix::sys::socket::recv(broker.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT).is_ok_and(|n| n > 0)
        {
            return rung;
        }
        rung = true;
    }
    rung
}

/// Somebody has sent descriptors to this end, the broker's: nothing behind them will be heard.
pub fn is_deaf(broker: impl AsFd) -> bool {
    is_laden(broker)
}

/// What comes next has descriptors. They are not received.
fn is_laden(socket: impl AsFd) -> bool {
    let mut byte = [0u8];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    // Without room for them the kernel says that there are some, and installs none.
    let peeked = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut iov, None, flags);
    peeked.is_ok_and(|message| message.flags.contains(MsgFlags::MSG_CTRUNC))
}

/// `SO_PASSRIGHTS`, asm-generic/socket.h.
const SO_PASSRIGHTS: libc::c_int = 83;

/// What goes with the gate, before the nonce.
const MARK: &[u8] = b"turnstile-gate";

/// The nonce of the segment whose gate is in this queue; `None`: there is none. Nothing is taken out, nor received.
pub fn whose(socket: impl AsFd) -> Option<u64> {
    let mut bytes = [0u8; MARK.len() + size_of::<u64>()];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let length = nix::sys::socket::recv(socket.as_fd().as_raw_fd(), &mut bytes, flags).ok()?;
    let nonce = bytes.strip_prefix(MARK).filter(|_| length == bytes.len())?;
    Some(u64::from_ne_bytes(nonce.try_into().ok()?))
}

/// A member leaves, and no broker is there to be told: whoever has the other end looks whether anybody is left.
pub fn ring(socket: impl AsFd) {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    // No room: it has been rung often enough.
    let _ = nix::sys::socket::send(socket.as_fd().as_raw_fd(), b"r", flags);
}

/// The broker and its keeper have ended.
pub fn broker_is_gone(socket: impl AsFd) -> bool {
    is_let_go_within(socket, PollTimeout::ZERO)
}

/// The other end is nobody's any more, or becomes so within `limit`.
pub fn is_let_go_within(socket: impl AsFd, limit: PollTimeout) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
    poll(&mut fds, limit).is_ok_and(|n| n > 0) && fds[0].revents().is_some_and(|seen| seen.intersects(ended))
}

/// The gate's description as a descriptor, which is in no queue any more; `None`: somebody else has taken it out.
pub fn take_out(socket: impl AsFd) -> Option<OwnedFd> {
    receive(socket, MsgFlags::empty())
}

/// Another descriptor of the gate's description, which stays where it is.
pub fn copy(socket: impl AsFd) -> Option<OwnedFd> {
    receive(socket, MsgFlags::MSG_PEEK)
}

fn receive(socket: impl AsFd, how: MsgFlags) -> Option<OwnedFd> {
    /// `SCM_MAX_FD`, net/scm.h. A client may have filled the queue itself: whatever comes is closed.
    const MOST_FDS: usize = 253;
    let mut byte = [0u8; 1];
    let mut control = nix::cmsg_space!([RawFd; MOST_FDS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT | how;
    loop {
        let mut iov = [IoSliceMut::new(&mut byte)];
        match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            Err(_) => return None,
            Ok(message) => {
                let mut received = Vec::new();
                for one in message.cmsgs().ok()? {
                    if let ControlMessageOwned::ScmRights(fds) = one {
                        // SAFETY: just installed by the kernel for us; nobody else owns them.
                        received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                return received.into_iter().next();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::gate;
    use nix::sys::stat::fstat;
    use std::fs::OpenOptions;

    fn file() -> (tempfile::NamedTempFile, OwnedFd) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = OpenOptions::new().read(true).write(true).open(file.path()).unwrap().into();
        (file, fd)
    }

    #[test]
    fn the_gate_stands_as_long_as_somebody_has_the_socket() {
        let (file, fd) = file();
        let gate = gate::close(fd, None, 7).map_err(|(e, ..)| e).unwrap();
        let member = gate.hold().descriptor().try_clone().unwrap();
        assert!(!broker_is_gone(&member));
        assert_eq!(whose(&member), Some(7));
        drop(gate); // killed: nothing is unlocked
        assert!(broker_is_gone(&member));
        let other = file.reopen().unwrap();
        assert!(gate::stands(&other));
        let copy = copy(&member).unwrap();
        assert_eq!(fstat(&copy).unwrap().st_ino, fstat(&other).unwrap().st_ino);
        drop(copy);
        assert!(gate::stands(&other));
        drop(member);
        assert!(!gate::stands(&other));
    }

    #[test]
    fn what_is_taken_out_is_the_gate() {
        let (file, fd) = file();
        let gate = gate::close(fd, None, 7).map_err(|(e, ..)| e).unwrap();
        let member = gate.hold().descriptor().try_clone().unwrap();
        drop(gate);
        let taken = take_out(&member).unwrap();
        assert!(take_out(&member).is_none());
        assert!(gate::is_held_by(&taken));
        drop(taken);
        assert!(!gate::stands(file.reopen().unwrap()));
    }

    #[test]
    fn a_member_that_rings_is_heard_once() {
        let (_file, fd) = file();
        let gate = gate::close(fd, None, 7).map_err(|(e, ..)| e).unwrap();
        let member = gate.hold().descriptor().try_clone().unwrap();
        let rung = || has_rung(gate.hold().broker_end());
        assert!(!rung());
        ring(&member);
        ring(&member);
        assert!(rung() && !rung());
        assert!(copy(&member).is_some());
    }

    #[test]
    fn an_opened_gate_is_held_by_nobody() {
        let (file, fd) = file();
        let gate = gate::close(fd, None, 7).map_err(|(e, ..)| e).unwrap();
        let member = gate.hold().descriptor().try_clone().unwrap();
        gate.open();
        assert!(!gate::stands(file.reopen().unwrap()));
        assert!(take_out(&member).is_none());
    }
}
