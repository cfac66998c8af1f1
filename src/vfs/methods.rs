//! The C ABI: every `sqlite3_io_methods` callback. Each finds its state, catches unwinding, and either forwards
//! to the unix VFS or hands over to [`super::locks`], [`super::shm`] or [`super::control`].

use super::main_file::{MainFile, Service};
use super::wrapped::{Kind, Wrapped};
use super::{control, locks, open, shm, timeouts, wal};
use crate::client::shared::Shared;
use crate::lock::FileLevel;
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

type File = *mut ffi::sqlite3_file;

/// Marks a wrapped table.
pub const CLOSE: unsafe extern "C" fn(File) -> c_int = close;

/// Runs a callback's body; a panic becomes `code` and never crosses into the host.
pub fn guarded(code: c_int, body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(code)
}

/// As [`guarded`], for a callback of `file`, which other threads of this process see as being driven meanwhile.
fn call(file: File, code: c_int, body: impl FnOnce(&mut Wrapped) -> c_int) -> c_int {
    guarded(code, || {
        let w = state(file);
        if let Kind::Main(main) = &w.kind {
            main.activity.enter();
        }
        let rc = catch_unwind(AssertUnwindSafe(|| body(state(file)))).unwrap_or(code);
        if let Kind::Main(main) = &state(file).kind {
            main.note_holds();
            main.activity.leave();
        }
        rc
    })
}

/// The methods for a file of this kind: what the unix VFS has, with what is ours in place. `iVersion` and absent
/// methods stay as they are.
pub fn table(real: &ffi::sqlite3_io_methods, kind: &Kind) -> ffi::sqlite3_io_methods {
    let mut m = *real;
    m.xClose = Some(close);
    m.xWrite = Some(write);
    m.xTruncate = Some(truncate);
    m.xSync = Some(sync);
    m.xFileSize = Some(file_size);
    if let Kind::Main(_) = kind {
        m.xRead = Some(read);
        m.xLock = Some(lock);
        m.xUnlock = Some(unlock);
        m.xCheckReservedLock = Some(check_reserved);
        m.xFileControl = Some(file_control);
        m.xShmMap = m.xShmMap.and(Some(shm_map));
        m.xShmLock = m.xShmLock.and(Some(shm_lock));
        m.xShmBarrier = m.xShmBarrier.and(Some(shm_barrier));
        m.xShmUnmap = m.xShmUnmap.and(Some(shm_unmap));
        m.xFetch = m.xFetch.and(Some(fetch));
    }
    if let Kind::Companion { owner: Some(_), .. } = kind {
        m.xRead = Some(read_companion);
    }
    m
}

/// Calls a method of the unix VFS. Its tables have every method of their version.
macro_rules! real {
    ($w:expr, $method:ident, $missing:expr $(, $arg:expr)*) => {
        // SAFETY: `real` is the unix VFS's static table, and the arguments are the callback's own.
        match unsafe { (*$w.real).$method } {
            Some(f) => unsafe { f($($arg),*) },
            None => $missing,
        }
    };
}
pub(super) use real;

/// State of the file whose method SQLite calls.
fn state<'a>(file: File) -> &'a mut Wrapped {
    // SAFETY: these callbacks are only ever in tables made by Wrapped::wrap; SQLite serialises a file's calls.
    unsafe { Wrapped::of(file) }
}

fn main_file(w: &mut Wrapped) -> Option<&mut MainFile> {
    match &mut w.kind {
        Kind::Main(main) => Some(main),
        Kind::Companion { .. } => None,
    }
}

unsafe extern "C" fn close(file: File) -> c_int {
    guarded(ffi::SQLITE_IOERR_CLOSE, || {
        // SAFETY: as `state`.
        let wrapped = unsafe { Wrapped::unwrap(file) };
        let inherited = wrapped.inherited();
        let Wrapped { real, kind, .. } = *wrapped;
        let closed = || {
            // SAFETY: the unix VFS's own table, on its own file.
            unsafe { (*real).xClose }.map_or(ffi::SQLITE_OK, |f| unsafe { f(file) })
        };
        let mut main = match kind {
            Kind::Main(main) => main,
            Kind::Companion { wal, .. } => {
                if let Some(writes) = wal.filter(|_| !inherited) {
                    wal::wal_closes(&writes);
                }
                return closed();
            }
        };
        main.leave_note();
        // A transaction whose session was lost did not end as others do.
        main.settles_at_rows(false);
        open::forget(&main);
        if main.told_timeout {
            timeouts::forget(main.db());
        }
        if inherited {
            // The parent's seat, mappings and descriptors are not this process's to give up.
            let rc = closed();
            std::mem::forget(main);
            return rc;
        }
        main.forget_guest_regions();
        match main.service {
            Service::Plain(_) => closed(),
            Service::Seat(member) => {
                // The connection's descriptor first: closing it after the gate is open would drop the POSIX
                // locks of a plain connection of this process.
                let rc = closed();
                member.leave();
                rc
            }
        }
    })
}

unsafe extern "C" fn read(file: File, to: *mut c_void, amount: c_int, offset: i64) -> c_int {
    call(file, ffi::SQLITE_IOERR_READ, |w| {
        if w.inherited() && !planted("inherited-snapshot-read") {
            return ffi::SQLITE_IOERR_READ; // nobody keeps in place what its snapshot is made of
        }
        if !main_file(w).is_none_or(MainFile::snapshot_is_durable) {
            return ffi::SQLITE_IOERR_FSYNC;
        }
        let rc = real!(w, xRead, ffi::SQLITE_IOERR_READ, file, to, amount, offset);
        if !w.inherited()
            && let Some(main) = main_file(w)
        {
            // It is the first page read after SHARED.
            main.found_no_hot_journal();
        }
        believed(w, planted("page-believed"), rc, ffi::SQLITE_IOERR_READ)
    })
}

unsafe extern "C" fn read_companion(file: File, to: *mut c_void, amount: c_int, offset: i64) -> c_int {
    call(file, ffi::SQLITE_IOERR_READ, |w| {
        if let Kind::Companion { wal: Some(writes), .. } = &w.kind {
            if w.inherited() && !planted("inherited-snapshot-read") {
                return ffi::SQLITE_IOERR_READ;
            }
            if !w.inherited() && !wal::wal_is_read(writes) {
                return ffi::SQLITE_IOERR_FSYNC;
            }
        }
        let rc = real!(w, xRead, ffi::SQLITE_IOERR_READ, file, to, amount, offset);
        let wal = matches!(w.kind, Kind::Companion { wal: Some(_), .. });
        let rule_missing = if wal { planted("frame-believed") } else { planted("journal-believed") };
        believed(w, rule_missing, rc, ffi::SQLITE_IOERR_READ)
    })
}

unsafe extern "C" fn file_size(file: File, size: *mut i64) -> c_int {
    call(file, ffi::SQLITE_IOERR_FSTAT, |w| {
        let rc = real!(w, xFileSize, ffi::SQLITE_IOERR_FSTAT, file, size);
        believed(w, planted("size-believed"), rc, ffi::SQLITE_IOERR_FSTAT)
    })
}

/// A member's pages are not mapped, because SQLite refers to a mapped page long after it was looked at; SQLite then reads.
unsafe extern "C" fn fetch(file: File, offset: i64, amount: c_int, to: *mut *mut c_void) -> c_int {
    call(file, ffi::SQLITE_IOERR_MMAP, |w| {
        if main_file(w).is_some_and(|m| m.gated().is_some()) && !planted("pages-mapped") {
            // SAFETY: SQLite passes a place for the pointer.
            unsafe { *to = std::ptr::null_mut() };
            return ffi::SQLITE_OK;
        }
        real!(w, xFetch, ffi::SQLITE_IOERR_MMAP, file, offset, amount, to)
    })
}

/// `rc`, if what has just been read with it may be believed; else `code`.
fn believed(w: &Wrapped, rule_missing: bool, rc: c_int, code: c_int) -> c_int {
    let believes = match &w.kind {
        _ if w.inherited() || rule_missing => true,
        Kind::Main(main) => main.believes(),
        // SAFETY: SQLite is in a call for the companion, so it is in none for the database, which is open.
        Kind::Companion { owner, .. } => owner.is_none_or(|main| unsafe { (*main).believes() }),
    };
    if believes { rc } else { code }
}

unsafe extern "C" fn write(file: File, from: *const c_void, amount: c_int, offset: i64) -> c_int {
    call(file, ffi::SQLITE_IOERR_WRITE, |w| {
        if let Some(code) = refusal(w, ffi::SQLITE_IOERR_WRITE) {
            return code;
        }
        if let Kind::Companion { wal: Some(writes), .. } = &mut w.kind {
            writes.make_room((offset + i64::from(amount)) as u64);
        }
        let rc = real!(w, xWrite, ffi::SQLITE_IOERR_WRITE, file, from, amount, offset);
        if let (ffi::SQLITE_OK, Kind::Companion { wal: Some(writes), .. }) = (rc, &mut w.kind) {
            // SAFETY: xWrite's own arguments.
            writes.note(unsafe { wal::bytes(from, amount) }, offset);
        }
        rc
    })
}

unsafe extern "C" fn truncate(file: File, size: i64) -> c_int {
    call(file, ffi::SQLITE_IOERR_TRUNCATE, |w| match refusal(w, ffi::SQLITE_IOERR_TRUNCATE) {
        None => real!(w, xTruncate, ffi::SQLITE_IOERR_TRUNCATE, file, size),
        Some(code) => code,
    })
}

unsafe extern "C" fn sync(file: File, flags: c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_FSYNC, |w| match refusal(w, ffi::SQLITE_IOERR_FSYNC) {
        None if matches!(w.kind, Kind::Companion { wal: Some(_), .. }) => wal::sync_wal(w, file, flags),
        None => real!(w, xSync, ffi::SQLITE_IOERR_FSYNC, file, flags),
        Some(code) => code,
    })
}

/// Why nothing may be changed: a forked child must not touch its parent's files, and nobody writes a database whose
/// segment is poisoned (`code`); no frames follow those that a failed sync has left (the sync's own code, for it is what
/// failed).
fn refusal(w: &mut Wrapped, code: c_int) -> Option<c_int> {
    if w.inherited() || w.opened_before_fork() && !matches!(&w.kind, Kind::Main(m) if m.seat().is_none()) {
        return Some(code);
    }
    let (whole, follows) = match &mut w.kind {
        Kind::Main(main) => {
            let descriptor = main.descriptor;
            let mut checked = main.checked;
            let ours = main.gated().is_none_or(|m| still_members(m.shared(), descriptor, &mut checked));
            main.checked = checked;
            (ours, true)
        }
        Kind::Companion { segment, owner, checked, wal } => {
            // SAFETY: as in `believed`.
            let descriptor = owner.map_or(-1, |main| unsafe { (*main).descriptor });
            let ours = segment.is_none() || still_members(segment.as_ref(), descriptor, checked);
            (ours, wal.as_ref().is_none_or(wal::may_write_wal))
        }
    };
    match (whole, follows) {
        (false, _) => Some(code),
        (true, false) => Some(ffi::SQLITE_IOERR_FSYNC),
        (true, true) => None,
    }
}

/// The gate stands, and the host has left our descriptors alone.
fn still_members(segment: Option<&Arc<Shared>>, database: RawFd, checked: &mut u64) -> bool {
    segment.is_none_or(|s| s.believes(|| Some(database)) && s.still_ours(checked))
}

unsafe extern "C" fn lock(file: File, level: c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_LOCK, |w| match FileLevel::from_sqlite(level) {
        Some(level) => locks::lock(file, w, level),
        None => ffi::SQLITE_MISUSE,
    })
}

unsafe extern "C" fn unlock(file: File, level: c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_UNLOCK, |w| match FileLevel::from_sqlite(level) {
        Some(level) => locks::unlock(file, w, level),
        None => ffi::SQLITE_MISUSE,
    })
}

unsafe extern "C" fn check_reserved(file: File, out: *mut c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_CHECKRESERVEDLOCK, |w| {
        // SAFETY: SQLite passes a place for the answer.
        locks::check_reserved(file, w, unsafe { &mut *out })
    })
}

unsafe extern "C" fn file_control(file: File, op: c_int, arg: *mut c_void) -> c_int {
    if op == ffi::SQLITE_FCNTL_PDB && !planted("pdb-asks-the-note") {
        // SAFETY: sqlite3.h: with this operation the argument is the address of a pointer to the connection. The file is
        // open, and what is read and set here may be read and set while others use it.
        let joins = unsafe { control::joins_shared_cache(file, arg.cast()) };
        if joins {
            return guarded(ffi::SQLITE_ERROR, || {
                real!(state(file), xFileControl, ffi::SQLITE_NOTFOUND, file, op, arg)
            });
        }
    }
    call(file, ffi::SQLITE_ERROR, |w| control::file_control(file, w, op, arg))
}

unsafe extern "C" fn shm_map(
    file: File,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    call(file, ffi::SQLITE_IOERR_SHMMAP, |w| {
        // SAFETY: SQLite passes a place for the pointer (volatile there: it is shared memory).
        let out = unsafe { &mut *out };
        shm::map(file, w, region, size, extend, out)
    })
}

unsafe extern "C" fn shm_lock(file: File, first: c_int, count: c_int, flags: c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_SHMLOCK, |w| shm::lock(file, w, first, count, flags))
}

unsafe extern "C" fn shm_barrier(file: File) {
    guarded(0, || {
        shm::barrier(file, state(file));
        0
    });
}

unsafe extern "C" fn shm_unmap(file: File, delete: c_int) -> c_int {
    call(file, ffi::SQLITE_IOERR_SHMMAP, |w| shm::unmap(file, w, delete))
}
