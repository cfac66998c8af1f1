//! What the processes of a workload did, one by one and together.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// SQLite's message for `SQLITE_BUSY`, `sqlite3ErrStr` in main.c.
pub const LOCKED: &str = "database is locked";

/// What one process did.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
pub struct Tally {
    pub number: usize,
    /// Statements tried. All that were neither committed nor locked failed with `error`.
    pub attempts: u64,
    /// Statements that returned success.
    pub committed: u64,
    /// Statements that failed with [`LOCKED`].
    pub locked: u64,
    /// The longest time from wanting to write a row to having written it, failed attempts included.
    pub worst_wait_ms: f64,
    /// The longest time that one statement took, whatever came of it.
    pub worst_attempt_ms: f64,
    /// How turnstile served it, where it can tell.
    pub mode: Option<String>,
    /// What else went wrong; it ended the work.
    pub error: Option<String>,
}

/// What all processes of a workload did on one side.
#[derive(Debug, Clone, Default, Serialize, PartialEq)]
pub struct Outcome {
    pub processes: usize,
    pub attempts: u64,
    pub committed: u64,
    pub locked: u64,
    /// Attempts that failed in any other way, and processes that ended without a result.
    pub failed_otherwise: u64,
    /// Rows in the file when all was over, counted by plain SQLite. `None`: it could not be read.
    pub rows: Option<u64>,
    /// Commits of the process with the fewest and of the one with the most.
    pub least: u64,
    pub most: u64,
    pub worst_wait_ms: f64,
    pub worst_attempt_ms: f64,
    /// From the common start to the last process's end.
    pub seconds: f64,
    /// What went wrong other than [`LOCKED`], in words.
    pub problems: Vec<String>,
}

impl Outcome {
    /// Adds up. `Err`: a process without a result, and why.
    pub fn of(results: &[Result<Tally, String>]) -> Outcome {
        let mut all = Outcome { processes: results.len(), least: u64::MAX, ..Outcome::default() };
        for (number, result) in results.iter().enumerate() {
            let lost = Tally::default();
            let tally = result.as_ref().unwrap_or(&lost);
            all.attempts += tally.attempts;
            all.committed += tally.committed;
            all.locked += tally.locked;
            all.least = all.least.min(tally.committed);
            all.most = all.most.max(tally.committed);
            all.worst_wait_ms = all.worst_wait_ms.max(tally.worst_wait_ms);
            all.worst_attempt_ms = all.worst_attempt_ms.max(tally.worst_attempt_ms);
            let problem = result.as_ref().map_or_else(Some, |t| t.error.as_ref());
            if let Some(problem) = problem {
                all.failed_otherwise += 1;
                all.problems.push(format!("process {}: {problem}", number + 1));
            }
        }
        all.least = all.least.min(all.most);
        all
    }

    /// The least commits of a process by the most: 1 is fair, 0 is a process that got nothing.
    pub fn fairness(&self) -> f64 {
        if self.most == 0 { 0.0 } else { self.least as f64 / self.most as f64 }
    }

    /// Nothing failed, and the file holds what was committed, no less and no more.
    pub fn is_flawless(&self) -> bool {
        self.locked == 0 && self.problems.is_empty() && self.rows == Some(self.committed)
    }
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(committed: u64, locked: u64) -> Tally {
        Tally { attempts: committed + locked, committed, locked, ..Tally::default() }
    }

    #[test]
    fn a_process_without_a_result_is_a_failure_and_committed_nothing() {
        let all = Outcome::of(&[Ok(tally(5, 0)), Err("did not end".to_owned())]);
        assert_eq!((all.committed, all.least, all.most, all.failed_otherwise), (5, 0, 5, 1));
        assert_eq!(all.problems, ["process 2: did not end"]);
        assert!(!Outcome { rows: Some(5), ..all }.is_flawless());
    }

    #[test]
    fn a_lost_row_is_a_flaw_and_so_is_one_too_many() {
        let all = Outcome::of(&[Ok(tally(5, 0)), Ok(tally(4, 0))]);
        assert!(Outcome { rows: Some(9), ..all.clone() }.is_flawless());
        for rows in [Some(8), Some(10), None] {
            assert!(!Outcome { rows, ..all.clone() }.is_flawless());
        }
        assert_eq!(all.fairness(), 0.8);
    }

    #[test]
    fn nobody_commits_is_not_fair() {
        assert_eq!(Outcome::of(&[Ok(tally(0, 3)), Ok(tally(0, 3))]).fairness(), 0.0);
    }
}
