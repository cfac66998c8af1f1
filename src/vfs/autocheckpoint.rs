//! Automatic checkpoints: off while the broker checkpoints, and back when it does not.
//!
//! A connection's automatic checkpoint is SQLite's own WAL hook with a number of frames. That hook stays; its number is
//! raised to one that no WAL reaches, with the old one in its low bits. So it can always be told from an
//! application's hook or setting, which must not be touched (see [`super::hook`]). When the application asks or sets by
//! `PRAGMA wal_autocheckpoint`, it finds its own number; the next statement that writes looks again. No statement is run for
//! any of this: the application's authorizer, profile or progress handler would see it.
//!
//! A connection in `locking_mode=EXCLUSIVE` locks the broker's checkpointer out, so it has its own number back: at that
//! pragma, and whenever it is found to keep EXCLUSIVE.
//!
//! Raised not when the connection opens, because SQLite sets its default after the auto-extensions, but at the start of a
//! statement that writes, from its trace: no call of the VFS is running then, and the other databases may be looked at. Given
//! back at any time, also where an application's trace has taken the place of ours.

use super::adopt;
use super::api::Library;
use super::hook;
use super::main_file::MainFile;
use super::statement;
use crate::client::Lost;
use crate::client::member::Member;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::CheckpointWords;
use libsqlite3_sys as ffi;
use std::ffi::c_int;
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
    /// A statement that may attach a database has started.
    attached: AtomicBool,
}

/// To be looked at when the next statement starts that writes.
const LOOK: u8 = 0;
/// SQLite's own, with the application's number.
const OWN: u8 = 1;
/// The broker's.
const BROKERS: u8 = 2;

impl Default for Automatic {
    fn default() -> Automatic {
        Automatic {
            state: AtomicU8::new(LOOK),
            threshold: AtomicU32::new(u32::MAX),
            overdue: AtomicU32::new(0),
            lapsed: AtomicBool::new(false),
            attached: AtomicBool::new(false),
        }
    }
}

impl Automatic {
    /// Something may have changed.
    pub fn look_again(&self) {
        self.state.store(LOOK, Relaxed);
    }

    /// A statement starts that may attach a database.
    pub fn attaches(&self) {
        self.attached.store(true, Relaxed);
        self.look_again();
    }

    #[inline]
    pub fn is_due(&self) -> bool {
        self.state.load(Relaxed) == LOOK
    }
}

/// Looks at the connection's automatic checkpoint. Called when a statement starts, outside any call of the VFS.
pub fn look(library: &'static Library, db: *mut ffi::sqlite3, automatic: &Automatic) {
    let (Some(set), Some(now)) = (library.api.wal_autocheckpoint, hook::automatic(library, db)) else {
        return automatic.state.store(OWN, Relaxed);
    };
    automatic.threshold.store(u32::MAX, Relaxed);
    let wanted = now & !RAISED;
    // Nothing to take over. (Not yet: a statement of an auto-extension's, before SQLite has set its default.)
    let mut state = if wanted == 0 { LOOK } else { OWN };
    let names = || adopt::database_names(library, db, automatic.attached.load(Relaxed));
    let brokers = || names().is_some_and(|names| adopt::all_checkpointed_by_broker(library, db, &names));
    if wanted >= DEFAULT && (brokers() || planted("attached-forgotten")) {
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

/// The connection has SQLite's own hook with its own number. Called in any call on the connection.
pub fn give_back(library: &'static Library, db: *mut ffi::sqlite3, automatic: &Automatic) {
    if automatic.threshold.swap(u32::MAX, Relaxed) != u32::MAX
        && let Some(set) = library.api.wal_autocheckpoint
        && let Some(now) = hook::automatic(library, db).filter(|now| now & RAISED != 0)
    {
        // SAFETY: as in `look`.
        unsafe { set(db, (now & !RAISED) as c_int) };
    }
    automatic.look_again();
}

/// A planted fault: as if SQLite had set its default already.
pub fn raise_early(library: &'static Library, db: *mut ffi::sqlite3, automatic: &Automatic) {
    if let Some(set) = library.api.wal_autocheckpoint {
        // SAFETY: the connection that is being opened, in whose call we are.
        unsafe { set(db, (RAISED | DEFAULT) as c_int) };
        automatic.threshold.store(DEFAULT, Relaxed);
        automatic.state.store(BROKERS, Relaxed);
    }
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

    /// The broker is gone, or checkpoints no more: SQLite's automatic checkpoints come back.
    fn lapse(&self) {
        let Some(note) = self.known_note() else { return };
        note.automatic.lapsed.store(true, Relaxed);
        // In a shared cache the note may be of a connection that another thread is in a call of.
        match note.db() == self.db()
            && !self.shared_cache.load(Relaxed)
            && !planted("given-back-by-trace-alone")
        {
            true => give_back(self.library, note.db(), &note.automatic),
            false => note.automatic.look_again(),
        }
    }

    /// Tells the broker, once; again when it seems not to hear.
    #[cold]
    fn tell_broker(&self, due: u32, threshold: u32) -> Result<(), Lost> {
        let (Some(note), Some(member)) = (self.known_note(), self.gated()) else { return Ok(()) };
        let Some(words) = member.shared().and_then(|s| s.checkpoint()) else { return Ok(()) };
        let automatic = &note.automatic;
        if words.duty.load(SeqCst) == 0 {
            self.lapse();
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
            self.lapse();
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
            self.lapse();
        }
    }
}
