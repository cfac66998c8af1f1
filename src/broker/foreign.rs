//! Descriptors that other users send. On a filesystem of their own (FUSE) `fstat`, `fcntl` and even `close` may wait for
//! ever, unkillably. So they are received and judged in processes of their own ([`super::receiving`]), and what may be on
//! such a filesystem stays there.

use super::filesystem::mount_of;
use super::join::Refused;
use super::server::Server;
use super::session::Stage;
use crate::planted::planted;
use crate::segment::memfd;
use crate::wire::message::{Refusal, ToBroker};
use crate::wire::receiver::Judged;
use crate::wire::socket::Packet;
use nix::sys::socket::{UnixAddr, getsockname, getsockopt, sockopt::SockType};
use std::cell::RefCell;
use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};

/// What a receiver says of a join.
pub type JudgedJoin = Result<Judged, Refused>;

/// So many are taken of one user; then it is let in no more.
pub const MOST_ASIDE: usize = 16;

thread_local! {
    /// What was dropped and not closed, of a broker, which has one thread.
    static DROPPED: RefCell<Vec<(u32, OwnedFd)>> = const { RefCell::new(Vec::new()) };
}

/// Another descriptor of something that a user has sent. While it is there, no other descriptor is the last one to be closed.
/// When it is dropped it is closed elsewhere ([`Server::close`]).
#[derive(Debug)]
pub struct Second {
    uid: u32,
    fd: ManuallyDrop<OwnedFd>,
}

impl Second {
    pub fn of(uid: u32, fd: &OwnedFd) -> Option<Second> {
        Some(Second { uid, fd: ManuallyDrop::new(fd.try_clone().ok()?) })
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // SAFETY: it is dropped once, and not looked at any more.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        DROPPED.with_borrow_mut(|dropped| dropped.push((self.uid, fd)));
    }
}

pub(super) fn dropped() -> Vec<(u32, OwnedFd)> {
    DROPPED.take()
}

impl Server {
    /// Of root and of the broker's own user everything is taken as it comes.
    pub(super) fn is_trusted(&self, uid: u32) -> bool {
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.options.allow_unsafe
    }

    /// The session's packets are not to be received here if they have descriptors.
    pub(super) fn is_foreign(&self, id: u64) -> bool {
        let uid = self.sessions.get(&id).map_or(0, |s| s.peer.uid);
        !self.is_trusted(uid) && !planted("foreign-descriptors-closed")
    }

    /// A packet, and why some of its descriptors have been left out. An error is a broken rule and ends the session.
    pub(super) fn received(
        &mut self,
        id: u64,
        packet: Packet,
        left_out: Option<String>,
        judged: Option<JudgedJoin>,
    ) -> Result<(), String> {
        if packet.too_much {
            return Err("protocol: a packet too long, or with too many descriptors".into());
        }
        let Some(reason) = left_out else { return self.packet(id, packet, judged) };
        let open = self.sessions.get(&id).is_some_and(|s| s.stage == Stage::Open);
        match packet.decode() {
            Ok(ToBroker::Join { id: request, .. }) if open => {
                self.refuse(id, request, Refusal::UnsafePlace, reason);
                Ok(())
            }
            _ => Err(reason),
        }
    }
}

/// Why a descriptor of another user's must not be touched. What is asked here, the kernel answers by itself.
pub fn unsafe_place(fd: &OwnedFd, peer_pid: i32) -> Option<String> {
    // Only a memfd answers the first and only a socket the second; no other file is asked anything.
    if memfd::is_sealed(fd) || is_unix_socket(fd) {
        return None;
    }
    match mount_of(fd, peer_pid, &[]) {
        // Another filesystem may lie below it, and its own user may have put it there.
        Some(mount) if mount.is_stacked() && !mount.own && !is_of_our_user_namespace(peer_pid) => {
            Some(format!(
                "it is on a filesystem ({}) that was mounted in a user namespace, over others that may never answer",
                mount.kind
            ))
        }
        Some(mount) if mount.is_local() => None,
        Some(mount) => Some(mount.reason()),
        None => Some("the broker cannot tell which filesystem it is on".into()),
    }
}

/// Other sockets may be closed slowly (socket(7), SO_LINGER).
fn is_unix_socket(fd: &OwnedFd) -> bool {
    !planted("sockets-are-strange")
        && getsockopt(fd, SockType).is_ok()
        && getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok()
}

/// In another one its process might have been allowed to mount what it likes.
fn is_of_our_user_namespace(pid: i32) -> bool {
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/user")).ok();
    let same = pid > 0 && of("self").is_some_and(|own| of(&pid.to_string()) == Some(own));
    same || planted("stacked-is-local")
}
