//! Whose WAL hook a connection has, read where SQLite keeps it.
//!
//! An automatic checkpoint is SQLite's own WAL hook with a number of frames. `PRAGMA wal_autocheckpoint` tells the number, but
//! it is a statement: an application's authorizer, profile and progress handler would see it. `sqlite3_wal_hook` tells of a
//! hook only by replacing it. So the hook and its argument, which `struct sqlite3` has side by side, are read in place. Where
//! that is, each SQLite tells by itself: two marks are set as hooks on a connection that is just being opened, and there must
//! be one place that has first the one and then the other. Else nothing is read, and automatic checkpoints stay as they are.

use super::api::Library;
use libsqlite3_sys as ffi;
use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

type Hook = unsafe extern "C" fn(*mut c_void, *mut ffi::sqlite3, *const c_char, c_int) -> c_int;

/// Nobody has looked yet.
const UNKNOWN: usize = 0;
/// It was not found.
const NOWHERE: usize = usize::MAX;
/// A number of frames that is nobody's default.
const NUMBER: c_int = 4_321;

/// Where a library's connections have their WAL hook.
#[derive(Debug, Default)]
pub struct Place {
    /// In words from the start of `struct sqlite3`: the hook, and behind it its argument.
    word: AtomicUsize,
    /// The address of SQLite's own hook, the automatic checkpoint.
    own: AtomicUsize,
}

/// The two marks. They differ in what they return, so that no linker makes one of them; neither is ever called.
unsafe extern "C" fn one(_: *mut c_void, _: *mut ffi::sqlite3, _: *const c_char, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn other(_: *mut c_void, _: *mut ffi::sqlite3, _: *const c_char, _: c_int) -> c_int {
    ffi::SQLITE_ERROR
}

/// A word of the connection's memory.
///
/// # Safety
/// `db` is a live connection of at least so many words, in whose call we are.
unsafe fn read(db: *mut ffi::sqlite3, word: usize) -> usize {
    // SAFETY: by contract; aligned, because it was allocated for pointers. Others may write other words meanwhile.
    unsafe { ptr::read_volatile(db.cast::<usize>().add(word)) }
}

/// Looks, once, on a connection that is just being opened: it has no hook, and has none afterwards.
pub fn find(library: &Library, db: *mut ffi::sqlite3) {
    let place = &library.hook;
    let (Some(set_hook), Some(set_automatic)) = (library.api.wal_hook, library.api.wal_autocheckpoint) else {
        return;
    };
    if place.word.load(Relaxed) != UNKNOWN {
        return;
    }
    // SAFETY: the connection, allocated by the library's own allocator, in whose call we are.
    let words = unsafe { (library.api.msize)(db.cast()) } as usize / size_of::<usize>();
    let set = |hook: Option<Hook>, argument: usize| {
        // SAFETY: as above. No transaction commits on it while a mark is its hook.
        unsafe { set_hook(db, hook, argument as *mut c_void) };
    };
    let has = |word: usize, hook: usize, argument: usize| {
        // SAFETY: `word` and the one behind it are the connection's.
        unsafe { read(db, word) == hook && read(db, word + 1) == argument }
    };
    let (first, second) = (one as Hook as usize, other as Hook as usize);
    set(Some(one), first ^ second);
    let mut found: Vec<usize> =
        (1..words.saturating_sub(1)).filter(|w| has(*w, first, first ^ second)).collect();
    set(Some(other), first);
    found.retain(|w| has(*w, second, first));
    // SAFETY: as above.
    unsafe { set_automatic(db, NUMBER) };
    let own = found.first().map_or(0, |w| unsafe { read(db, *w) });
    found.retain(|w| own != 0 && own != second && has(*w, own, NUMBER as usize));
    set(None, 0);
    found.retain(|w| has(*w, 0, 0));
    match found[..] {
        [word] => {
            place.own.store(own, Relaxed);
            place.word.store(word, Release); // with `own`: whoever sees the word sees that
        }
        _ => place.word.store(NOWHERE, Relaxed),
    }
}

/// The number of frames of the connection's automatic checkpoint, as `PRAGMA wal_autocheckpoint` has it: 0 if there is another
/// hook, or none. `None`: it cannot be told.
pub fn automatic(library: &Library, db: *mut ffi::sqlite3) -> Option<u32> {
    let word = library.hook.word.load(Acquire);
    if word == UNKNOWN || word == NOWHERE {
        return None;
    }
    // SAFETY: the library's connections have these two words.
    let (hook, argument) = unsafe { (read(db, word), read(db, word + 1)) };
    if hook != library.hook.own.load(Relaxed) {
        return Some(0);
    }
    // Negative numbers are off, like 0.
    Some((argument as u32 as i32).max(0) as u32)
}
