//! Durable commits at `synchronous=FULL`: a commit's sync of the WAL becomes a number (see [`crate::lock::commits`]),
//! and the wait for it comes after the write lock is given back.
//!
//! What SQLite does, in this order (wal.c `walFrames`, pager.c `pager_end_transaction`; the same in 3.40 and 3.54, and
//! held by a test): it writes the frames, the last one with the commit mark; syncs the WAL ([`sync_wal`](super::wal::sync_wal): here the number
//! is issued and nothing synced); publishes the commit in the wal-index; releases WRITE; and calls
//! `SQLITE_FCNTL_COMMIT_PHASETWO` ([`MainFile::commit_is_durable`]: here it waits), whose error is the commit's.
//!
//! Syncs that are made at once, because order matters: of the WAL's header, a checkpoint's, on a device without
//! `POWERSAFE_OVERWRITE`, the first commit of a generation, and whenever the connection writes more than one file (with a
//! super-journal SQLite ignores the result of COMMIT_PHASETWO).
//!
//! **Readers never see what power loss could undo**: who takes a snapshot that may hold a commit which is not yet
//! durable waits for that sync at its first page read. A writing statement in its turn need not, as long as nothing of
//! what it reads gets out: it waits at its own commit, or when its transaction ends otherwise, or when a statement that
//! returns rows starts in it.

use super::main_file::MainFile;
use crate::lock::commits::Awaited;
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::ffi::c_int;

impl MainFile {
    /// The connection writes no other file in this transaction.
    pub(super) fn shares_its_sync(&self) -> bool {
        let (api, db) = (&self.library.api, self.db());
        let Some(db_name) = api.db_name.filter(|_| !db.is_null() && self.shares) else { return false };
        // SAFETY: the connection in whose call we are. 0 is main, 1 temp, which has no part in a super-journal.
        unsafe {
            if db_name(db, 2).is_null() || planted("several-files-share") {
                return true;
            }
            let names = std::iter::once(0).chain(2..).map(|i| db_name(db, i)).take_while(|n| !n.is_null());
            names.filter(|n| (api.txn_state)(db, *n) == ffi::SQLITE_TXN_WRITE).count() <= 1
        }
    }

    /// `SQLITE_FCNTL_COMMIT_PHASETWO`: waits until the commit is durable. SQLite's code; never BUSY.
    pub fn commit_is_durable(&mut self) -> c_int {
        if planted("killed-before-durable") {
            let _ = nix::sys::signal::raise(nix::sys::signal::SIGKILL);
        }
        let seen = self.seen.take();
        match self.commit.take().or(seen) {
            Some(_) if planted("ack-before-sync") => ffi::SQLITE_OK,
            Some(awaited) if !self.wait_for(awaited) => ffi::SQLITE_IOERR_FSYNC,
            _ => ffi::SQLITE_OK,
        }
    }

    /// The read transaction of a commit ends, and nobody has asked whether it is durable: this SQLite does not do things
    /// in the order that is relied on (or the commit failed after its frames were written). It syncs for itself from
    /// now on.
    pub fn commit_was_not_asked_for(&mut self) {
        let Some(awaited) = self.commit.take() else { return };
        self.wait_for(awaited);
        self.shares = false;
        let text =
            format!("{}: a commit ended without COMMIT_PHASETWO: it syncs by itself from now on", self.path);
        self.library.log(ffi::SQLITE_WARNING, &text);
    }

    fn wait_for(&mut self, awaited: Awaited) -> bool {
        let (Some(wal), Some(shared)) = (self.wal_file, self.gated().and_then(|m| m.shared().cloned()))
        else {
            return false;
        };
        let flags = if self.sync_flags == 0 { ffi::SQLITE_SYNC_NORMAL } else { self.sync_flags };
        let words = shared.checkpoint();
        let Some(commits) = shared.commits() else { return wal.sync(flags, words) == ffi::SQLITE_OK };
        if shared.table().is_none() {
            // It may only read the segment: a sync of its own, which it cannot share.
            return commits.durable() >= awaited.number && !commits.is_lost(awaited)
                || wal.sync(flags, words) == ffi::SQLITE_OK;
        }
        let durable = commits.wait(awaited, || {
            if planted("stopped-while-leading") {
                let _ = nix::sys::signal::raise(nix::sys::signal::SIGSTOP);
            }
            wal.sync(flags, words) == ffi::SQLITE_OK
        });
        if !durable {
            self.repair();
        }
        durable
    }

    /// A snapshot is about to be taken. False: a sync has failed, and that cannot be repaired now.
    pub fn may_take_snapshot(&mut self) -> bool {
        let shared = self.gated().and_then(|m| m.shared());
        let failed = shared.and_then(|s| s.commits()).is_some_and(|c| c.has_failed());
        !failed || self.repair()
    }

    /// The frames that a transaction writes may follow those that are there.
    pub fn may_write_wal(&self) -> bool {
        let shared = self.gated().and_then(|m| m.shared());
        !shared.and_then(|s| s.commits()).is_some_and(|c| c.has_failed())
    }

    /// A snapshot has been taken, in the turn or not: remembers the newest commit in it that is not durable yet.
    pub fn note_snapshot(&mut self) {
        self.seen_in_turn = false;
        // Every read transaction comes by here: nothing is cloned.
        let Some(shared) = self.gated().and_then(|m| m.shared()) else { return };
        let known = shared.commits().map(|c| (c.latest(), c.durable()));
        self.snapshot = known.map(|(latest, _)| latest);
        let waits = self.config.durable_reads && !planted("reads-before-sync");
        self.seen = match known {
            _ if !waits => None,
            Some((latest, durable)) => Some(latest).filter(|l| durable < l.number),
            // Laid out otherwise: nobody can say.
            None => {
                let header = self.wal_index.map(|i| i.header());
                let changed = header != self.last_header;
                self.last_header = header;
                changed.then(Awaited::unknown)
            }
        };
        if self.seen.is_some() && self.turn && self.keeps_to_itself() {
            self.seen_in_turn = true;
            self.settles_at_rows(true);
        }
    }

    /// The first page of a snapshot is about to be read. False: it never will be durable.
    #[inline]
    pub fn snapshot_is_durable(&mut self) -> bool {
        (self.seen.is_none() || self.seen_in_turn || self.settle()) && !self.snapshot_is_lost()
    }

    /// A commit in the snapshot has failed and is no more.
    fn snapshot_is_lost(&self) -> bool {
        let Some(snapshot) = self.snapshot else { return false };
        let shared = self.gated().and_then(|m| m.shared());
        shared.and_then(|s| s.commits()).is_some_and(|c| c.is_lost(snapshot))
    }

    /// Waits until the snapshot is durable.
    pub fn settle(&mut self) -> bool {
        self.seen.take().is_none_or(|seen| self.inherited() || self.wait_for(seen))
    }

    /// The read transaction is over and its locks are given back.
    pub fn snapshot_ends(&mut self) {
        self.commit_was_not_asked_for();
        if std::mem::take(&mut self.seen_in_turn) {
            self.settles_at_rows(false);
            // It has not committed (a constraint, a rollback), or less durably than others.
            self.settle();
        }
        self.seen = None;
        self.snapshot = None;
    }

    /// A checkpoint is about to copy frames, whether or not its own connection syncs.
    pub fn checkpoint_starts(&mut self) {
        let commits = self.gated().and_then(|m| m.shared().cloned());
        if let Some(awaited) = commits.and_then(|s| s.commits().and_then(|c| c.pending())) {
            self.wait_for(awaited);
        }
    }
}
