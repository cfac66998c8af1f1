//! Whose fault it is when the checkpointer dies: a member can write into its wal-index, its WAL and its database what
//! SQLite has never met. The databases at which it was at work are suspect, and only a database that it dies at again
//! and again is left to its members. A suspect is worked at alone, so that the next death says which one it was.

use super::server::Server;
use crate::planted::planted;
use std::time::{Duration, Instant};

/// So many deaths within [`DEATHS_WITHIN`] at one database, or at none, and there is no next time.
const DEATHS: usize = 4;
/// So many at all the databases of one user.
const DEATHS_OF_A_USER: usize = 3 * DEATHS;
const DEATHS_WITHIN: Duration = Duration::from_secs(60);
/// A suspect that takes longer is not alone any more: others' WALs grow meanwhile.
const ALONE: Duration = Duration::from_secs(1);

/// When the checkpointer has died of late, at one database or at none.
#[derive(Debug, Default)]
pub struct Deaths(Vec<Instant>);

impl Deaths {
    fn another(&mut self, now: Instant) {
        self.0.retain(|at| now.duration_since(*at) < DEATHS_WITHIN);
        self.0.push(now);
    }

    fn count(&self, now: Instant) -> usize {
        self.0.iter().filter(|at| now.duration_since(**at) < DEATHS_WITHIN).count()
    }
}

impl Server {
    /// Whether this database's checkpoint may begin now: not beside a suspect's, and a suspect's not beside any.
    pub(super) fn may_checkpoint(&self, number: u32, now: Instant) -> bool {
        let suspect = self.databases.get(&number).is_some_and(|d| d.checkpoints.deaths.count(now) != 0);
        let at_work = self.checkpointing.iter().filter_map(|number| self.databases.get(number));
        let in_the_way = at_work.filter_map(|d| {
            let running = now.duration_since(d.checkpoints.since()?);
            Some(running < ALONE && (suspect || d.checkpoints.deaths.count(now) != 0))
        });
        !in_the_way.into_iter().any(|is| is)
    }

    /// The checkpointer has died. To be called before what it was doing is forgotten.
    pub(super) fn blame(&mut self, status: &str) {
        let now = Instant::now();
        let at_work = |d: &&mut super::database::Database| d.checkpoints.is_running();
        let suspects: Vec<_> = self.databases.values_mut().filter(at_work).collect();
        if suspects.is_empty() || planted("one-dies-for-all") {
            self.checkpointer.deaths.another(now);
            if self.checkpointer.deaths.count(now) >= DEATHS {
                self.give_up(&format!("the checkpointer ended {DEATHS} times within a minute ({status})"));
            }
            return;
        }
        let founder = suspects.first().map(|db| db.founder).filter(|_| suspects.len() == 1);
        for db in suspects {
            db.checkpoints.deaths.another(now);
            if db.checkpoints.deaths.count(now) >= DEATHS {
                db.leave_to_members(&format!(
                    "the checkpointer ended {DEATHS} times within a minute at this database ({status})"
                ));
            }
        }
        let Some(uid) = founder else { return };
        self.checkpointer.deaths_by_user.entry(uid).or_default().another(now);
        if let Some(reason) = self.given_up_on(uid) {
            let theirs = self.databases.values_mut().filter(|d| d.founder == uid && !d.is_guest());
            theirs.for_each(|d| d.leave_to_members(&reason));
        }
    }

    /// Why databases that this user was the first to open are left to their members, if they are.
    pub(super) fn given_up_on(&self, uid: u32) -> Option<String> {
        let deaths = self.checkpointer.deaths_by_user.get(&uid)?.count(Instant::now());
        (deaths >= DEATHS_OF_A_USER).then(|| {
            format!("the checkpointer ended {deaths} times within a minute at databases of user {uid}")
        })
    }
}
