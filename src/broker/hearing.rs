//! What has happened at the loop's descriptors, user by user, and what is said to sessions.

use super::server::{
    CHECKPOINTER_PIDFD, CHECKPOINTER_SOCKET, KEEPER_SOCKET, KEYS, LISTENER, MOST_A_ROUND, RECEIVER,
    SEARCH_SOCKET, SIGNALS, Server,
};
use super::shares::SLICE;
use crate::wire::message::{FromBroker, HelloAnswer, PROTOCOL_MAGIC, PROTOCOL_VERSION};
use crate::wire::socket;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::signalfd::SignalFd;
use std::io;
use std::time::Instant;

impl Server {
    pub(super) fn dispatch(&mut self, events: &[EpollEvent], signals: Option<&SignalFd>) {
        let mut sessions = Vec::new();
        for event in events {
            match event.data() {
                LISTENER => self.accept(),
                SIGNALS => signals.into_iter().for_each(|s| self.signalled(s)),
                CHECKPOINTER_SOCKET => self.checkpointer_event(event.events()),
                CHECKPOINTER_PIDFD => self.checkpointer_died(),
                KEEPER_SOCKET => self.keeper_event(event.events()),
                SEARCH_SOCKET => self.search_event(),
                key if key % KEYS == 0 => sessions.push((key / KEYS, event.events())),
                key if key % KEYS == RECEIVER => self.receiver_event(key / KEYS),
                key => self.dying.push_back((key / KEYS, "its process ended")),
            }
        }
        self.bury();
        sessions.sort_by_key(|(id, _)| self.shares.lately(self.uid_of(*id)));
        for (id, flags) in sessions {
            let uid = self.uid_of(id);
            // What it has asked for comes first, in the order in which it was sent.
            if !self.shares.has_more(uid) || self.put_off.contains(&id) {
                self.passed_over.insert(id);
                continue;
            }
            let begun = Instant::now();
            self.socket_event(id, flags);
            self.shares.charge(uid, begun.elapsed());
        }
    }

    fn socket_event(&mut self, id: u64, flags: EpollFlags) {
        if flags.contains(EpollFlags::EPOLLOUT) {
            self.flush(id);
        }
        let (begun, uid) = (Instant::now(), self.uid_of(id));
        for n in 0..MOST_A_ROUND {
            // What a round has read of it is charged by the caller.
            if n != 0 && (begun.elapsed() >= SLICE || !self.shares.has_more(uid)) {
                self.passed_over.insert(id);
                return;
            }
            let Some(socket) = self.sessions.get(&id).and_then(|s| s.socket.as_ref()) else { return };
            if self.is_foreign(id) {
                match socket::has_descriptors(socket) {
                    Ok(true) => return self.receive_elsewhere(id),
                    // What is received next is this packet, or the end.
                    Ok(false) => {}
                    // What comes from now on has not been looked at.
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                    Err(_) => return self.silence(id),
                }
            }
            match socket::receive_any(socket) {
                Ok(packet) => {
                    if let Err(reason) = self.received(id, packet, None, None) {
                        self.end_session(id, &reason);
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.silence(id);
                    return;
                }
            }
        }
    }

    pub(super) fn flush(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let result = session.flush();
        self.watch_for_room(id);
        if let Err(e) = result {
            tracing::debug!(session = id, "cannot send: {e}");
            self.silence(id);
        }
    }

    pub(super) fn watch_for_room(&self, id: u64) {
        let Some(session) = self.sessions.get(&id) else { return };
        let Some(socket) = &session.socket else { return };
        let out = if session.has_unsent() { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let _ = self.epoll.modify(socket, &mut EpollEvent::new(EpollFlags::EPOLLIN | out, id * KEYS));
    }

    /// Sends a message to a session; one that cannot be sent to loses its socket.
    pub(super) fn send(&mut self, id: u64, message: &FromBroker) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        match session.send(message, &[]) {
            Ok(()) if session.has_unsent() => self.watch_for_room(id),
            Ok(()) => {}
            Err(e) => {
                tracing::debug!(session = id, "cannot send: {e}");
                self.silence(id);
            }
        }
    }

    pub(super) fn greet(&mut self, id: u64, refused: Option<String>) -> Result<(), String> {
        let answer = HelloAnswer { magic: PROTOCOL_MAGIC, version: PROTOCOL_VERSION, refused };
        let bytes = socket::encode(&answer).map_err(|e| e.to_string())?;
        let socket = self.sessions.get(&id).and_then(|s| s.socket.as_ref()).ok_or("gone")?;
        socket::send(socket, &bytes, &[]).map_err(|e| e.to_string())
    }

    pub(super) fn watch_pidfd(&self, id: u64) {
        let Some(pidfd) = self.sessions.get(&id).and_then(|s| s.peer.pidfd.as_ref()) else { return };
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, id * KEYS + 1);
        let _ = self.epoll.add(pidfd, event); // EEXIST: watched since it was accepted
    }
}
