//! The files beside a database as a hidden SQLite opens them: that they are this database's, and may be written by whoever
//! may write that ([`crate::client::companions`]). Of databases whose locks are the kernel's, too.

use super::database::Database;
use super::table;
use crate::client::companions;
use crate::client::served::object_of;
use nix::errno::Errno;
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// SQLite is about to open it, and may make it if it is not there.
pub fn prepare(path: &Path, caller: usize) -> Result<(), Errno> {
    let Some(database) = owner_of(path, caller) else { return Ok(()) };
    let Some(fd) = table::descriptor_of(&database) else { return Ok(()) };
    // SAFETY: SQLite's own descriptor of it, which is open as long as it is known.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    // What lies there is another database's.
    if companions::is_replaced(file, &database.path) {
        return Err(Errno::EACCES);
    }
    // A journal is nobody else's before there is something in it. A member has no use for a `-shm` file.
    let made = match path.as_os_str().as_bytes() {
        name if name.ends_with(b"-wal") => true,
        name => name.ends_with(b"-shm") && database.is_plain(),
    };
    if made { companions::prepare(file, path).map_err(|_| Errno::EACCES) } else { Ok(()) }
}

/// It has opened a file.
pub fn opened(path: &Path, caller: usize) {
    if let Some(database) = owner_of(path, caller)
        && let Some(fd) = table::descriptor_of(&database)
    {
        // SAFETY: SQLite's own descriptor of it, which is open as long as it is known.
        companions::share(unsafe { BorrowedFd::borrow_raw(fd) }, path);
    }
}

/// The database that this copy of SQLite has open by the name that a companion's begins with.
fn owner_of(path: &Path, caller: usize) -> Option<Arc<Database>> {
    let name = path.as_os_str().as_bytes();
    let base = ["-shm", "-wal", "-journal"].iter().find_map(|suffix| name.strip_suffix(suffix.as_bytes()))?;
    let (library, base) = (object_of(caller), Path::new(OsStr::from_bytes(base)));
    // Where one that has been replaced and the one at its place are both open, SQLite does not say for which it opens this.
    table::database_at(library, base).or_else(|| table::database_called(library, base))
}
