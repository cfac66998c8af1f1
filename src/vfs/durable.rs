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
use crate::lock::commits::{Commits, Number, Place};
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
/// How long the one that cuts the WAL back waits for a writer that is just writing.
const CUT_PATIENCE: Duration = Duration::from_secs(5);

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
        && let Some(number) = commits.issue(commit.from(commits), commit.to(commits))
    {
        main.commit = Some(number);
        main.sync_flags = flags;
        return ffi::SQLITE_OK;
    }
    let sync = commits.begin();
    if !(planted("checkpoint-without-wal-sync") && checkpoints) {
        let rc = wal.sync(flags);
        if rc != ffi::SQLITE_OK {
            commits.fail();
            main.cut_back();
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
        let seen = std::mem::take(&mut self.seen);
        let number = self.commit.take().or((seen != 0).then_some(seen));
        match number {
            Some(_) if planted("ack-before-sync") => ffi::SQLITE_OK,
            Some(number) if !self.wait_for(number) => ffi::SQLITE_IOERR_FSYNC,
            _ => ffi::SQLITE_OK,
        }
    }

    /// The read transaction of a commit ends, and nobody has asked whether it is durable: this SQLite does not do things
    /// in the order that is relied on (or the commit failed after its frames were written). It syncs for itself from
    /// now on.
    pub fn commit_was_not_asked_for(&mut self) {
        let Some(number) = self.commit.take() else { return };
        self.wait_for(number);
        self.shares = false;
        let text =
            format!("{}: a commit ended without COMMIT_PHASETWO: it syncs by itself from now on", self.path);
        self.library.log(ffi::SQLITE_WARNING, &text);
    }

    fn wait_for(&mut self, number: Number) -> bool {
        let (Some(wal), Some(shared)) = (self.wal_file, self.gated().and_then(|m| m.shared().cloned()))
        else {
            return false;
        };
        let flags = if self.sync_flags == 0 { ffi::SQLITE_SYNC_NORMAL } else { self.sync_flags };
        let Some(commits) = shared.commits() else { return wal.sync(flags) == ffi::SQLITE_OK };
        if shared.table().is_none() {
            // It may only read the segment: a sync of its own, which it cannot share.
            return commits.durable() >= number || wal.sync(flags) == ffi::SQLITE_OK;
        }
        let durable = commits.wait(number, || {
            if planted("stopped-while-leading") {
                let _ = nix::sys::signal::raise(nix::sys::signal::SIGSTOP);
            }
            wal.sync(flags) == ffi::SQLITE_OK
        });
        if !durable {
            self.cut_back();
        }
        durable
    }

    /// A snapshot has been taken, in the turn or not: remembers the newest commit in it that is not durable yet.
    pub fn note_snapshot(&mut self) {
        self.seen = 0;
        self.seen_in_turn = false;
        if !self.config.durable_reads || planted("reads-before-sync") {
            return;
        }
        let Some(shared) = self.gated().and_then(|m| m.shared()) else { return };
        self.seen = match shared.commits() {
            Some(commits) => commits.pending().unwrap_or(0),
            // Laid out otherwise: nobody can say.
            None => {
                let header = self.wal_index.map(|i| i.header());
                let changed = header != self.last_header;
                self.last_header = header;
                if changed { Number::MAX } else { 0 }
            }
        };
        if self.seen != 0 && self.turn && self.keeps_to_itself() {
            self.seen_in_turn = true;
            self.settles_at_rows(true);
        }
    }

    /// The first page of a snapshot is about to be read. False: it never will be durable.
    #[inline]
    pub fn snapshot_is_durable(&mut self) -> bool {
        self.seen == 0 || self.seen_in_turn || self.settle()
    }

    /// Waits until the snapshot is durable.
    pub fn settle(&mut self) -> bool {
        let seen = std::mem::take(&mut self.seen);
        seen == 0 || self.inherited() || self.wait_for(seen)
    }

    /// The read transaction is over and its locks are given back.
    pub fn snapshot_ends(&mut self) {
        self.commit_was_not_asked_for();
        if std::mem::take(&mut self.seen_in_turn) {
            self.settles_at_rows(false);
            // It has not committed (a constraint, a rollback), or less durably than others.
            self.settle();
        }
        self.seen = 0;
    }

    /// A checkpoint is about to copy frames, whether or not its own connection syncs.
    pub fn checkpoint_starts(&mut self) {
        let commits = self.gated().and_then(|m| m.shared().cloned());
        if let Some(number) = commits.and_then(|s| s.commits().and_then(|c| c.pending())) {
            self.wait_for(number);
        }
    }

    /// A sync of the WAL has failed. Nobody goes on with this segment; and before anybody is told that its commit
    /// failed, the WAL is cut back to what is durable, or a recovery would bring those commits back, beside the ones
    /// with which applications tried again.
    fn cut_back(&mut self) {
        let Some(shared) = self.gated().and_then(|m| m.shared().cloned()) else { return };
        let Some(commits) = shared.commits().filter(|_| shared.table().is_some()) else { return };
        shared.poison();
        if planted("wal-not-cut") {
            return;
        }
        let end = Instant::now() + CUT_PATIENCE;
        let held = self.exclusive_slots;
        let wanted = (1 << slot::WRITE | 1 << slot::CHECKPOINT) & !held;
        while !commits.is_cut() {
            let fenced = self.gated().is_some_and(|m| m.fence(wanted));
            if fenced {
                let cut = commits.cut_at().zip(self.wal_file);
                let rc = cut.map_or(ffi::SQLITE_OK, |(length, wal)| wal.truncate(length));
                if rc == ffi::SQLITE_OK {
                    commits.set_cut();
                }
                if let Some(member) = self.gated() {
                    member.unfence(wanted);
                }
                let text = match (cut, rc) {
                    (Some((length, _)), ffi::SQLITE_OK) => format!(
                        "a sync of the WAL of {} failed: it was cut back to {length} bytes, the last durable commit; \
                         every connection must be closed and opened again",
                        self.path
                    ),
                    (None, _) => format!(
                        "a sync of the WAL of {} failed; every connection must be closed and opened again",
                        self.path
                    ),
                    _ => format!("the WAL of {} cannot be cut back after a failed sync ({rc})", self.path),
                };
                self.library.log(ffi::SQLITE_IOERR_FSYNC, &text);
                if let Some(member) = self.gated() {
                    member.log(&text);
                }
                return;
            }
            if Instant::now() >= end {
                let text = format!(
                    "after a failed sync the WAL of {} could not be cut back: a writer holds it; transactions that \
                     failed may come back",
                    self.path
                );
                self.library.log(ffi::SQLITE_IOERR_FSYNC, &text);
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
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
