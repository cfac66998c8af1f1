//! The last close of a database that lingers with the broker, and the next open.
//!
//! SQLite's last close copies the WAL into the database, syncs both and removes the WAL; the next process makes another
//! one. For short-lived processes that is most of what they pay. Here the last close only copies, so that the file is
//! complete for whoever reads it, and SQLite is told that it is not alone. The database's sync and the WAL's end are left
//! to the broker's checkpointer, a moment after the last of them.
//!
//! Until then the WAL is there for a power loss alone: **the file has it all**. If somebody changes it meanwhile (puts a
//! backup in its place, say), the WAL is of a database that is no more, and must never be read again. That is seen by the
//! file's size and modification time, which the last close sets to a nanosecond that the kernel's clock would hardly give.

use super::main_file::MainFile;
use super::wal_file::WalFile;
use super::wrapped::descriptor;
use crate::lock::{FileLevel, slot};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::CheckpointWords;
use crate::segment::wal_index::{FRAME_HEADER, Header, WAL_HEADER, WalIndex};
use libsqlite3_sys as ffi;
use nix::sys::stat::{FileStat, fstat, futimens};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::path::Path;

/// A last close that has more frames to copy is SQLite's.
const MOST_FRAMES: u32 = 4096;

/// The database's file and the unix VFS's own methods for it.
#[derive(Clone, Copy)]
pub struct RealFile {
    pub file: *mut ffi::sqlite3_file,
    pub methods: *const ffi::sqlite3_io_methods,
}

impl RealFile {
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
    /// `xLock(EXCLUSIVE)` of a connection that is being closed. True: the database lingers, all of its WAL is in it, and
    /// SQLite leaves the WAL as it is if it is told that others are there. False: SQLite's last close goes its way.
    pub(super) fn lingers(&mut self, real: RealFile) -> bool {
        let Some(member) = self.gated() else { return false };
        let words = member.shared().filter(|s| s.may_rest()).and_then(|s| s.checkpoint());
        let offered = words.is_some_and(|w| w.may_linger.load(SeqCst) != 0 && w.duty.load(SeqCst) != 0);
        if !offered || !member.closes_last() || !member.fence(1 << slot::CHECKPOINT) {
            return false;
        }
        if member.shuts_out_newcomers() {
            // Until `xUnlock(NONE)`.
            self.level = FileLevel::Pending;
        }
        let (copied, failed) = match self.copy_back(real) {
            Ok(()) => (true, false),
            Err(Left { sync_failed }) => (false, sync_failed),
        };
        if let Some(member) = self.gated() {
            member.unfence(1 << slot::CHECKPOINT | 1 << slot::READ0);
        }
        if failed {
            self.repair();
        }
        if !copied && self.level == FileLevel::Pending {
            // PENDING becomes EXCLUSIVE, or is given back.
            self.level = FileLevel::Shared;
        }
        copied
    }

    /// Under CHECKPOINT: copies what is not in the database yet. As a checkpoint of SQLite's does it (wal.c
    /// `walCheckpoint`), but for the database's sync; so nothing is said of it in the index.
    fn copy_back(&self, real: RealFile) -> Result<(), Left> {
        let left = || Left { sync_failed: false };
        let (member, wal) = self.gated().zip(self.wal_file).ok_or_else(left)?;
        let shared = member.shared().ok_or_else(left)?;
        let index = self.wal_index.ok_or_else(left)?;
        let (table, words) = shared.table().zip(shared.checkpoint()).ok_or_else(left)?;
        let header = index.valid_header().filter(|h| h.frames() != 0).ok_or_else(left)?;
        let (_, backfilled) = index.progress();
        let salts = u64::from_ne_bytes(header.salts());
        let known = (backfilled..=header.frames()).contains(&table.copied())
            && words.copied_salts.load(SeqCst) == salts;
        let from = if known { table.copied() } else { backfilled.min(header.frames()) };
        // Who reads an older snapshot needs the pages as they are, and who reads without the WAL needs them all.
        let in_the_way = (slot::READ0 + 1..slot::COUNT)
            .filter(|s| index.read_mark(usize::from(s - slot::READ0)) < header.frames())
            .any(|s| {
                !member.fence(1 << s) || {
                    member.unfence(1 << s);
                    false
                }
            });
        if header.frames() - from > MOST_FRAMES || in_the_way || !member.fence(1 << slot::READ0) {
            return Err(left());
        }
        if !self.all_synced(&header, wal)? {
            return Err(left());
        }
        table.set_copied(0);
        let copied = self.copy_pages(&header, from, wal, real).ok_or_else(left)?;
        words.copied_salts.store(salts, SeqCst);
        words.note_left(&copied);
        table.set_copied(header.frames());
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

    /// The newest frame of each page behind frame `from`; then the file as it is.
    fn copy_pages(&self, header: &Header, from: u32, wal: WalFile, real: RealFile) -> Option<FileStat> {
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
        let length = u64::from(header.pages()) * size as u64;
        if !real.cut(length) {
            return None;
        }
        // SAFETY: the connection's own file, in a call for it.
        let fd = unsafe { descriptor(real.file, self.library.unix, Path::new(&self.path)) }?;
        // Not the access time: together they would be a change of attributes, for which the broker watches.
        let now = clock_gettime(ClockId::CLOCK_REALTIME).ok()?;
        // A time may only be set by the file's owner, and some filesystems keep no nanoseconds: what somebody else writes
        // could not be told from this.
        futimens(fd, &TimeSpec::UTIME_OMIT, &now).ok()?;
        let set = |st: &FileStat| (st.st_mtime, st.st_mtime_nsec) == (now.tv_sec(), now.tv_nsec());
        fstat(fd).ok().filter(|st| st.st_size as u64 == length && set(st))
    }

    /// The wal-index is being opened, and nobody else has it open. What it holds is nobody's truth then, and is recovered
    /// from the WAL; but for a database that has lingered and is as the last close left it. False: an I/O error.
    pub(super) fn found_alone(&self, real: RealFile, index: WalIndex) -> bool {
        let shared = self.gated().and_then(|m| m.shared());
        let Some((table, words)) = shared.and_then(|s| s.table().zip(s.checkpoint())) else { return false };
        let its_wal = |wal: WalFile| {
            let header = index.valid_header();
            header.is_some_and(|header| wal.is(words.wal_inode.load(SeqCst), &header))
        };
        let whole = table.is_complete(words, index) && self.wal_file.is_some_and(its_wal);
        let unchanged = whole && (self.is_as_left(real, words) || planted("changed-file-trusted"));
        if unchanged || planted("stale-wal-index") {
            return true;
        }
        table.forget_copied();
        if whole {
            // Somebody has written to the file, and the WAL is not its any more. (Or has only touched it: then the WAL
            // holds nothing that the file does not, and is not needed once that is on the disk.)
            let text = format!(
                "{} was changed by somebody else after its last close: its WAL is dropped",
                self.path
            );
            self.library.log(ffi::SQLITE_NOTICE, &text);
            if !real.sync() || self.wal_file.is_none_or(|wal| wal.truncate(0) != ffi::SQLITE_OK) {
                return false;
            }
        }
        index.invalidate();
        true
    }

    fn is_as_left(&self, real: RealFile, words: &CheckpointWords) -> bool {
        // SAFETY: as in `copy_pages`.
        let fd = unsafe { descriptor(real.file, self.library.unix, Path::new(&self.path)) };
        fd.and_then(|fd| fstat(fd).ok()).is_some_and(|st| words.is_as_left(&st))
    }
}

/// The WAL is left to SQLite.
struct Left {
    sync_failed: bool,
}
