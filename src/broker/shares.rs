//! The loop's time, shared by users: who has taken the least of late is served first, and nobody takes more than a slice of
//! a round while others may wait. A user may have as many sessions as it likes for that.

use super::database::State;
use super::server::Server;
use crate::planted::planted;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Of a round, for one user. What is left over is served in the next one, which follows at once.
pub const SLICE: Duration = Duration::from_millis(2);
/// What was taken is forgotten by halves.
const HALVED: Duration = Duration::from_millis(50);
/// The gates of one user's databases are looked at for a twentieth of the time at most: a look takes as long as others'
/// locks on the file are many.
const GATES: u32 = 20;

#[derive(Debug)]
struct Taken {
    round: Duration,
    lately: Duration,
}

/// Where the look at a user's gates goes on, and not before when.
#[derive(Debug)]
pub struct Look {
    pub from: u32,
    pub not_before: Instant,
    pub spent: Duration,
}

#[derive(Debug, Default)]
pub struct Shares {
    users: BTreeMap<u32, Taken>,
    halved: Option<Instant>,
    gates: BTreeMap<u32, Look>,
}

impl Shares {
    pub fn next_round(&mut self, now: Instant) {
        let halve = self.halved.is_none_or(|at| now.saturating_duration_since(at) >= HALVED);
        self.users.retain(|_, user| {
            user.round = Duration::ZERO;
            user.lately /= if halve { 2 } else { 1 };
            user.lately > Duration::from_micros(1)
        });
        if halve {
            self.halved = Some(now);
        }
    }

    pub fn charge(&mut self, uid: u32, took: Duration) {
        let user = self.users.entry(uid).or_insert(Taken { round: Duration::ZERO, lately: Duration::ZERO });
        user.round += took;
        user.lately += took;
    }

    /// There is something left of its slice.
    pub fn has_more(&self, uid: u32) -> bool {
        self.users.get(&uid).is_none_or(|user| user.round < SLICE) || planted("no-shares")
    }

    /// What orders users: what they have taken of late.
    pub fn lately(&self, uid: u32) -> Duration {
        self.users.get(&uid).filter(|_| !planted("no-shares")).map_or(Duration::ZERO, |user| user.lately)
    }

    /// Whether this database's gate is to be looked at now; the caller says what it took.
    pub fn looks_at_gate(&mut self, uid: u32, number: u32, now: Instant) -> bool {
        let look = self.gates.entry(uid).or_insert(Look { from: 0, not_before: now, spent: Duration::ZERO });
        if now < look.not_before || number < look.from {
            return false;
        }
        if look.spent >= SLICE {
            // The first one that is left out is the next one.
            look.not_before = now + GATES * look.spent;
            look.from = number;
            return false;
        }
        true
    }

    pub fn looked_at_gate(&mut self, uid: u32, took: Duration) {
        if let Some(look) = self.gates.get_mut(&uid) {
            look.spent += took;
        }
    }

    /// All have been looked at, or left out.
    pub fn end_looks(&mut self, now: Instant) {
        self.gates.retain(|_, look| {
            if look.not_before <= now {
                look.from = 0;
                if look.spent >= SLICE {
                    look.not_before = now + GATES * look.spent;
                }
            }
            look.spent = Duration::ZERO;
            look.not_before > now
        });
    }
}

impl Server {
    pub(super) fn look_at_gates(&mut self, now: Instant) {
        for (number, db) in &self.databases {
            let State::Gated { gate, segment } = &db.state else { continue };
            if !self.shares.looks_at_gate(db.founder, *number, now) {
                continue;
            }
            let begun = Instant::now();
            if !gate.stands() && !segment.control.poisoned() {
                tracing::error!(database = ?db.identity, "somebody unlocked the gate: the segment is poisoned");
                segment.control.poison();
            }
            self.shares.looked_at_gate(db.founder, begun.elapsed());
        }
        self.shares.end_looks(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planted::fails_without;

    #[test]
    fn who_has_taken_much_comes_last_and_stops_for_others() {
        fails_without("no-shares", || {
            let now = Instant::now();
            let mut shares = Shares::default();
            shares.next_round(now);
            for _ in 0..100 {
                if shares.has_more(1) {
                    shares.charge(1, SLICE / 4);
                }
            }
            shares.charge(2, SLICE / 4);
            assert!(shares.lately(1) <= SLICE && !shares.has_more(1) && shares.has_more(2));
            let mut users = [1, 2, 3];
            users.sort_by_key(|uid| shares.lately(*uid));
            assert_eq!(users, [3, 2, 1]);
            shares.next_round(now);
            assert!(shares.has_more(1) && shares.lately(1) > shares.lately(2));
            (1..100).for_each(|n| shares.next_round(now + n * HALVED));
            assert_eq!(shares.lately(1), Duration::ZERO);
        });
    }

    #[test]
    fn slow_looks_are_seldom_and_reach_every_gate() {
        let mut now = Instant::now();
        let mut shares = Shares::default();
        let mut seen = Vec::new();
        for _ in 0..200 {
            for number in 1..=10 {
                if shares.looks_at_gate(1, number, now) {
                    shares.looked_at_gate(1, SLICE * 2);
                    seen.push(number);
                }
                assert!(shares.looks_at_gate(2, number, now), "another user's are not put off");
            }
            shares.end_looks(now);
            now += Duration::from_millis(50);
        }
        // One in 80 ms, each in its turn.
        assert!((90..=200).contains(&seen.len()), "{}", seen.len());
        assert!((1..=10).all(|number| seen.iter().filter(|n| **n == number).count() >= 9), "{seen:?}");
    }
}
