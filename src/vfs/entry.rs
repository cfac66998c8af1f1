//! The extension's entry points: registering the VFS with the library that loads us, adopting its connection.

use super::adopt;
use super::api::{Library, read_routines, say};
use super::open::{delete, open};
use super::waiting::sleep;
use crate::client::autostart::own_path;
use crate::client::config::Config;
use crate::client::served;
use libsqlite3_sys as ffi;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

/// `SQLITE_OK_LOAD_PERMANENTLY`, sqlite3.h.
const OK_LOAD_PERMANENTLY: c_int = 256;

/// What SQLite calls when it loads `libturnstile.so`.
///
/// # Safety
/// Called by SQLite's `sqlite3_load_extension` with its own arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sqlite3_turnstile_init(
    db: *mut ffi::sqlite3,
    message: *mut *mut c_char,
    routines: *const c_void,
) -> c_int {
    // SAFETY: by contract.
    match unsafe { enter(db, message, routines, true) } {
        ffi::SQLITE_OK => OK_LOAD_PERMANENTLY,
        rc => rc,
    }
}

/// SQLite makes the entry point's name of the letters of the file's: here `libturnstile-musl.so`.
///
/// # Safety
/// As [`sqlite3_turnstile_init`].
#[cfg(target_env = "musl")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sqlite3_turnstilemusl_init(
    db: *mut ffi::sqlite3,
    message: *mut *mut c_char,
    routines: *const c_void,
) -> c_int {
    // SAFETY: by contract.
    unsafe { sqlite3_turnstile_init(db, message, routines) }
}

/// The same as an auto-extension, run for every connection that opens: `turnstile run` and the turnstile program
/// itself. Returns plain `SQLITE_OK`, anything else would fail the open.
///
/// # Safety
/// Registered with `sqlite3_auto_extension`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn turnstile_auto_init(
    db: *mut ffi::sqlite3,
    message: *mut *mut c_char,
    routines: *const c_void,
) -> c_int {
    // SAFETY: by contract.
    unsafe { enter(db, message, routines, false) }
}

/// # Safety
/// The arguments of an extension's entry point.
unsafe fn enter(
    db: *mut ffi::sqlite3,
    message: *mut *mut c_char,
    routines: *const c_void,
    strict: bool,
) -> c_int {
    silence_panics();
    let entered = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: by contract.
        let api = unsafe { read_routines(routines) }.map_err(|reason| (None, reason))?;
        let library = register(api).map_err(|reason| (None, reason))?;
        let settings = Config::from_environment().map_err(|e| (Some(library), e.to_string()));
        settings
            .and_then(|_| adopt::connection(library, db, !strict).map_err(|reason| (Some(library), reason)))
    }));
    match entered {
        Ok(Ok(())) => ffi::SQLITE_OK,
        // A connection that chose its own VFS under `turnstile run` stays what it chose, and the log says so.
        Ok(Err((Some(library), reason))) if !strict && reason.contains("another VFS") => {
            library.log(ffi::SQLITE_WARNING, &reason);
            ffi::SQLITE_OK
        }
        Ok(Err((_, reason))) => {
            // SAFETY: by contract.
            unsafe { say(routines, message, &reason) };
            ffi::SQLITE_ERROR
        }
        Err(_) => ffi::SQLITE_ERROR,
    }
}

/// In the extension a panic, which never leaves a callback, must not print on the host's descriptor 2 either. The
/// program keeps its own panic messages.
fn silence_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        if own_path().is_some_and(|p| p.extension().is_some_and(|e| e == "so")) {
            std::panic::set_hook(Box::new(|_| {}));
        }
    });
}

/// Registers the VFS with a library, once: wraps `unix` in place and makes `turnstile` the default, unless the
/// application has made another VFS the default.
fn register(api: super::api::Routines) -> Result<&'static Library, String> {
    static REGISTERING: Mutex<()> = Mutex::new(());
    let _guard = REGISTERING.lock().unwrap_or_else(PoisonError::into_inner);
    // The linker throws away what nobody names.
    std::hint::black_box(&super::build::BUILD);
    if let Some(known) = Library::of_table(&api) {
        return Ok(known);
    }
    // SAFETY: sqlite3_vfs_find with a static name, or null for the default.
    let (unix, default) = unsafe { ((api.vfs_find)(c"unix".as_ptr()), (api.vfs_find)(std::ptr::null())) };
    if unix.is_null() {
        return Err("this SQLite has no VFS named \"unix\"".into());
    }
    // SAFETY: the library's own VFS, which it never unregisters.
    let original = unsafe { *unix };
    if original.xOpen.is_none() || original.iVersion < 1 {
        return Err("this SQLite's unix VFS is not usable".into());
    }
    let mut vfs = original;
    vfs.pNext = std::ptr::null_mut();
    vfs.zName = c"turnstile".as_ptr();
    vfs.xOpen = Some(open);
    vfs.xDelete = Some(delete);
    vfs.xSleep = Some(sleep);
    if let Some(open) = original.xOpen {
        served::serve(open as usize);
    }
    let library = Library::new(api, unix, original, vfs).publish();
    let make_default = c_int::from(std::ptr::eq(unix, default));
    // SAFETY: `library` lives for ever; SQLite only links its vfs into a list. The unix VFS is the library's
    // writable static, and its methods are replaced by ones that forward to the originals.
    unsafe {
        let rc = (api.vfs_register)(&raw mut (*library).vfs, make_default);
        if rc != ffi::SQLITE_OK {
            return Err(format!("sqlite3_vfs_register failed ({rc})"));
        }
        (*unix).xOpen = Some(open);
        (*unix).xDelete = Some(delete);
        (*unix).xSleep = Some(sleep);
        if make_default == 0 && !default.is_null() {
            let name = CStr::from_ptr((*default).zName).to_string_lossy().into_owned();
            let text =
                format!("the default VFS is '{name}' and stays it; vfs=turnstile or vfs=unix is brokered");
            (*library).log(ffi::SQLITE_NOTICE, &text);
        }
        Ok(&*library)
    }
}
