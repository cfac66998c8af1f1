//! `PRAGMA busy_timeout`, as a connection was told: it passes the main database's file only, and holds for
//! attached ones too.

use crate::client::fork::PerProcess;
use libsqlite3_sys as ffi;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

static TIMEOUTS: PerProcess<Mutex<BTreeMap<usize, Duration>>> = PerProcess::new();

/// The limit that the application gave, if it did.
pub fn of(db: *mut ffi::sqlite3) -> Option<Duration> {
    TIMEOUTS.get().lock().unwrap_or_else(PoisonError::into_inner).get(&(db as usize)).copied()
}

pub fn set(db: *mut ffi::sqlite3, limit: Duration) {
    if !db.is_null() {
        TIMEOUTS.get().lock().unwrap_or_else(PoisonError::into_inner).insert(db as usize, limit);
    }
}

/// The connection closes: its address may become another's.
pub fn forget(db: *mut ffi::sqlite3) {
    TIMEOUTS.get().lock().unwrap_or_else(PoisonError::into_inner).remove(&(db as usize));
}
