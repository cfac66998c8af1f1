//! What is known of a connection, for all its databases: what the statement that starts is, and where a turn was
//! taken ahead.
//!
//! The first is noted by SQLite's trace, so that the lock call that follows need not look through all statements. It is a
//! hint with a short life: it stands from the start of a statement to the end of the read transaction, and only while no
//! statement has been prepared since (a blob handle prepares one and is not traced). Without a note (the application has set
//! a trace of its own, an adopted connection, a retry, a close that was refused) the statements are walked.
//!
//! A connection has one trace. Ours is set while SQLite opens the connection, before any auto-extension runs: whatever the
//! application sets then replaces ours, and ours replaces nothing.

use super::api::Library;
use super::autocheckpoint::{self, Automatic};
use super::hook;
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

const NONE: u8 = 0;
const READS: u8 = 1;
const WRITES: u8 = 2;

/// One connection's note. Only touched under that connection's mutex; the atomics make it shareable at no cost.
#[derive(Debug)]
pub struct Note {
    pub library: &'static Library,
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

/// By the address of the connection.
#[derive(Default)]
struct Notes {
    /// Kept by the connection's files and its trace.
    known: BTreeMap<usize, Weak<Note>>,
    /// What our traces point at. An application that sets a trace of its own says nothing to ours, so such a note stays until
    /// the next connection opens at the same address.
    traced: BTreeMap<usize, Arc<Note>>,
}

static NOTES: PerProcess<Mutex<Notes>> = PerProcess::new();

fn notes() -> MutexGuard<'static, Notes> {
    NOTES.get().lock().unwrap_or_else(PoisonError::into_inner)
}

impl Note {
    /// The connection's note.
    pub fn of(library: &'static Library, db: *mut ffi::sqlite3) -> Arc<Note> {
        let mut notes = notes();
        if let Some(note) = notes.known.get(&(db as usize)).and_then(Weak::upgrade) {
            return note;
        }
        notes.known.retain(|_, note| note.strong_count() > 0);
        let note = Arc::new(Note::new(library, db));
        notes.known.insert(db as usize, Arc::downgrade(&note));
        note
    }

    fn new(library: &'static Library, db: *mut ffi::sqlite3) -> Note {
        Note {
            library,
            db: db as usize,
            kind: AtomicU8::new(NONE),
            newest: AtomicUsize::new(0),
            text: AtomicU64::new(0),
            rows: AtomicBool::new(false),
            settling: AtomicPtr::new(ptr::null_mut()),
            ahead: AtomicPtr::new(ptr::null_mut()),
            automatic: Automatic::default(),
        }
    }

    /// The connection that it is of.
    pub fn db(&self) -> *mut ffi::sqlite3 {
        self.db as *mut ffi::sqlite3
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

/// The connection is just being opened: SQLite has opened its first database, and nothing of the application has run on it.
/// A connection that attaches a database runs a statement.
pub fn is_opening(library: &Library, db: *mut ffi::sqlite3) -> bool {
    // SAFETY: the connection in whose call we are.
    !db.is_null() && unsafe { (library.api.next_stmt)(db, ptr::null_mut()) }.is_null()
}

/// Traces a connection that is just being opened (see [`is_opening`]).
pub fn trace(library: &'static Library, db: *mut ffi::sqlite3) {
    hook::find(library, db);
    let note = Arc::new(Note::new(library, db));
    let context = Arc::as_ptr(&note);
    {
        // Another connection of that address is gone, and with it whatever could still call its trace.
        let mut notes = notes();
        notes.known.insert(db as usize, Arc::downgrade(&note));
        notes.traced.insert(db as usize, Arc::clone(&note));
    }
    let events = ffi::SQLITE_TRACE_STMT | ffi::SQLITE_TRACE_CLOSE;
    // SAFETY: the context is kept until `untrace` has taken the trace off, or until a new connection has this address.
    let rc = unsafe { (library.api.trace_v2)(db, events, Some(traced), context.cast_mut().cast()) };
    if rc != ffi::SQLITE_OK {
        notes().traced.remove(&(db as usize));
    }
}

/// A close has begun. It is not the end: SQLite says so before it looks whether it can close, and again at the next try; and
/// after `sqlite3_close_v2` statements go on. So the trace is taken off, by the one call after which it cannot come again. A
/// connection that goes on does so as one that was adopted: its statements are walked, its automatic checkpoints are its own.
///
/// No trace at all would end an application's `sqlite3_profile` too, which SQLite keeps beside the trace but asks for in the
/// same place. So what replaces ours is one that says that it wants to know of profiles, and does nothing.
///
/// # Safety
/// The context that `trace` gave, in a call of our trace. It must not be used afterwards.
unsafe fn untrace(context: *const Note) {
    // SAFETY: by contract.
    let (library, db) = unsafe { ((*context).library, (*context).db()) };
    if planted("closes-once") {
        // SAFETY: none: that it is the last event is what the rule is about.
        return unsafe { Arc::decrement_strong_count(context) };
    }
    // SAFETY: by contract.
    autocheckpoint::give_back(library, db, unsafe { &(*context).automatic });
    let events = if planted("profile-ends-with-trace") { 0 } else { ffi::SQLITE_TRACE_PROFILE };
    // SAFETY: the connection that calls its trace, which is ours, under its own mutex.
    unsafe { (library.api.trace_v2)(db, events, Some(nothing), ptr::null_mut()) };
    let mut notes = notes();
    // Not in a forked child, where the parent's note is nobody's to drop.
    if notes.traced.get(&(db as usize)).is_some_and(|note| ptr::eq(Arc::as_ptr(note), context)) {
        notes.traced.remove(&(db as usize));
    }
}

unsafe extern "C" fn nothing(_: c_uint, _: *mut c_void, _: *mut c_void, _: *mut c_void) -> c_int {
    0
}

unsafe extern "C" fn traced(
    event: c_uint,
    context: *mut c_void,
    subject: *mut c_void,
    text: *mut c_void,
) -> c_int {
    let _ = catch_unwind(|| {
        if event == ffi::SQLITE_TRACE_CLOSE {
            // SAFETY: the context that `trace` gave.
            return unsafe { untrace(context.cast_const().cast()) };
        }
        // SAFETY: the context that `trace` gave, kept until the trace is taken off.
        let note = unsafe { &*context.cast_const().cast::<Note>() };
        if event == ffi::SQLITE_TRACE_STMT {
            let api = &note.library.api;
            // SAFETY: as below.
            if note.automatic.is_due() && unsafe { (api.stmt_readonly)(subject.cast()) } == 0 {
                autocheckpoint::look(note.library, note.db(), &note.automatic);
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
                note.automatic.attaches();
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
