//! Joining and leaving: a process's sessions, the segments it has from them, and who lets the gate go.

use super::JoinError;
use super::autostart;
use super::config::Config;
use super::fork::{self, PerProcess};
use super::member::Member;
use super::session::Session;
use super::shared::Shared;
use crate::planted::planted;
use crate::wire::message::{FromBroker, Join, Mode, Refusal, Role, ToBroker};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// By the broker's number of the database and whether it may be written.
type Segments = BTreeMap<(u32, bool), (Arc<Shared>, usize)>;

/// A session and the segments that this process has from it.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) session: Session,
    /// With the number of seats that use each. Locked over joins and leaves, so that a leaving last seat has
    /// given up the gate before the next joins.
    segments: Mutex<Segments>,
}

/// The process's sessions, by the socket that was asked for.
static SESSIONS: PerProcess<Mutex<BTreeMap<Option<PathBuf>, Arc<Connected>>>> = PerProcess::new();

fn connected(config: &Config) -> Result<Arc<Connected>, JoinError> {
    fork::install();
    let mut sessions = lock(SESSIONS.get());
    match sessions.get(&config.socket) {
        Some(known) if !known.session.is_lost() => return Ok(Arc::clone(known)),
        // Not kept for ever: with its last seat it is dropped, and the broker lets its seats go.
        _ => drop(sessions.remove(&config.socket)),
    }
    let session = autostart::session(config)?;
    let new = Arc::new(Connected { session, segments: Mutex::default() });
    sessions.insert(config.socket.clone(), Arc::clone(&new));
    Ok(new)
}

/// What a connection joins with. The descriptors are only borrowed: they are the host's SQLite's.
pub struct Claim<'a> {
    pub database: BorrowedFd<'a>,
    pub directory: OwnedFd,
    pub shm: Option<OwnedFd>,
    pub join: Join,
}

impl Member {
    /// Takes a seat for one SQLite connection.
    pub fn join(config: &Config, claim: &Claim) -> Result<Member, JoinError> {
        let refused = match Member::join_one(config, claim) {
            Err(e @ JoinError::Refused { why: Refusal::OtherBroker, .. }) if config.socket.is_none() => e,
            other => return other,
        };
        // The broker that a program of this user finds first is not the one that has this database: a host's
        // broker was started while a user's own was serving it.
        for socket in super::place::candidates().flatten() {
            let other = Config { socket: Some(socket), ..config.clone() };
            if let Ok(member) = Member::join_one(&other, claim) {
                return Ok(member);
            }
        }
        Err(refused)
    }

    fn join_one(config: &Config, claim: &Claim) -> Result<Member, JoinError> {
        let mut last = JoinError::Lost;
        // Again, if a broker exits for idleness between our hello and our join.
        for _ in 0..3 {
            let connected = connected(config)?;
            match Member::join_at(connected, claim) {
                Err(e @ JoinError::Lost) => last = e,
                other => return other,
            }
        }
        Err(last)
    }

    fn join_at(connected: Arc<Connected>, claim: &Claim) -> Result<Member, JoinError> {
        let mut segments = lock(&connected.segments);
        let session = &connected.session;
        let id = session.new_id();
        let mut fds = vec![claim.database.as_raw_fd(), claim.directory.as_raw_fd()];
        fds.extend(claim.shm.as_ref().map(|fd| fd.as_raw_fd()));
        let join = Join { has_shm: claim.shm.is_some(), ..claim.join.clone() };
        let (answer, received) =
            session.ask(&ToBroker::Join { id, join }, id, &fds).map_err(|_| JoinError::Lost)?;
        let joined = match answer {
            FromBroker::Joined { joined, .. } => joined,
            FromBroker::Refused { why, reason, .. } => return Err(JoinError::Refused { why, reason }),
            _ => return Err(JoinError::Lost),
        };
        let key = (joined.seat.database, joined.role == Role::ReadWrite);
        let shared = match (joined.mode, joined.segment) {
            (Mode::Guest, _) => None,
            (Mode::Gated, true) => match Shared::open(received, joined.nonce, joined.role) {
                Ok(shared) => {
                    let shared = Arc::new(shared);
                    segments.insert(key, (Arc::clone(&shared), 1));
                    Some(shared)
                }
                Err(e) => {
                    // Descriptors that this process has no room for, mostly.
                    drop(segments);
                    Member::new(connected, joined, None).leave();
                    return Err(e.into());
                }
            },
            (Mode::Gated, false) => {
                let (shared, seats) = segments.get_mut(&key).ok_or(JoinError::Lost)?;
                *seats += 1;
                Some(Arc::clone(shared))
            }
        };
        drop(segments);
        Ok(Member::new(connected, joined, shared))
    }

    /// Gives the seat up. The last seat of this process on its database unmaps the segment and closes the gate
    /// *before* it says so: once the broker has opened the gate, a plain connection of this very process may
    /// lock the file, and closing any descriptor of it would drop that lock.
    ///
    /// The caller has closed the connection's own descriptor.
    pub fn leave(mut self) {
        if let Some(fast) = self.fast.take() {
            fast.with(&self.connected.session, self.connection.get(), |seat| seat.leave());
        }
        let connected = Arc::clone(&self.connected);
        let mut segments = lock(&connected.segments);
        let key = (self.joined.seat.database, self.joined.role == Role::ReadWrite);
        let mut late = None;
        if let Some(shared) = self.shared.take()
            && let Some((_, seats)) = segments.get_mut(&key)
        {
            *seats -= 1;
            if *seats == 0 {
                segments.remove(&key);
                if planted("late-close-of-gate") {
                    late = Some(Arc::clone(&shared));
                }
            }
            drop(shared); // the last one unmaps and closes here
        }
        if connected.session.is_lost() {
            // Not to be found again: with its last seat it is dropped, its liveness byte comes free, and the
            // broker, if it lives, lets its seats go.
            lock(SESSIONS.get()).retain(|_, c| !Arc::ptr_eq(c, &connected));
        } else {
            let id = connected.session.new_id();
            let _ = connected.session.ask(&ToBroker::Leave { id, seat: self.joined.seat }, id, &[]);
        }
        drop(late);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
