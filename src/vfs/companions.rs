//! The files beside a database as the unix VFS opens them: that they are this database's, and may be written by whoever may
//! write that ([`crate::client::companions`]).

use super::main_file::MainFile;
use super::open::owner_of;
use crate::client::companions;
use std::ffi::{CStr, OsStr, c_char};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The unix VFS is about to open a WAL, and makes it if it is not there. An error is a sentence for people.
pub fn prepare_wal(name: *const c_char) -> Result<(), String> {
    with_owner(name, |main, wal| main.prepare(wal)).unwrap_or(Ok(()))
}

/// The unix VFS has opened a WAL or a journal.
pub fn opened(name: *const c_char) -> Result<(), String> {
    let opened = with_owner(name, |main, companion| {
        let (Some(database), Some(path)) = (main.database(), main.own_path()) else { return Ok(()) };
        // Opened first, looked after: another database's companion is there only once that has the name.
        if companions::is_replaced(database, &path) {
            return Err(format!(
                "{}: the database has been deleted or replaced since this connection opened it: open it again",
                path.display()
            ));
        }
        companions::share(database, companion);
        Ok(())
    });
    opened.unwrap_or(Ok(()))
}

fn with_owner<T>(name: *const c_char, then: impl FnOnce(&MainFile, &Path) -> T) -> Option<T> {
    // SAFETY: the owner's connection is the one that opens its companion, so nothing else uses its state now.
    let main = unsafe { &*owner_of(name)? };
    // SAFETY: SQLite's name for the companion.
    let companion = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
    Some(then(main, companion))
}

impl MainFile {
    /// In guest mode the unix VFS is about to open `-shm`, and makes it if it is not there.
    pub fn prepare_shm(&self) -> Result<(), String> {
        self.shm_path().map_or(Ok(()), |shm| self.prepare(&shm))
    }

    /// It has opened it.
    pub fn share_shm(&self) {
        if let (Some(database), Some(shm)) = (self.database(), self.shm_path()) {
            companions::share(database, &shm);
        }
    }

    fn prepare(&self, companion: &Path) -> Result<(), String> {
        let Some(database) = self.database() else { return Ok(()) };
        companions::prepare(database, companion).map_err(|e| format!("{}: {e}", companion.display()))
    }

    fn database(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: SQLite's own, open as long as this file is; where the host has closed it, what is asked of it fails.
        (self.descriptor >= 0).then(|| unsafe { BorrowedFd::borrow_raw(self.descriptor) })
    }

    /// The path by which SQLite has it open.
    fn own_path(&self) -> Option<PathBuf> {
        if self.journal_name.is_null() {
            return None;
        }
        // SAFETY: SQLite's name for the journal, which lives as long as the file is open.
        let journal = unsafe { CStr::from_ptr(self.journal_name) };
        Some(OsStr::from_bytes(journal.to_bytes().strip_suffix(b"-journal")?).into())
    }

    fn shm_path(&self) -> Option<PathBuf> {
        Some(companions::beside(&self.own_path()?, "-shm"))
    }
}
