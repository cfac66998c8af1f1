//! SQLite as this extension sees it: the routines of the library that loaded it, one set a library, because one
//! process can hold two SQLite libraries that both load the same extension.

use super::hook::Place;
use libsqlite3_sys as ffi;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// SQLite 3.34: older libraries lack routines that name the companion files.
pub const OLDEST_SQLITE: c_int = 3_034_000;

type Db = *mut ffi::sqlite3;
type Stmt = *mut ffi::sqlite3_stmt;
type WalHook = unsafe extern "C" fn(*mut c_void, Db, *const c_char, c_int) -> c_int;
type Traced = unsafe extern "C" fn(c_uint, *mut c_void, *mut c_void, *mut c_void) -> c_int;

/// The routines, in the order of `struct turnstile_api` in `c/api.c`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Routines {
    pub version: c_int,
    pub libversion: unsafe extern "C" fn() -> *const c_char,
    pub vfs_find: unsafe extern "C" fn(*const c_char) -> *mut ffi::sqlite3_vfs,
    pub vfs_register: unsafe extern "C" fn(*mut ffi::sqlite3_vfs, c_int) -> c_int,
    pub file_control: unsafe extern "C" fn(Db, *const c_char, c_int, *mut c_void) -> c_int,
    pub next_stmt: unsafe extern "C" fn(Db, Stmt) -> Stmt,
    pub stmt_busy: unsafe extern "C" fn(Stmt) -> c_int,
    pub stmt_readonly: unsafe extern "C" fn(Stmt) -> c_int,
    pub stmt_status: unsafe extern "C" fn(Stmt, c_int, c_int) -> c_int,
    pub sql: unsafe extern "C" fn(Stmt) -> *const c_char,
    pub db_filename: unsafe extern "C" fn(Db, *const c_char) -> *const c_char,
    pub prepare_v2: unsafe extern "C" fn(Db, *const c_char, c_int, *mut Stmt, *mut *const c_char) -> c_int,
    pub step: unsafe extern "C" fn(Stmt) -> c_int,
    pub column_text: unsafe extern "C" fn(Stmt, c_int) -> *const c_uchar,
    pub finalize: unsafe extern "C" fn(Stmt) -> c_int,
    pub get_autocommit: unsafe extern "C" fn(Db) -> c_int,
    pub trace_v2: unsafe extern "C" fn(Db, c_uint, Option<Traced>, *mut c_void) -> c_int,
    pub log: unsafe extern "C" fn(c_int, *const c_char, ...),
    pub mprintf: unsafe extern "C" fn(*const c_char, ...) -> *mut c_char,
    pub uri_parameter: unsafe extern "C" fn(*const c_char, *const c_char) -> *const c_char,
    pub uri_boolean: unsafe extern "C" fn(*const c_char, *const c_char, c_int) -> c_int,
    pub filename_journal: unsafe extern "C" fn(*const c_char) -> *const c_char,
    pub filename_wal: unsafe extern "C" fn(*const c_char) -> *const c_char,
    pub txn_state: unsafe extern "C" fn(Db, *const c_char) -> c_int,
    pub column_count: unsafe extern "C" fn(Stmt) -> c_int,
    pub msize: unsafe extern "C" fn(*mut c_void) -> u64,
    pub wal_hook: Option<unsafe extern "C" fn(Db, Option<WalHook>, *mut c_void) -> *mut c_void>,
    pub wal_autocheckpoint: Option<unsafe extern "C" fn(Db, c_int) -> c_int>,
    pub is_interrupted: Option<unsafe extern "C" fn(Db) -> c_int>,
    pub db_name: Option<unsafe extern "C" fn(Db, c_int) -> *const c_char>,
}

unsafe extern "C" {
    fn turnstile_api_read(table: *const c_void, least: c_int, out: *mut Routines) -> c_int;
    fn turnstile_api_say(table: *const c_void, out: *mut *mut c_char, text: *const c_char);
}

/// One SQLite library in this process, with its unix VFS as it was before we wrapped it.
pub struct Library {
    pub api: Routines,
    /// The library's own VFS named "unix", whose `xOpen`, `xDelete` and `xSleep` are wrapped in place.
    pub unix: *mut ffi::sqlite3_vfs,
    /// The unix VFS as it was.
    pub original: ffi::sqlite3_vfs,
    /// The VFS named "turnstile".
    pub vfs: ffi::sqlite3_vfs,
    pub hook: Place,
    next: *mut Library,
}

// SAFETY: a Library is immutable once it is published, but for `vfs`, which SQLite links into its list under
// its own mutex.
unsafe impl Sync for Library {}

static LIBRARIES: AtomicPtr<Library> = AtomicPtr::new(ptr::null_mut());

impl Library {
    /// The library that `unix_or_ours`, one of its two VFSes, belongs to.
    pub fn of_vfs(vfs: *const ffi::sqlite3_vfs) -> Option<&'static Library> {
        Library::find(|l| ptr::eq(l.unix, vfs) || ptr::eq(&l.vfs, vfs))
    }

    pub fn of_table(routines: &Routines) -> Option<&'static Library> {
        Library::find(|l| ptr::fn_addr_eq(l.api.vfs_register, routines.vfs_register))
    }

    fn find(matches: impl Fn(&Library) -> bool) -> Option<&'static Library> {
        let mut node = LIBRARIES.load(Ordering::Acquire);
        // SAFETY: only leaked boxes are ever in the list.
        while let Some(library) = unsafe { node.as_ref() } {
            if matches(library) {
                return Some(library);
            }
            node = library.next;
        }
        None
    }

    /// Publishes a library for the life of the process. Called under the registration lock.
    pub fn publish(mut self) -> *mut Library {
        self.next = LIBRARIES.load(Ordering::Acquire);
        let leaked = Box::into_raw(Box::new(self));
        LIBRARIES.store(leaked, Ordering::Release);
        leaked
    }

    pub fn new(
        api: Routines,
        unix: *mut ffi::sqlite3_vfs,
        original: ffi::sqlite3_vfs,
        vfs: ffi::sqlite3_vfs,
    ) -> Library {
        Library { api, unix, original, vfs, hook: Place::default(), next: ptr::null_mut() }
    }

    /// Writes to SQLite's error log; the only place where the host's operator finds our reasons.
    pub fn log(&self, code: c_int, text: &str) {
        let text = CString::new(format!("turnstile: {text}")).unwrap_or_default();
        // SAFETY: "%s" takes one NUL-terminated string.
        unsafe { (self.api.log)(code, c"%s".as_ptr(), text.as_ptr()) };
    }

    /// A copy of `text` that SQLite can free.
    pub fn sqlite_string(&self, text: &str) -> *mut c_char {
        let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
        // SAFETY: "%s" takes one NUL-terminated string.
        unsafe { (self.api.mprintf)(c"%s".as_ptr(), text.as_ptr()) }
    }

    pub fn version(&self) -> String {
        // SAFETY: a static string of the library.
        unsafe { CStr::from_ptr((self.api.libversion)()) }.to_string_lossy().into_owned()
    }

    /// The URI parameter of a file name that SQLite handed to `xOpen`.
    ///
    /// # Safety
    /// `name` must be such a name.
    pub unsafe fn uri(&self, name: *const c_char, key: &CStr) -> Option<String> {
        // SAFETY: by contract; the value lives as long as the name.
        let value = unsafe { (self.api.uri_parameter)(name, key.as_ptr()) };
        // SAFETY: NUL-terminated if not null.
        (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_string_lossy().into_owned())
    }
}

/// Leaves a message where `sqlite3_load_extension` returns it, whatever the library's version.
///
/// # Safety
/// The routine table and the place for a message that SQLite handed to the extension's entry point.
pub unsafe fn say(table: *const c_void, message: *mut *mut c_char, reason: &str) {
    let text = CString::new(format!("turnstile: {reason}")).unwrap_or_default();
    if !table.is_null() && !message.is_null() {
        // SAFETY: by contract; the C side copies the text into SQLite's memory.
        unsafe { turnstile_api_say(table, message, text.as_ptr()) };
    }
}

/// Reads the routine table.
///
/// # Safety
/// `table` must be the `sqlite3_api_routines` that SQLite handed to the extension's entry point.
pub unsafe fn read_routines(table: *const c_void) -> Result<Routines, String> {
    if table.is_null() {
        return Err("this SQLite was built without extension support (SQLITE_OMIT_LOAD_EXTENSION)".into());
    }
    let mut out = std::mem::MaybeUninit::<Routines>::uninit();
    // SAFETY: by contract; the C side fills all of it when the version is new enough.
    let version = unsafe { turnstile_api_read(table, OLDEST_SQLITE, out.as_mut_ptr()) };
    match version >= OLDEST_SQLITE {
        // SAFETY: filled.
        true => Ok(unsafe { out.assume_init() }),
        false => Err(format!(
            "SQLite {}.{}.{} is too old: turnstile needs 3.34 or later",
            version / 1_000_000,
            version / 1000 % 1000,
            version % 1000
        )),
    }
}
