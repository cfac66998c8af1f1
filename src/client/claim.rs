//! From an open database file to a seat: what is sent along, the second descriptors that this takes, and the look at
//! the gate afterwards.

use super::JoinError;
use super::companions;
use super::config::Config;
use super::fork::PerProcess;
use super::host::{HostFd, LowDescriptors};
use super::joining::Joins;
use super::member::Member;
use super::resting::{self, Home};
use crate::planted::planted;
use crate::segment::gate;
use crate::wire::message::{self, Join, Mode};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode as Bits, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

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

fn read_only(fd: BorrowedFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL).is_ok_and(|bits| bits & libc::O_ACCMODE == libc::O_RDONLY)
}

/// A seat for the database behind `fd`, which the SQLite library `which` (any number that tells those of a process
/// apart) of this version has open at `path`. Gated, the gate has been seen through `fd`.
pub fn take_seat(
    config: &Config,
    which: u64,
    sqlite_version: String,
    fd: BorrowedFd,
    path: &Path,
) -> Result<Member, JoinError> {
    if let Some(member) = resume(config, which, fd, path) {
        return Ok(member);
    }
    let low = LowDescriptors::occupy()?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(directory, flags, Bits::empty()).map_err(std::io::Error::from)?;
    // A read-only connection of a process that may write joins as a writer, so that readers that start first
    // do not force guest mode.
    let own = if read_only(fd) { second_descriptor(path, &KEPT) } else { None };
    let shm_path = companions::beside(path, "-shm");
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
            sqlite_version,
            library: which,
        },
    };
    let mut result = Member::join(config, &claim);
    for _ in 0..SHM_TRIES {
        let Some(shm) = claim.shm.take_if(|shm| bad_descriptor(&result) && replaced(shm, &shm_path)) else {
            break;
        };
        keep_shm(shm);
        let _low = LowDescriptors::occupy()?;
        claim.shm = second_descriptor(&shm_path, &KEPT_SHM);
        result = Member::join(config, &claim);
    }
    let Joins { shm, directory, join, .. } = claim;
    let gated = matches!(&result, Ok(m) if m.mode() == Mode::Gated);
    if let Some(shm) = shm.as_ref().filter(|_| gated) {
        remove_left_behind(shm, &shm_path, &directory);
    }
    // Gated: nobody in this process holds POSIX locks on these files, the gate would not stand. Else keep them.
    if let Some(shm) = shm.filter(|_| !gated) {
        keep_shm(shm);
    }
    let mut member = match result {
        Ok(member) => member,
        Err(e) => {
            if let Some(own) = own {
                keep(own, &KEPT);
            }
            return Err(e);
        }
    };
    if let (None, true, Some(name)) = (&own, gated, &join.name) {
        member.rests_at(Home::new(config, which, fd, directory, name));
    }
    match (own, gated) {
        (Some(own), true) => member.keep(HostFd::of_shared_file(own)?),
        (Some(own), false) => keep(own, &KEPT),
        (None, _) => {}
    }
    // Both sides must stand on one kernel and one file.
    if gated && !gate::stands(fd) {
        member.leave();
        return Err(JoinError::Unseen);
    }
    Ok(member)
}

/// Removes the `-shm` file that a plain client has left when it was killed. The gate holds it, so no plain client uses it, and
/// no member does. If it kept its name, the gate would hold it for the next database of that name, too: one that is made
/// while this one, deleted by then, is still open.
fn remove_left_behind(shm: &OwnedFd, path: &Path, directory: &OwnedFd) {
    if !gate::stands_on_shm(shm) || replaced(shm, path) || planted("shm-keeps-its-name") {
        return;
    }
    if let Some(name) = path.file_name() {
        // Not allowed, or gone by now: it is held by the gate as it stands.
        let _ = unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
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
