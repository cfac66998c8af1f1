//! Automatic checkpoints: off while the broker checkpoints, and back when it does not.
//!
//! A connection's automatic checkpoint is SQLite's own WAL hook with a number of frames. That hook stays; its number is
//! raised to one that no WAL reaches, with the old one in its low bits. So it can always be told from an
//! application's hook or setting, which must not be touched: `PRAGMA wal_autocheckpoint` says the number if the hook is
//! SQLite's, and 0 if it is not. (`sqlite3_wal_hook` would replace what it is to look at.) When the application asks or
//! sets by that pragma, it finds its own number; the next statement that writes looks again.
//!
//! A connection in `locking_mode=EXCLUSIVE` locks the broker's checkpointer out, so it has its own number back: at that
//! pragma, and whenever it is found to keep EXCLUSIVE.
//!
//! Not when the connection opens: SQLite sets its default after the auto-extensions. At the start of a statement that
//! writes, from its trace: no call of the VFS is running then, and a statement may be prepared.

use super::adopt;
use super::api::Library;
use super::main_file::MainFile;
use super::statement;
use crate::client::Lost;
use crate::client::member::Member;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::CheckpointWords;
use libsqlite3_sys as ffi;
use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// `SQLITE_DEFAULT_WAL_AUTOCHECKPOINT`. An application that wants fewer frames than this wants its database file
/// closer behind its commits than the broker keeps it: its setting stays as it is.
const DEFAULT: u32 = 1000;
/// Marks a number as raised: a WAL of so many frames has no index.
const RAISED: u32 = 1 << 30;
/// A WAL that grows on by so many times its threshold although the broker has been told: is it still there?
const OVERDUE: u32 = 4;
/// No writer is held for longer, whatever the segment says.
const LONGEST_HOLD: Duration = Duration::from_millis(250);

/// What is known of a connection's automatic checkpoints.
#[derive(Debug)]
pub struct Automatic {
    state: AtomicU8,
    /// Frames that are not in the database yet, at which the broker is told.
    threshold: AtomicU32,
    /// The next length at which the broker is told again.
    overdue: AtomicU32,
    /// The broker was gone, and the next one is waited for.
    lapsed: AtomicBool,
}

/// To be looked at when the next statement starts.
const LOOK: u8 = 0;
/// Being looked at.
const LOOKING: u8 = 1;
/// SQLite's, the application's, or off by its wish.
const OWN: u8 = 2;
/// The broker's.
const BROKERS: u8 = 3;

impl Default for Automatic {
    fn default() -> Automatic {
        Automatic {
            state: AtomicU8::new(LOOK),
            threshold: AtomicU32::new(u32::MAX),
            overdue: AtomicU32::new(0),
            lapsed: AtomicBool::new(false),
        }
    }
}

impl Automatic {
    /// Something may have changed.
    pub fn look_again(&self) {
        self.state.store(LOOK, Relaxed);
    }

    /// The broker is gone.
    fn lapse(&self) {
        self.lapsed.store(true, Relaxed);
        self.look_again();
    }

    #[inline]
    pub fn is_due(&self) -> bool {
        self.state.load(Relaxed) == LOOK
    }
}

/// Looks at the connection's automatic checkpoint. Called when a statement starts, outside any call of the VFS.
pub fn look(library: &'static Library, db: *mut ffi::sqlite3, automatic: &Automatic) {
    let Some(set) = library.api.wal_autocheckpoint else { return };
    automatic.state.store(LOOKING, Relaxed);
    let Some(now) = setting(library, db) else {
        // Forbidden by the application's authorizer, say. What has been raised is lowered when it can be.
        let raised = automatic.threshold.load(Relaxed) != u32::MAX;
        return automatic.state.store(if raised { LOOK } else { OWN }, Relaxed);
    };
    automatic.threshold.store(u32::MAX, Relaxed);
    let brokers = adopt::all_checkpointed_by_broker(library, db) || planted("attached-forgotten");
    let wanted = now & !RAISED;
    let mut state = OWN;
    if brokers && wanted >= DEFAULT {
        state = BROKERS;
        automatic.threshold.store(wanted, Relaxed);
    }
    let number = if state == BROKERS { RAISED | wanted } else { wanted };
    if number != now {
        // SAFETY: the connection in whose statement we are, under its own mutex, which is recursive. It has SQLite's
        // hook, whose number this sets.
        unsafe { set(db, number as c_int) };
    }
    automatic.state.store(state, Relaxed);
}

/// `PRAGMA wal_autocheckpoint`: the number of SQLite's own hook; 0 if there is another one, or none.
fn setting(library: &Library, db: *mut ffi::sqlite3) -> Option<u32> {
    let api = &library.api;
    let mut statement = ptr::null_mut();
    // SAFETY: the connection in whose statement we are; the new one is finalized before returning.
    unsafe {
        let sql = c"PRAGMA wal_autocheckpoint";
        let mut number = None;
        if (api.prepare_v2)(db, sql.as_ptr(), -1, &mut statement, ptr::null_mut()) == ffi::SQLITE_OK
            && (api.step)(statement) == ffi::SQLITE_ROW
        {
            let text = (api.column_text)(statement, 0);
            if !text.is_null() {
                // Negative numbers are off, like 0.
                number = CStr::from_ptr(text.cast()).to_str().ok().map(|t| t.parse().unwrap_or(0));
            }
        }
        (api.finalize)(statement);
        number
    }
}

/// The application asks for its setting, or sets it: it meets SQLite's own hook with its own number.
pub fn asked_for(library: &'static Library, db: *mut ffi::sqlite3, automatic: &Automatic) {
    let was = automatic.state.swap(LOOKING, Relaxed);
    if was == LOOKING || planted("autocheckpoint-tells-raised") {
        return automatic.state.store(was, Relaxed); // it is ourselves who ask
    }
    if let Some(set) = library.api.wal_autocheckpoint
        && automatic.threshold.load(Relaxed) != u32::MAX
        && let Some(now) = setting(library, db)
        && now & RAISED != 0
    {
        // SAFETY: as in `look`.
        unsafe { set(db, (now & !RAISED) as c_int) };
    }
    automatic.look_again();
}

impl Member {
    /// The broker checkpoints this database.
    pub fn checkpointed_by_broker(&self) -> bool {
        let words = self.shared().and_then(|s| s.checkpoint());
        words.is_some_and(|w| w.duty.load(SeqCst) != 0)
    }
}

impl MainFile {
    /// The broker checkpoints this database, and this connection lets it.
    pub fn checkpointed_by_broker(&self) -> bool {
        let kept = self.keeps_exclusive && !planted("exclusive-left-to-the-broker");
        !kept && self.gated().is_some_and(Member::checkpointed_by_broker)
    }

    /// EXCLUSIVE was had as `locking_mode=EXCLUSIVE` takes it, or given back: who checkpoints changes.
    pub fn exclusive_is_kept(&mut self, kept: bool) {
        self.keeps_exclusive = kept;
        if let Some(note) = self.note() {
            note.automatic.look_again();
        }
    }

    /// A write lock has just been given back: whether the WAL is due for a checkpoint.
    #[inline]
    pub fn wal_has_grown(&mut self) {
        let (Some(index), Some(note)) = (self.wal_index, self.known_note()) else { return };
        if note.automatic.lapsed.load(Relaxed) && self.gated().is_some_and(Member::checkpointed_by_broker) {
            // The next broker has come.
            note.automatic.lapsed.store(false, Relaxed);
            note.automatic.look_again();
        }
        let threshold = note.automatic.threshold.load(Relaxed);
        let (frames, backfilled) = index.progress();
        if frames.saturating_sub(backfilled) >= threshold {
            let _ = self.tell_broker(frames.saturating_sub(backfilled), threshold);
        }
    }

    /// Tells the broker, once; again when it seems not to hear. If it is gone, SQLite's automatic checkpoints come
    /// back, with the next statement.
    #[cold]
    fn tell_broker(&self, due: u32, threshold: u32) -> Result<(), Lost> {
        let (Some(note), Some(member)) = (self.known_note(), self.gated()) else { return Ok(()) };
        let Some(words) = member.shared().and_then(|s| s.checkpoint()) else { return Ok(()) };
        let automatic = &note.automatic;
        if words.duty.load(SeqCst) == 0 {
            automatic.lapse();
            return Ok(());
        }
        let first = words.asked.load(SeqCst) == 0 && words.asked.swap(1, SeqCst) == 0;
        let overdue = automatic.overdue.load(Relaxed);
        if first {
            automatic.overdue.store(OVERDUE * threshold, Relaxed);
        } else if due < overdue {
            return Ok(());
        } else {
            automatic.overdue.store(due.saturating_add(threshold), Relaxed);
        }
        if planted("gone-broker-trusted") {
            return Ok(());
        }
        let told = match self.wal_file.as_ref().and_then(|wal| wal.descriptor()) {
            Some(wal) => member.wal_grew(wal),
            None => Err(Lost),
        };
        if !first && member.session().is_lost() || told.is_err() {
            words.duty.store(0, SeqCst);
            automatic.lapse();
        }
        Ok(())
    }

    /// The checkpoint that begins is one that the application has asked for: a statement runs that is it, or this
    /// connection has no automatic ones.
    pub fn asked_for_checkpoint(&self) -> bool {
        let automatic = self.known_note().map(|note| note.automatic.state.load(Relaxed));
        automatic == Some(BROKERS) || statement::current_run(&self.library.api, self.db()).is_some()
    }

    /// A write transaction begins: a WAL that has outrun its checkpoint is not appended to before that ends.
    /// A wait that never fails.
    #[inline]
    pub fn wait_for_checkpoint(&self) {
        let words = self.gated().and_then(|m| m.shared()).and_then(|s| s.checkpoint());
        if let (Some(words), Some(index)) = (words, self.wal_index) {
            let brake = words.brake.load(SeqCst);
            let asked = || words.asked.load(SeqCst) != 0 && words.duty.load(SeqCst) != 0;
            if brake != 0 && index.progress().0 >= brake && asked() {
                self.held(words);
            }
        }
    }

    #[cold]
    fn held(&self, words: &CheckpointWords) {
        let begun = Instant::now();
        if !planted("writers-outrun") {
            futex::wait(&words.asked, 1, LONGEST_HOLD);
        }
        // In vain: is there still a broker that will answer?
        if begun.elapsed() >= LONGEST_HOLD && self.gated().is_some_and(|m| m.session().is_lost()) {
            words.duty.store(0, SeqCst);
            if let Some(note) = self.known_note() {
                note.automatic.lapse();
            }
        }
    }
}
