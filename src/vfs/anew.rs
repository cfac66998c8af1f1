//! A connection that only reads, inherited over a fork: the child's first transaction on it joins anew.
//!
//! Its parent's seat protects nothing that the child reads. So the child takes a seat of its own, with its own session, and what
//! SQLite remembers of the connection is made true again: the seat gets the SHARED lock that SQLite keeps in WAL mode, and the
//! child's mapping of the wal-index is put where SQLite has its addresses. SQLite reads through what it has cached only if the
//! index's header is the one that it saw last; the fork handler has made that impossible (`WalIndex::set_apart`).
//!
//! Not in the middle of a transaction: nobody has kept its snapshot in place. Its reads fail until it is over.

use super::join;
use super::last_close::RealFile;
use super::locks;
use super::main_file::{MainFile, Service};
use super::open;
use super::wrapped::{Kind, Wrapped, descriptor};
use crate::client::fork;
use crate::client::member::Member;
use crate::lock::{FileLevel, Slots};
use crate::planted::planted;
use crate::segment::wal_index::WalIndex;
use crate::wire::message::{Mode, Role};
use libsqlite3_sys as ffi;
use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

type File = *mut ffi::sqlite3_file;

/// The bytes of the database's header by which SQLite tells WAL mode (sqlite.org/fileformat2.html, offsets 18 and 19).
const FORMAT_AT: u64 = 18;
const FORMAT_WAL: [u8; 2] = [2, 2];

/// What SQLite believes to have had is given back.
pub fn unlocked(w: &mut Wrapped, slots: Slots) {
    if let Kind::Main(main) = &mut w.kind {
        let mask = slots.mask().unwrap_or(0);
        main.shared_slots &= !mask;
        main.exclusive_slots &= !mask;
    }
}

/// A lock is asked for on an inherited connection. True: it is not inherited any more, and has what SQLite believes that it
/// has.
pub fn joins(file: File, w: &mut Wrapped) -> bool {
    let real = RealFile { file, methods: w.real };
    let Kind::Main(main) = &mut w.kind else { return false };
    if main.writable || main.cannot_join || planted("inherited-reads-nothing") {
        return false;
    }
    if main.gated().is_none() || !main.is_idle() {
        return false;
    }
    if main.own_index.head().is_some() && !fork::was_handled() {
        return false; // made without the C library: SQLite may have looked at its parent's index already
    }
    match main.join_anew(real) {
        Ok(()) => true,
        Err(reason) => {
            let text = format!("{}: inherited over a fork, and cannot be read: {reason}", main.path);
            main.library.log(ffi::SQLITE_IOERR_LOCK, &text);
            false
        }
    }
}

impl MainFile {
    /// No transaction was open at the fork, or it is over.
    fn is_idle(&self) -> bool {
        // In WAL mode SQLite keeps SHARED between transactions.
        let kept = if self.wal_open { FileLevel::Shared } else { FileLevel::None };
        self.reads_nothing() && self.level <= kept
    }

    fn join_anew(&mut self, real: RealFile) -> Result<(), String> {
        let journal = path_of(self.journal_name).ok_or("it has no name")?;
        let path = journal.as_os_str().as_bytes().strip_suffix(b"-journal").ok_or("its name is unknown")?;
        let path = Path::new(OsStr::from_bytes(path));
        // SAFETY: SQLite is in a call for the file, which the unix VFS of that library has opened.
        let fd = unsafe { descriptor(real.file, self.library.unix, path) };
        let fd = fd.ok_or("another file has its name, or none")?;
        let parents_role = self.seat().map(Member::role);
        let service = join::join(self.library, &self.config, fd, path).map_err(|refusal| refusal.reason)?;
        let mut anew = MainFile::new(self.library, self.path.clone(), self.config.clone(), service);
        anew.journal_name = self.journal_name;
        anew.wal_name = self.wal_name;
        anew.connection = self.connection;
        anew.writable = false;
        anew.descriptor = self.descriptor;
        anew.wal_file = self.wal_file;
        // As SQLite has mapped it: a role that may write must still be one.
        let same =
            anew.gated().is_some_and(|m| m.role() == Role::ReadWrite || parents_role == Some(Role::ReadOnly));
        let had = match same {
            true => anew.gets_what(self, real),
            false => Err("plain clients hold it, or this process may not write it".to_owned()),
        };
        if let Err(reason) = had {
            anew.gives_up();
            return Err(reason);
        }
        anew.own_index = std::mem::take(&mut self.own_index);
        // In its place, where its companions find it. The parent's seat and mappings are not this process's to give up.
        std::mem::forget(std::mem::replace(self, anew));
        open::is_own(self);
        Ok(())
    }

    /// What SQLite believes that the inherited connection has.
    fn gets_what(&mut self, inherited: &mut MainFile, real: RealFile) -> Result<(), String> {
        if inherited.level == FileLevel::None {
            return Ok(());
        }
        if locks::gated(self, FileLevel::Shared) != ffi::SQLITE_OK {
            return Err("it is locked".into());
        }
        // From here on nobody leaves WAL mode or removes the WAL. Before, they may have.
        let named = path_of(self.wal_name).and_then(|path| std::fs::metadata(path).ok()).map(|m| m.ino());
        let known = self.wal_file.filter(|wal| wal.descriptor().is_some()).and_then(|wal| wal.inode());
        let mut format = [0; FORMAT_WAL.len()];
        let in_wal_mode = real.read(&mut format, FORMAT_AT) && format == FORMAT_WAL;
        let its_own = known.is_some() && known == named && in_wal_mode || planted("any-wal-is-its-own");
        if !its_own || self.probation && self.journal_exists() {
            return Err("its WAL is not the one any more that was there at the fork".into());
        }
        self.found_no_hot_journal();
        let member = self.gated().ok_or("no seat")?;
        let shared = member.shared().cloned().ok_or("no segment")?;
        if !matches!(member.open_wal_index(|index| self.found_alone(index)), Ok(true)) {
            return Err("its wal-index cannot be opened".into());
        }
        self.wal_open = true;
        // If it does not come to its end, SQLite might find there what it saw last.
        inherited.cannot_join = true;
        if !inherited.own_index.move_to(&shared) {
            return Err("its wal-index cannot be mapped".into());
        }
        // SAFETY: the first region stays mapped until `xShmUnmap`, which forgets this.
        self.wal_index = inherited.own_index.head().map(|head| unsafe { WalIndex::new(head) });
        match self.believes() {
            true => Ok(()),
            false => Err("its gate is gone".into()),
        }
    }

    /// The seat that was taken is given back.
    fn gives_up(mut self) {
        self.own_index = Default::default();
        if let Service::Seat(member) = self.service {
            if member.mode() == Mode::Gated && self.wal_open {
                let _ = member.close_wal_index();
            }
            member.leave();
        }
    }
}

/// SQLite's name for a file, which lives as long as the connection's file is open.
fn path_of<'a>(name: *const c_char) -> Option<&'a Path> {
    // SAFETY: NUL-terminated if not null.
    (!name.is_null()).then(|| Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes())))
}
