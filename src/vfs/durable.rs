//! Durable commits at `synchronous=FULL`: a commit's sync of the WAL becomes a number (see [`crate::lock::commits`]),
//! and the wait for it comes after the write lock is given back.
//!
//! What SQLite does, in this order (wal.c `walFrames`, pager.c `pager_end_transaction`; the same in 3.40 and 3.54, and
//! held by a test): it writes the frames, the last one with the commit mark; syncs the WAL ([`sync_wal`]: here the number
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
use super::wrapped::{Kind, Wrapped};
use crate::lock::commits::{Awaited, Commits, Place};
use crate::lock::slot;
use crate::planted::planted;
use crate::segment::wal_index::Header;
use crate::wire::message::Role;
use libsqlite3_sys as ffi;
use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

type File = *mut ffi::sqlite3_file;

/// `WAL_HDRSIZE` and `WAL_FRAME_HDRSIZE` in wal.c, bytes.
const WAL_HEADER: u64 = 32;
const FRAME_HEADER: u64 = 24;
/// How long the one that cuts the WAL back after a failed sync waits for a writer that is just writing.
const REPAIR_PATIENCE: Duration = Duration::from_secs(5);

/// A connection's WAL while it is open, where its [`MainFile`] finds it.
#[derive(Clone, Copy)]
pub struct WalFile {
    file: File,
    real: *const ffi::sqlite3_io_methods,
}

impl std::fmt::Debug for WalFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WalFile")
    }
}

impl WalFile {
    fn sync(self, flags: c_int) -> c_int {
        // SAFETY: the unix VFS's own method on its own file, which is open: closing it takes it out of the MainFile.
        unsafe { (*self.real).xSync.map_or(ffi::SQLITE_IOERR_FSYNC, |f| f(self.file, flags)) }
    }

    fn truncate(self, length: u64) -> c_int {
        // SAFETY: as above.
        unsafe { (*self.real).xTruncate.map_or(ffi::SQLITE_IOERR_TRUNCATE, |f| f(self.file, length as i64)) }
    }

    /// Writing some bytes never harms those beside them.
    fn is_powersafe(self) -> bool {
        // SAFETY: as above.
        let has = unsafe { (*self.real).xDeviceCharacteristics.map_or(0, |f| f(self.file)) };
        has & ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE != 0
    }
}

/// What has been written to a WAL since its last sync.
#[derive(Debug)]
pub struct WalWrites {
    owner: *mut MainFile,
    /// The salts of a header that has been written and not synced.
    header: Option<[u8; 8]>,
    /// The salts of the last header written here.
    salts: [u8; 8],
    /// Offset of the last frame header with a commit mark.
    commit: Option<u64>,
    /// Size of the last page.
    page: u64,
}

impl WalWrites {
    /// `owner` is the database's state, which outlives the WAL's: SQLite closes the WAL first.
    pub fn new(owner: *mut MainFile) -> WalWrites {
        WalWrites { owner, header: None, salts: [0; 8], commit: None, page: 0 }
    }

    /// The database's state.
    ///
    /// # Safety
    /// No other reference to it is alive: SQLite is in a call for the WAL, so it is in none for the database.
    unsafe fn owner<'a>(&self) -> &'a mut MainFile {
        // SAFETY: by contract and that of `new`.
        unsafe { &mut *self.owner }
    }

    /// A write that went well: a header, a frame's header, or a frame's page.
    pub fn note(&mut self, bytes: &[u8], offset: i64) {
        match (bytes.len() as u64, u64::try_from(offset).unwrap_or(0)) {
            (WAL_HEADER, 0) => {
                self.salts.copy_from_slice(&bytes[16..24]);
                self.header = Some(self.salts);
            }
            (FRAME_HEADER, at) if bytes[4..8] != [0; 4] => self.commit = Some(at),
            (FRAME_HEADER, _) => {}
            (page, _) => self.page = page,
        }
    }
}

/// The WAL has been opened.
pub fn wal_opened(file: File, real: *const ffi::sqlite3_io_methods, main: &mut MainFile) {
    main.wal_file = Some(WalFile { file, real });
}

/// It is about to close.
pub fn wal_closes(writes: &WalWrites) {
    // SAFETY: SQLite is in a call for the WAL.
    unsafe { writes.owner() }.wal_file = None;
}

/// `xRead` of a WAL, before it: the snapshot is durable.
pub fn wal_is_read(writes: &WalWrites) -> bool {
    // SAFETY: SQLite is in a call for the WAL.
    unsafe { writes.owner() }.snapshot_is_durable()
}

/// A change of a WAL is about to be made.
pub fn may_write_wal(writes: &WalWrites) -> bool {
    // SAFETY: SQLite is in a call for the WAL.
    unsafe { writes.owner() }.may_write_wal()
}

/// `xSync` of a WAL.
pub fn sync_wal(w: &mut Wrapped, file: File, flags: c_int) -> c_int {
    let wal = WalFile { file, real: w.real };
    let Kind::Companion { wal: Some(writes), .. } = &mut w.kind else { return wal.sync(flags) };
    let (header, frame) = (writes.header.take(), writes.commit.take());
    // SAFETY: SQLite is in a call for the WAL.
    let main = unsafe { writes.owner() };
    let shared = main.gated().filter(|m| m.role() == Role::ReadWrite).and_then(|m| m.shared().cloned());
    let Some(commits) = shared.as_ref().and_then(|s| s.commits()) else { return wal.sync(flags) };
    let checkpoints = main.owns(slot::CHECKPOINT);
    if !checkpoints && !main.owns(slot::WRITE) {
        // locking_mode=EXCLUSIVE: its commits are not counted, and no lock of the wal-index is taken for them.
        commits.lose_count();
        return wal.sync(flags);
    }
    let commit = frame.filter(|_| !checkpoints).and_then(|at| Commit::of(main, writes, at));
    if let Some(commit) = commit.filter(|c| header.is_none() && commits.salts() == c.salts && c.salts != 0)
        && wal.is_powersafe()
        && main.shares_its_sync()
        && let Some(awaited) = commits.issue(commit.from(commits), commit.to(commits))
    {
        main.commit = Some(awaited);
        main.sync_flags = flags;
        return ffi::SQLITE_OK;
    }
    let sync = commits.begin();
    if !(planted("checkpoint-without-wal-sync") && checkpoints) {
        let rc = wal.sync(flags);
        if rc != ffi::SQLITE_OK {
            commits.fail(sync);
            main.repair();
            return rc;
        }
    }
    if !commits.end(sync) {
        return ffi::SQLITE_IOERR_FSYNC;
    }
    if let Some(salts) = header {
        let generation = commits.begin_generation(u64::from_ne_bytes(salts));
        let place = |length| Place { generation, length };
        commits.issue_durable(place(0), place(WAL_HEADER));
    } else if let Some(commit) = commit {
        if commits.salts() != commit.salts {
            commits.begin_generation(commit.salts);
            commits.issue_durable(commit.to(commits), commit.to(commits));
        } else {
            commits.issue_durable(commit.from(commits), commit.to(commits));
        }
    }
    ffi::SQLITE_OK
}

/// Where a commit lies in the WAL.
#[derive(Clone, Copy)]
struct Commit {
    salts: u64,
    from: u64,
    to: u64,
}

impl Commit {
    /// The commit that `main` is about to publish, its last frame at `frame`.
    fn of(main: &MainFile, writes: &WalWrites, frame: u64) -> Option<Commit> {
        let published: Header = main.wal_index?.header();
        let frames = u64::from(published.frames());
        // With no frame published yet, this transaction has written the header.
        let salts = if frames == 0 { writes.salts } else { published.salts() };
        if frames != 0 && u64::from(published.page_size()) != writes.page {
            return None;
        }
        Some(Commit {
            salts: u64::from_ne_bytes(salts),
            from: WAL_HEADER + frames * (FRAME_HEADER + writes.page),
            to: frame + FRAME_HEADER + writes.page,
        })
    }

    fn from(&self, commits: Commits) -> Place {
        Place { generation: commits.generation(), length: self.from }
    }

    fn to(&self, commits: Commits) -> Place {
        Place { generation: commits.generation(), length: self.to }
    }
}

impl MainFile {
    /// The connection writes no other file in this transaction.
    fn shares_its_sync(&self) -> bool {
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
        let Some(commits) = shared.commits() else { return wal.sync(flags) == ffi::SQLITE_OK };
        if shared.table().is_none() {
            // It may only read the segment: a sync of its own, which it cannot share.
            return commits.durable() >= awaited.number && !commits.is_lost(awaited)
                || wal.sync(flags) == ffi::SQLITE_OK;
        }
        let durable = commits.wait(awaited, || {
            if planted("stopped-while-leading") {
                let _ = nix::sys::signal::raise(nix::sys::signal::SIGSTOP);
            }
            wal.sync(flags) == ffi::SQLITE_OK
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
        let Some(shared) = self.gated().and_then(|m| m.shared().cloned()) else { return };
        let commits = shared.commits();
        self.snapshot = commits.map(|c| c.latest());
        let waits = self.config.durable_reads && !planted("reads-before-sync");
        self.seen = match commits {
            _ if !waits => None,
            Some(commits) => self.snapshot.filter(|s| commits.durable() < s.number),
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

    /// A sync of the WAL has failed. Before anybody is told that its commit did, the WAL is cut back to what is durable, or
    /// a recovery would bring those commits back, beside the ones with which applications tried again. Whoever finds it
    /// so does it. False: somebody has held WRITE or CHECKPOINT all the time.
    fn repair(&mut self) -> bool {
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

/// The bytes of a write.
///
/// # Safety
/// As for `xWrite`: `from` points at `amount` bytes.
pub unsafe fn bytes<'a>(from: *const c_void, amount: c_int) -> &'a [u8] {
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts(from.cast(), usize::try_from(amount).unwrap_or(0)) }
}
