//! What is known of a connection, for all its databases: what the statement that starts is, and where a turn was
//! taken ahead.
//!
//! The first is noted by SQLite's trace, so that the lock call that follows need not look through all statements. It is a hint with a short life: it stands from the start of a statement to the end of the read transaction,
//! and only while no statement has been prepared since (a blob handle prepares one and is not traced). Without a
//! note (the application has set a trace of its own, an adopted connection, a retry) the statements are walked.

use super::api::Library;
use super::autocheckpoint::{self, Automatic};
use super::main_file::MainFile;
use super::statement::Statement;
use crate::client::fork::PerProcess;
use crate::lock::learned::hash;
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::panic::catch_unwind;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const NONE: u8 = 0;
const READS: u8 = 1;
const WRITES: u8 = 2;

/// One connection's note. Only touched under that connection's mutex; the atomics make it shareable at no cost.
#[derive(Debug)]
pub struct Note {
    library: &'static Library,
    db: usize,
    kind: AtomicU8,
    /// The connection's newest statement when the note was made.
    newest: AtomicUsize,
    /// A hash of the statement's text, if it matters: it writes, or is one of an explicit transaction; else 0.
    text: AtomicU64,
    /// The statement returns rows.
    rows: AtomicBool,
    /// The file where a snapshot was taken that is not durable yet and that nobody outside has seen.
    settling: AtomicPtr<MainFile>,
    /// The file where its turn was taken ahead and not used yet.
    ahead: AtomicPtr<MainFile>,
    pub automatic: Automatic,
}

/// By the address of the connection; kept by its files and by its trace.
static NOTES: PerProcess<Mutex<BTreeMap<usize, Weak<Note>>>> = PerProcess::new();

impl Note {
    /// The connection's note.
    pub fn of(library: &'static Library, db: *mut ffi::sqlite3) -> Arc<Note> {
        let mut notes = NOTES.get().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(note) = notes.get(&(db as usize)).and_then(Weak::upgrade) {
            return note;
        }
        notes.retain(|_, note| note.strong_count() > 0);
        let note = Arc::new(Note {
            library,
            db: db as usize,
            kind: AtomicU8::new(NONE),
            newest: AtomicUsize::new(0),
            text: AtomicU64::new(0),
            rows: AtomicBool::new(false),
            settling: AtomicPtr::new(ptr::null_mut()),
            ahead: AtomicPtr::new(ptr::null_mut()),
            automatic: Automatic::default(),
        });
        notes.insert(db as usize, Arc::downgrade(&note));
        note
    }

    /// `file` waits for its snapshot to become durable when a statement starts that returns rows; or no more.
    pub fn set_settling(&self, file: *mut MainFile, settling: bool) {
        match settling {
            true => self.settling.store(file, Relaxed),
            false if self.settling.load(Relaxed) == file => self.settling.store(ptr::null_mut(), Relaxed),
            false => {}
        }
    }

    /// Another file than `file` waits in this way.
    pub fn settles_elsewhere(&self, file: *mut MainFile) -> bool {
        let other = self.settling.load(Relaxed);
        !other.is_null() && other != file
    }

    /// `file` has taken its turn ahead.
    pub fn set_ahead(&self, file: *mut MainFile) {
        self.ahead.store(file, Relaxed);
    }

    /// `file` uses its turn, or has it no more.
    pub fn clear_ahead(&self, file: *mut MainFile) {
        if self.ahead.load(Relaxed) == file {
            self.ahead.store(ptr::null_mut(), Relaxed);
        }
    }

    /// Another file than `file` that has its turn and has not used it.
    pub fn ahead_elsewhere(&self, file: *mut MainFile) -> Option<*mut MainFile> {
        let ahead = self.ahead.load(Relaxed);
        (!ahead.is_null() && ahead != file).then_some(ahead)
    }

    /// The statement that has just started; `None`: nothing is known.
    pub fn statement(&self) -> Option<Statement> {
        let kind = self.kind.load(Relaxed);
        let newest = self.newest.load(Relaxed) == self.newest_now() || planted("stale-note-trusted");
        let fresh = kind != NONE && newest;
        let silent = kind == WRITES && !self.rows.load(Relaxed);
        fresh.then(|| Statement { writes: kind == WRITES, silent, text: self.text.load(Relaxed) })
    }

    /// The read transaction is over.
    pub fn forget(&self) {
        self.kind.store(NONE, Relaxed);
    }

    fn newest_now(&self) -> usize {
        // SAFETY: the connection in whose call we are.
        unsafe { (self.library.api.next_stmt)(self.db as *mut ffi::sqlite3, ptr::null_mut()) as usize }
    }
}

/// Traces a connection that has just been opened: no application has set a trace yet.
pub fn trace(library: &'static Library, db: *mut ffi::sqlite3) {
    let context = Arc::into_raw(Note::of(library, db));
    let events = ffi::SQLITE_TRACE_STMT | ffi::SQLITE_TRACE_CLOSE;
    // SAFETY: the context lives until SQLITE_TRACE_CLOSE; an application that sets its own trace leaks it.
    let rc = unsafe { (library.api.trace_v2)(db, events, Some(traced), context.cast_mut().cast()) };
    if rc != ffi::SQLITE_OK {
        // SAFETY: SQLite has not taken it.
        drop(unsafe { Arc::from_raw(context) });
    }
}

unsafe extern "C" fn traced(
    event: c_uint,
    context: *mut c_void,
    subject: *mut c_void,
    text: *mut c_void,
) -> c_int {
    let _ = catch_unwind(|| {
        // SAFETY: the context that `trace` gave, alive until the event below.
        let note = unsafe { &*context.cast_const().cast::<Note>() };
        if event == ffi::SQLITE_TRACE_STMT {
            let api = &note.library.api;
            // SAFETY: as below.
            if note.automatic.is_due() && unsafe { (api.stmt_readonly)(subject.cast()) } == 0 {
                autocheckpoint::look(note.library, note.db as *mut ffi::sqlite3, &note.automatic);
            }
            // SAFETY: sqlite3.h: the subject is the statement that starts, `text` its text.
            let (reads, hash) = unsafe {
                let reads = (api.stmt_readonly)(subject.cast()) != 0;
                let alone = reads && (api.get_autocommit)(note.db as *mut ffi::sqlite3) != 0;
                (
                    reads,
                    if alone || text.is_null() { 0 } else { hash(CStr::from_ptr(text.cast()).to_bytes()) },
                )
            };
            // SAFETY: as above.
            if !text.is_null() && attaches(unsafe { CStr::from_ptr(text.cast()) }.to_bytes()) {
                note.automatic.look_again();
            }
            let rows = unsafe { (api.column_count)(subject.cast()) } > 0;
            let settling = note.settling.load(Relaxed);
            if rows && !settling.is_null() {
                // SAFETY: a file of the connection that starts this statement, under the connection's mutex, in no
                // call of the file's own; it takes itself out of the note before it goes. A sync that fails is
                // told by the reads that follow.
                let _ = unsafe { (*settling).settle() };
            }
            note.rows.store(rows, Relaxed);
            note.text.store(hash, Relaxed);
            note.newest.store(note.newest_now(), Relaxed);
            note.kind.store(if reads { READS } else { WRITES }, Relaxed);
        } else if event == ffi::SQLITE_TRACE_CLOSE {
            // SAFETY: the last event of this connection; `trace` gave one reference away.
            drop(unsafe { Arc::from_raw(context.cast_const().cast::<Note>()) });
        }
    });
    0
}

/// The statement may be an ATTACH: through another VFS, which nobody else sees.
fn attaches(text: &[u8]) -> bool {
    let text = text.trim_ascii_start();
    let word = b"attach";
    match text.first() {
        Some(b'a' | b'A') => text.get(..word.len()).is_some_and(|t| t.eq_ignore_ascii_case(word)),
        // Behind a comment.
        Some(b'-' | b'/') => text.windows(word.len()).any(|t| t.eq_ignore_ascii_case(word)),
        _ => false,
    }
}
