//! A WAL whose database's locks are the broker's: what is written to it, and what its `xSync` is (see
//! [`super::durable`]).

use super::main_file::MainFile;
use super::wal_file::{SHORT, WalFile};
use super::wrapped::{Kind, Wrapped};
use crate::lock::commits::{Commits, Place};
use crate::lock::slot;
use crate::planted::planted;
use crate::segment::wal_index::{FRAME_HEADER, Header, WAL_HEADER};
use crate::wire::message::Role;
use libsqlite3_sys as ffi;
use std::ffi::{c_int, c_void};

type File = *mut ffi::sqlite3_file;

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
    /// The file is at least so long.
    length: u64,
}

impl WalWrites {
    /// `owner` is the database's state, which outlives the WAL's: SQLite closes the WAL first.
    pub fn new(owner: *mut MainFile) -> WalWrites {
        WalWrites { owner, header: None, salts: [0; 8], commit: None, page: 0, length: 0 }
    }

    /// The database's state.
    ///
    /// # Safety
    /// No other reference to it is alive: SQLite is in a call for the WAL, so it is in none for the database.
    unsafe fn owner<'a>(&self) -> &'a mut MainFile {
        // SAFETY: by contract and that of `new`.
        unsafe { &mut *self.owner }
    }

    /// A write up to `end` is about to be made.
    pub fn make_room(&mut self, end: u64) {
        if end > self.length.max(SHORT) {
            // SAFETY: SQLite is in a call for the WAL.
            let main = unsafe { self.owner() };
            let commits = main.gated().and_then(|m| m.shared()).and_then(|s| s.commits());
            // Commits are synced here: each generation's header is counted once.
            let durable = commits.is_some_and(|c| c.newest() > c.generation());
            if let Some(wal) = main.wal_file.filter(|_| durable && !planted("wal-grows-by-frames")) {
                self.length = wal.make_room(end);
            }
        }
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

/// The WAL is about to close.
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
    let unnamed = WalFile::new(file, w.real, None);
    let Kind::Companion { wal: Some(writes), .. } = &mut w.kind else { return unnamed.sync(flags, None) };
    let (header, frame) = (writes.header.take(), writes.commit.take());
    // SAFETY: SQLite is in a call for the WAL.
    let main = unsafe { writes.owner() };
    let wal = main.wal_file.unwrap_or(unnamed);
    let shared = main.gated().filter(|m| m.role() == Role::ReadWrite).and_then(|m| m.shared().cloned());
    let Some(commits) = shared.as_ref().and_then(|s| s.commits()) else {
        return wal.sync(flags, None);
    };
    let words = shared.as_ref().and_then(|s| s.checkpoint());
    let checkpoints = main.owns(slot::CHECKPOINT);
    if !checkpoints && !main.owns(slot::WRITE) {
        // locking_mode=EXCLUSIVE: its commits are not counted, and no lock of the wal-index is taken for them.
        commits.lose_count();
        return wal.sync(flags, words);
    }
    if header.is_some() && !checkpoints && main.header_needs_no_sync() {
        // The commit's own sync is the first, is made at once, and begins to count.
        commits.lose_count();
        return ffi::SQLITE_OK;
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
        let rc = wal.sync(flags, words);
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
        let known = commits.salts() == commit.salts;
        if !known {
            commits.begin_generation(commit.salts);
        }
        let to = commit.to(commits);
        commits.issue_durable(if known { commit.from(commits) } else { to }, to);
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

/// The bytes of a write.
///
/// # Safety
/// As for `xWrite`: `from` points at `amount` bytes.
pub unsafe fn bytes<'a>(from: *const c_void, amount: c_int) -> &'a [u8] {
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts(from.cast(), usize::try_from(amount).unwrap_or(0)) }
}
