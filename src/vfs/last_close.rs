//! The last close of a database that short-lived programs open again and again, and the next open.
//!
//! SQLite's last close copies the WAL into the database, syncs both and removes the WAL; the next process makes another
//! one, syncs its name, and appends to it. For short-lived processes that is most of what they pay. So where a database has
//! been opened soon after its last close, the next last close copies and syncs as SQLite does, but leaves the WAL's file:
//! it *ends* the WAL with a mark in the place of its header ([`ended`]), syncs that, and tells SQLite that it is not alone.
//! The same where several close at once: in plain SQLite none of them gets EXCLUSIVE then, and the WAL stays, full.
//!
//! **When the last close returns, the file alone is complete and on the disk, and no WAL that anybody would read lies beside
//! it.** Nothing is left to do for anybody, so nothing that happens next matters: the broker's death, a file that is
//! renamed over this one, a copy, a power loss. An earlier design left the sync and the WAL's end to the broker, half a
//! second later; a file that took the database's name in that time got the old one's WAL.
//!
//! The order is what makes it safe: what is copied is on the disk in the WAL; then the database is written and synced; then
//! the WAL is marked and the mark synced. All locks of the wal-index are held, so nobody reads or writes meanwhile. The
//! index is invalidated before they are given back: whoever comes next, also this very connection if it was not about to
//! close, recovers it from a WAL that says that it is empty.

use super::main_file::MainFile;
use super::wal_file::WalFile;
use crate::lock::FileLevel;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::ended;
use crate::segment::layout::CheckpointWords;
use crate::segment::wal_index::{FRAME_HEADER, Header, WAL_HEADER, WalIndex};
use libsqlite3_sys as ffi;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::time::{Duration, Instant};

/// A last close that has more frames to copy is SQLite's.
const MOST_FRAMES: u32 = 4096;
/// A WAL whose file is longer, in bytes, is removed by SQLite's last close.
const MOST_LEFT: u64 = 1 << 20;
/// How long others that close at the same time may take, and the broker's checkpointer to stop.
const OTHERS_CLOSE: Duration = Duration::from_secs(2);
/// Every lock of the wal-index.
const ALL_SLOTS: u8 = u8::MAX;

/// The database's file and the unix VFS's own methods for it.
#[derive(Clone, Copy)]
pub struct RealFile {
    pub file: *mut ffi::sqlite3_file,
    pub methods: *const ffi::sqlite3_io_methods,
}

impl RealFile {
    /// All of `bytes` at `offset`.
    pub(super) fn read(self, bytes: &mut [u8], offset: u64) -> bool {
        let amount = bytes.len() as c_int;
        // SAFETY: as in `write`.
        let rc = unsafe {
            (*self.methods)
                .xRead
                .map(|read| read(self.file, bytes.as_mut_ptr().cast(), amount, offset as i64))
        };
        rc == Some(ffi::SQLITE_OK)
    }

    fn write(self, bytes: &[u8], offset: u64) -> bool {
        let amount = bytes.len() as c_int;
        // SAFETY: the unix VFS's own method on its own open file, in a call of SQLite's for that file.
        let rc = unsafe {
            (*self.methods).xWrite.map(|write| write(self.file, bytes.as_ptr().cast(), amount, offset as i64))
        };
        rc == Some(ffi::SQLITE_OK)
    }

    /// Makes the file as long as that, if it is longer.
    fn cut(self, length: u64) -> bool {
        let mut now = 0i64;
        // SAFETY: as above.
        unsafe {
            let methods = &*self.methods;
            let known = methods.xFileSize.map(|size| size(self.file, &mut now)) == Some(ffi::SQLITE_OK);
            known
                && (now as u64 <= length
                    || methods.xTruncate.map(|cut| cut(self.file, length as i64)) == Some(ffi::SQLITE_OK))
        }
    }

    fn sync(self) -> bool {
        // SAFETY: as above.
        let rc = unsafe { (*self.methods).xSync.map(|sync| sync(self.file, ffi::SQLITE_SYNC_NORMAL)) };
        rc == Some(ffi::SQLITE_OK)
    }
}

impl MainFile {
    /// `xLock(EXCLUSIVE)` of a connection that is being closed. True: the WAL has ended, and SQLite leaves its file as it is
    /// if it is told that others are there. False: SQLite's last close goes its way.
    pub(super) fn ends_wal(&mut self, real: RealFile) -> bool {
        let Some(member) = self.gated() else { return false };
        let words = member.shared().filter(|_| member.is_whole()).and_then(|s| s.checkpoint());
        let Some(words) = words else { return false };
        let comes_back = words.comes_back.load(SeqCst) != 0;
        // Of several that close at once none has the file for itself, which SQLite's last close wants.
        let last = member.closes_last();
        let alone = !member.is_read_by_others() || planted("each-close-leaves-it-to-others");
        if !last || (alone && !comes_back) {
            return false;
        }
        let begun = Instant::now();
        while !member.shuts_out_newcomers() {
            // Another one that closes, which gives PENDING back or is just ending the WAL.
            let goes_on = begun.elapsed() < OTHERS_CLOSE && member.closes_last();
            if !goes_on || planted("each-close-leaves-it-to-others") {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        // Until `xUnlock(NONE)`.
        self.level = FileLevel::Pending;
        // A reader of an older snapshot needs the pages as they are; nobody may begin another one. The broker's checkpointer
        // sees PENDING and stops; if nobody else is in its way, SQLite's EXCLUSIVE waits for it.
        let end = Instant::now() + if alone { Duration::ZERO } else { OTHERS_CLOSE };
        let fence = || self.gated().is_some_and(|m| m.fence(ALL_SLOTS));
        let mut fenced = fence();
        while !fenced && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
            fenced = fence();
        }
        let ended = match fenced {
            true => self.copy_and_end(real, alone),
            false => Err(Left { sync_failed: false }),
        };
        if let Some(member) = self.gated().filter(|_| fenced) {
            member.unfence(ALL_SLOTS);
        }
        match ended {
            Ok(()) => true,
            Err(Left { sync_failed }) => {
                if sync_failed {
                    self.repair();
                }
                // PENDING becomes EXCLUSIVE, or is given back.
                self.level = FileLevel::Shared;
                false
            }
        }
    }

    /// Under all locks of the index: copies what is not in the database yet, as a checkpoint of SQLite's does it (wal.c
    /// `walCheckpoint`), and ends the WAL.
    fn copy_and_end(&self, real: RealFile, alone: bool) -> Result<(), Left> {
        let left = || Left { sync_failed: false };
        let (member, wal) = self.gated().zip(self.wal_file).ok_or_else(left)?;
        let words = member.shared().and_then(|s| s.checkpoint()).ok_or_else(left)?;
        let index = self.wal_index.ok_or_else(left)?;
        let header = index.valid_header().ok_or_else(left)?;
        let (_, backfilled) = index.progress();
        let from = backfilled.min(header.frames());
        let large =
            header.frames() - from > MOST_FRAMES || wal.length().is_none_or(|length| length > MOST_LEFT);
        if large && alone {
            return Err(left());
        }
        if header.frames() == 0 {
            match wal.length() {
                // Nobody has written.
                _ if bears_mark(wal, words) => return Ok(()),
                Some(0) if alone => return Err(left()),
                Some(0) => return Ok(()),
                _ => {}
            }
        }
        // A WAL that was begun anew, and not written since, is in the database and on the disk.
        if header.frames() != 0 {
            if !self.all_synced(&header, wal)? {
                return Err(left());
            }
            self.copy_pages(&header, from, wal, real).ok_or_else(left)?;
            if !planted("ended-before-synced") && !real.sync() {
                // SQLite's own close tries again and tells nobody either. The WAL still has it all.
                return Err(left());
            }
        }
        let number = number_by_chance().ok_or_else(left)?;
        words.ended.store(0, SeqCst);
        if !planted("wal-left-valid") && !wal.write(&ended::mark(number), 0) {
            return Err(left());
        }
        index.invalidate();
        // Its name too: a WAL that has been removed before may be back after a power loss as long as that is not synced.
        let sync = || wal.sync(ffi::SQLITE_SYNC_NORMAL, Some(words)) == ffi::SQLITE_OK;
        if !planted("ended-unsynced") && !sync() {
            // The mark may be lost: SQLite's last close would remove the WAL next. It finds an index that is not valid, and
            // leaves the WAL to a recovery, which finds it as it is on the disk: ended or complete.
            return Err(left());
        }
        words.ended.store(number, SeqCst);
        Ok(())
    }

    /// What is copied must be on the disk before: the rest of the WAL is synced, if it is not.
    fn all_synced(&self, header: &Header, wal: WalFile) -> Result<bool, Left> {
        let Some(commits) = self.gated().and_then(|m| m.shared()).and_then(|s| s.commits()) else {
            return Ok(false);
        };
        let salts = u64::from_ne_bytes(header.salts());
        if commits.cover(salts, header.length()) || planted("last-close-copies-unsynced") {
            return Ok(true);
        }
        let sync = commits.begin();
        let flags = if self.sync_flags == 0 { ffi::SQLITE_SYNC_NORMAL } else { self.sync_flags };
        let words = self.gated().and_then(|m| m.shared()).and_then(|s| s.checkpoint());
        if wal.sync(flags, words) != ffi::SQLITE_OK {
            commits.fail(sync);
            return Err(Left { sync_failed: true });
        }
        Ok(commits.end(sync))
    }

    /// The newest frame of each page behind frame `from`; then the file's length.
    fn copy_pages(&self, header: &Header, from: u32, wal: WalFile, real: RealFile) -> Option<()> {
        let shared = self.gated()?.shared()?;
        let size = header.page_size() as usize;
        if !(512..=65536).contains(&size) {
            return None;
        }
        let mut newest = BTreeMap::new();
        for frame in from + 1..=header.frames() {
            let page = shared.page_of(frame)?;
            if page != 0 && page <= header.pages() {
                newest.insert(page, frame);
            }
        }
        let mut bytes = vec![0u8; FRAME_HEADER as usize + size];
        if planted("last-close-copies-nothing") {
            newest.clear();
        }
        for (page, frame) in newest {
            let at = WAL_HEADER + u64::from(frame - 1) * bytes.len() as u64;
            // A frame says itself whose it is: the WAL is the index's.
            let whole = wal.read(&mut bytes, at)
                && bytes[..4] == page.to_be_bytes()
                && bytes[8..16] == header.salts();
            if !whole || !real.write(&bytes[FRAME_HEADER as usize..], u64::from(page - 1) * size as u64) {
                return None;
            }
        }
        real.cut(u64::from(header.pages()) * size as u64).then_some(())
    }

    /// The header that has been written is the first since the WAL ended, and its mark is on the disk. SQLite syncs a header
    /// before the frames behind it, because the disk could hold the old header with some of the old frames, and a recovery
    /// would play those back. Here it holds the mark, old frames or not: what it may hold before the first commit's sync is
    /// nothing, or frames of that very commit.
    pub(super) fn header_needs_no_sync(&self) -> bool {
        let words = self.gated().and_then(|m| m.shared()).and_then(|s| s.checkpoint());
        let (Some(words), Some(index)) = (words, self.wal_index) else { return false };
        let published = index.header();
        // Of no WAL: nobody has written a header before, whether or not it was synced.
        let first = published.frames() == 0 && published.salts() == [0; 8];
        first && words.ended.swap(0, SeqCst) != 0 || planted("header-of-any-wal")
    }

    /// The wal-index is being opened, and nobody else has it open. What it holds is nobody's truth then: it is recovered
    /// from the WAL.
    pub(super) fn found_alone(&self, index: WalIndex) {
        if let Some(words) = self.gated().and_then(|m| m.shared()).and_then(|s| s.checkpoint()) {
            let inode = self.wal_file.and_then(WalFile::inode).unwrap_or(0);
            words.wal_is_opened(inode, self.wal_file.is_some_and(|wal| bears_mark(wal, words)));
        }
        if !planted("stale-wal-index") {
            index.invalidate();
        }
    }
}

/// The WAL's header is the mark that is on the disk: nobody has written to it since it ended.
fn bears_mark(wal: WalFile, words: &CheckpointWords) -> bool {
    let mut bytes = [0; WAL_HEADER as usize];
    wal.read(&mut bytes, 0) && ended::is_mark(&bytes, words.ended.load(SeqCst))
}

/// Never 0.
fn number_by_chance() -> Option<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the kernel writes at most the buffer's length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    (got == bytes.len() as isize).then(|| u64::from_ne_bytes(bytes) | 1)
}

/// The WAL is left to SQLite.
struct Left {
    sync_failed: bool,
}
