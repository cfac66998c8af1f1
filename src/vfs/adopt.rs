//! A connection that is already open when the extension is loaded: the usual case (`.load`, `load_extension`).

use super::api::Library;
use super::main_file::MainFile;
use super::open::{install, service_for};
use super::statement::Connection;
use super::wrapped::{Kind, Wrapped};
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;

/// `SQLITE_FCNTL_*` that sqlite3_file_control answers itself.
fn file_control<T>(
    library: &Library,
    db: *mut ffi::sqlite3,
    name: &CStr,
    op: c_int,
    initial: T,
) -> Option<T> {
    let mut out = initial;
    // SAFETY: each of the operations used here writes one value of type T.
    let rc = unsafe { (library.api.file_control)(db, name.as_ptr(), op, (&raw mut out).cast::<c_void>()) };
    (rc == ffi::SQLITE_OK).then_some(out)
}

/// Whether each of these databases of the connection that can have a WAL is one that the broker checkpoints. Asked outside any
/// call of the VFS.
pub fn all_checkpointed_by_broker(library: &Library, db: *mut ffi::sqlite3, names: &[CString]) -> bool {
    names.iter().all(|name| {
        let op = ffi::SQLITE_FCNTL_FILE_POINTER;
        let file = file_control(library, db, name, op, ptr::null_mut::<ffi::sqlite3_file>());
        let Some(file) = file.filter(|f| !f.is_null()) else { return true };
        // SAFETY: SQLite's pointer to the database's file; if wrapped, no callback of it is running.
        unsafe {
            (*file).pMethods.is_null() // in memory, or temporary
                || Wrapped::is_wrapped(file)
                    && matches!(&Wrapped::of(file).kind, Kind::Main(main)
                        if main.checkpointed_by_broker())
        }
    })
}

/// Adopts every database of the connection. On error nothing half-works: what could not be adopted stays plain
/// and the caller fails the load.
///
/// `opening`: the connection is just being opened and has no other than `main`. Nothing may be prepared then: beside a
/// shared cache whose schema somebody changes that fails, and SQLite takes the error for the open's.
pub fn connection(library: &'static Library, db: *mut ffi::sqlite3, opening: bool) -> Result<(), String> {
    if !planted("list-before-main") {
        // First, because `PRAGMA database_list`, where it must be used, reads the schema before SQLite 3.39 or so, and whatever has been read
        // in WAL mode keeps its lock.
        database(library, db, c"main")?;
    }
    if !opening || planted("names-at-open") {
        let names = database_names(library, db, true).filter(|_| !planted("names-at-open"));
        let names = names.unwrap_or_else(|| listed(library, db));
        for name in names {
            database(library, db, &name)?;
        }
    }
    Ok(())
}

/// The connection's databases, without a statement that the application's authorizer, profile or progress handler would see.
/// SQLite before 3.39 does not tell: there it is known only that a connection that has `attached` nothing has no more than two.
pub fn database_names(library: &Library, db: *mut ffi::sqlite3, attached: bool) -> Option<Vec<CString>> {
    if planted("asked-by-statements") {
        return Some(listed(library, db));
    }
    match library.api.db_name {
        Some(db_name) => {
            let name = |index| {
                // SAFETY: the connection in whose call we are; its own name for a database, NUL-terminated if not null.
                unsafe {
                    let name = db_name(db, index);
                    (!name.is_null()).then(|| CStr::from_ptr(name).to_owned())
                }
            };
            Some((0..).map_while(name).collect())
        }
        None => (!attached).then(|| vec![c"main".to_owned(), c"temp".to_owned()]),
    }
}

/// `PRAGMA database_list`: for an application that loads the extension into a SQLite before 3.39, once.
fn listed(library: &Library, db: *mut ffi::sqlite3) -> Vec<CString> {
    let api = &library.api;
    let mut names = Vec::new();
    let mut statement = ptr::null_mut();
    // SAFETY: the connection whose extension is being loaded; the statement is finalized before returning.
    unsafe {
        let sql = c"PRAGMA database_list";
        if (api.prepare_v2)(db, sql.as_ptr(), -1, &mut statement, ptr::null_mut()) == ffi::SQLITE_OK {
            while (api.step)(statement) == ffi::SQLITE_ROW {
                let name = (api.column_text)(statement, 1);
                if !name.is_null() {
                    names.push(CStr::from_ptr(name.cast()).to_owned());
                }
            }
        }
        (api.finalize)(statement);
    }
    names
}

fn database(library: &'static Library, db: *mut ffi::sqlite3, name: &CStr) -> Result<(), String> {
    let file =
        file_control(library, db, name, ffi::SQLITE_FCNTL_FILE_POINTER, ptr::null_mut::<ffi::sqlite3_file>());
    let Some(file) = file.filter(|f| !f.is_null()) else { return Ok(()) };
    // SAFETY: SQLite's pointer to the database's file.
    if unsafe { (*file).pMethods.is_null() } {
        return Ok(()); // in memory, or temporary: no file
    }
    // SAFETY: as above.
    if unsafe { Wrapped::is_wrapped(file) } {
        // SAFETY: wrapped, and no callback of it is running.
        if let Kind::Main(main) = unsafe { &mut Wrapped::of(file).kind }
            && let Connection::Fixed(other) = main.connection
            && other != db
        {
            // A pager that two connections share: which of them asks cannot be told.
            main.connection = Connection::Unknown;
        }
        return Ok(());
    }
    // SAFETY: the connection's own name for its database.
    let path = unsafe { (library.api.db_filename)(db, name.as_ptr()) };
    // SAFETY: NUL-terminated if not null.
    if path.is_null() || unsafe { *path } == 0 {
        return Ok(()); // a temporary database that has spilled to a file
    }
    let what = name.to_string_lossy();
    // SAFETY: the name that the connection's own open made.
    if unsafe { library.uri(path, c"cache") }.as_deref() == Some("shared") {
        return Err(format!(
            "database '{what}' is open with cache=shared: load turnstile on another connection first (:memory: \
             will do), and open this one after it"
        ));
    }
    let vfs =
        file_control(library, db, name, ffi::SQLITE_FCNTL_VFS_POINTER, ptr::null_mut::<ffi::sqlite3_vfs>());
    if vfs != Some(library.unix) {
        return Err(format!(
            "database '{what}' is open through another VFS than \"unix\": open it without vfs="
        ));
    }
    if file_control(library, db, name, ffi::SQLITE_FCNTL_LOCKSTATE, -1) != Some(ffi::SQLITE_LOCK_NONE) {
        return Err(format!(
            "database '{what}' has already been read: load turnstile first thing after opening the connection, \
             outside any transaction"
        ));
    }
    // SAFETY: an open file of the unix VFS, by its VFS pointer; nothing of it is locked.
    let (config, service) = unsafe { service_for(library, path, file) }.map_err(|refusal| {
        library.log(refusal.code, &refusal.reason);
        format!("database '{what}': {}", refusal.reason)
    })?;
    // SAFETY: NUL-terminated.
    let text = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
    let mut main = MainFile::new(library, text, config, service);
    main.connection = Connection::Fixed(db);
    // SAFETY: as above.
    unsafe { install(file, main, path) };
    Ok(())
}
