//! A `sqlite3_file` of the unix VFS whose methods are ours.
//!
//! The methods table is allocated per file with our state behind it, so `pMethods` itself leads to the state:
//! one mechanism for files that we open, files that the wrapped unix VFS opens, and files that are already open
//! when the extension is loaded. The `unixFile` stays where and what it is, and the unix VFS's own methods work
//! on it unchanged.

use super::main_file::MainFile;
use super::wal::WalWrites;
use crate::client::fork;
use crate::client::shared::Shared;
use libsqlite3_sys as ffi;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// What kind of file it is.
pub enum Kind {
    /// A database.
    Main(Box<MainFile>),
    /// A rollback journal or WAL: guarded against forked children, and against plain clients once the gate is gone.
    Companion {
        segment: Option<Arc<Shared>>,
        /// Its database's state, if that is gated: SQLite closes it later than its companions.
        owner: Option<*mut MainFile>,
        /// See [`Shared::still_ours`].
        checked: u64,
        /// What is written to a WAL whose locks are the broker's.
        wal: Option<WalWrites>,
    },
}

/// `methods` must come first: SQLite's `pMethods` points at it.
#[repr(C)]
pub struct Wrapped {
    methods: ffi::sqlite3_io_methods,
    pub real: *const ffi::sqlite3_io_methods,
    pub epoch: u64,
    pub kind: Kind,
}

impl Wrapped {
    /// Puts our methods over `file`'s.
    ///
    /// # Safety
    /// `file` is an open file of the unix VFS whose methods are the unix VFS's own.
    pub unsafe fn wrap(file: *mut ffi::sqlite3_file, kind: Kind) {
        // SAFETY: by contract.
        let real = unsafe { (*file).pMethods };
        // SAFETY: the unix VFS's tables are static.
        let methods = unsafe { super::methods::table(&*real, &kind) };
        let wrapped = Box::new(Wrapped { methods, real, epoch: fork::epoch(), kind });
        // SAFETY: by contract; freed by `unwrap` at close.
        unsafe { (*file).pMethods = Box::into_raw(wrapped).cast() };
    }

    /// The state behind a wrapped file's methods.
    ///
    /// # Safety
    /// `file` has been wrapped, and no other reference to its state is alive (SQLite calls the methods of one
    /// file from one thread at a time).
    pub unsafe fn of<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Wrapped {
        // SAFETY: by contract; `methods` is the first field.
        unsafe { &mut *(*file).pMethods.cast_mut().cast::<Wrapped>() }
    }

    /// Whether `file`'s methods are ours.
    ///
    /// # Safety
    /// `file` points to a `sqlite3_file` with a valid or null `pMethods`.
    pub unsafe fn is_wrapped(file: *mut ffi::sqlite3_file) -> bool {
        // SAFETY: by contract.
        let methods = unsafe { (*file).pMethods.as_ref() };
        methods.and_then(|m| m.xClose).is_some_and(|f| std::ptr::fn_addr_eq(f, super::methods::CLOSE))
    }

    /// Restores the unix VFS's own methods and returns the state.
    ///
    /// # Safety
    /// As for [`Wrapped::of`].
    pub unsafe fn unwrap(file: *mut ffi::sqlite3_file) -> Box<Wrapped> {
        // SAFETY: by contract; made by `wrap` from a box.
        unsafe {
            let wrapped = Box::from_raw((*file).pMethods.cast_mut().cast::<Wrapped>());
            (*file).pMethods = wrapped.real;
            wrapped
        }
    }

    /// Inherited by a forked child.
    pub fn inherited(&self) -> bool {
        match &self.kind {
            Kind::Main(main) => main.inherited(),
            // SAFETY: SQLite is in a call for the companion, so it is in none for the database, which is open.
            Kind::Companion { owner, .. } => {
                self.opened_before_fork() && owner.is_none_or(|main| unsafe { (*main).inherited() })
            }
        }
    }

    /// Opened by a process that has forked this one: by this file nothing is written, whoever has joined anew.
    pub fn opened_before_fork(&self) -> bool {
        self.epoch != fork::epoch()
    }
}

/// The unix VFS's file, as far as its layout has been the same in every version (os_unix.c).
#[repr(C)]
struct UnixFile {
    methods: *const ffi::sqlite3_io_methods,
    vfs: *mut ffi::sqlite3_vfs,
    inode: *mut c_void,
    h: c_int,
}

/// The number of an open unix file's descriptor.
///
/// # Safety
/// `file` is an open file of the unix VFS for which [`descriptor`] has found one: so the layout is known.
pub unsafe fn number(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: by contract.
    unsafe { (*file.cast::<UnixFile>()).h }
}

/// The descriptor of an open unix file, verified: the VFS field must be the VFS that opened it, and the number
/// must be the file at `path`.
///
/// # Safety
/// `file` is an open file of `vfs`.
pub unsafe fn descriptor(
    file: *mut ffi::sqlite3_file,
    vfs: *mut ffi::sqlite3_vfs,
    path: &std::path::Path,
) -> Option<std::os::fd::BorrowedFd<'static>> {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: by contract at least a sqlite3_file; unixFile is larger than what is read.
    let unix = unsafe { &*file.cast::<UnixFile>() };
    if !std::ptr::eq(unix.vfs, vfs) || unix.h < 0 {
        return None;
    }
    // SAFETY: borrowed only while the connection's own call is running, which keeps it open.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(unix.h) };
    let st = nix::sys::stat::fstat(fd).ok()?;
    let there = std::fs::metadata(path).ok()?;
    (st.st_dev == there.dev() && st.st_ino == there.ino()).then_some(fd)
}
