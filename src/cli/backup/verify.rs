//! Whether a copy that has no name yet is a sound database.

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::path::Path;
use std::ptr;

use rusqlite::{Connection, OpenFlags, ffi};
use turnstile::planted::planted;

use crate::checkpointer::vfs::full_pathname;

use super::target::Target;
use super::{Event, Failure, Main};

/// What is told of what is wrong.
const LINES: usize = 5;

const VFS: &CStr = c"turnstile-backup";

pub fn verify(main: &mut Main, copy: &Target, file: &Path) -> Result<(), Failure> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    // Nobody else has it: no locks, no WAL.
    let name = format!("file:{}?immutable=1", copy.descriptor_path());
    let opened = Connection::open_with_flags_and_vfs(name, flags, VFS);
    let db = opened.map_err(Failure::doing("the copy cannot be verified"))?;
    main.tell(Event::Opened(db.get_interrupt_handle()));
    main.go_on()?;
    let found = db.prepare("PRAGMA integrity_check").and_then(|mut check| {
        check.query_map([], |row| row.get::<_, String>(0))?.collect::<rusqlite::Result<Vec<_>>>()
    });
    main.go_on()?;
    let found = match found {
        Ok(lines) => lines,
        Err(e) if is_damage(&e) => vec![e.to_string()],
        Err(e) => return Err(Failure::Failed(format!("the copy cannot be verified: {e}"))),
    };
    if found == ["ok"] || planted("backup-unverified") {
        return Ok(());
    }
    let mut said = found.iter().flat_map(|line| line.lines()).take(LINES).collect::<Vec<_>>().join("; ");
    if found.len() > LINES {
        said.push_str("; ...");
    }
    Err(Failure::Damaged(format!(
        "the copy is damaged, so there is no new {}: {said}. If `PRAGMA integrity_check` finds the same in the database, the database \
         is; else look at the disk that the copy was made on",
        file.display()
    )))
}

fn is_damage(e: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(e.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

/// Registers the unix VFS as it is before turnstile's is laid over it, but that it opens a link of /proc: a file without a name
/// is opened by one.
pub fn register() -> io::Result<()> {
    // SAFETY: as sqlite3.h says of each; a VFS of SQLite's own stays; the copy is leaked, because SQLite keeps it.
    let rc = unsafe {
        let unix = ffi::sqlite3_vfs_find(c"unix".as_ptr());
        let Some(mut vfs) = unix.as_ref().copied() else { return Err(io::Error::other("SQLite has no VFS")) };
        vfs.pNext = ptr::null_mut();
        vfs.zName = VFS.as_ptr();
        vfs.xFullPathname = Some(full_pathname);
        let call: unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int = open_link;
        let call: unsafe extern "C" fn() = std::mem::transmute(call as *const ());
        let set = vfs.xSetSystemCall.map_or(ffi::SQLITE_ERROR, |set| set(unix, c"open".as_ptr(), Some(call)));
        if set != ffi::SQLITE_OK { set } else { ffi::sqlite3_vfs_register(Box::into_raw(Box::new(vfs)), 0) }
    };
    if rc == ffi::SQLITE_OK { Ok(()) } else { Err(io::Error::other(format!("no VFS for it ({rc})"))) }
}

/// `open` as SQLite calls it for every file. It forbids that a name be a link, which those of our own descriptors are.
unsafe extern "C" fn open_link(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: SQLite passes a string.
    let ours = unsafe { CStr::from_ptr(path) }.to_bytes().starts_with(b"/proc/self/fd/");
    let flags = if ours { flags & !libc::O_NOFOLLOW } else { flags };
    // SAFETY: as above.
    unsafe { libc::open(path, flags, mode) }
}
