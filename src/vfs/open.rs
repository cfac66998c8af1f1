//! `xOpen` and `xDelete`: of the VFS named "turnstile", and of the unix VFS wrapped in place, which is where an
//! adopted connection's ATTACH goes.

use super::api::Library;
use super::companions;
use super::join;
use super::main_file::{MainFile, Service};
use super::methods::guarded;
use super::wal::WalWrites;
use super::wal_file::WalFile;
use super::wrapped::{Kind, Wrapped, descriptor, number};
use crate::client::config::{Config, Source};
use crate::client::fork::PerProcess;
use crate::lock::FileLevel;
use crate::planted::planted;
use libsqlite3_sys as ffi;
use nix::fcntl::{FcntlArg, fcntl};
use std::ffi::{CStr, c_char, c_int};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

type File = *mut ffi::sqlite3_file;

/// A brokered file and its companions, by the addresses that SQLite names them with.
struct Names {
    journal: usize,
    wal: usize,
    main: *mut MainFile,
    /// Device and inode, in guest mode.
    guest: Option<(u64, u64)>,
}

// SAFETY: the pointer is only followed from callbacks of the connection that owns the file.
unsafe impl Send for Names {}

impl Names {
    fn has(&self, name: usize) -> bool {
        name == self.journal || name == self.wal
    }
}

/// The process's open brokered files; in a forked child, also those that it inherited and has not closed yet.
#[derive(Default)]
struct OpenFiles {
    own: Mutex<Vec<Names>>,
    inherited: Mutex<Vec<Names>>,
}

fn open_files() -> &'static OpenFiles {
    static CURRENT: PerProcess<OpenFiles> = PerProcess::new();
    CURRENT.get_from(|parent| OpenFiles {
        own: Mutex::default(),
        inherited: Mutex::new(parent.map(OpenFiles::all).unwrap_or_default()),
    })
}

impl OpenFiles {
    /// In a child: a list that another thread of the parent was just changing cannot be read.
    fn all(&self) -> Vec<Names> {
        let copy = |list: &Mutex<Vec<Names>>| -> Vec<Names> {
            let list = list.try_lock();
            let names = list.iter().flat_map(|l| l.iter());
            names.map(|n| Names { main: std::ptr::null_mut(), ..*n }).collect()
        };
        copy(&self.own).into_iter().chain(copy(&self.inherited)).collect()
    }
}

fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that was inherited over a fork, in guest mode, is still open on this file: the unix VFS then
/// believes that this process holds the parent's locks.
pub fn inherited_guest(identity: (u64, u64)) -> bool {
    lock(&open_files().inherited).iter().any(|n| n.guest == Some(identity))
}

/// A super-journal of a connection that a forked child has inherited. Rolling back, the child would find the name of its
/// parent's in the journal and remove it; committing several files, it would choose the same name, because SQLite's
/// random numbers are the same in both processes.
fn is_inherited_super_journal(name: *const c_char) -> bool {
    if name.is_null() || planted("childs-super-journal") {
        return false;
    }
    // SAFETY: SQLite's name for the file to open.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes();
    let belongs = |n: &Names| {
        // SAFETY: SQLite's name for a journal, which lives as long as the connection; that one is not closed yet.
        let journal = (n.journal != 0).then(|| unsafe { CStr::from_ptr(n.journal as *const c_char) });
        journal
            .and_then(|j| j.to_bytes().strip_suffix(b"-journal"))
            .is_some_and(|main| name.strip_prefix(main).is_some_and(|rest| rest.starts_with(b"-mj")))
    };
    let files = open_files();
    lock(&files.inherited).iter().any(belongs) && !lock(&files.own).iter().any(belongs)
}

/// The file is about to close.
pub fn forget(main: &MainFile) {
    let files = open_files();
    let list = if main.inherited() { &files.inherited } else { &files.own };
    lock(list).retain(|n| n.journal != main.journal_name as usize);
}

/// `xOpen` of both VFSes.
pub unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: File,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    guarded(ffi::SQLITE_CANTOPEN, || {
        let Some(library) = Library::of_vfs(vfs) else { return ffi::SQLITE_CANTOPEN };
        let Some(real_open) = library.original.xOpen else { return ffi::SQLITE_CANTOPEN };
        let mut opened: c_int = flags;
        let companion = flags & (ffi::SQLITE_OPEN_MAIN_JOURNAL | ffi::SQLITE_OPEN_WAL) != 0;
        // A journal is nobody else's before there is something in it.
        if flags & ffi::SQLITE_OPEN_WAL != 0
            && flags & ffi::SQLITE_OPEN_CREATE != 0
            && let Err(reason) = companions::prepare_wal(name)
        {
            library.log(ffi::SQLITE_CANTOPEN, &reason);
            // SAFETY: the callback's own argument; SQLite wants pMethods null after a failed open.
            unsafe { (*file).pMethods = std::ptr::null() };
            return ffi::SQLITE_CANTOPEN;
        }
        if flags & ffi::SQLITE_OPEN_SUPER_JOURNAL != 0 && is_inherited_super_journal(name) {
            // SAFETY: the callback's own argument; SQLite wants pMethods null after a failed open.
            unsafe { (*file).pMethods = std::ptr::null() };
            return ffi::SQLITE_CANTOPEN;
        }
        // SAFETY: the callback's own arguments, with the unix VFS in place of ours.
        let rc = unsafe { real_open(library.unix, name, file, flags, &mut opened) };
        if !out_flags.is_null() {
            // SAFETY: not null.
            unsafe { *out_flags = opened };
        }
        if flags & ffi::SQLITE_OPEN_MAIN_JOURNAL != 0 && flags & ffi::SQLITE_OPEN_READONLY != 0 {
            looked_at(name);
        }
        // SAFETY: xOpen has set pMethods, to null if it failed.
        if rc != ffi::SQLITE_OK || unsafe { (*file).pMethods.is_null() } || name.is_null() {
            return rc;
        }
        if flags & ffi::SQLITE_OPEN_MAIN_DB != 0 {
            // SAFETY: `name` came with SQLITE_OPEN_MAIN_DB, so it is a name with URI parameters.
            let code = unsafe { opened_main(library, name, file) };
            if code != ffi::SQLITE_OK {
                close_refused(file);
            }
            return code;
        }
        if companion {
            if let Err(reason) = companions::opened(name) {
                library.log(ffi::SQLITE_CANTOPEN, &reason);
                close_refused(file);
                return ffi::SQLITE_CANTOPEN;
            }
            opened_companion(name, file, flags);
        }
        rc
    })
}

/// The file whose companion has that name. It is its connection that opens the companion, so nothing else uses it now.
pub(super) fn owner_of(name: *const c_char) -> Option<*mut MainFile> {
    lock(&open_files().own).iter().find(|n| !name.is_null() && n.has(name as usize)).map(|n| n.main)
}

fn close_refused(file: File) {
    // SAFETY: opened by the unix VFS just now; SQLite wants pMethods null after a failed open.
    unsafe {
        if let Some(close) = (*file).pMethods.as_ref().and_then(|m| m.xClose) {
            close(file);
        }
        (*file).pMethods = std::ptr::null();
    }
}

/// # Safety
/// `name` is a database name that SQLite handed to `xOpen`.
unsafe fn opened_main(library: &'static Library, name: *const c_char, file: File) -> c_int {
    // SAFETY: by contract.
    let path = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    // SAFETY: by contract.
    match unsafe { service_for(library, name, file) } {
        Ok((config, service)) => {
            let main = MainFile::new(library, path, config, service);
            // SAFETY: by contract.
            unsafe { install(file, main, name) };
            ffi::SQLITE_OK
        }
        Err(refusal) => {
            library.log(refusal.code, &format!("{path}: {}", refusal.reason));
            refusal.code
        }
    }
}

/// Settings and broker for a database that the unix VFS has just opened, or that is being adopted.
///
/// # Safety
/// `name` is a database name that SQLite handed to `xOpen`; `file` is that database's open unix file.
pub unsafe fn service_for(
    library: &'static Library,
    name: *const c_char,
    file: File,
) -> Result<(Config, Service), join::Refusal> {
    let uri = |key: &str| {
        let key = std::ffi::CString::new(key.to_ascii_lowercase()).ok()?;
        // SAFETY: `name` is such a name, by contract.
        unsafe { library.uri(name, &key) }
    };
    let config =
        Config::from_environment().and_then(|c| c.amend(Source::Uri, uri)).map_err(join::Refusal::setting)?;
    for (key, why) in [(c"immutable", "immutable=1"), (c"nolock", "nolock=1")] {
        // SAFETY: `name` is such a name, by contract.
        if unsafe { (library.api.uri_boolean)(name, key.as_ptr(), 0) } != 0 {
            return Ok((config, Service::Plain(format!("opened with {why}: no locks are asked for"))));
        }
    }
    // SAFETY: by contract.
    let path = Path::new(std::ffi::OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
    // SAFETY: by contract.
    let Some(fd) = (unsafe { descriptor(file, library.unix, path) }) else {
        return Err(join::Refusal::unopened(
            "the open file is not the one at its path (moved meanwhile?), or this SQLite's unix VFS is laid out \
             in a way that turnstile does not know",
        ));
    };
    let service = join::join(library, &config, fd, path)?;
    Ok((config, service))
}

/// Asked of the descriptor: a connection that is adopted does not say how it was opened.
fn writable(descriptor: RawFd) -> bool {
    // SAFETY: SQLite's own descriptor, open for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl(fd, FcntlArg::F_GETFL).is_ok_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// Wraps the file and remembers its companions' names.
///
/// # Safety
/// As [`service_for`].
pub unsafe fn install(file: File, mut main: MainFile, name: *const c_char) {
    let library = main.library;
    // SAFETY: by contract.
    unsafe {
        main.journal_name = (library.api.filename_journal)(name);
        main.wal_name = (library.api.filename_wal)(name);
    }
    let brokered = matches!(main.service, Service::Seat(_));
    if brokered {
        // SAFETY: by contract; a seat was taken with what `descriptor` found.
        main.descriptor = unsafe { number(file) };
        main.writable = writable(main.descriptor);
    }
    let mut main = Box::new(main);
    if brokered {
        is_own(&mut main);
    }
    // SAFETY: by contract.
    unsafe { Wrapped::wrap(file, Kind::Main(main)) };
}

/// The brokered file, which stays where it is, is this process's to name its companions by.
pub fn is_own(main: &mut MainFile) {
    let journal = main.journal_name as usize;
    let guest = main.guest().and_then(|_| std::fs::metadata(&main.path).ok()).map(|m| (m.dev(), m.ino()));
    // The address of a name that an inherited connection used may be this one's now.
    lock(&open_files().inherited).retain(|n| n.journal != journal);
    let wal = main.wal_name as usize;
    lock(&open_files().own).push(Names { journal, wal, main, guest });
}

/// A journal opened read-only while its database is held SHARED is being looked at for a hot one, also if it
/// cannot be opened: SQLite then assumes that it is hot.
fn looked_at(name: *const c_char) {
    let names = lock(&open_files().own);
    if let Some(owner) = names.iter().find(|n| n.journal == name as usize) {
        // SAFETY: the owner's connection is the one that opens its journal, so nothing else uses its state now.
        let main = unsafe { &mut *owner.main };
        main.hot_journal |= main.level == FileLevel::Shared;
    }
}

/// A journal or WAL of a brokered file is guarded against forked children, and against a lost gate.
fn opened_companion(name: *const c_char, file: File, flags: c_int) {
    let names = lock(&open_files().own);
    let Some(owner) = names.iter().find(|n| n.has(name as usize)) else { return };
    // SAFETY: as in `looked_at`.
    let main = unsafe { &mut *owner.main };
    let wal = flags & ffi::SQLITE_OPEN_WAL != 0;
    if wal && !planted("probation-until-a-page") {
        // All pages may be in the WAL, and its index a VFS's above ours: then nothing else tells.
        main.found_no_hot_journal();
    }
    let segment = main.gated().and_then(|m| m.shared().cloned());
    let gated_by = main.gated().map(|_| owner.main);
    let wal = main.gated().filter(|_| wal).map(|_| {
        // SAFETY: SQLite's name for its WAL, which it has just opened.
        let path = Path::new(std::ffi::OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
        // SAFETY: just opened by the unix VFS of that library.
        let fd = unsafe { descriptor(file, main.library.unix, path) };
        let named = fd.and_then(|fd| Some((fd, nix::sys::stat::fstat(fd).ok()?.st_ino)));
        // SAFETY: just opened by the unix VFS.
        WalFile::new(file, unsafe { (*file).pMethods }, named)
    });
    let wal = wal.map(|wal| {
        main.wal_file = Some(wal);
        WalWrites::new(owner.main)
    });
    // SAFETY: just opened by the unix VFS.
    unsafe { Wrapped::wrap(file, Kind::Companion { segment, owner: gated_by, checked: 0, wal }) };
}

/// `xDelete` of both VFSes: a forked child must not delete its parent's journal or WAL, nor a member what may be a plain
/// client's by now.
pub unsafe extern "C" fn delete(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, sync_dir: c_int) -> c_int {
    guarded(ffi::SQLITE_IOERR_DELETE, || {
        let Some(library) = Library::of_vfs(vfs) else { return ffi::SQLITE_IOERR_DELETE };
        let Some(real_delete) = library.original.xDelete else { return ffi::SQLITE_IOERR_DELETE };
        let at = name as usize;
        let files = open_files();
        let owner = lock(&files.own).iter().find(|n| n.has(at)).map(|n| n.main);
        // SAFETY: as in `looked_at`: it is the owner's connection that removes its companion.
        if owner.is_some_and(|main| unsafe { !(*main).believes() }) && !planted("companion-deleted-blindly") {
            return ffi::SQLITE_IOERR_DELETE;
        }
        if owner.is_none() && lock(&files.inherited).iter().any(|n| n.has(at)) {
            return ffi::SQLITE_OK;
        }
        // SAFETY: the callback's own arguments.
        unsafe { real_delete(library.unix, name, sync_dir) }
    })
}
