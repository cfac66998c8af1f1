//! Joining: a process's sessions, and the segments it has from them.

use super::JoinError;
use super::autostart;
use super::config::Config;
use super::fork::{self, PerProcess};
use super::member::Member;
use super::session::Session;
use super::shared::Shared;
use crate::lock::takeover::Holds;
use crate::planted::planted;
use crate::wire::keeper::KeptHome;
use crate::wire::message::{Claim, FromBroker, Join, Mode, Refusal, Role, SeatKey, ToBroker};
use nix::sys::stat::fstat;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// By the broker's number of the database and whether it may be written. A segment lives as long as a seat uses it.
type Segments = BTreeMap<(u32, bool), Weak<Shared>>;

/// A session and the segments that this process has from it.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) session: Session,
    /// Locked over joins and leaves, so that a leaving last seat has given up the gate before the next joins.
    pub(super) segments: Mutex<Segments>,
}

impl Connected {
    /// Not to be found again: with its last seat it is dropped, its liveness byte comes free, and the broker, if it
    /// lives, lets its seats go.
    pub(super) fn forget(self: &Arc<Connected>) {
        lock(SESSIONS.get()).retain(|_, c| !Arc::ptr_eq(c, self));
    }
}

/// The process's sessions, by the socket that was asked for.
static SESSIONS: PerProcess<Mutex<BTreeMap<Option<PathBuf>, Arc<Connected>>>> = PerProcess::new();

fn connected(config: &Config) -> Result<Arc<Connected>, JoinError> {
    fork::install();
    let mut sessions = lock(SESSIONS.get());
    match sessions.get(&config.socket) {
        Some(known) if !known.session.is_lost() => return Ok(Arc::clone(known)),
        _ => {}
    }
    let session = autostart::session(config)?;
    // Now that there is a broker again, what this process had may go on with it.
    if let Some(known) = sessions.get(&config.socket)
        && known.session.path() == session.path()
        && !known.session.is_lost()
    {
        return Ok(Arc::clone(known));
    }
    // Not kept for ever: see `Connected::forget`.
    sessions.remove(&config.socket);
    let new = Arc::new(Connected { session, segments: Mutex::default() });
    sessions.insert(config.socket.clone(), Arc::clone(&new));
    Ok(new)
}

/// What a connection joins with. The descriptors are only borrowed: they are the host's SQLite's.
pub struct Joins<'a> {
    pub database: BorrowedFd<'a>,
    pub directory: OwnedFd,
    pub shm: Option<OwnedFd>,
    pub join: Join,
}

impl Member {
    /// Takes a seat for one SQLite connection.
    pub fn join(config: &Config, claim: &Joins) -> Result<Member, JoinError> {
        let refused = match Member::join_one(config, claim) {
            Err(e @ JoinError::Refused { why: Refusal::OtherBroker, .. }) if config.socket.is_none() => e,
            other => return other,
        };
        // The broker that a program of this user finds first is not the one that has this database: a host's
        // broker was started while a user's own was serving it.
        for socket in super::place::candidates().flatten() {
            let mut other = config.clone();
            other.socket = Some(socket);
            if let Ok(member) = Member::join_one(&other, claim) {
                return Ok(member);
            }
        }
        Err(refused)
    }

    fn join_one(config: &Config, claim: &Joins) -> Result<Member, JoinError> {
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

    fn join_at(connected: Arc<Connected>, claim: &Joins) -> Result<Member, JoinError> {
        let mut segments = lock(&connected.segments);
        let session = &connected.session;
        let id = session.new_id();
        let mut fds = vec![claim.database.as_raw_fd(), claim.directory.as_raw_fd()];
        fds.extend(claim.shm.as_ref().map(|fd| fd.as_raw_fd()));
        let join = Join { has_shm: claim.shm.is_some(), ..claim.join.clone() };
        let had = Claim {
            seat: SeatKey { database: 0, seat: 0 },
            role: Role::ReadWrite,
            library: join.library,
            sqlite_version: join.sqlite_version.clone(),
            count: 0,
            holds: None,
        };
        let home = || fstat(&claim.directory).ok().zip(join.name.clone());
        let home = home().map(|(st, name)| KeptHome { device: st.st_dev, inode: st.st_ino, name });
        let link = session.link().map_err(|_| JoinError::Lost)?;
        let message = ToBroker::Join { id, join };
        let (answer, received) = link.ask(&message, id, &fds).map_err(|_| JoinError::Lost)?;
        let joined = match answer {
            FromBroker::Joined { joined, .. } => joined,
            FromBroker::Refused { why, reason, .. } => return Err(JoinError::Refused { why, reason }),
            _ => return Err(JoinError::Lost),
        };
        let key = (joined.seat.database, joined.role == Role::ReadWrite);
        // Not noted, it is not ours: another thread has met the next broker meanwhile, which takes it back.
        let note = |shared: Option<&Arc<Shared>>| {
            let shared = shared.filter(|_| joined.role == Role::ReadWrite).map(Arc::downgrade);
            let fast = shared.as_ref().and_then(Weak::upgrade).is_some_and(|s| s.table().is_some());
            let holds = (!fast || planted("no-fast-lane")).then(Holds::default);
            let (seat, role, count) = (joined.seat, joined.role, joined.count);
            let seat = Claim { seat, role, count, holds, ..had };
            let noted = session.note(&link, |had| {
                had.seats.insert(joined.seat, seat);
                if let (Some(shared), Some(home)) = (shared, home) {
                    had.segments.entry(joined.seat.database).or_insert((shared, home));
                }
            });
            noted.map_err(|_| JoinError::Lost)
        };
        let shared = match (joined.mode, joined.segment) {
            (Mode::Guest, _) => None,
            (Mode::Gated, true) => match Shared::open(received, joined.nonce, joined.role) {
                Ok(shared) => {
                    let shared = Arc::new(shared);
                    segments.insert(key, Arc::downgrade(&shared));
                    Some(shared)
                }
                Err(e) => {
                    // Descriptors that this process has no room for, mostly.
                    note(None)?;
                    drop(segments);
                    Member::new(connected, joined, None).leave();
                    return Err(e.into());
                }
            },
            (Mode::Gated, false) => Some(segments.get(&key).and_then(Weak::upgrade).ok_or(JoinError::Lost)?),
        };
        note(shared.as_ref())?;
        drop(segments);
        Ok(Member::new(connected, joined, shared))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
