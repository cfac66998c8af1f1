//! A database that nobody has yet: its gate, or guest mode when plain clients hold the file. Members that were left alone
//! are looked for.

use super::database::{Database, Segment, State};
use super::foreign::Second;
use super::join::{Candidate, Refused};
use super::server::Server;
use crate::planted::planted;
use crate::segment::gate::{self, Conflict, GateError};
use crate::segment::mapping::ControlMap;
use crate::segment::names::Place;
use crate::wire::message::{Join, Refusal, Role};
use std::time::{Duration, Instant};

/// How long the gate is tried for: a plain client may just be passing.
const GATE_PATIENCE: Duration = Duration::from_millis(100);
/// Between two tries.
const GATE_RETRY: Duration = Duration::from_millis(2);
/// How long members that were left alone are looked for.
const SEARCH_PATIENCE: Duration = Duration::from_secs(5);

/// A join that waits for the gate.
pub(super) struct Pending {
    pub session: u64,
    pub id: u64,
    pub join: Join,
    pub candidate: Candidate,
    pub _seconds: Vec<Second>,
}

/// A database whose gate is being tried for.
pub struct Forming {
    pub(super) joins: Vec<Pending>,
    since: Instant,
    pub next_try: Instant,
    /// The search that is waited for, its gate being held by members without a broker, or another one's.
    search: Option<u64>,
}

impl Forming {
    pub(super) fn new(first: Pending, now: Instant) -> Forming {
        Forming { joins: vec![first], since: now, next_try: now, search: None }
    }

    pub fn forget_session(&mut self, session: u64) {
        self.joins.retain(|p| p.session != session);
    }
}

impl Server {
    /// Tries the gate of every forming database that is due.
    pub(super) fn try_forming(&mut self, now: Instant) {
        if self.forming.first().is_none_or(|first| now < first.next_try) {
            return;
        }
        let (due, rest) =
            std::mem::take(&mut self.forming).into_iter().partition(|f: &Forming| now >= f.next_try);
        self.forming = rest;
        for mut forming in due {
            let uid = forming.joins.first().map_or(0, |p| self.uid_of(p.session));
            if !self.shares.has_more(uid) {
                forming.next_try = now + GATE_RETRY;
                self.forming.push(forming);
                continue;
            }
            let begun = Instant::now();
            self.try_one(forming, now);
            self.shares.charge(uid, begun.elapsed());
        }
        self.forming.sort_by_key(|f| f.next_try);
    }

    /// The first try.
    pub(super) fn try_new(&mut self, forming: Forming, now: Instant) {
        self.try_one(forming, now);
        self.forming.sort_by_key(|f| f.next_try);
    }

    fn try_one(&mut self, mut forming: Forming, now: Instant) {
        let sessions = &self.sessions;
        forming.joins.retain(|p| sessions.contains_key(&p.session));
        let Some(first) = forming.joins.first_mut() else { return };
        if let Some(number) = self.number_of(first.candidate.identity) {
            // Its members have come back, or were found.
            return self.take_seats(number, forming.joins);
        }
        let place = self.listener.place();
        let state = if gate::stands(&first.candidate.database) && !planted("other-gate-is-plain") {
            Err(other_gate(&first.candidate))
        } else if first.join.guest {
            guest("asked for (TURNSTILE_MODE=guest)")
        } else if first.candidate.role == Role::ReadOnly {
            guest("the first member may only read, and a gate needs a writer")
        } else if first.candidate.shm_unseen {
            guest("its -shm file cannot be opened for writing by the first member")
        } else {
            match try_gate(&mut first.candidate, place) {
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
            Err((Refusal::OtherBroker, _)) if self.is_looked_for(&mut forming, now) => {
                forming.next_try = now + GATE_RETRY;
                self.forming.push(forming);
            }
            Err((why, reason)) => {
                for p in forming.joins {
                    self.refuse(p.session, p.id, why, reason.clone());
                }
            }
            Ok(state) => {
                let number = self.found(&forming.joins[0], state);
                self.take_seats(number, forming.joins);
            }
        }
    }

    fn take_seats(&mut self, number: u32, joins: Vec<Pending>) {
        for p in joins {
            let (session, id) = (p.session, p.id);
            if let Err((why, reason)) = self.take_seat(number, p) {
                self.refuse(session, id, why, reason);
            }
        }
        self.drop_if_unused(number);
    }

    /// A search that has begun since has not ended.
    fn is_looked_for(&mut self, forming: &mut Forming, now: Instant) -> bool {
        let over = now.duration_since(forming.since) >= SEARCH_PATIENCE;
        if over || self.options.finder.is_none() || planted("members-not-looked-for") {
            return false;
        }
        forming.search = forming.search.or_else(|| self.searching.next());
        let Some(search) = forming.search.filter(|s| !self.searching.has_ended(*s)) else { return false };
        self.search(now, search);
        true
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
        self.add_database(number, db);
        self.offer_checkpoints(number);
        self.recall(number);
        number
    }
}

fn guest(reason: &str) -> Result<State, Refused> {
    let turns = ControlMap::private().map_err(|e| (Refusal::Exhausted, format!("no memory: {e}")))?;
    Ok(State::Guest { reason: reason.into(), turns })
}

fn other_gate(candidate: &Candidate) -> Refused {
    let reason = format!(
        "another broker has it, or members whose broker is gone hold the gate of '{}', have not come back yet and cannot \
         be found: use that broker's socket, or end those processes (`fuser` names them)",
        candidate.home.display()
    );
    (Refusal::OtherBroker, reason)
}

/// Takes the gate on the candidate's own descriptor. `Ok(None)`: plain clients hold the file.
fn try_gate(candidate: &mut Candidate, place: Place) -> Result<Option<State>, Refused> {
    let exhausted = |e: std::io::Error| (Refusal::Exhausted, format!("cannot make the segment: {e}"));
    let database = candidate.database.try_clone().map_err(exhausted)?;
    let shm = candidate.shm.as_ref().map(|fd| fd.try_clone()).transpose().map_err(exhausted)?;
    let nonce = super::session::random().map_err(|e| (Refusal::Exhausted, e))?;
    let nonce = u64::from_ne_bytes(nonce);
    match gate::close(database, shm, nonce) {
        Ok(gate) => {
            let segment = match Segment::create(nonce, place) {
                Ok(segment) => Box::new(segment),
                Err(e) => {
                    gate.open();
                    return Err(exhausted(e));
                }
            };
            Ok(Some(State::Gated { gate, segment }))
        }
        Err((GateError::Conflict(Conflict::Plain(_)), ..)) => Ok(None),
        Err((GateError::Conflict(Conflict::OtherGate), ..)) => Err(other_gate(candidate)),
        Err((e @ GateError::Unholdable(_), ..)) => Err((Refusal::Exhausted, e.to_string())),
        Err((GateError::Unlockable(e), ..)) => {
            Err((Refusal::UnsafePlace, format!("the filesystem cannot lock it: {e}")))
        }
    }
}
