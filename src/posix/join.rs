//! How a database is recognised: by SQLite's first lock on it. Until then its descriptor is any other file's.

use super::database::Database;
use super::table::{self, Kind, Known};
use crate::client::JoinError;
use crate::client::claim;
use crate::client::config::{Config, Fallback};
use crate::client::fork::PerProcess;
use crate::client::member::Member;
use crate::client::served::{is_served, object_of};
use crate::planted::planted;
use crate::wire::message::{Mode, Refusal, Role};
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

/// One at a time: two connections' first locks on one database are to become one seat.
static JOINING: PerProcess<Mutex<()>> = PerProcess::new();

/// What `turnstile run` says for us; set by C.
static REPORT: AtomicUsize = AtomicUsize::new(0);

pub type Report = unsafe extern "C" fn(kind: *const libc::c_char, text: *const libc::c_char);

pub fn report_by(report: Report) {
    REPORT.store(report as usize, SeqCst);
}

fn report(kind: &std::ffi::CStr, text: &str) {
    let address = REPORT.load(SeqCst);
    if address != 0
        && let Ok(text) = std::ffi::CString::new(text)
    {
        // SAFETY: only ever set to such a function, which is never unloaded.
        let report = unsafe { std::mem::transmute::<usize, Report>(address) };
        // SAFETY: two strings that outlive the call.
        unsafe { report(kind.as_ptr(), text.as_ptr()) };
    }
}

/// The database behind a descriptor on which SQLite, with code at `caller`, asks for its first lock. `None`: a file that
/// is none of ours.
pub fn recognise(fd: RawFd, caller: usize) -> Result<Option<Known>, Errno> {
    // SAFETY: SQLite is in a call with it.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let Ok(st) = fstat(file) else { return Ok(None) };
    if SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Ok(None);
    }
    let library = object_of(caller);
    let identity = (st.st_dev, st.st_ino);
    let _joining = JOINING.get().lock().unwrap_or_else(PoisonError::into_inner);
    let database = match table::database(library, identity) {
        Some(known) => known,
        None => join(file, library, &st)?,
    };
    let kind = if database.is_plain() { Kind::Plain } else { Kind::Database };
    Ok(table::add(fd, kind, &database).then_some(Known { kind, database }))
}

fn join(file: BorrowedFd, library: usize, st: &FileStat) -> Result<Arc<Database>, Errno> {
    let identity = (st.st_dev, st.st_ino);
    let path = path_of(file, identity);
    let with = |path: PathBuf, member| Database::new(library, identity, path, member);
    // The VFS's own connections have real locks in guest mode only. Without a name no WAL would be found.
    let Some(path) = path.filter(|_| !is_served(library) || planted("served-twice")) else {
        return Ok(with(PathBuf::new(), None));
    };
    let refused = |reason: &str| {
        report(c"unreached", &format!("{}: {reason}", path.display()));
        Errno::EIO
    };
    let config = Config::from_environment().map_err(|e| refused(&e.to_string()))?;
    match claim::take_seat(&config, library as u64, "linked in".into(), file, &path) {
        Ok(member) if is_served_here(&member) => {
            report(c"lane", &path.display().to_string());
            Ok(with(path, Some(member)))
        }
        Ok(member) => {
            if member.mode() == Mode::Gated {
                refused(
                    "its locks would have to be asked for by messages, which SQLite that is linked in cannot: it is \
                     opened without turnstile, and waits until nobody else has it open",
                );
            }
            member.leave();
            Ok(with(path, None))
        }
        Err(JoinError::NoBroker(reason)) if config.fallback == Fallback::Plain => {
            refused(&format!("plain SQLite: no broker, TURNSTILE_FALLBACK=plain: {reason}"));
            Ok(with(path, None))
        }
        Err(e @ JoinError::Refused { why: Refusal::OtherBroker | Refusal::Stopping, .. }) => {
            refused(&e.to_string());
            Err(Errno::EAGAIN)
        }
        Err(e) => Err(refused(&e.to_string())),
    }
}

fn is_served_here(member: &Member) -> bool {
    member.mode() == Mode::Gated && member.role() == Role::ReadWrite && member.lane() == "fast"
}

/// The name by which SQLite has the file open, if that is this very file's.
fn path_of(file: BorrowedFd, identity: (u64, u64)) -> Option<PathBuf> {
    use std::os::fd::AsRawFd;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    is_there(&path, identity).then_some(path)
}

fn is_there(path: &Path, identity: (u64, u64)) -> bool {
    path.is_absolute() && std::fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == identity)
}
