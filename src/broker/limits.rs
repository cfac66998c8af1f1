//! What one user may have at this broker, so that nobody can take what others need: sessions, databases, descriptors
//! that were sent and not taken yet, lines in the log.

use super::foreign::MOST_ASIDE;
use super::join::Refused;
use super::session::Session;
use crate::segment::layout::MAX_SEATS;
use crate::wire::message::Refusal;
use crate::wire::socket;
use nix::sys::socket::{Shutdown, shutdown};
use serde::Serialize;
use std::collections::BTreeMap;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

/// Descriptors that a session costs: its socket, its pidfd, its liveness memfd.
const SESSION_COSTS: u64 = 3;
/// And a database: its file, its WAL, its `-shm`, two memfds, two ends of what holds the gate.
const DATABASE_COSTS: u64 = 7;
/// Joins of one session that may wait for a gate at a time. A process makes one after the other.
pub const MOST_JOINS: usize = 16;
/// Seats of one database that clients have who may only read it: all of them, and those of one user. The rest is for those
/// who may write.
pub const READERS: usize = MAX_SEATS / 4 * 3;
pub const READERS_OF_A_USER: usize = MAX_SEATS / 2;
/// Lines of the log that are written in a second because of one user.
const LINES: usize = 100;

/// Of one user (uid).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Processes with a session.
    pub sessions: usize,
    /// Databases that it was the first to open, as long as anybody has them open.
    pub databases: usize,
    /// Descriptors that were sent to it and that it has not received. The kernel allows the broker's user only so
    /// many (`RLIMIT_NOFILE`), over all.
    pub descriptors: usize,
}

impl Limits {
    /// What leaves enough for others of the `descriptors` that this process may have. `everyone`: there are others.
    pub fn of(descriptors: u64, everyone: bool) -> Limits {
        let share = if everyone { descriptors / 4 } else { descriptors / 4 * 3 };
        let most = |limit: u64| usize::try_from(limit).unwrap_or(usize::MAX).max(1);
        Limits {
            sessions: most((share / SESSION_COSTS).min(8192)),
            databases: most((share / DATABASE_COSTS).min(4096)),
            descriptors: most((descriptors / 8).min(256)),
        }
    }
}

/// Messages with descriptors that may lie unread in a session's socket.
#[derive(Debug)]
struct Unread {
    session: u64,
    descriptors: usize,
    /// Ours to keep, the session having ended: how much of it is unread can be asked as long as this is open.
    socket: Option<OwnedFd>,
}

#[derive(Debug, Default)]
struct User {
    sessions: usize,
    /// Databases that it was the first to open.
    databases: usize,
    unread: Vec<Unread>,
    spent: Vec<OwnedFd>,
    lines: usize,
    /// Descriptors of it that must not be closed.
    aside: usize,
}

/// Everybody who has something here, by uid.
#[derive(Debug, Default)]
pub struct Users(BTreeMap<u32, User>);

impl Users {
    pub fn sessions(&self, uid: u32) -> usize {
        self.0.get(&uid).map_or(0, |user| user.sessions)
    }

    pub fn databases(&self, uid: u32) -> usize {
        self.0.get(&uid).map_or(0, |user| user.databases)
    }

    pub fn founded(&mut self, uid: u32) {
        self.0.entry(uid).or_default().databases += 1;
    }

    /// A database that it was the first to open is closed.
    pub fn lost(&mut self, uid: u32) {
        if let Some(user) = self.0.get_mut(&uid) {
            user.databases = user.databases.saturating_sub(1);
        }
    }

    /// Descriptors that were not received when it was last looked at.
    pub fn under_way(&self, uid: u32) -> usize {
        self.0.get(&uid).map_or(0, |user| user.unread.iter().map(|u| u.descriptors).sum())
    }

    pub fn uids(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.keys().copied()
    }

    /// Another descriptor of it must not be closed.
    pub fn set_aside(&mut self, uid: u32) {
        self.0.entry(uid).or_default().aside += 1;
    }

    /// It has sent too many of those.
    pub fn is_outcast(&self, uid: u32) -> bool {
        self.0.get(&uid).is_some_and(|user| user.aside >= MOST_ASIDE)
    }

    pub fn outcasts(&self) -> impl Iterator<Item = u32> + '_ {
        self.uids().filter(|uid| self.is_outcast(*uid))
    }

    pub fn arrived(&mut self, uid: u32) {
        self.0.entry(uid).or_default().sessions += 1;
    }

    pub fn left(&mut self, session: &Session) {
        if let Some(user) = self.0.get_mut(&session.peer.uid) {
            user.sessions = user.sessions.saturating_sub(1);
        }
    }

    /// The session's socket is not used any more. It is kept while there are descriptors in it that have been sent to the
    /// session, else it comes back.
    pub fn silenced(&mut self, session: &Session, socket: OwnedFd) -> Option<OwnedFd> {
        let Some(user) = self.0.get_mut(&session.peer.uid) else { return Some(socket) };
        if let Some(unread) = user.unread.iter_mut().find(|u| u.session == session.id)
            && !socket::all_read(&socket)
        {
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            unread.socket = Some(socket);
            return None;
        }
        Some(socket)
    }

    /// Sockets that were kept and need not be kept any more, with their users.
    pub fn spent(&mut self) -> Vec<(u32, OwnedFd)> {
        let of = |(uid, user): (&u32, &mut User)| {
            let uid = *uid;
            mem::take(&mut user.spent).into_iter().map(move |socket| (uid, socket))
        };
        self.0.iter_mut().flat_map(of).collect()
    }

    /// So many descriptors are about to be sent to a session. Refused if its user has too many that it does not take.
    pub fn send(
        &mut self,
        sessions: &BTreeMap<u64, Session>,
        (uid, session): (u32, u64),
        descriptors: usize,
        limit: usize,
    ) -> Result<(), Refused> {
        let user = self.0.entry(uid).or_default();
        let spent = &mut user.spent;
        user.unread.retain_mut(|u| match &u.socket {
            Some(socket) if !socket::all_read(socket) => true,
            Some(_) => {
                spent.extend(u.socket.take());
                false
            }
            None => sessions.get(&u.session).is_some_and(|s| !s.has_read_all()),
        });
        let under_way: usize = user.unread.iter().map(|u| u.descriptors).sum();
        if under_way + descriptors > limit {
            return Err(too_many(uid, "descriptors that it has not received", limit, "descriptors"));
        }
        match user.unread.iter_mut().find(|u| u.session == session) {
            Some(unread) => unread.descriptors += descriptors,
            None => user.unread.push(Unread { session, descriptors, socket: None }),
        }
        Ok(())
    }

    /// Whether another line about this user goes into the log.
    pub fn may_say(&mut self, uid: u32) -> bool {
        let user = self.0.entry(uid).or_default();
        user.lines += 1;
        user.lines <= LINES
    }

    /// Another second.
    pub fn tick(&mut self) {
        for (uid, user) in &mut self.0 {
            let more = std::mem::take(&mut user.lines).saturating_sub(LINES);
            if more != 0 {
                tracing::warn!(uid, "{more} more lines about this user within a second");
            }
        }
        self.0.retain(|_, user| {
            let has = user.sessions + user.databases + user.aside + user.spent.len();
            has != 0 || !user.unread.is_empty()
        });
    }
}

/// The sentence for who asks for more: `--user-{option}` changes the limit.
pub fn too_many(uid: u32, what: &str, limit: usize, option: &str) -> Refused {
    let reason = format!(
        "user {uid} has {limit} {what} at this broker, as many as one user may (turnstile serve --user-{option})"
    );
    (Refusal::Exhausted, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_leaves_three_quarters_to_others_and_its_own_broker_has_none() {
        for descriptors in [256, 1024, 4096, 524_288, u64::MAX] {
            let limits = Limits::of(descriptors, true);
            let cost = limits.sessions as u64 * SESSION_COSTS;
            assert!(limits.sessions > 0 && cost <= descriptors / 4, "{descriptors}: {limits:?}");
            assert!(limits.databases as u64 * DATABASE_COSTS <= descriptors / 4, "{descriptors}: {limits:?}");
            assert!(Limits::of(descriptors, false).sessions >= limits.sessions);
        }
        assert_eq!(Limits::of(0, true), Limits { sessions: 1, databases: 1, descriptors: 1 });
    }
}
