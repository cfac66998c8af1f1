//! Descriptors that other users send. On a filesystem of their own (FUSE) `fstat`, `fcntl` and even `close` may wait for
//! ever, unkillably: so one that may be on such a filesystem is touched by nobody here, and not closed either.

use super::filesystem::mount_of;
use super::server::Server;
use super::session::Stage;
use crate::planted::planted;
use crate::segment::memfd;
use crate::wire::message::{Refusal, ToBroker};
use crate::wire::socket::Packet;
use std::mem;
use std::os::fd::OwnedFd;

/// So many are kept of one user; then it is let in no more.
pub const MOST_ASIDE: usize = 16;

impl Server {
    /// A packet as it came. An error is a broken rule and ends the session.
    pub(super) fn received(&mut self, id: u64, mut packet: Packet) -> Result<(), String> {
        let aside = self.set_aside(id, &mut packet);
        if packet.too_much {
            return Err("protocol: a packet too long, or with too many descriptors".into());
        }
        let Some(reason) = aside else { return self.packet(id, packet) };
        let open = self.sessions.get(&id).is_some_and(|s| s.stage == Stage::Open);
        match packet.decode() {
            Ok(ToBroker::Join { id: request, .. }) if open => {
                self.refuse(id, request, Refusal::UnsafePlace, reason);
                Ok(())
            }
            _ => Err(reason),
        }
    }

    /// Takes what must not be touched out of another user's packet, and says what it was.
    fn set_aside(&mut self, id: u64, packet: &mut Packet) -> Option<String> {
        let peer = &self.sessions.get(&id)?.peer;
        let (uid, pid) = (peer.uid, peer.pid);
        let trusted = uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.options.allow_unsafe;
        if trusted || planted("foreign-descriptors-closed") {
            return None;
        }
        let mut reason = None;
        for fd in mem::take(&mut packet.fds) {
            match unsafe_place(&fd, pid) {
                None => packet.fds.push(fd),
                Some(why) => {
                    mem::forget(fd);
                    self.users.set_aside(uid);
                    reason = Some(why);
                }
            }
        }
        reason
    }
}

/// Why the descriptor must not be touched. What is asked here, the kernel answers by itself.
fn unsafe_place(fd: &OwnedFd, peer_pid: i32) -> Option<String> {
    // Only a memfd answers; no other file is asked anything.
    if memfd::is_sealed(fd) {
        return None;
    }
    match mount_of(fd, peer_pid, &[]) {
        Some(mount) if mount.is_local() => None,
        Some(mount) => Some(mount.reason()),
        None => Some("the broker cannot tell which filesystem it is on".into()),
    }
}
