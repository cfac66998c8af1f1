//! The checkpointer's `sqlite3_vfs`: a database and its WAL behind descriptors, the wal-index in the segment, the
//! locks from a seat. Nothing is opened or removed by name, and no other file is there.

use super::work::Work;
use nix::sys::stat::fstat;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{fdatasync, ftruncate};
use rusqlite::ffi;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;
use turnstile::lock::Slots;
use turnstile::planted::planted;
use turnstile::segment::layout::REGION_SIZE;

pub const NAME: &CStr = c"turnstile-checkpointer";

thread_local! {
    /// The database of this thread.
    static WORK: Cell<*const Work> = const { Cell::new(ptr::null()) };
}

/// `base` must come first: SQLite sees a `sqlite3_file`.
#[repr(C)]
struct File {
    base: ffi::sqlite3_file,
    work: *const Work,
    wal: bool,
}

type Raw = *mut ffi::sqlite3_file;

/// Of a sleep that SQLite asks for, in microseconds.
const LONGEST_SLEEP: c_int = 200;

/// Makes `work` the database that this thread's connections open. It must outlive them.
pub fn serve(work: &Work) {
    WORK.set(work);
}

/// Registers the VFS, beside the default one, which lends it time and randomness.
pub fn register() -> io::Result<()> {
    // SAFETY: the default VFS is static; the copy is leaked, because SQLite keeps it.
    let rc = unsafe {
        let default = ffi::sqlite3_vfs_find(ptr::null());
        let Some(default) = default.as_ref() else { return Err(io::Error::other("SQLite has no VFS")) };
        let mut vfs = *default;
        vfs.szOsFile = size_of::<File>() as c_int;
        vfs.pNext = ptr::null_mut();
        vfs.zName = NAME.as_ptr();
        vfs.xOpen = Some(open);
        vfs.xDelete = Some(delete);
        vfs.xAccess = Some(access);
        vfs.xFullPathname = Some(full_pathname);
        vfs.xSleep = Some(sleep);
        ffi::sqlite3_vfs_register(Box::into_raw(Box::new(vfs)), 0)
    };
    match rc {
        ffi::SQLITE_OK => Ok(()),
        _ => Err(io::Error::other("SQLite does not take the checkpointer's VFS")),
    }
}

/// wal.c sleeps between its tries to read the index's header, 10 s in all, while SHARED is held here and a last close
/// waits for it. Whoever writes the header needs some microseconds; the next checkpoint finds another one.
unsafe extern "C" fn sleep(_: *mut ffi::sqlite3_vfs, micros: c_int) -> c_int {
    let micros = micros.clamp(0, if planted("checkpointer-sleeps") { c_int::MAX } else { LONGEST_SLEEP });
    std::thread::sleep(Duration::from_micros(micros as u64));
    micros
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

/// The file behind SQLite's pointer.
fn file<'a>(raw: Raw) -> (&'a Work, bool) {
    // SAFETY: these callbacks are only ever called with files that `open` has made, whose work outlives them.
    unsafe {
        let file = &*raw.cast::<File>();
        (&*file.work, file.wal)
    }
}

/// Runs `body` on the file's descriptor.
fn with_descriptor<T>(raw: Raw, body: impl FnOnce(&OwnedFd) -> nix::Result<T>) -> nix::Result<T> {
    match file(raw) {
        (work, false) => body(&work.database),
        (work, true) => work.wal.borrow().as_ref().map_or(Err(nix::errno::Errno::EBADF), body),
    }
}

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    _: *const c_char,
    raw: Raw,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    let work = WORK.get();
    let wal = flags & ffi::SQLITE_OPEN_WAL != 0;
    // SAFETY: SQLite gives szOsFile bytes, and wants pMethods null after a failed open.
    unsafe {
        (*raw).pMethods = ptr::null();
        if work.is_null() || flags & (ffi::SQLITE_OPEN_MAIN_DB | ffi::SQLITE_OPEN_WAL) == 0 {
            return ffi::SQLITE_CANTOPEN;
        }
        raw.cast::<File>().write(File { base: ffi::sqlite3_file { pMethods: &METHODS }, work, wal });
        if !out.is_null() {
            *out = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(_: *mut ffi::sqlite3_vfs, _: *const c_char, _: c_int) -> c_int {
    ffi::SQLITE_IOERR_DELETE
}

/// There is a WAL, and no journal: members have looked for one before they opened the WAL.
unsafe extern "C" fn access(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    _: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: a NUL-terminated name, and a place for the answer.
    unsafe { *out = c_int::from(CStr::from_ptr(name).to_bytes().ends_with(b"-wal")) };
    ffi::SQLITE_OK
}

/// A name is taken as it stands, links and all.
///
/// # Safety
/// As SQLite calls `xFullPathname`.
pub unsafe extern "C" fn full_pathname(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    size: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: a NUL-terminated name, and `size` bytes for a copy of it.
    unsafe {
        let bytes = CStr::from_ptr(name).to_bytes_with_nul();
        if bytes.len() > size as usize {
            return ffi::SQLITE_CANTOPEN;
        }
        ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len());
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(_: Raw) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(raw: Raw, to: *mut c_void, amount: c_int, offset: i64) -> c_int {
    if file(raw).0.interrupted() {
        return ffi::SQLITE_INTERRUPT;
    }
    // SAFETY: SQLite gives `amount` bytes.
    let buffer = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), amount as usize) };
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        match with_descriptor(raw, |fd| pread(fd, rest, offset + done as i64)) {
            Ok(0) => {
                buffer[done..].fill(0);
                return ffi::SQLITE_IOERR_SHORT_READ;
            }
            Ok(n) => done += n,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return ffi::SQLITE_IOERR_READ,
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn write(raw: Raw, from: *const c_void, amount: c_int, offset: i64) -> c_int {
    let (work, wal) = file(raw);
    if work.interrupted() {
        return ffi::SQLITE_INTERRUPT;
    }
    if wal {
        return ffi::SQLITE_IOERR_WRITE; // a checkpoint writes none
    }
    // SAFETY: SQLite gives `amount` bytes.
    let buffer = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), amount as usize) };
    let mut done = 0;
    while done < buffer.len() {
        match pwrite(&work.database, &buffer[done..], offset + done as i64) {
            Ok(n) => done += n,
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::ENOSPC) => return ffi::SQLITE_FULL,
            Err(_) => return ffi::SQLITE_IOERR_WRITE,
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn truncate(raw: Raw, size: i64) -> c_int {
    if file(raw).0.interrupted() {
        return ffi::SQLITE_INTERRUPT;
    }
    if file(raw).1 {
        // The index says that the WAL is empty, and that is enough: the next writer begins it anew. Until then it
        // tells whoever recovers it what the database holds.
        return ffi::SQLITE_OK;
    }
    let cut = with_descriptor(raw, |fd| match fstat(fd)?.st_size == size {
        true => Ok(()),
        false => ftruncate(fd, size),
    });
    if cut.is_ok() { ffi::SQLITE_OK } else { ffi::SQLITE_IOERR_TRUNCATE }
}

unsafe extern "C" fn sync(raw: Raw, _: c_int) -> c_int {
    let (work, wal) = file(raw);
    if work.interrupted() {
        return ffi::SQLITE_INTERRUPT;
    }
    if wal {
        // The kernel tells of an error once for each description, and this one is a member's: so that commits that wait
        // for a sync hear of it, it is said to all.
        let sync = work.commits().begin();
        return match with_descriptor(raw, |fd| fdatasync(fd)) {
            Ok(()) if work.commits().end(sync) => ffi::SQLITE_OK,
            Ok(()) => ffi::SQLITE_IOERR_FSYNC,
            Err(_) => {
                work.commits().fail(sync);
                ffi::SQLITE_IOERR_FSYNC
            }
        };
    }
    match fdatasync(&work.database) {
        Ok(()) => ffi::SQLITE_OK,
        Err(e) => {
            // What had been copied before may be lost, and a member that syncs next would not hear of it.
            work.sync_failed.replace(Some(format!("it could not be synced ({e})")));
            ffi::SQLITE_IOERR_FSYNC
        }
    }
}

unsafe extern "C" fn file_size(raw: Raw, out: *mut i64) -> c_int {
    match with_descriptor(raw, |fd| fstat(fd)) {
        Ok(st) => {
            // SAFETY: SQLite passes a place for it.
            unsafe { *out = st.st_size };
            ffi::SQLITE_OK
        }
        Err(_) => ffi::SQLITE_IOERR_FSTAT,
    }
}

/// SHARED is held for the whole of a checkpoint ([`Work::begin`]); EXCLUSIVE, by which SQLite finds out at its close
/// whether it is the last, is never had.
unsafe extern "C" fn lock(_: Raw, level: c_int) -> c_int {
    if level <= ffi::SQLITE_LOCK_SHARED { ffi::SQLITE_OK } else { ffi::SQLITE_BUSY }
}

unsafe extern "C" fn unlock(_: Raw, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved(_: Raw, out: *mut c_int) -> c_int {
    // SAFETY: a place for the answer.
    unsafe { *out = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_control(_: Raw, _: c_int, _: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_: Raw) -> c_int {
    4096
}

unsafe extern "C" fn characteristics(_: Raw) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn shm_map(
    raw: Raw,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: a place for the address.
    let out = unsafe { &mut *out };
    *out = ptr::null_mut();
    if size as usize != REGION_SIZE || region < 0 {
        return ffi::SQLITE_IOERR_SHMMAP;
    }
    match file(raw).0.region(region as u32, extend != 0) {
        Ok(address) => {
            *out = address.unwrap_or(ptr::null_mut()).cast();
            ffi::SQLITE_OK
        }
        Err(_) => ffi::SQLITE_NOMEM,
    }
}

unsafe extern "C" fn shm_lock(raw: Raw, first: c_int, count: c_int, flags: c_int) -> c_int {
    let work = file(raw).0;
    let slots = u8::try_from(first).ok().zip(u8::try_from(count).ok()).and_then(|(f, c)| Slots::new(f, c));
    let Some(slots) = slots else { return ffi::SQLITE_MISUSE };
    let shared = flags & ffi::SQLITE_SHM_SHARED != 0;
    if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
        work.unlock(slots, shared);
        return ffi::SQLITE_OK;
    }
    if work.lock(slots, shared) { ffi::SQLITE_OK } else { ffi::SQLITE_BUSY }
}

unsafe extern "C" fn shm_barrier(_: Raw) {
    fence(Ordering::SeqCst);
}

unsafe extern "C" fn shm_unmap(_: Raw, _: c_int) -> c_int {
    ffi::SQLITE_OK
}
