//! The extension inside the SQLite that this program has linked in, for the processes of `demo` and `bench`.

use std::error::Error;

use rusqlite::{Connection, OptionalExtension, ffi};

/// Gives the extension to this program's SQLite, for every connection that it opens from now on.
pub fn register() -> Result<(), String> {
    type EntryPoint =
        unsafe extern "C" fn(*mut ffi::sqlite3, *mut *mut i8, *const ffi::sqlite3_api_routines) -> i32;
    // SAFETY: the two types differ in the name of a pointer alone; the function is there for this call.
    let rc = unsafe {
        let entry: EntryPoint = std::mem::transmute(turnstile::vfs::entry::turnstile_auto_init as *const ());
        ffi::sqlite3_auto_extension(Some(entry))
    };
    if rc == ffi::SQLITE_OK { Ok(()) } else { Err(format!("sqlite3_auto_extension failed ({rc})")) }
}

/// How turnstile serves this connection: `gated`, unless something is wrong. `None`: it is plain SQLite's.
pub fn mode(db: &Connection) -> Result<Option<String>, Box<dyn Error>> {
    let status = db.query_row("PRAGMA turnstile_status", [], |row| row.get::<_, String>(0)).optional()?;
    let Some(status) = status else { return Ok(None) };
    let status: serde_json::Value = serde_json::from_str(&status)?;
    Ok(Some(status["mode"].as_str().unwrap_or("none").to_owned()))
}
