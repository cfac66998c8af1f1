//! From a judged descriptor to a seat: the gate, or guest mode when plain clients hold the file.

use super::database::{Database, Seat, Segment, State};
use super::join::{self, Candidate, Refused};
use super::limits::{MOST_JOINS, too_many};
use super::server::Server;
use crate::planted::planted;
use crate::segment::gate::{self, Conflict, GateError};
use crate::segment::mapping::ControlMap;
use crate::wire::message::{FromBroker, Join, Joined, Mode, Refusal, Role, SeatKey};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

/// How long the gate is tried for: a plain client may just be passing.
const GATE_PATIENCE: Duration = Duration::from_millis(100);
/// Between two tries.
const GATE_RETRY: Duration = Duration::from_millis(2);

/// A join that waits for the gate.
struct Pending {
    session: u64,
    id: u64,
    join: Join,
    candidate: Candidate,
}

/// A database whose gate is being tried for.
pub struct Forming {
    joins: Vec<Pending>,
    since: Instant,
    pub next_try: Instant,
}

impl Forming {
    pub fn forget_session(&mut self, session: u64) {
        self.joins.retain(|p| p.session != session);
    }
}

impl Server {
    /// A `Join` message.
    pub(super) fn join(&mut self, session: u64, id: u64, join: Join, fds: Vec<OwnedFd>) {
        if let Err((why, reason)) = self.try_join(session, id, join, fds) {
            self.refuse(session, id, why, reason);
        }
    }

    pub(super) fn refuse(&mut self, session: u64, id: u64, why: Refusal, reason: String) {
        if let Some(s) = self.sessions.get(&session)
            && self.users.may_say(s.peer.uid)
        {
            tracing::info!(session, client = s.label(), ?why, "join refused: {reason}");
        }
        self.send(session, &FromBroker::Refused { id, why, reason });
    }

    fn try_join(&mut self, session: u64, id: u64, join: Join, fds: Vec<OwnedFd>) -> Result<(), Refused> {
        if self.stopping.is_some() {
            return Err((Refusal::Stopping, "the broker is stopping".into()));
        }
        let Some(s) = self.sessions.get(&session) else { return Ok(()) };
        let uid = s.peer.uid;
        // An unsafe place harms its own users; but only the broker's own user may ask for it, because touching
        // a hostile file can hang the broker.
        let own_user = s.peer.uid == nix::unistd::geteuid().as_raw() || s.peer.uid == 0;
        let lenient = self.options.allow_unsafe || (join.allow_unsafe && own_user);
        let candidate = join::judge(&join, fds, s.peer.pid, lenient)?;
        if lenient && join.allow_unsafe {
            tracing::warn!(
                session,
                name = candidate.home.display(),
                "filesystem checks overridden by the client"
            );
        }
        let waiting = self.forming.iter().flat_map(|f| &f.joins).filter(|p| p.session == session).count();
        if waiting >= MOST_JOINS {
            return Err((Refusal::Exhausted, format!("{waiting} joins of this process wait already")));
        }
        let pending = Pending { session, id, join, candidate };
        let identity = pending.candidate.identity;
        if let Some(number) = self.number_of(identity) {
            return self.take_seat(number, pending);
        }
        if let Some(f) =
            self.forming.iter_mut().find(|f| f.joins.iter().any(|p| p.candidate.identity == identity))
        {
            f.joins.push(pending);
            return Ok(());
        }
        let limit = self.options.limits.databases;
        let mine = |p: &Pending| self.sessions.get(&p.session).is_some_and(|s| s.peer.uid == uid);
        let forming = self.forming.iter().filter(|f| f.joins.first().is_some_and(mine)).count();
        let founded = self.databases.values().filter(|d| d.founder == uid).count();
        if founded + forming >= limit && !planted("users-without-limit") {
            return Err(too_many(uid, "databases", limit, "databases"));
        }
        let now = Instant::now();
        self.forming.push(Forming { joins: vec![pending], since: now, next_try: now });
        self.try_forming(now);
        Ok(())
    }

    fn number_of(&self, identity: super::database::Identity) -> Option<u32> {
        self.databases.iter().find(|(_, d)| d.identity == identity).map(|(n, _)| *n)
    }

    /// Tries the gate of every forming database that is due.
    pub(super) fn try_forming(&mut self, now: Instant) {
        let (due, rest) =
            std::mem::take(&mut self.forming).into_iter().partition(|f: &Forming| now >= f.next_try);
        self.forming = rest;
        for forming in due {
            self.try_one(forming, now);
        }
        self.forming.sort_by_key(|f| f.next_try);
    }

    fn try_one(&mut self, mut forming: Forming, now: Instant) {
        let sessions = &self.sessions;
        forming.joins.retain(|p| sessions.contains_key(&p.session));
        let Some(first) = forming.joins.first_mut() else { return };
        let Candidate { home, identity, .. } = &first.candidate;
        if self.name_is_taken(&home.clone(), *identity) && !planted("name-not-looked-at") {
            forming.next_try = now + GATE_RETRY;
            self.forming.push(forming);
            return;
        }
        let state = if first.join.guest {
            guest("asked for (TURNSTILE_MODE=guest)")
        } else if first.candidate.role == Role::ReadOnly {
            guest("the first member may only read, and a gate needs a writer")
        } else if first.candidate.shm_unseen {
            guest("its -shm file cannot be opened for writing by the first member")
        } else {
            match try_gate(&mut first.candidate) {
                Ok(Some(state)) => Ok(state),
                Ok(None) if now.duration_since(forming.since) < GATE_PATIENCE => {
                    forming.next_try = now + GATE_RETRY;
                    self.forming.push(forming);
                    return;
                }
                Ok(None) => guest("plain SQLite clients hold the file"),
                Err(refused) => Err(refused),
            }
        };
        match state {
            Err((why, reason)) => {
                for p in forming.joins {
                    self.refuse(p.session, p.id, why, reason.clone());
                }
            }
            Ok(state) => {
                let number = self.found(&forming.joins[0], state);
                for p in forming.joins {
                    let (session, id) = (p.session, p.id);
                    if let Err((why, reason)) = self.take_seat(number, p) {
                        self.refuse(session, id, why, reason);
                    }
                }
                self.drop_if_unused(number);
            }
        }
    }

    fn found(&mut self, first: &Pending, state: State) -> u32 {
        let candidate = &first.candidate;
        let founder = self.sessions.get(&first.session).map_or(0, |s| s.peer.uid);
        while self.databases.contains_key(&self.next_database) {
            self.next_database = self.next_database.wrapping_add(1);
        }
        let number = self.next_database;
        self.next_database = number.wrapping_add(1);
        let mode = match &state {
            State::Gated { .. } => "gated".to_owned(),
            State::Guest { reason, .. } => format!("guest: {reason}"),
        };
        tracing::info!(database = number, name = candidate.home.display(), identity = ?candidate.identity, mode, "opened");
        let db = Database::new(candidate.identity, founder, state);
        self.start_keeper();
        self.keeping.database(number, &db);
        self.databases.insert(number, db);
        self.offer_checkpoints(number);
        self.offer_linger(number);
        number
    }

    fn take_seat(&mut self, number: u32, p: Pending) -> Result<(), Refused> {
        let Some(db) = self.databases.get_mut(&number) else { return Ok(()) };
        let role = p.candidate.role;
        match &db.home {
            Some(home) if *home != p.candidate.home => {
                let reason = format!(
                    "the same file is in use under another name ('{}', a hard link?): each name would have its own \
                     -wal",
                    home.display()
                );
                return Err((Refusal::UnsafePlace, reason));
            }
            Some(_) => {}
            None if role == Role::ReadWrite => {
                self.keeping.home(number, &p.candidate.home);
                db.home = Some(p.candidate.home.clone());
            }
            None => {} // a reader's word binds nobody
        }
        if let State::Guest { .. } = db.state
            && !planted("two-libraries-guest")
            && let Some(other) = db.seats.values().find(|s| s.session == p.session)
            && other.library != p.join.library
        {
            let reason = "two SQLite libraries of one process on one file in guest mode would break each other's \
                          POSIX locks";
            return Err((Refusal::UnsafePlace, reason.into()));
        }
        if db.free_seat().is_none()
            && let Some(seat) = db.close_one_resting()
        {
            self.clear_seat(SeatKey { database: number, seat });
        }
        let Some(db) = self.databases.get_mut(&number) else { return Ok(()) };
        let Some(seat) = db.free_seat() else {
            let reason = format!("all {} seats are taken", crate::segment::layout::CHECKPOINTER - 1);
            return Err((Refusal::Exhausted, reason));
        };
        let key = SeatKey { database: number, seat };
        let has_segment = db.has_session(p.session, role);
        let mut fds: Vec<&OwnedFd> = Vec::new();
        let read_only;
        let (mode, nonce) = match &db.state {
            State::Gated { gate, segment } => {
                if !has_segment && role == Role::ReadWrite {
                    fds.extend([&segment.control_fd, &segment.wal_index_fd, gate.hold().descriptor()]);
                } else if !has_segment && planted("read-only-gets-writable") {
                    fds.extend([&segment.control_fd, &segment.wal_index_fd]);
                } else if !has_segment {
                    read_only =
                        read_only_segment(segment).map_err(|e| (Refusal::Exhausted, e.to_string()))?;
                    fds.extend(&read_only);
                }
                (Mode::Gated, segment.nonce)
            }
            State::Guest { .. } => (Mode::Guest, 0),
        };
        let Some(uid) = self.sessions.get(&p.session).map(|s| s.peer.uid) else { return Ok(()) };
        if !fds.is_empty() && !planted("users-without-limit") {
            self.users.send(&self.sessions, (uid, p.session), fds.len(), self.options.limits.descriptors)?;
        }
        let Some(session) = self.sessions.get_mut(&p.session) else { return Ok(()) };
        let count = db.table().count(seat);
        let joined = Joined { seat: key, mode, role, nonce, segment: !fds.is_empty(), count };
        let taken = Seat {
            session: p.session,
            role,
            sqlite_version: super::session::printable(&p.join.sqlite_version),
            library: p.join.library,
            since: SystemTime::now(),
            socket_lane: mode == Mode::Guest || role == Role::ReadOnly,
            heard: Instant::now(),
            request: None,
            count,
        };
        // Before the client knows: the keeper is to know more than the client, and another one that closes looks for
        // seats in use.
        self.keeping.session(session);
        self.keeping.seat(key, &taken);
        db.table().hand_out(seat);
        if let Err(e) = session.send(&FromBroker::Joined { id: p.id, joined }, &fds) {
            db.table().members.clear(seat);
            self.keeping.seat_gone(key);
            return Err((Refusal::Exhausted, format!("cannot pass the segment: {e}")));
        }
        session.seats.insert(key);
        let unsent = session.has_unsent();
        db.seats.insert(seat, taken);
        if unsent {
            self.watch_for_room(p.session);
        }
        tracing::debug!(database = number, seat, session = p.session, ?role, "joined");
        Ok(())
    }

    /// The seat is given up or its process is dead.
    pub(super) fn remove_seat(&mut self, key: SeatKey) {
        self.clear_seat(key);
        self.drop_if_unused(key.database);
    }

    /// A seat at rest is not kept any more, if it is still this session's and rests under this count.
    pub(super) fn let_go(&mut self, session: u64, key: SeatKey, count: u32) {
        let Some(db) = self.databases.get(&key.database) else { return };
        let own = db.seats.get(&key.seat).is_some_and(|s| s.session == session);
        if own && db.table().let_go(key.seat, count) {
            self.remove_seat(key);
        }
    }

    pub(super) fn clear_seat(&mut self, key: SeatKey) {
        if let Some(s) = self.sessions.values_mut().find(|s| s.seats.contains(&key)) {
            s.seats.remove(&key);
            s.unclaimed.remove(&key);
        }
        if let Some(db) = self.databases.get_mut(&key.database) {
            db.lane().remove(key.seat);
            db.seats.remove(&key.seat);
            self.keeping.seat_gone(key);
        }
    }

    /// Nobody is left, or only seats that rest: closed means closed.
    pub(super) fn drop_if_unused(&mut self, number: u32) {
        if self.stays(number) {
            return;
        }
        let resting = self.databases.get(&number).filter(|_| !planted("the-resting-count"));
        for seat in resting.map(|db| db.close_all_resting()).unwrap_or_default() {
            self.clear_seat(SeatKey { database: number, seat });
        }
        if self.abandon_if_unclaimed(number) {
            return;
        }
        // The checkpointer may be at work: this comes again when it is done.
        if !self.databases.get(&number).is_some_and(|d| d.seats.is_empty() && !d.checkpoints.is_busy()) {
            return;
        }
        self.end_checkpoints(number);
        if let Some(db) = self.databases.remove(&number) {
            self.unwatch(&db.linger);
            self.lingering.closed(db.identity, db.linger.stranger_waits);
            tracing::info!(database = number, "closed: its last member left");
            if let State::Gated { gate, segment } = db.state {
                // Processes whose seats rested have it mapped.
                segment.control.poison();
                gate.open();
            }
            // Last: what it unlocks by itself it does when no broker is left.
            self.keeping.database_gone(number);
        }
    }
}

fn guest(reason: &str) -> Result<State, Refused> {
    let turns = ControlMap::private().map_err(|e| (Refusal::Exhausted, format!("no memory: {e}")))?;
    Ok(State::Guest { reason: reason.into(), turns })
}

fn read_only_segment(segment: &Segment) -> std::io::Result<[OwnedFd; 2]> {
    use crate::segment::memfd::reopen_read_only;
    Ok([reopen_read_only(&segment.control_fd)?, reopen_read_only(&segment.wal_index_fd)?])
}

/// Takes the gate on the candidate's own descriptor. `Ok(None)`: plain clients hold the file.
fn try_gate(candidate: &mut Candidate) -> Result<Option<State>, Refused> {
    let exhausted = |e: std::io::Error| (Refusal::Exhausted, format!("cannot make the segment: {e}"));
    let database = candidate.database.try_clone().map_err(exhausted)?;
    let shm = candidate.shm.as_ref().map(|fd| fd.try_clone()).transpose().map_err(exhausted)?;
    match gate::close(database, shm) {
        Ok(gate) => {
            let segment = match Segment::create() {
                Ok(segment) => Box::new(segment),
                Err(e) => {
                    gate.open();
                    return Err(exhausted(e));
                }
            };
            Ok(Some(State::Gated { gate, segment }))
        }
        Err((GateError::Conflict(Conflict::Plain(_)), ..)) => Ok(None),
        Err((GateError::Conflict(Conflict::OtherGate), ..)) => Err((
            Refusal::OtherBroker,
            format!(
                "another broker has it, or members whose broker is gone hold the gate of '{}' and have not come back \
                 yet: use that broker's socket, or end those processes (`fuser` names them)",
                candidate.home.display()
            ),
        )),
        Err((e @ GateError::Unholdable(_), ..)) => Err((Refusal::Exhausted, e.to_string())),
        Err((GateError::Unlockable(e), ..)) => {
            Err((Refusal::UnsafePlace, format!("the filesystem cannot lock it: {e}")))
        }
    }
}
