//! Waits that would never end because they wait for each other: the youngest of a cycle yields.

use super::server::Server;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::wire::message::SeatKey;
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// How many seats are looked at to find a cycle; a longer one ends at its waiters' limits.
const CYCLE_LOOKS: usize = 4096;
/// The same for all waits that are looked at in one round: the others' is the next one. What seats say in the segment may
/// be anything, and a member that has a thousand of them must not keep the broker busy.
const ROUND_LOOKS: usize = 4 * CYCLE_LOOKS;
/// A cycle that looks the same for so long is one.
const CYCLE_STANDS: Duration = Duration::from_millis(12);

/// A wait that may be part of a cycle.
pub struct Cycle {
    start: SeatKey,
    /// As it was first seen, and when. Empty: not looked at yet.
    path: Vec<(SeatKey, u64)>,
    seen: Instant,
}

/// Those that have to be looked at, the next one first.
#[derive(Default)]
pub struct Cycles {
    line: VecDeque<Cycle>,
    /// Their starts.
    known: BTreeSet<SeatKey>,
}

impl Cycles {
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }
}

impl Server {
    /// The seat has begun to wait. If that closes a cycle, it is the youngest waiter of it, and will yield.
    pub(super) fn look_for_cycle(&mut self, start: SeatKey, now: Instant) {
        if !planted("cycles-wait") && self.cycles.known.insert(start) {
            self.cycles.line.push_back(Cycle { start, path: Vec::new(), seen: now });
        }
    }

    /// Ends the cycles that have stood still. What is read in the segments changes while it is read: a holder that
    /// has just given its turn to a waiter and waits itself looks like a cycle, for a moment.
    pub(super) fn break_cycles(&mut self, now: Instant) {
        let mut looks = ROUND_LOOKS;
        for _ in 0..self.cycles.line.len() {
            if looks < CYCLE_LOOKS {
                return;
            }
            let Some(cycle) = self.cycles.line.pop_front() else { return };
            let mut left = CYCLE_LOOKS;
            let path = self.cycle(cycle.start, &mut left);
            looks -= CYCLE_LOOKS - left;
            let Some(path) = path else {
                self.cycles.known.remove(&cycle.start);
                continue;
            };
            if path != cycle.path {
                self.cycles.line.push_back(Cycle { path, seen: now, ..cycle });
                continue;
            }
            // The youngest yields; the others were seen waiting when it was looked at.
            let mine = (self.stamp(cycle.start), cycle.start);
            let youngest = cycle.path.iter().skip(1).all(|(key, since)| (*since, *key) <= mine);
            let stands = if youngest { CYCLE_STANDS } else { 4 * CYCLE_STANDS };
            if now.duration_since(cycle.seen) < stands {
                self.cycles.line.push_back(cycle);
                continue;
            }
            let key = cycle.start;
            self.cycles.known.remove(&key);
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
            self.end_wait(key, true);
        }
    }

    /// A cycle of waits through `start`: who waits for whom, each with what changes when it moves on. `looks`: how many
    /// seats may be looked at; those that were are taken off.
    fn cycle(&self, start: SeatKey, looks: &mut usize) -> Option<Vec<(SeatKey, u64)>> {
        let mine = self.connection_of(start)?;
        let mut followed = BTreeSet::new();
        // Waiters and blockers in turn, each with the one that led to it.
        let mut steps: Vec<(SeatKey, usize)> = vec![(start, 0)];
        let mut next = 0;
        while next < steps.len() {
            let waiter = steps[next].0;
            for blocker in self.blockers(waiter) {
                *looks = looks.checked_sub(1)?;
                let Some(connection) = self.connection_of(blocker) else { continue };
                if connection == mine {
                    let mut path = vec![(blocker, self.stamp(blocker))];
                    let mut step = next;
                    while step != 0 {
                        path.push((steps[step].0, self.stamp(steps[step].0)));
                        step = steps[step].1;
                    }
                    path.push((start, self.stamp(start)));
                    return Some(path);
                }
                // Each connection is followed once, to wherever it waits.
                if followed.insert(connection) {
                    self.waits_of(connection, looks, |waiter| steps.push((waiter, next)))?;
                }
            }
            next += 1;
        }
        None
    }

    /// The seats in which a connection waits. `None`: too many to look at.
    fn waits_of(
        &self,
        connection: (u64, u64),
        looks: &mut usize,
        mut found: impl FnMut(SeatKey),
    ) -> Option<()> {
        let session = self.sessions.get(&connection.0)?;
        *looks = looks.checked_sub(session.seats.len())?;
        for key in &session.seats {
            let waits = self.databases.get(&key.database).is_some_and(|db| db.waits(key.seat));
            if waits && self.connection_of(*key) == Some(connection) {
                found(*key);
            }
        }
        Some(())
    }

    /// When the seat's wait began.
    fn stamp(&self, key: SeatKey) -> u64 {
        let words = self.databases.get(&key.database).and_then(|d| d.table().seat(key.seat));
        words.map_or(0, |w| w.since.load(SeqCst))
    }
}
