//! After a failed sync of the WAL.

use super::main_file::MainFile;
use crate::client::repair::Finder;
use libsqlite3_sys as ffi;

impl MainFile {
    /// See [`Finder::repair`].
    pub(super) fn repair(&mut self) -> bool {
        let (Some(member), Some(wal)) = (self.gated(), self.wal_file) else { return false };
        let cut = |length| match wal.truncate(length) {
            ffi::SQLITE_OK => Ok(()),
            rc => Err(rc),
        };
        let log = |text: &str| self.library.log(ffi::SQLITE_IOERR_FSYNC, text);
        let (owned, index, path) = (self.exclusive_slots, self.wal_index, self.path.as_str());
        Finder { member, owned, index, path, cut: &cut, log: &log }.repair()
    }
}
