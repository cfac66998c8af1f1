//! A seat: joining, asking, waiting, leaving.

use super::autostart;
use super::config::Config;
use super::fork::{self, PerProcess};
use super::host::{HostFd, thread_id};
use super::session::Session;
use super::shared::Shared;
use super::{JoinError, Lost};
use crate::lock::{Ask, Release, Verdict};
use crate::wire::message::{
    Blocker, ConnectionKey, FromBroker, Join, Joined, Mode, Refusal, Role, SeatKey, ToBroker,
};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// By the broker's number of the database and whether it may be written.
type Segments = BTreeMap<(u32, bool), (Arc<Shared>, usize)>;

/// A session and the segments that this process has from it.
#[derive(Debug)]
struct Connected {
    session: Session,
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

/// One connection's seat.
#[derive(Debug)]
pub struct Member {
    connected: Arc<Connected>,
    joined: Joined,
    shared: Option<Arc<Shared>>,
}

/// How a lock request ended.
#[derive(Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The wait was ended because it would never have.
    pub deadlock: bool,
    /// The limit was reached or the statement interrupted.
    pub gave_up: bool,
    pub blocker: Option<Blocker>,
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
                    let member = Member { connected, joined, shared: None };
                    member.leave();
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
        Ok(Member { connected, joined, shared })
    }

    pub fn mode(&self) -> Mode {
        self.joined.mode
    }

    pub fn role(&self) -> Role {
        self.joined.role
    }

    pub fn seat(&self) -> SeatKey {
        self.joined.seat
    }

    pub fn session(&self) -> &Session {
        &self.connected.session
    }

    pub fn shared(&self) -> Option<&Arc<Shared>> {
        self.shared.as_ref()
    }

    /// The session still stands and the segment may be used.
    pub fn is_whole(&self) -> bool {
        !self.connected.session.is_lost() && !self.shared.as_ref().is_some_and(|s| s.poisoned())
    }

    /// Asks for a lock and waits as long as the rules say and `give_up` allows. When it gives up, the request
    /// is answered as it stands: a wait ahead then has its lock without the turn.
    pub fn lock(
        &self,
        ask: Ask,
        connection: ConnectionKey,
        give_up: impl FnMut() -> bool,
    ) -> Result<Outcome, Lost> {
        let session = self.session();
        let id = session.new_id();
        let seat = self.joined.seat;
        session.send(&ToBroker::Lock { id, seat, ask, connection, thread: thread_id() }, &[])?;
        let (answer, gave_up) = match session.await_answer(id, give_up)? {
            Some(answer) => (answer, false),
            None => {
                session.send(&ToBroker::Cancel { seat }, &[])?;
                (session.answer_within(id, Duration::from_secs(10))?.ok_or_else(|| session.lose())?, true)
            }
        };
        match answer.0 {
            FromBroker::Lock { verdict, deadlock, blocker, .. } => {
                Ok(Outcome { verdict, deadlock, gave_up, blocker })
            }
            _ => Err(Lost),
        }
    }

    pub fn release(&self, release: Release) -> Result<(), Lost> {
        self.session().send(&ToBroker::Unlock { seat: self.joined.seat, release }, &[])
    }

    /// Whether another seat holds RESERVED.
    pub fn reserved_by_other(&self) -> Result<bool, Lost> {
        let id = self.session().new_id();
        match self.session().ask(&ToBroker::CheckReserved { id, seat: self.joined.seat }, id, &[])?.0 {
            FromBroker::Reserved { by_other, .. } => Ok(by_other),
            _ => Err(Lost),
        }
    }

    pub fn journal_is_clear(&self) -> Result<(), Lost> {
        self.session().send(&ToBroker::JournalClear { seat: self.joined.seat }, &[])
    }

    pub fn turn_is_used(&self) -> Result<(), Lost> {
        self.session().send(&ToBroker::TurnUsed { seat: self.joined.seat }, &[])
    }

    /// Opens the wal-index; the broker invalidates it first if nobody else has it open.
    pub fn open_wal_index(&self) -> Result<(), Lost> {
        let id = self.session().new_id();
        let seat = self.joined.seat;
        self.wal_index(id, ToBroker::OpenWalIndex { id, seat })?.map(drop).ok_or(Lost)
    }

    pub fn close_wal_index(&self) -> Result<(), Lost> {
        self.session().send(&ToBroker::CloseWalIndex { seat: self.joined.seat }, &[])
    }

    /// At least `regions` regions; `None` when there is no memory for them.
    pub fn grow_wal_index(&self, regions: u32) -> Result<Option<u32>, Lost> {
        let id = self.session().new_id();
        let seat = self.joined.seat;
        self.wal_index(id, ToBroker::GrowWalIndex { id, seat, regions })
    }

    fn wal_index(&self, id: u64, message: ToBroker) -> Result<Option<u32>, Lost> {
        match self.session().ask(&message, id, &[])?.0 {
            FromBroker::WalIndex { ok, regions, .. } => Ok(ok.then_some(regions)),
            _ => Err(Lost),
        }
    }

    /// Keeps a read-write descriptor that was opened for a read-only connection.
    pub fn keep(&self, fd: HostFd) {
        match &self.shared {
            Some(shared) => shared.keep(fd),
            // Guest mode: closing it would drop the POSIX locks of this process's connections at any time.
            None => std::mem::forget(fd),
        }
    }

    /// Tells the broker's log what may not be printed in the host's output.
    pub fn log(&self, text: &str) {
        let _ = self.session().send(&ToBroker::Log { text: text.chars().take(1000).collect() }, &[]);
    }

    /// Gives the seat up. The last seat of this process on its database unmaps the segment and closes the gate
    /// *before* it says so: once the broker has opened the gate, a plain connection of this very process may
    /// lock the file, and closing any descriptor of it would drop that lock.
    ///
    /// The caller has closed the connection's own descriptor.
    pub fn leave(mut self) {
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
                if crate::planted::planted("late-close-of-gate") {
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

/// The broker's status report as JSON.
pub fn status_report(session: &Session) -> Result<Vec<u8>, Lost> {
    let id = session.new_id();
    let mut json = Vec::new();
    let mut answer = session.ask(&ToBroker::Status { id }, id, &[])?.0;
    loop {
        match answer {
            FromBroker::Status { part, last, .. } => {
                json.extend(part);
                if last {
                    return Ok(json);
                }
            }
            _ => return Err(Lost),
        }
        answer = session.answer_within(id, Duration::from_secs(10))?.ok_or(Lost)?.0;
    }
}
