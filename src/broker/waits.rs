//! Waits that would never end are ended: cycles, and turns that nobody uses.

use super::database::Suspect;
use super::server::Server;
use crate::lock::Verdict;
use crate::wire::message::{Blocker, SeatKey};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How far a chain of waits is followed; a longer cycle ends at its waiters' limits.
const CYCLE_STEPS: usize = 4096;
/// How often a suspect is looked at.
pub const SUSPECT_TICK: Duration = Duration::from_millis(4);
/// Nanoseconds that a suspect may run without asking for its next lock (a statement may be prepared anew in it).
const SUSPECT_RAN: u64 = 8_000_000;
/// A suspect that sleeps (a page read from a slow disk, wal.c between two tries, a stopped process) is given this
/// long.
const SUSPECT_LIMIT: Duration = Duration::from_millis(200);
const IDLE_SUSPECT_LIMIT: Duration = Duration::from_millis(50);

impl Server {
    /// Takes unused turns back from threads that have been running, not from those that wait for a processor:
    /// on a busy machine a thread may be kept from its next instruction for longer than any fixed limit that
    /// the writers behind it would accept.
    pub(super) fn judge_suspects(&mut self, now: Instant) {
        for db in self.databases.values_mut() {
            let Some(unused) = db.locks.suspect(now) else {
                db.suspect = None;
                continue;
            };
            let Some(seat) = db.seats.get(&unused.seat) else { continue };
            let ran =
                self.sessions.get(&seat.session).and_then(|s| time_on_processor(s.peer.pid, seat.thread));
            let Some(first) = db.suspect.filter(|s| s.unused == unused) else {
                db.suspect = Some(Suspect { unused, ran });
                continue;
            };
            let limit = if unused.idle { IDLE_SUSPECT_LIMIT } else { SUSPECT_LIMIT };
            let moved_on = match (first.ran, ran) {
                (Some(before), Some(after)) => after.saturating_sub(before) >= SUSPECT_RAN,
                _ => true, // the kernel does not say: by the clock alone
            };
            if moved_on || now.duration_since(unused.since) >= limit {
                tracing::debug!(seat = unused.seat, "turn taken back: no write lock followed");
                db.locks.revoke(unused.seat);
                db.suspect = None;
            }
        }
    }

    /// The seat has just begun to wait. If that closes a cycle, it is the youngest waiter of it, and yields.
    pub(super) fn break_cycle(&mut self, key: SeatKey, now: Instant) {
        if !crate::planted::planted("cycles-wait") && self.closes_cycle(key) {
            if let Some(blocker) = self.blocker_of(key) {
                tracing::warn!(
                    database = key.database,
                    seat = key.seat,
                    "deadlock: a cycle of waits through {} (pid {}); the youngest waiter yields",
                    blocker.program,
                    blocker.pid
                );
            }
            if let Some(db) = self.databases.get_mut(&key.database) {
                db.deadlocks += 1;
            }
            self.end_wait(key, now, true);
        }
    }

    fn closes_cycle(&self, start: SeatKey) -> bool {
        let Some(mine) = self.connection_of(start) else { return false };
        let mut todo = self.blockers(start);
        if todo.iter().any(|b| self.connection_of(*b) == Some(mine)) {
            return true;
        }
        // Only a connection that has another seat can be waited for through a cycle of more than one.
        let mut waiting: BTreeMap<(u64, u64), Vec<SeatKey>> = BTreeMap::new();
        for (number, db) in &self.databases {
            for (seat, _, _) in db.locks.waiting() {
                let waiter = SeatKey { database: *number, seat };
                if let Some(connection) = self.connection_of(waiter) {
                    waiting.entry(connection).or_default().push(waiter);
                }
            }
        }
        let mut steps = 0;
        while let Some(blocker) = todo.pop() {
            let Some(connection) = self.connection_of(blocker) else { continue };
            if connection == mine {
                return true;
            }
            // Each waiting connection is followed once.
            for waiter in waiting.remove(&connection).unwrap_or_default() {
                todo.extend(self.blockers(waiter));
            }
            steps += 1;
            if steps > CYCLE_STEPS {
                return false;
            }
        }
        false
    }

    fn connection_of(&self, key: SeatKey) -> Option<(u64, u64)> {
        let seat = self.databases.get(&key.database)?.seats.get(&key.seat)?;
        Some((seat.session, seat.connection))
    }

    fn blockers(&self, key: SeatKey) -> Vec<SeatKey> {
        let seats = self.databases.get(&key.database).map(|d| d.locks.blockers(key.seat)).unwrap_or_default();
        seats.into_iter().map(|seat| SeatKey { database: key.database, seat }).collect()
    }

    /// The first one that the seat waits for, described.
    pub(super) fn blocker_of(&self, key: SeatKey) -> Option<Blocker> {
        let blocker = *self.blockers(key).first()?;
        let db = self.databases.get(&blocker.database)?;
        let seat = db.seats.get(&blocker.seat)?;
        let session = self.sessions.get(&seat.session)?;
        let held = match db.locks.turn().holder().filter(|h| h.seat == blocker.seat) {
            Some(h) => h.since.elapsed(),
            None => seat.since.elapsed().unwrap_or_default(),
        };
        Some(Blocker {
            pid: session.pid(),
            program: session.who.program.clone(),
            container: session.who.container.clone(),
            held_ms: held.as_millis() as u64,
        })
    }

    /// Ends a wait: the request is answered without waiting.
    pub(super) fn end_wait(&mut self, key: SeatKey, now: Instant, deadlock: bool) {
        let blocker = self.blocker_of(key);
        let Some(db) = self.databases.get_mut(&key.database) else { return };
        // None: it was answered before the cancellation arrived.
        let Some(verdict) = db.locks.give_up(key.seat, now) else { return };
        let Some(seat) = db.seats.get_mut(&key.seat) else { return };
        if let Some(request) = seat.request.take() {
            let session = seat.session;
            let blocker = blocker.filter(|_| verdict == Verdict::Busy || deadlock);
            self.answer(session, request, verdict, deadlock, blocker);
        }
    }
}

/// Nanoseconds that a thread has spent on a processor (`/proc/PID/task/TID/schedstat`, first field). A thread of
/// another pid namespace has another number here and is not found.
fn time_on_processor(pid: i32, thread: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
    text.split(' ').next()?.parse().ok()
}
