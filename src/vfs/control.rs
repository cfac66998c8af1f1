//! `xFileControl`: what is ours is answered here, everything else goes to the unix VFS.

use super::autocheckpoint;
use super::main_file::{MainFile, Service};
use super::methods::real;
use super::note;
use super::statement::Connection;
use super::timeouts;
use super::wrapped::{Kind, Wrapped};
use crate::lock::{Ask, Release, Request, Slots, Verdict, slot};
use crate::planted::planted;
use crate::wire::message::{Mode, Role};
use libsqlite3_sys as ffi;
use serde::Serialize;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// `SQLITE_FCNTL_EXTERNAL_READER`, sqlite3.h.
const FCNTL_EXTERNAL_READER: c_int = 40;

/// A connection is being opened on a b-tree that others have open (a shared cache). SQLite says so without the b-tree's
/// mutex, so others may be in calls of the file: its state is not touched.
///
/// # Safety
/// An open file of ours.
pub unsafe fn joins_shared_cache(file: *mut ffi::sqlite3_file, db: *mut *mut ffi::sqlite3) -> bool {
    // SAFETY: by contract.
    let Kind::Main(main) = (unsafe { &Wrapped::of(file).kind }) else { return false };
    let joins = matches!(main.connection, Connection::Current(at) if at == db);
    if joins {
        main.shared_cache.store(true, Relaxed);
    }
    joins
}

pub fn file_control(file: *mut ffi::sqlite3_file, w: &mut Wrapped, op: c_int, arg: *mut c_void) -> c_int {
    if let Kind::Main(main) = &mut w.kind {
        // sqlite3PagerClose asks it, and then for EXCLUSIVE.
        main.closing = op == ffi::SQLITE_FCNTL_HAS_MOVED;
        match op {
            ffi::SQLITE_FCNTL_PDB => {
                main.connection = Connection::Current(arg.cast());
                let opening = note::is_opening(main.library, main.db());
                if opening && main.seat().is_some() && !planted("no-trace") {
                    note::trace(main.library, main.db());
                }
                // Another database of a connection may be one that the broker does not checkpoint.
                if let Some(note) = main.note() {
                    note.automatic.look_again();
                    if opening && planted("autocheckpoint-set-early") {
                        autocheckpoint::raise_early(note.library, note.db(), &note.automatic);
                    }
                }
            }
            ffi::SQLITE_FCNTL_PRAGMA => {
                // SAFETY: sqlite3.h: an array of at least three strings, the first for the answer.
                let done = unsafe { pragma(main, arg.cast::<*mut c_char>()) };
                if let Some(rc) = done {
                    return rc;
                }
            }
            ffi::SQLITE_FCNTL_LOCKSTATE if main.gated().is_some() => {
                // SAFETY: sqlite3.h: points to an int.
                unsafe { *arg.cast::<c_int>() = main.level as c_int };
                return ffi::SQLITE_OK;
            }
            ffi::SQLITE_FCNTL_LOCK_TIMEOUT => {
                // SAFETY: sqlite3.h: points to an int, which receives the old value.
                let value = unsafe { &mut *arg.cast::<c_int>() };
                if main.gated().is_some() {
                    std::mem::swap(value, &mut main.lock_timeout);
                    return ffi::SQLITE_OK;
                }
            }
            FCNTL_EXTERNAL_READER if main.gated().is_some() => {
                // SAFETY: sqlite3.h: points to an int.
                unsafe { *arg.cast::<c_int>() = c_int::from(external_reader(main)) };
                return ffi::SQLITE_OK;
            }
            ffi::SQLITE_FCNTL_COMMIT_PHASETWO if main.gated().is_some() && !main.inherited() => {
                let rc = main.commit_is_durable();
                if rc != ffi::SQLITE_OK {
                    return rc;
                }
            }
            ffi::SQLITE_FCNTL_CKPT_START if main.gated().is_some() && !main.inherited() => {
                main.checkpoint_starts();
            }
            _ => {}
        }
    }
    let rc = real!(w, xFileControl, ffi::SQLITE_NOTFOUND, file, op, arg);
    if op == ffi::SQLITE_FCNTL_VFSNAME
        && let Kind::Main(main) = &w.kind
    {
        // SAFETY: sqlite3.h: a pointer to a string from sqlite3_mprintf, to be freed by SQLite.
        unsafe {
            let name = arg.cast::<*mut c_char>();
            *name = (main.library.api.mprintf)(c"turnstile/%z".as_ptr(), *name);
        }
        return ffi::SQLITE_OK;
    }
    rc
}

/// `PRAGMA turnstile_status`, and the timeout that `PRAGMA busy_timeout` passes by on its way to SQLite.
///
/// # Safety
/// `args` is the array of `SQLITE_FCNTL_PRAGMA`.
unsafe fn pragma(main: &mut MainFile, args: *mut *mut c_char) -> Option<c_int> {
    // SAFETY: by contract; the second is the pragma's name, the third its argument or null.
    let (name, value) = unsafe {
        let value = *args.add(2);
        let value = (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned());
        (CStr::from_ptr(*args.add(1)).to_string_lossy().to_ascii_lowercase(), value)
    };
    if planted("traced-late") {
        note::trace(main.library, main.db());
    }
    match name.as_str() {
        // `locking_mode`: the number is the application's own from here on, also where no trace tells of later statements.
        "wal_autocheckpoint" | "locking_mode" if !main.inherited() => {
            let rule = match name.as_str() {
                "locking_mode" => "exclusive-left-to-the-broker",
                _ => "autocheckpoint-tells-raised",
            };
            if let Some(note) = main.note().filter(|_| !planted(rule)) {
                autocheckpoint::give_back(note.library, note.db(), &note.automatic);
            }
            None
        }
        "busy_timeout" => {
            if let Some(ms) = value.and_then(|v| v.trim().parse::<i64>().ok()) {
                main.told_timeout = true;
                timeouts::set(main.db(), Duration::from_millis(ms.max(0) as u64));
            }
            None
        }
        "turnstile_status" => {
            let json = serde_json::to_string(&Status::of(main)).unwrap_or_default();
            // SAFETY: by contract.
            unsafe { *args = main.library.sqlite_string(&json) };
            Some(ffi::SQLITE_OK)
        }
        _ => None,
    }
}

/// Whether another connection has a read transaction open in the WAL.
fn external_reader(main: &mut MainFile) -> bool {
    let Some(slots) = Slots::new(slot::READ0, slot::COUNT - slot::READ0) else { return true };
    let ask = Ask { request: Request::ShmExclusive { slots, blocking: false }, ahead: false };
    match main.ask(ask, || false) {
        Ok(o) if o.verdict != Verdict::Busy => {
            if let Some(member) = main.gated() {
                let _ = member.release(Release::ShmExclusive { slots, keep_turn: false });
            }
            false
        }
        // Held, or it cannot be told: there may be one.
        _ => true,
    }
}

/// One row of JSON.
#[derive(Serialize)]
struct Status<'a> {
    mode: &'static str,
    /// Why the mode is what it is, where that is not plain from its name.
    reason: Option<String>,
    database: &'a str,
    seat: Option<u32>,
    role: Option<&'static str>,
    /// How lock requests travel: "fast" (in the segment) or "socket" (by messages to the broker).
    lane: Option<&'static str>,
    socket: Option<String>,
    broker_pid: Option<i32>,
    has_turn: bool,
    wait_ms: u64,
    version: &'static str,
}

impl Status<'_> {
    fn of(main: &MainFile) -> Status<'_> {
        let member = match &main.service {
            Service::Seat(member) if !main.inherited() => Some(member),
            _ => None,
        };
        let (mode, reason) = match (&main.service, member) {
            (Service::Plain(reason), _) => ("plain", Some(reason.clone())),
            (_, None) => ("inherited", Some("this connection was opened before a fork".to_owned())),
            (_, Some(m)) if !m.is_whole() => ("lost", Some("the broker is gone".to_owned())),
            (_, Some(m)) if m.mode() == Mode::Gated => ("gated", None),
            _ => ("guest", Some("plain clients hold the file, or guest mode was asked for".to_owned())),
        };
        Status {
            mode,
            reason,
            database: &main.path,
            seat: member.map(|m| m.seat().seat),
            role: member.map(|m| if m.role() == Role::ReadWrite { "read-write" } else { "read-only" }),
            lane: member.map(|m| m.lane()),
            socket: member.map(|m| m.session().path().display().to_string()),
            broker_pid: member.map(|m| m.session().broker_pid()),
            has_turn: main.turn,
            wait_ms: main.limit().as_millis() as u64,
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}
