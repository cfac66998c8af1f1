//! How a session ends: it broke a rule, its socket is gone, or its process is proven dead.

use super::server::Server;
use super::session::{SILENT_LOOKS, Stage};
use super::shares::SLICE;
use crate::planted::planted;
use nix::sys::stat::fstat;
use std::os::fd::AsFd;
use std::time::Instant;

impl Server {
    /// Ends a session that broke the rules. Its seats stay until it is proven dead or lets go.
    pub(super) fn end_session(&mut self, id: u64, reason: &str) {
        if let Some(s) = self.sessions.get(&id)
            && self.users.may_say(s.peer.uid)
        {
            tracing::warn!(session = id, client = s.label(), uid = s.peer.uid, "session ended: {reason}");
        }
        self.silence(id);
    }

    /// The socket is gone. Not a death: a session with seats is kept until it is proven dead.
    pub(super) fn silence(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if let Some(socket) = session.socket.take() {
            let _ = self.epoll.delete(socket.as_fd());
            let uid = session.peer.uid;
            let unused = self.users.silenced(session, socket);
            unused.into_iter().for_each(|socket| self.close_socket(uid, socket));
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.stage = Stage::Silent;
        session.since = Instant::now();
        self.silent_until = Some(session.since + SILENT_LOOKS);
        if session.seats.is_empty() {
            self.drop_session(id);
        } else if session.let_go() {
            self.session_died(id, "it closed everything");
        }
    }

    pub(super) fn drop_session(&mut self, id: u64) {
        let Some(mut session) = self.sessions.remove(&id) else { return };
        let proven = std::mem::take(&mut session.proven);
        self.keeping.session_gone(&session);
        self.users.left(&session);
        if let Some(pidfd) = &session.peer.pidfd {
            let _ = self.epoll.delete(pidfd);
        }
        // It may be larger than it looks, and take its time to be freed.
        let uid = session.peer.uid;
        let large = session.take_liveness().filter(|fd| !fstat(fd).is_ok_and(|st| st.st_blocks <= 8));
        large.into_iter().for_each(|fd| self.close(uid, fd));
        self.let_go_if_unclaimed(proven);
    }

    /// Clears away the dead, as far as their users have time left: a process may leave as much behind as it likes.
    pub(super) fn bury(&mut self) {
        for _ in 0..self.dying.len() {
            let Some((id, how)) = self.dying.pop_front() else { return };
            let uid = self.uid_of(id);
            if !self.shares.has_more(uid) {
                self.dying.push_back((id, how));
                continue;
            }
            let begun = Instant::now();
            self.session_died(id, how);
            self.shares.charge(uid, begun.elapsed());
        }
    }

    pub(super) fn session_died(&mut self, id: u64, how: &'static str) {
        let Some(session) = self.sessions.get(&id) else { return };
        if planted("deaths-unnoticed") {
            return;
        }
        let seats: Vec<_> = session.seats.iter().copied().collect();
        if !seats.is_empty() {
            tracing::info!(session = id, client = session.label(), seats = seats.len(), "cleared: {how}");
        }
        self.forming.iter_mut().for_each(|f| f.forget_session(id));
        let begun = Instant::now();
        for seat in seats {
            if begun.elapsed() >= SLICE {
                return self.dying.push_back((id, how));
            }
            self.remove_seat(seat);
        }
        self.drop_session(id);
    }
}
