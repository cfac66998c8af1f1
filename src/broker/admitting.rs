//! Who gets in: connections are accepted as long as their user has room.

use super::limits::too_many;
use super::liveness;
use super::server::{KEYS, LISTENER, MOST_A_ROUND, Server};
use super::session::Session;
use crate::planted::planted;
use crate::wire::message::{HelloAnswer, PROTOCOL_MAGIC, PROTOCOL_VERSION};
use crate::wire::socket;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::io;
use std::os::fd::OwnedFd;

impl Server {
    pub(super) fn accept(&mut self) {
        for _ in 0..MOST_A_ROUND {
            let socket = match socket::accept(&self.listener.socket) {
                Ok(socket) => socket,
                Err(Errno::EAGAIN) => return,
                // It has gone again.
                Err(Errno::ECONNABORTED | Errno::EINTR) => continue,
                Err(e) => {
                    // Out of descriptors, say: not asked again before the next tick.
                    tracing::warn!("cannot accept: {e}");
                    self.deaf = self.epoll.delete(&self.listener.socket).is_ok();
                    return;
                }
            };
            if let Err(e) = self.admit(socket) {
                tracing::warn!("cannot admit a session: {e}");
            }
        }
    }

    pub(super) fn hear_again(&mut self) {
        if std::mem::take(&mut self.deaf) {
            let _ = self.epoll.add(&self.listener.socket, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER));
        }
    }

    pub(super) fn admit(&mut self, socket: OwnedFd) -> io::Result<()> {
        let peer = liveness::peer_of(&socket)?;
        let uid = peer.uid;
        let limit = self.options.limits.sessions;
        if self.receivers.is_outcast(uid) {
            let reason = format!("what user {uid} has sent keeps the broker's processes from ending");
            return self.turn_away(uid, socket, reason);
        }
        if self.users.is_outcast(uid) {
            let reason =
                format!("user {uid} has sent too many descriptors of filesystems that may never answer");
            return self.turn_away(uid, socket, reason);
        }
        if self.users.sessions(uid) >= limit && !planted("users-without-limit") {
            let (_, reason) = too_many(uid, "sessions", limit, "sessions");
            if self.users.may_say(uid) {
                tracing::warn!(uid, pid = peer.pid, "session refused: {reason}");
            }
            return self.turn_away(uid, socket, reason);
        }
        let id = self.next_session;
        self.next_session += 1;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, id * KEYS))?;
        if let Some(pidfd) = &peer.pidfd {
            self.epoll
                .add(pidfd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, id * KEYS + 1))?;
        }
        self.users.arrived(uid);
        self.sessions.insert(id, Session::new(id, socket, peer));
        Ok(())
    }

    /// Before its hello: who is not let in is not waited for.
    fn turn_away(&mut self, uid: u32, socket: OwnedFd, reason: String) -> io::Result<()> {
        let answer = HelloAnswer { magic: PROTOCOL_MAGIC, version: PROTOCOL_VERSION, refused: Some(reason) };
        let said = socket::encode(&answer).and_then(|bytes| socket::send(&socket, &bytes, &[]));
        self.close_socket(uid, socket);
        said
    }
}
