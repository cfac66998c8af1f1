//! After a failed sync of the WAL.

use super::main_file::MainFile;
use crate::lock::commits::Commits;
use crate::lock::slot;
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::time::{Duration, Instant};

/// How long the one that cuts the WAL back after a failed sync waits for a writer that is just writing.
const REPAIR_PATIENCE: Duration = Duration::from_secs(5);

impl MainFile {
    /// A sync of the WAL has failed. Before anybody is told that its commit did, the WAL is cut back to what is durable, or
    /// a recovery would bring those commits back, beside the ones with which applications tried again. Whoever finds it
    /// so does it. False: somebody has held WRITE or CHECKPOINT all the time.
    pub(super) fn repair(&mut self) -> bool {
        let Some(shared) = self.gated().and_then(|m| m.shared().cloned()) else { return false };
        let Some(commits) = shared.commits() else { return false };
        let writes = shared.table().is_some();
        let end = Instant::now() + REPAIR_PATIENCE;
        let wanted = (1 << slot::WRITE | 1 << slot::CHECKPOINT) & !self.exclusive_slots;
        while commits.has_failed() {
            if writes && self.gated().is_some_and(|m| m.fence(wanted)) {
                let done = !commits.has_failed() || self.cut_back(commits);
                if let Some(member) = self.gated() {
                    member.unfence(wanted);
                }
                return done;
            }
            if Instant::now() >= end {
                let text = format!(
                    "after a failed sync the WAL of {} could not be cut back: a writer or a checkpoint holds it",
                    self.path
                );
                self.library.log(ffi::SQLITE_IOERR_FSYNC, &text);
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Under WRITE and CHECKPOINT: cuts the WAL, and has the index recovered from what is left.
    fn cut_back(&self, commits: Commits) -> bool {
        let (Some(wal), Some(index)) = (self.wal_file, self.wal_index) else { return false };
        // Not counted: nobody's commit waited, and the one that synced was not published.
        let published = || index.valid_header().filter(|h| h.frames() != 0).map(|h| h.length());
        let length = commits.cut_at().or_else(published);
        let rc = match length {
            Some(length) if !planted("wal-not-cut") => wal.truncate(length),
            _ => ffi::SQLITE_OK,
        };
        let text = match (rc, length) {
            (ffi::SQLITE_OK, Some(length)) => {
                format!("a sync of the WAL of {} failed: it is cut back to {length} bytes", self.path)
            }
            (ffi::SQLITE_OK, None) => format!("a sync of the WAL of {} failed", self.path),
            _ => format!("the WAL of {} cannot be cut back after a failed sync ({rc})", self.path),
        };
        self.library.log(ffi::SQLITE_IOERR_FSYNC, &text);
        if let Some(member) = self.gated() {
            member.log(&text);
        }
        if rc != ffi::SQLITE_OK {
            return false;
        }
        index.forget_header();
        commits.repaired();
        true
    }
}
