//! After a failed sync of the WAL.

use super::member::Member;
use crate::lock::commits::Commits;
use crate::lock::slot;
use crate::planted::planted;
use crate::segment::wal_index::WalIndex;
use std::time::{Duration, Instant};

/// How long the one that cuts the WAL back after a failed sync waits for a writer that is just writing.
const REPAIR_PATIENCE: Duration = Duration::from_secs(5);

/// Who finds that a sync of the WAL has failed.
pub struct Finder<'a> {
    pub member: &'a Member,
    /// The wal-index slots that it has exclusively.
    pub owned: u8,
    pub index: Option<WalIndex>,
    pub path: &'a str,
    /// Cuts the WAL to that length. SQLite's code, or the C library's error.
    pub cut: &'a dyn Fn(u64) -> Result<(), i32>,
    /// Tells the application's log.
    pub log: &'a dyn Fn(&str),
}

impl Finder<'_> {
    /// A sync of the WAL has failed. Before anybody is told that its commit did, the WAL is cut back to what is durable, or
    /// a recovery would bring those commits back, beside the ones with which applications tried again. Whoever finds it
    /// so does it. False: somebody has held WRITE or CHECKPOINT all the time.
    pub fn repair(&self) -> bool {
        let Some(shared) = self.member.shared() else { return false };
        let Some(commits) = shared.commits() else { return false };
        let writes = shared.table().is_some();
        let end = Instant::now() + REPAIR_PATIENCE;
        let wanted = (1 << slot::WRITE | 1 << slot::CHECKPOINT) & !self.owned;
        while commits.has_failed() {
            if writes && self.member.fence(wanted) {
                let done = !commits.has_failed() || self.cut_back(commits);
                self.member.unfence(wanted);
                return done;
            }
            if Instant::now() >= end {
                (self.log)(&format!(
                    "after a failed sync the WAL of {} could not be cut back: a writer or a checkpoint holds it",
                    self.path
                ));
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Under WRITE and CHECKPOINT: cuts the WAL, and has the index recovered from what is left.
    fn cut_back(&self, commits: Commits) -> bool {
        let Some(index) = self.index else { return false };
        // Not counted: nobody's commit waited, and the one that synced was not published.
        let published = || {
            index.valid_header().and_then(|h| match h.frames() {
                // What a WAL held that was begun anew is in the database. All of it goes, or the recovery finds in it the
                // commit that failed, and later ones follow frames that never reach the disk.
                0 => (!planted("empty-wal-not-cut")).then_some(0),
                _ => Some(h.length()),
            })
        };
        let length = commits.cut_at().or_else(published);
        let cut = match length {
            Some(length) if !planted("wal-not-cut") => (self.cut)(length),
            _ => Ok(()),
        };
        let text = match (cut, length) {
            (Ok(()), Some(length)) => {
                format!("a sync of the WAL of {} failed: it is cut back to {length} bytes", self.path)
            }
            (Ok(()), None) => format!("a sync of the WAL of {} failed", self.path),
            (Err(e), _) => format!("the WAL of {} cannot be cut back after a failed sync ({e})", self.path),
        };
        (self.log)(&text);
        self.member.log(&text);
        if cut.is_err() {
            return false;
        }
        index.forget_header();
        commits.repaired();
        true
    }
}
