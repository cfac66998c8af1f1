//! A connection's WAL as a file: the unix VFS's own, and two things that are cheaper than by its methods.
//!
//! * **Syncs.** The unix VFS syncs the directory with the first sync of every WAL that it has opened, because it might
//!   have made it. In a segment that is done once. And some builds of SQLite (those without `HAVE_FDATASYNC`) call fsync(2),
//!   which writes times as well; the data and the size, which are all that a WAL is, are fdatasync(2)'s.
//! * **Room.** A sync of an appended frame must also put the file's new size on the disk: 310 us against 130 for one that
//!   was there already. So a WAL that is synced grows by many frames at a time, as zeros, which no recovery takes for a
//!   frame.

use crate::segment::atomic::SeqCst;
use crate::segment::layout::CheckpointWords;
use crate::segment::statx::statx;
use libsqlite3_sys as ffi;
use nix::errno::Errno;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

type File = *mut ffi::sqlite3_file;

/// A WAL that is shorter grows as SQLite has it: it may be one of a few transactions.
pub const SHORT: u64 = 256 << 10;
/// By how much others grow: half of what they have, within these, in bytes.
const LEAST_ROOM: u64 = 64 << 10;
const MOST_ROOM: u64 = 512 << 10;
static ZEROS: [u8; LEAST_ROOM as usize] = [0; LEAST_ROOM as usize];

/// A connection's WAL while it is open, where its `MainFile` finds it.
#[derive(Clone, Copy)]
pub struct WalFile {
    file: File,
    real: *const ffi::sqlite3_io_methods,
    /// Its descriptor and inode, if they are known.
    named: Option<(RawFd, u64)>,
}

impl std::fmt::Debug for WalFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WalFile")
    }
}

impl WalFile {
    /// `file` is an open file of the unix VFS with these methods, and outlives the value: its close takes it out of the
    /// `MainFile`.
    pub fn new(
        file: File,
        real: *const ffi::sqlite3_io_methods,
        named: Option<(BorrowedFd, u64)>,
    ) -> WalFile {
        WalFile { file, real, named: named.map(|(fd, inode)| (fd.as_raw_fd(), inode)) }
    }

    /// `xSync`. SQLite's code.
    pub fn sync(self, flags: c_int, words: Option<&CheckpointWords>) -> c_int {
        let known = words.zip(self.named).filter(|(w, (_, inode))| w.wal_inode.load(SeqCst) == *inode);
        if let Some((words, (fd, inode))) = known
            && words.wal_linked.load(SeqCst) != 0
            && let Some(rc) = sync_data(fd, inode)
        {
            return rc;
        }
        // SAFETY: the unix VFS's own method on its own file, which is open.
        let rc = unsafe { (*self.real).xSync.map_or(ffi::SQLITE_IOERR_FSYNC, |f| f(self.file, flags)) };
        if let (ffi::SQLITE_OK, Some((words, _))) = (rc, known) {
            words.wal_linked.store(1, SeqCst);
        }
        rc
    }

    pub fn truncate(self, length: u64) -> c_int {
        // SAFETY: as above.
        unsafe { (*self.real).xTruncate.map_or(ffi::SQLITE_IOERR_TRUNCATE, |f| f(self.file, length as i64)) }
    }

    /// All of `bytes` at `offset`.
    pub fn read(self, bytes: &mut [u8], offset: u64) -> bool {
        let (to, amount) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int);
        // SAFETY: as above.
        let rc = unsafe { (*self.real).xRead.map(|read| read(self.file, to, amount, offset as i64)) };
        rc == Some(ffi::SQLITE_OK)
    }

    /// All of `bytes` at `offset`, over what is there.
    pub fn write(self, bytes: &[u8], offset: u64) -> bool {
        let (from, amount) = (bytes.as_ptr().cast(), bytes.len() as c_int);
        // SAFETY: as above.
        let rc = unsafe { (*self.real).xWrite.map(|write| write(self.file, from, amount, offset as i64)) };
        rc == Some(ffi::SQLITE_OK)
    }

    pub fn inode(self) -> Option<u64> {
        self.named.map(|(_, inode)| inode)
    }

    /// Its descriptor, if the host has not closed it.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        let (fd, inode) = self.named?;
        // SAFETY: SQLite's own, open as long as this value is.
        (inode_of(fd)? == inode).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    pub fn length(self) -> Option<u64> {
        let mut length = 0i64;
        // SAFETY: as above.
        let rc = unsafe { (*self.real).xFileSize.map(|f| f(self.file, &mut length)) };
        (rc == Some(ffi::SQLITE_OK)).then_some(length as u64)
    }

    /// A frame is about to be written that ends there: makes the file longer than that, if it is not. The length that it
    /// has at least.
    pub fn make_room(self, end: u64) -> u64 {
        let Some(mut length) = self.length() else { return 0 };
        if end <= length {
            return length;
        }
        let enough = end + (length / 2).clamp(LEAST_ROOM, MOST_ROOM);
        while length < enough {
            let amount = (enough - length).min(ZEROS.len() as u64);
            // SAFETY: as above. Without success (a full disk) the frame is written as it would have been.
            let rc = unsafe {
                let write = (*self.real).xWrite;
                write.map(|f| f(self.file, ZEROS.as_ptr().cast(), amount as c_int, length as i64))
            };
            if rc != Some(ffi::SQLITE_OK) {
                break;
            }
            length += amount;
        }
        length
    }

    /// Writing some bytes never harms those beside them.
    pub fn is_powersafe(self) -> bool {
        // SAFETY: as above.
        let has = unsafe { (*self.real).xDeviceCharacteristics.map_or(0, |f| f(self.file)) };
        has & ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE != 0
    }
}

/// fdatasync(2), if the descriptor is still that file's: the host may have closed it. SQLite's code.
fn sync_data(fd: RawFd, inode: u64) -> Option<c_int> {
    if inode_of(fd)? != inode {
        return None;
    }
    // SAFETY: borrowed for the call only; it is ours.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    loop {
        match nix::unistd::fdatasync(fd) {
            Ok(()) => return Some(ffi::SQLITE_OK),
            Err(Errno::EINTR) => {}
            Err(_) => return Some(ffi::SQLITE_IOERR_FSYNC),
        }
    }
}

/// By statx(2), asked for nothing else: whoever asks for times (fstat(2) does) makes the next write change them, on Linux
/// 6.13 and later, and the next sync a third slower.
fn inode_of(fd: RawFd) -> Option<u64> {
    Some(statx(fd, c"", libc::AT_EMPTY_PATH, libc::STATX_INO)?.stx_ino)
}
