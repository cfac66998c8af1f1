//! What `c/files.c` calls. Nothing unwinds into it, and `errno` is as it was but for an error that is answered.

use super::join::{self, Report};
use super::table::{self, Kind, Known};
use super::{locks, shm, turn, wal};
use crate::client::fork;
use nix::errno::Errno;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU32};
use std::time::Duration;

/// The one symbol by which C reaches all of it. As `struct turnstile_files` in `c/files.c`.
#[repr(C)]
pub struct Files {
    kinds: &'static [AtomicU8; table::FILES],
    known: &'static AtomicU32,
    report: extern "C" fn(Report),
    lock: unsafe extern "C" fn(c_int, c_int, *mut libc::flock, usize, *mut c_int) -> c_int,
    open_companion: unsafe extern "C" fn(*const c_char, usize) -> c_int,
    opened: unsafe extern "C" fn(c_int, *const c_char, usize),
    close: extern "C" fn(c_int) -> *mut c_void,
    closed: unsafe extern "C" fn(*mut c_void),
    io: extern "C" fn(c_int, i64, c_int) -> c_int,
    believed: extern "C" fn(c_int) -> c_int,
    map: extern "C" fn(c_int, u64) -> c_int,
    mapped: extern "C" fn(usize, usize),
    unmapped: extern "C" fn(usize),
    unlink: unsafe extern "C" fn(*const c_char, usize) -> c_int,
    sleep: extern "C" fn(u64, usize) -> c_int,
}

#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static turnstile_files: Files = Files {
    kinds: &table::KINDS,
    known: &table::COUNT,
    report,
    lock,
    open_companion,
    opened,
    close,
    closed,
    io,
    believed,
    map: map_shm,
    mapped,
    unmapped,
    unlink,
    sleep,
};

fn guarded<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    let before = Errno::last_raw();
    let answer = catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise);
    Errno::set_raw(before);
    answer
}

/// -1 with `errno` set, or the value.
fn answer(result: Result<c_int, Errno>) -> c_int {
    result.unwrap_or_else(|e| {
        e.set();
        -1
    })
}

/// # Safety
/// `path` is a string.
unsafe fn path<'a>(path: *const c_char) -> &'a Path {
    // SAFETY: by contract.
    Path::new(std::ffi::OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()))
}

/// How `turnstile run` is told.
extern "C" fn report(by: Report) {
    join::report_by(by);
}

/// A lock call. 0: it is the kernel's. Else `result` and `errno` are the answer.
///
/// # Safety
/// `lock` points at what `fcntl` was given.
unsafe extern "C" fn lock(
    fd: c_int,
    command: c_int,
    lock: *mut libc::flock,
    caller: usize,
    result: *mut c_int,
) -> c_int {
    // SAFETY: by contract.
    let lock = unsafe { &mut *lock };
    let done = guarded(Some(Err(Errno::EIO)), || locks::call(fd, command, lock, caller));
    let Some(done) = done else { return 0 };
    // SAFETY: C's own variable.
    unsafe { *result = answer(done.map(|()| 0)) };
    1
}

/// A file whose name ends in `-shm`, `-wal` or `-journal` is to be opened. -2: it is the kernel's.
///
/// # Safety
/// `name` is a string.
unsafe extern "C" fn open_companion(name: *const c_char, caller: usize) -> c_int {
    // SAFETY: by contract.
    let name = unsafe { path(name) };
    match guarded(Some(Err(Errno::EIO)), || shm::open(name, caller)) {
        Some(done) => answer(done),
        None => -2,
    }
}

/// A file was opened, while databases are known.
///
/// # Safety
/// `name` is a string.
unsafe extern "C" fn opened(fd: c_int, name: *const c_char, caller: usize) {
    // SAFETY: by contract.
    let name = unsafe { path(name) };
    guarded((), || shm::opened(fd, name, caller));
}

/// A descriptor that is marked is about to be closed, or replaced. What is returned goes to [`closed`].
extern "C" fn close(fd: c_int) -> *mut c_void {
    let known = guarded(None, || {
        if table::in_vfork_child() {
            return None;
        }
        if let Some(Known { kind, database }) = table::find(fd) {
            shm::closes(&database, kind, fd);
        }
        table::remove(fd)
    });
    known.map_or(std::ptr::null_mut(), |known| Box::into_raw(Box::new(known)).cast())
}

/// It is closed: with its last descriptor the database is left.
///
/// # Safety
/// `known` is what [`close`] returned, once.
unsafe extern "C" fn closed(known: *mut c_void) {
    if !known.is_null() {
        // SAFETY: by contract.
        let known = unsafe { Box::from_raw(known.cast::<Known>()) };
        guarded((), || drop(known));
    }
}

/// A marked descriptor is about to be read (up to `end`, or -1) or written. Not 0: the error.
extern "C" fn io(fd: c_int, end: i64, writes: c_int) -> c_int {
    let may = guarded(false, || wal::may_go_on(fd, u64::try_from(end).ok(), writes != 0));
    if may { 0 } else { refused(writes != 0) }
}

/// Not EIO for a read: SQLite says then that the database is malformed (os_unix.c, `unixRead`).
fn refused(writes: bool) -> c_int {
    (if writes { Errno::EIO } else { Errno::ESTALE }) as c_int
}

/// A marked descriptor has been read. Not 0: the error that SQLite gets in place of the bytes.
extern "C" fn believed(fd: c_int) -> c_int {
    let is = guarded(false, || wal::is_believed(fd));
    if is { 0 } else { refused(false) }
}

/// A part of `-shm` that ends there is about to be mapped. Not 0: the error.
extern "C" fn map_shm(fd: c_int, end: u64) -> c_int {
    guarded(Errno::EIO as c_int, || match table::find(fd) {
        Some(Known { kind: Kind::Shm, database }) if shm::map(&database, end) => 0,
        Some(Known { kind: Kind::Shm, .. }) => Errno::ENOMEM as c_int,
        _ => Errno::EIO as c_int,
    })
}

/// It was mapped: a forked child gets a copy of its own.
extern "C" fn mapped(address: usize, length: usize) {
    guarded((), || fork::remember_mapping(address, length));
}

extern "C" fn unmapped(address: usize) {
    guarded((), || fork::forget_mapping(address));
}

/// A file whose name ends in `-shm` or `-journal` is to be removed: an [`shm::Unlink`].
///
/// # Safety
/// `name` is a string.
unsafe extern "C" fn unlink(name: *const c_char, caller: usize) -> c_int {
    // SAFETY: by contract.
    let name = unsafe { path(name) };
    guarded(shm::Unlink::Refused, || shm::unlink(name, caller)) as c_int
}

/// A thread sleeps. 0: it has not yet.
extern "C" fn sleep(micros: u64, caller: usize) -> c_int {
    c_int::from(guarded(false, || turn::sleep(Duration::from_micros(micros), caller)))
}
