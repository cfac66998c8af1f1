//! What the connection is doing, asked of SQLite from inside a VFS call: which statement runs, does it write.

use super::api::Routines;
use crate::lock::learned::hash;
use libsqlite3_sys as ffi;
use std::ptr;

/// `SQLITE_STMTSTATUS_RUN`: how often a statement was started.
const STMTSTATUS_RUN: i32 = 6;

/// One run of one statement: its retries after a BUSY are the same run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    statement: usize,
    count: i32,
}

impl Run {
    pub fn same_statement(self, other: Run) -> bool {
        self.statement == other.statement
    }
}

/// Where a file's connection is found.
#[derive(Clone, Copy, Debug)]
pub enum Connection {
    Unknown,
    /// The handle that loaded the extension.
    Fixed(*mut ffi::sqlite3),
    /// `SQLITE_FCNTL_PDB`: the address of the b-tree's current connection, read each time (shared cache).
    Current(*mut *mut ffi::sqlite3),
}

impl Connection {
    pub fn handle(self) -> *mut ffi::sqlite3 {
        match self {
            Connection::Unknown => ptr::null_mut(),
            Connection::Fixed(db) => db,
            // SAFETY: points into the b-tree that owns the file whose call we are in.
            Connection::Current(at) => unsafe { *at },
        }
    }
}

/// The running statements of `db`. Called from a VFS callback, under the connection's own mutex.
fn running(api: &Routines, db: *mut ffi::sqlite3) -> impl Iterator<Item = *mut ffi::sqlite3_stmt> + '_ {
    let mut next = ptr::null_mut();
    std::iter::from_fn(move || {
        if db.is_null() {
            return None;
        }
        loop {
            // SAFETY: db is the connection in whose call we are; next is null or one of its statements.
            unsafe {
                next = (api.next_stmt)(db, next);
                if next.is_null() {
                    return None;
                }
                if (api.stmt_busy)(next) != 0 {
                    return Some(next);
                }
            }
        }
    })
}

/// A statement that begins a read transaction.
#[derive(Clone, Copy, Debug)]
pub struct Statement {
    /// Not read-only, which `BEGIN IMMEDIATE` is not either.
    pub writes: bool,
    /// What it reads does not get out before the transaction ends, or another statement starts that is noted.
    pub silent: bool,
    /// A hash of its text; 0: it does not matter, or is not known.
    pub text: u64,
}

/// The running statement that writes, else the newest that runs.
pub fn walk(api: &Routines, db: *mut ffi::sqlite3) -> Statement {
    // SAFETY: statements of the connection in whose call we are.
    let writer = running(api, db).find(|s| unsafe { (api.stmt_readonly)(*s) } == 0);
    let first = || in_transaction(api, db).then(|| running(api, db).next()).flatten();
    let text = writer.or_else(first).map_or(0, |s| {
        // SAFETY: the statement's own text, NUL-terminated if there is one.
        unsafe {
            let sql = (api.sql)(s);
            if sql.is_null() { 0 } else { hash(std::ffi::CStr::from_ptr(sql).to_bytes()) }
        }
    });
    // Nobody notes the statements of this connection: it must be the whole transaction, and return nothing.
    // SAFETY: as above.
    let silent = writer.is_some_and(|s| unsafe {
        (api.column_count)(s) == 0 && !in_transaction(api, db) && changes_rows((api.sql)(s))
    });
    Statement { writes: writer.is_some(), silent, text }
}

/// The text begins like a statement that changes rows; `BEGIN IMMEDIATE`, for one, does not.
///
/// # Safety
/// `sql` is null or NUL-terminated.
unsafe fn changes_rows(sql: *const std::ffi::c_char) -> bool {
    if sql.is_null() {
        return false;
    }
    // SAFETY: by contract.
    let text = unsafe { std::ffi::CStr::from_ptr(sql) }.to_bytes().trim_ascii_start();
    let begins = |word: &[u8]| text.len() >= word.len() && text[..word.len()].eq_ignore_ascii_case(word);
    [&b"insert"[..], b"update", b"delete", b"replace"].into_iter().any(begins)
}

/// An explicit transaction is open.
pub fn in_transaction(api: &Routines, db: *mut ffi::sqlite3) -> bool {
    // SAFETY: the connection in whose call we are.
    !db.is_null() && unsafe { (api.get_autocommit)(db) } == 0
}

/// The running statement that writes, and how often it has been prepared anew (`SQLITE_STMTSTATUS_REPREPARE`).
pub fn writer(api: &Routines, db: *mut ffi::sqlite3) -> Option<(Run, i32)> {
    const STMTSTATUS_REPREPARE: i32 = 5;
    // SAFETY: statements of the connection in whose call we are; the counter is not reset.
    unsafe {
        let statement = running(api, db).find(|s| (api.stmt_readonly)(*s) == 0)?;
        let count = (api.stmt_status)(statement, STMTSTATUS_RUN, 0);
        let prepared = (api.stmt_status)(statement, STMTSTATUS_REPREPARE, 0);
        Some((Run { statement: statement as usize, count }, prepared))
    }
}

/// The run that waits: the newest running statement's. `None`: no statement (a checkpoint call, a backup).
pub fn current_run(api: &Routines, db: *mut ffi::sqlite3) -> Option<Run> {
    let statement = running(api, db).next()?;
    // SAFETY: as above; the counter is not reset.
    let count = unsafe { (api.stmt_status)(statement, STMTSTATUS_RUN, 0) };
    Some(Run { statement: statement as usize, count })
}

/// `sqlite3_interrupt` was called (SQLite 3.41 or later tells).
pub fn interrupted(api: &Routines, db: *mut ffi::sqlite3) -> bool {
    match api.is_interrupted {
        // SAFETY: the connection in whose call we are.
        Some(is_interrupted) if !db.is_null() => unsafe { is_interrupted(db) != 0 },
        _ => false,
    }
}
