//! The state of one connection's database file.

use super::ahead::Begun;
use super::api::Library;
use super::note::Note;
use super::statement::Connection;
use super::waiting::{Rerun, Vain};
use super::wal_file::WalFile;
use crate::client::activity::Activity;
use crate::client::config::Config;
use crate::client::fork;
use crate::client::member::Member;
use crate::client::shared::OwnIndex;
use crate::lock::commits::Awaited;
use crate::lock::{FileLevel, Slots, slot};
use crate::planted::planted;
use crate::segment::layout::REGION_SIZE;
use crate::segment::wal_index::{Header, WalIndex};
use crate::wire::message::Mode;
use libsqlite3_sys as ffi;
use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Who answers for this file's locks.
#[derive(Debug)]
pub enum Service {
    /// Plain SQLite, and why.
    Plain(String),
    /// A seat; its mode says whether the locks are the broker's or the unix VFS's.
    Seat(Member),
}

#[derive(Debug)]
pub struct MainFile {
    pub library: &'static Library,
    pub path: String,
    /// The names by which SQLite will ask for the companions; compared by address.
    pub journal_name: *const c_char,
    pub wal_name: *const c_char,
    pub connection: Connection,
    pub config: Config,
    pub service: Service,
    /// SQLite has it open for writing.
    pub writable: bool,
    pub epoch: u64,
    /// What this process knows of its own connections.
    pub activity: Activity,

    pub level: FileLevel,
    /// EXCLUSIVE was had straight from SHARED: in `locking_mode=EXCLUSIVE` it is kept, and nobody else can checkpoint.
    pub keeps_exclusive: bool,
    pub shared_slots: u8,
    pub exclusive_slots: u8,
    /// The last thing asked for was whether the file has moved: so a close begins.
    pub closing: bool,
    /// Between the first `xShmMap` and `xShmUnmap`.
    pub wal_open: bool,
    pub wal_index: Option<WalIndex>,
    /// Inherited, and not to be joined anew any more.
    pub cannot_join: bool,
    /// Its mapping of the wal-index, if it only reads.
    pub own_index: OwnIndex,
    /// In guest mode: the regions of `-shm` that the unix VFS has mapped for this connection, for the fork handler.
    guest_regions: Vec<usize>,
    /// The seat had the turn when last heard.
    pub turn: bool,
    /// The next unlock of a read slot is SQLite's retry, not the end of the transaction.
    pub retry_expected: bool,
    /// The statement that last took its turn here, and how often it was prepared anew since, run after run.
    pub(super) rerun: Rerun,
    /// The transaction that is open, as it began.
    pub(super) begun: Begun,
    /// The header when the write lock was had: unchanged at its release, nothing was written.
    pub write_basis: Option<Header>,
    /// A write lock was refused: whatever the next transaction does, it takes its turn first.
    pub second_chance: bool,
    /// Guest mode: CHECKPOINT is held as well, while the WAL is begun anew.
    pub keeps_checkpoints_out: bool,
    /// Admitted on probation: say when there is no hot journal.
    pub probation: bool,
    /// A `-journal` was read under this SHARED lock.
    pub hot_journal: bool,
    /// `PRAGMA busy_timeout` came by here.
    pub told_timeout: bool,
    /// `SQLITE_FCNTL_LOCK_TIMEOUT`, milliseconds.
    pub lock_timeout: c_int,
    /// See [`Shared::still_ours`](crate::client::shared::Shared::still_ours).
    pub checked: u64,
    lost_said: bool,
    /// The WAL, while it is open.
    pub wal_file: Option<WalFile>,
    /// SQLite's descriptor of the database, by which the gate is seen; -1: it has no seat.
    pub descriptor: RawFd,
    /// The number of a commit that is published, or about to be, and not waited for yet.
    pub commit: Option<Awaited>,
    /// Its commits may share a sync.
    pub shares: bool,
    /// The flags of its sync.
    pub sync_flags: c_int,
    /// The newest commit that may be in the snapshot.
    pub snapshot: Option<Awaited>,
    /// The same, if it was not durable yet and has not been waited for.
    pub seen: Option<Awaited>,
    /// What was seen in the turn gets out at its end only: that is when it is waited for.
    pub seen_in_turn: bool,
    /// The wal-index header of the last snapshot, where the segment does not tell what is durable.
    pub last_header: Option<Header>,
    pub(super) vain: Option<Vain>,
    /// Several connections have it open as one (a shared cache): no connection's note leads here, because another one's
    /// thread may be in a call of this file.
    pub shared_cache: AtomicBool,
    /// The connection's note, and whose it is.
    note: (usize, Option<Arc<Note>>),
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Library {}", self.version())
    }
}

impl MainFile {
    pub fn new(library: &'static Library, path: String, config: Config, service: Service) -> MainFile {
        let database = match &service {
            Service::Seat(member) => Some(member.seat().database),
            Service::Plain(_) => None,
        };
        MainFile {
            library,
            path,
            journal_name: std::ptr::null(),
            wal_name: std::ptr::null(),
            connection: Connection::Unknown,
            config,
            service,
            writable: true,
            epoch: fork::epoch(),
            activity: Activity::new(database),
            level: FileLevel::None,
            keeps_exclusive: false,
            shared_slots: 0,
            exclusive_slots: 0,
            closing: false,
            wal_open: false,
            wal_index: None,
            cannot_join: false,
            own_index: OwnIndex::default(),
            guest_regions: Vec::new(),
            turn: false,
            retry_expected: false,
            rerun: Rerun::default(),
            begun: Begun::default(),
            write_basis: None,
            second_chance: false,
            keeps_checkpoints_out: false,
            probation: false,
            hot_journal: false,
            told_timeout: false,
            lock_timeout: 0,
            checked: 0,
            lost_said: false,
            wal_file: None,
            descriptor: -1,
            commit: None,
            shares: true,
            sync_flags: 0,
            snapshot: None,
            seen: None,
            seen_in_turn: false,
            last_header: None,
            vain: None,
            shared_cache: AtomicBool::new(false),
            note: (0, None),
        }
    }

    /// After every lock and unlock: what others of this process may wait for.
    pub fn note_holds(&self) {
        let writes = self.turn || self.owns(slot::WRITE) || self.level >= FileLevel::Reserved;
        let reads = self.level >= FileLevel::Shared && !self.wal_open;
        self.activity.holds(writes, reads);
    }

    /// Inherited from the process that forked this one: nothing of it may be used.
    pub fn inherited(&self) -> bool {
        self.epoch != fork::epoch() && matches!(self.service, Service::Seat(_))
    }

    /// In guest mode: a forked child gets a private copy of this region. Several connections of a process share a
    /// mapping; each remembers it, because each may be the last one.
    pub fn remember_guest_region(&mut self, address: usize) {
        if self.guest().is_some() && !self.guest_regions.contains(&address) && !planted("guest-maps-shared") {
            fork::remember_mapping(address, REGION_SIZE);
            self.guest_regions.push(address);
        }
    }

    /// Before the unix VFS may unmap them.
    pub fn forget_guest_regions(&mut self) {
        self.guest_regions.drain(..).for_each(fork::forget_mapping);
    }

    /// The seat, if the broker answers for this file.
    pub fn seat(&self) -> Option<&Member> {
        match &self.service {
            Service::Seat(member) => Some(member),
            Service::Plain(_) => None,
        }
    }

    /// The seat, if locks and wal-index are the broker's.
    pub fn gated(&self) -> Option<&Member> {
        self.seat().filter(|m| m.mode() == Mode::Gated)
    }

    /// Whether what SQLite has just been answered about this database, or a file beside it, may be given to it. (Without a
    /// lock it reads what it will look at again.)
    #[inline]
    pub fn believes(&self) -> bool {
        self.level == FileLevel::None || self.gated().is_none_or(|m| m.believes(self.descriptor))
    }

    pub fn guest(&self) -> Option<&Member> {
        self.seat().filter(|m| m.mode() == Mode::Guest)
    }

    pub fn reads(&self) -> bool {
        self.shared_slots & slot::READ_MASK != 0
    }

    /// No wal-index slot is held.
    pub fn reads_nothing(&self) -> bool {
        self.shared_slots == 0 && self.exclusive_slots == 0
    }

    /// These slots have been had.
    pub fn note_held(&mut self, slots: Slots, shared: bool) {
        let mask = slots.mask().unwrap_or(0);
        match shared {
            true => self.shared_slots |= mask,
            false => self.exclusive_slots |= mask,
        }
    }

    pub fn owns(&self, slot: u8) -> bool {
        self.exclusive_slots & (1 << slot) != 0
    }

    pub fn db(&self) -> *mut ffi::sqlite3 {
        self.connection.handle()
    }

    /// What is known of the connection, if it is known which it is.
    pub(super) fn note(&mut self) -> Option<&Note> {
        let db = self.db();
        if self.note.0 != db as usize {
            self.leave_note();
            if let Some(note) = &self.note.1 {
                note.set_settling(std::ptr::from_ref(self).cast_mut(), false);
            }
            self.note = (db as usize, (!db.is_null()).then(|| Note::of(self.library, db)));
        }
        self.note.1.as_deref()
    }

    /// The note, if it may lead to this file.
    pub(super) fn own_note(&mut self) -> Option<&Note> {
        if self.shared_cache.load(Relaxed) { None } else { self.note() }
    }

    /// What has been known of the connection when it last mattered.
    #[inline]
    pub(super) fn known_note(&self) -> Option<&Arc<Note>> {
        self.note.1.as_ref()
    }

    /// It is its connection's main database.
    pub fn is_main(&self) -> bool {
        let (api, db) = (&self.library.api, self.db());
        if db.is_null() || self.journal_name.is_null() {
            return true;
        }
        // SAFETY: the connection in whose call we are; the name is its own.
        unsafe {
            let main = (api.db_filename)(db, c"main".as_ptr());
            !main.is_null() && (api.filename_journal)(main) == self.journal_name
        }
    }

    /// The turn here was taken ahead.
    pub fn note_ahead(&mut self) {
        let file = std::ptr::from_mut(self);
        if let Some(note) = self.own_note() {
            note.set_ahead(file);
        }
    }

    /// A write lock has been taken.
    pub fn write_begins(&self) {
        if let Some(shared) = self.gated().and_then(|m| m.shared()) {
            shared.write_begins();
        }
    }

    /// A statement of this connection that returns rows waits, when it starts, for what was seen here.
    pub fn settles_at_rows(&mut self, at_rows: bool) {
        let file = std::ptr::from_mut(self);
        // Not `note()` to take it back: the file may be closing, and its connection not to be asked any more.
        let note = if at_rows { self.own_note() } else { self.note.1.as_deref() };
        if let Some(note) = note {
            note.set_settling(file, at_rows);
        }
    }

    /// The turn here is used, or over.
    pub fn leave_note(&mut self) {
        let file = std::ptr::from_mut(self);
        if let Some(note) = &self.note.1 {
            note.clear_ahead(file);
        }
    }

    /// A lock is asked for here: a turn that the same connection has taken ahead on another file, and not used, is
    /// not for that file.
    pub fn leave_other_turn(&mut self) {
        let file = std::ptr::from_mut(self);
        let Some(other) = self.note().and_then(|note| note.ahead_elsewhere(file)) else { return };
        // SAFETY: another file of the connection in whose call we are, under the connection's mutex; it takes
        // itself out of the note before it goes.
        let other = unsafe { &mut *other };
        other.leave_note();
        if other.gated().is_some_and(Member::went_elsewhere) {
            other.turn = false;
        }
    }

    /// The read transaction is over, and the note with it.
    pub fn forget_note(&self) {
        if let Some(note) = &self.note.1 {
            note.forget();
        }
    }

    /// SQLite, admitted on probation, does what it does after its look for a hot journal: others may come in.
    pub fn found_no_hot_journal(&mut self) {
        if self.probation && self.level == FileLevel::Shared {
            self.probation = false;
            if let Some(member) = self.gated() {
                let _ = member.journal_is_clear();
            }
        }
    }

    /// Whether the rollback journal is there now. An error that is not its absence counts as yes.
    pub fn journal_exists(&self) -> bool {
        if self.journal_name.is_null() {
            return true;
        }
        // SAFETY: SQLite's name for the journal, which lives as long as the file is open.
        let name = unsafe { std::ffi::CStr::from_ptr(self.journal_name) };
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        std::fs::metadata(path).map_or_else(|e| e.kind() != std::io::ErrorKind::NotFound, |_| true)
    }

    /// Says once that the broker is gone.
    pub fn log_lost(&mut self) {
        if !std::mem::replace(&mut self.lost_said, true) {
            let text = format!(
                "the broker of {} is gone: this connection cannot go on; close it and open it again",
                self.path
            );
            self.library.log(ffi::SQLITE_IOERR_LOCK, &text);
        }
    }

    /// What wal.c compares after it got its read lock: it drops the lock and retries if any of it has changed.
    pub fn snapshot_basis(&self, read_slot: u8) -> Option<(Header, u32)> {
        let index = self.wal_index?;
        let mark = match read_slot {
            slot::READ0 => 0,
            other => index.read_mark(usize::from(other - slot::READ0)),
        };
        Some((index.header(), mark))
    }
}
