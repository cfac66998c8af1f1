//! The descriptors of this process that the lane answers for.

use super::database::Database;
use crate::client::fork::{self, PerProcess};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Descriptors with a number behind it stay the kernel's.
pub const FILES: usize = 1 << 20;

/// What the kernel calls the segment's wal-index, which is a memfd.
const WAL_INDEX: &[u8] = b"/memfd:turnstile";

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A database whose locks are the kernel's (guest mode, no broker, served by the VFS).
    Plain = 1,
    Database = 2,
    Shm = 3,
    Wal = 4,
    /// A rollback journal: a forked child must leave its parent's alone.
    Journal = 5,
}

/// By descriptor, a [`Kind`] or 0: all that is looked at for any other file, by C. Untouched pages of it cost nothing.
pub static KINDS: [AtomicU8; FILES] = [const { AtomicU8::new(0) }; FILES];

/// How many descriptors are known: with none, C asks nothing about a file that is opened.
pub static COUNT: AtomicU32 = AtomicU32::new(0);

#[derive(Clone, Debug)]
pub struct Known {
    pub kind: Kind,
    pub database: Arc<Database>,
}

struct Files {
    pid: libc::pid_t,
    known: RwLock<BTreeMap<RawFd, Known>>,
    /// The databases that its parent had open, and theirs.
    inherited: Vec<PathBuf>,
}

impl Files {
    fn new(parent: Option<&Files>) -> Files {
        // One that another thread of the parent was just changing cannot be read.
        let known = parent.and_then(|p| p.known.try_read().ok());
        let paths = known.iter().flat_map(|k| k.values()).map(|k| k.database.path.clone());
        let inherited = parent.map(|p| p.inherited.clone()).into_iter().flatten();
        let inherited = inherited.chain(paths).filter(|p| p.is_absolute()).collect();
        // SAFETY: no argument, no memory.
        Files { pid: unsafe { libc::getpid() }, known: RwLock::default(), inherited }
    }
}

/// A forked child has none of its parent's.
fn files() -> &'static Files {
    static KNOWN: PerProcess<Files> = PerProcess::new();
    fork::install();
    KNOWN.get_from(Files::new)
}

/// A connection to it, inherited over a fork, may be open.
pub fn is_inherited(path: &Path) -> bool {
    files().inherited.iter().any(|p| p == path)
}

/// The descriptor was inherited over a fork with a connection. Not so, and not marked any more, if it has become something
/// else where it was not seen.
pub fn was_inherited(fd: RawFd) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
    let bytes = name.as_os_str().as_bytes();
    let base = [&b"-wal"[..], b"-journal"].iter().find_map(|end| bytes.strip_suffix(*end)).unwrap_or(bytes);
    let inherited = is_inherited(Path::new(OsStr::from_bytes(base))) || bytes.starts_with(WAL_INDEX);
    if !inherited {
        remove(fd);
    }
    inherited
}

fn read() -> RwLockReadGuard<'static, BTreeMap<RawFd, Known>> {
    files().known.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, BTreeMap<RawFd, Known>> {
    files().known.write().unwrap_or_else(PoisonError::into_inner)
}

/// A child of vfork(2) runs in its parent's memory: what it does to its own descriptors is not to be noted there.
pub fn in_vfork_child() -> bool {
    // SAFETY: as above.
    files().pid != unsafe { libc::getpid() }
}

fn kind_of(fd: RawFd) -> Option<&'static AtomicU8> {
    KINDS.get(usize::try_from(fd).ok()?)
}

/// There is something to know of it: [`find`] then says what, or the descriptor was inherited over a fork.
pub fn is_marked(fd: RawFd) -> bool {
    kind_of(fd).is_some_and(|kind| kind.load(Relaxed) != 0)
}

pub fn find(fd: RawFd) -> Option<Known> {
    read().get(&fd).cloned()
}

/// A copy of SQLite has that file open as a database.
pub fn is_database(identity: (u64, u64)) -> bool {
    read().values().any(|k| k.database.identity == identity)
}

/// The database of that copy of SQLite.
pub fn database(library: usize, identity: (u64, u64)) -> Option<Arc<Database>> {
    let known = read();
    let mut all = known.values().map(|k| &k.database);
    all.find(|d| d.library == library && d.identity == identity).cloned()
}

/// The same by its name, for its companions.
pub fn database_at(library: usize, path: &Path) -> Option<Arc<Database>> {
    use std::os::unix::fs::MetadataExt;
    if read().is_empty() {
        return None;
    }
    let meta = std::fs::metadata(path).ok()?;
    database(library, (meta.dev(), meta.ino()))
}

/// The database that this copy of SQLite has opened by that name, whatever the name leads to by now.
pub fn database_called(library: usize, path: &Path) -> Option<Arc<Database>> {
    let known = read();
    let mut all = known.values().map(|k| &k.database);
    all.find(|d| d.library == library && d.path == path).cloned()
}

/// False: its number is too high to be looked up.
pub fn add(fd: RawFd, kind: Kind, database: &Arc<Database>) -> bool {
    let Some(mark) = kind_of(fd) else { return false };
    let mut known = write();
    known.insert(fd, Known { kind, database: Arc::clone(database) });
    COUNT.store(known.len() as u32, Relaxed);
    mark.store(kind as u8, Relaxed);
    true
}

/// The number is, or is about to be, something else. What is returned is dropped when the file is closed: with its last
/// descriptor a process leaves a database.
pub fn remove(fd: RawFd) -> Option<Known> {
    kind_of(fd)?.store(0, Relaxed);
    let mut known = write();
    let removed = known.remove(&fd);
    COUNT.store(known.len() as u32, Relaxed);
    removed
}

/// One of the database's own descriptors.
pub fn descriptor_of(database: &Database) -> Option<RawFd> {
    let known = read();
    let is_own = |kind: Kind| matches!(kind, Kind::Database | Kind::Plain);
    let mut own = known.iter().filter(|(_, k)| is_own(k.kind) && std::ptr::eq(&*k.database, database));
    own.next().map(|(fd, _)| *fd)
}
