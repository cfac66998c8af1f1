//! From an open database file to a seat, or to the reason why not.

use super::api::Library;
use super::main_file::Service;
use crate::client::JoinError;
use crate::client::config::{BadSetting, Config, Fallback};
use crate::client::fork::PerProcess;
use crate::client::host::{HostFd, LowDescriptors};
use crate::client::joining::Joins;
use crate::client::member::Member;
use crate::client::resting::{self, Home};
use crate::planted::planted;
use crate::segment::gate;
use crate::wire::message::{self, Join, Mode};
use libsqlite3_sys as ffi;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode as Bits, fstat};
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A database that is not opened: SQLite's code and a sentence for people.
#[derive(Debug)]
pub struct Refusal {
    pub code: c_int,
    pub reason: String,
}

impl Refusal {
    pub fn setting(bad: BadSetting) -> Refusal {
        Refusal { code: ffi::SQLITE_CANTOPEN, reason: bad.to_string() }
    }

    pub fn unopened(reason: &str) -> Refusal {
        Refusal { code: ffi::SQLITE_CANTOPEN, reason: reason.into() }
    }
}

impl From<JoinError> for Refusal {
    fn from(e: JoinError) -> Refusal {
        let code = match &e {
            JoinError::Refused {
                why: message::Refusal::OtherBroker | message::Refusal::Stopping, ..
            } => ffi::SQLITE_BUSY,
            _ => ffi::SQLITE_CANTOPEN,
        };
        Refusal { code, reason: e.to_string() }
    }
}

/// By device and inode.
type Kept = BTreeMap<(u64, u64), Vec<OwnedFd>>;

/// Descriptors of databases and `-shm` files that were opened here beside SQLite's own and may not be closed,
/// because that would drop the POSIX locks that this process's connections hold on the same file (guest mode).
/// Used again instead of opening another.
static KEPT: PerProcess<Mutex<Kept>> = PerProcess::new();
/// Those of `-shm` files: plain clients remove theirs at the last close and make another.
static KEPT_SHM: PerProcess<Mutex<Kept>> = PerProcess::new();

/// A descriptor of the file at `path`, opened read-write by this process's own rights or kept from before.
fn second_descriptor(path: &Path, of: &'static PerProcess<Mutex<Kept>>) -> Option<OwnedFd> {
    let meta = std::fs::symlink_metadata(path).ok().filter(|m| m.is_file())?;
    let identity = (meta.dev(), meta.ino());
    let mut kept = of.get().lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(fd) = kept.get_mut(&identity).and_then(Vec::pop) {
        return Some(fd);
    }
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    open(path, flags, Bits::empty()).ok()
}

fn keep(fd: OwnedFd, of: &'static PerProcess<Mutex<Kept>>) {
    if let Ok(st) = fstat(&fd) {
        let mut kept = of.get().lock().unwrap_or_else(PoisonError::into_inner);
        kept.entry((st.st_dev, st.st_ino)).or_default().push(fd);
    } else {
        std::mem::forget(fd);
    }
}

/// Keeps the descriptor of a `-shm` file, and closes those of files that have been removed since. SQLite removes one when
/// nobody has it open any more, so no lock of this process's is on it; else each open beside plain clients that come and
/// go would cost a descriptor.
fn keep_shm(fd: OwnedFd) {
    keep(fd, &KEPT_SHM);
    let mut kept = KEPT_SHM.get().lock().unwrap_or_else(PoisonError::into_inner);
    let there = |fd: &OwnedFd| fstat(fd).is_ok_and(|st| st.st_nlink > 0) || planted("removed-shm-kept");
    kept.retain(|_, fds| fds.first().is_some_and(there));
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn read_only(fd: BorrowedFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL).is_ok_and(|bits| bits & libc::O_ACCMODE == libc::O_RDONLY)
}

/// Joins the database behind `fd`, which SQLite has open at `path`.
pub fn join(
    library: &'static Library,
    config: &Config,
    fd: BorrowedFd,
    path: &Path,
) -> Result<Service, Refusal> {
    let io = |e: std::io::Error| Refusal { code: ffi::SQLITE_CANTOPEN, reason: e.to_string() };
    let which = library.api.vfs_register as usize as u64;
    if let Some(member) = resume(config, which, fd, path) {
        return Ok(Service::Seat(member));
    }
    let low = LowDescriptors::occupy().map_err(io)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(directory, flags, Bits::empty()).map_err(|e| io(e.into()))?;
    // A read-only connection of a process that may write joins as a writer, so that readers that start first
    // do not force guest mode.
    let own = if read_only(fd) { second_descriptor(path, &KEPT) } else { None };
    let shm_path = with_suffix(path, "-shm");
    let shm = second_descriptor(&shm_path, &KEPT_SHM);
    drop(low);

    let mut claim = Joins {
        database: own.as_ref().map_or(fd, |o| o.as_fd()),
        directory,
        shm,
        join: Join {
            name: path.file_name().map(|n| n.as_bytes().to_vec()),
            has_shm: false,
            guest: config.guest,
            allow_unsafe: config.allow_unsafe,
            sqlite_version: library.version(),
            library: which,
        },
    };
    let mut result = Member::join(config, &claim);
    for _ in 0..SHM_TRIES {
        let Some(shm) = claim.shm.take_if(|shm| bad_descriptor(&result) && replaced(shm, &shm_path)) else {
            break;
        };
        keep_shm(shm);
        let _low = LowDescriptors::occupy().map_err(io)?;
        claim.shm = second_descriptor(&shm_path, &KEPT_SHM);
        result = Member::join(config, &claim);
    }
    let Joins { shm, directory, join, .. } = claim;
    let gated = matches!(&result, Ok(m) if m.mode() == Mode::Gated);
    // Gated: nobody in this process holds POSIX locks on these files, the gate would not stand. Else keep them.
    if let Some(shm) = shm.filter(|_| !gated) {
        keep_shm(shm);
    }
    match result {
        Ok(mut member) => {
            if let (None, true, Some(name)) = (&own, gated, &join.name) {
                member.rests_at(Home::new(config, which, fd, directory, name));
            }
            match (own, gated) {
                (Some(own), true) => member.keep(HostFd::of_shared_file(own).map_err(io)?),
                (Some(own), false) => keep(own, &KEPT),
                (None, _) => {}
            }
            admitted(library, member, fd, path)
        }
        Err(e) => {
            if let Some(own) = own {
                keep(own, &KEPT);
            }
            match e {
                JoinError::NoBroker(reason) if config.fallback == Fallback::Plain => {
                    let reason = format!("no broker, TURNSTILE_FALLBACK=plain: {reason}");
                    library.log(ffi::SQLITE_WARNING, &format!("{}: plain SQLite: {reason}", path.display()));
                    Ok(Service::Plain(reason))
                }
                e => Err(e.into()),
            }
        }
    }
}

/// Plain clients remove `-shm` at their last close and make another at the next open.
const SHM_TRIES: usize = 10;

fn bad_descriptor<T>(result: &Result<T, JoinError>) -> bool {
    matches!(result, Err(JoinError::Refused { why: message::Refusal::BadDescriptor, .. }))
}

/// The `-shm` file that was opened is not the one that is there.
fn replaced(shm: &OwnedFd, path: &Path) -> bool {
    let there = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
    fstat(shm).ok().map(|st| (st.st_dev, st.st_ino)) != there
}

/// A seat that this process let rest, if it is one for this very file and the gate stands.
fn resume(config: &Config, library: u64, fd: BorrowedFd, path: &Path) -> Option<Member> {
    let member = resting::resume(config, library, fd, path)?;
    if !read_only(fd) && gate::stands(fd) {
        return Some(member);
    }
    member.leave();
    None
}

/// Both sides must stand on one kernel and one file: the gate is seen through the connection's own descriptor.
fn admitted(
    library: &'static Library,
    member: Member,
    fd: BorrowedFd,
    path: &Path,
) -> Result<Service, Refusal> {
    if member.mode() == Mode::Gated && !gate::stands(fd) {
        member.leave();
        return Err(Refusal::unopened(
            "the broker's lock on it is not seen from here (an overlay's upper directory, another kernel, a \
             second mount): two worlds would write one file",
        ));
    }
    let inherited = fstat(fd).is_ok_and(|st| super::open::inherited_guest((st.st_dev, st.st_ino)));
    if member.mode() == Mode::Guest && inherited {
        member.leave();
        return Err(Refusal::unopened(
            "a connection to it was inherited over a fork and is still open, in guest mode: SQLite would take its \
             parent's locks for its own; close the inherited connection first",
        ));
    }
    if member.mode() == Mode::Guest {
        let text = format!(
            "{}: guest mode, because plain clients hold the file or it was asked for: locks are SQLite's own",
            path.display()
        );
        library.log(ffi::SQLITE_NOTICE, &text);
    }
    Ok(Service::Seat(member))
}
