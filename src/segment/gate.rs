//! The gate: kernel locks that keep plain SQLite clients out while members use the segment.
//!
//! An open-file-description (OFD) write lock over SQLite's lock bytes of the database, and over the lock bytes
//! of `-shm` where one exists. The kernel keeps it until the last holder of the description is gone.

use super::hold::Hold;
use crate::planted::planted;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `PENDING_BYTE` (os.h); RESERVED is the byte after it, the SHARED range the 510 bytes after that.
const DATABASE_BYTES: (i64, i64) = (0x4000_0000, 512);
/// `UNIX_SHM_BASE` (os_unix.c): eight lock slots and the dead-man switch.
const SHM_BYTES: (i64, i64) = (120, 9);

/// Who stands in the way of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// A plain SQLite client (a POSIX lock), with its pid as far as this pid namespace can see it.
    Plain(i32),
    /// An OFD lock: another broker's gate, or that of members whose broker is gone.
    OtherGate,
}

#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error("the file is in use")]
    Conflict(Conflict),
    #[error("the file cannot be locked: {0}")]
    Unlockable(Errno),
    #[error("the gate cannot be held: {0}")]
    Unholdable(Errno),
}

/// Whether the file is open anywhere but through this description, which is open for reading and writing. `None`: the
/// kernel does not say. By a lease, which is only given for a file that nobody else has open (fcntl(2)); it is given back at
/// once, but who opens the file meanwhile makes the kernel send SIGIO, which the caller must ignore.
pub fn is_open_elsewhere(fd: impl AsFd) -> Option<bool> {
    let lease = |kind: i32| {
        // SAFETY: a call by numbers, on a descriptor that is borrowed for it.
        Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) })
    };
    match lease(libc::F_WRLCK) {
        Ok(_) => lease(libc::F_UNLCK).ok().map(|_| false),
        Err(Errno::EAGAIN) => Some(true),
        Err(_) => None,
    }
}

/// A gate that stands.
#[derive(Debug)]
pub struct Gate {
    database: OwnedFd,
    shm: Option<OwnedFd>,
    hold: Hold,
}

fn flock(kind: i32, (start, len): (i64, i64)) -> libc::flock {
    // SAFETY: libc::flock is plain data for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

fn take(fd: impl AsFd, bytes: (i64, i64)) -> Result<(), GateError> {
    match fcntl(&fd, FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK, bytes))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            let mut seen = flock(libc::F_WRLCK, bytes);
            fcntl(&fd, FcntlArg::F_OFD_GETLK(&mut seen)).map_err(GateError::Unlockable)?;
            Err(GateError::Conflict(match seen.l_pid {
                -1 if i32::from(seen.l_type) != libc::F_UNLCK && !planted("other-gate-is-plain") => {
                    Conflict::OtherGate
                }
                pid => Conflict::Plain(pid),
            }))
        }
        Err(e) => Err(GateError::Unlockable(e)),
    }
}

fn drop_lock(fd: impl AsFd, bytes: (i64, i64)) {
    // Unlocking a range of an open file does not fail (fcntl(2)); if it did, closing would still release it.
    let _ = fcntl(&fd, FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK, bytes)));
}

/// Takes the gate on the description of `database` (and of `shm`), without waiting. On failure nothing is
/// locked and the descriptors come back. `nonce`: of the segment that it is for.
pub fn close(
    database: OwnedFd,
    shm: Option<OwnedFd>,
    nonce: u64,
) -> Result<Gate, (GateError, OwnedFd, Option<OwnedFd>)> {
    if let Err(e) = take(&database, DATABASE_BYTES) {
        return Err((e, database, shm));
    }
    if let Some(fd) = &shm
        && !planted("no-shm-gate")
        && let Err(e) = take(fd, SHM_BYTES)
    {
        drop_lock(&database, DATABASE_BYTES);
        return Err((e, database, shm));
    }
    match Hold::new(&database, nonce) {
        Ok(hold) => Ok(Gate { database, shm, hold }),
        Err(e) => {
            shm.iter().for_each(|fd| drop_lock(fd, SHM_BYTES));
            drop_lock(&database, DATABASE_BYTES);
            Err((GateError::Unholdable(e), database, shm))
        }
    }
}

impl Gate {
    /// A gate that another process has closed, if it stands and `database` carries it.
    pub fn adopt(database: OwnedFd, shm: Option<OwnedFd>, hold: Hold) -> Option<Gate> {
        is_held_by(&database).then_some(Gate { database, shm, hold })
    }

    /// The database's descriptor that carries the lock.
    pub fn database(&self) -> &OwnedFd {
        &self.database
    }

    /// That of `-shm`, where there was one.
    pub fn shm(&self) -> Option<&OwnedFd> {
        self.shm.as_ref()
    }

    /// What holds the gate, to be passed on to members.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }

    /// Unlocks explicitly: a forked child, or a process whose seats rest, may still hold the description.
    pub fn open(self) {
        if let Some(shm) = &self.shm {
            drop_lock(shm, SHM_BYTES);
        }
        drop_lock(&self.database, DATABASE_BYTES);
        drop(super::hold::take_out(self.hold.descriptor()));
    }

    pub fn stands(&self) -> bool {
        stands(&self.database)
    }
}

/// Whether an OFD lock of somebody stands on the database's lock bytes, seen through `fd`.
///
/// Asked as a process-associated lock, which conflicts with an OFD lock even on the same description. Asked of the kernel
/// itself: under `turnstile run` the C library's `fcntl` is ours, and asks who holds what we hold while we ask.
pub fn stands(fd: impl AsFd) -> bool {
    let mut seen = flock(libc::F_WRLCK, DATABASE_BYTES);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is borrowed for the call, the lock is ours.
    let done = unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_GETLK, &raw mut seen) };
    done == 0 && i32::from(seen.l_type) != libc::F_UNLCK && seen.l_pid == -1
}

/// The pid of a process with a lock of SQLite's on the database, seen through `fd`; 0 if it is of another pid namespace.
pub fn plain_holder(fd: impl AsFd) -> Option<i32> {
    let mut seen = flock(libc::F_WRLCK, DATABASE_BYTES);
    fcntl(&fd, FcntlArg::F_GETLK(&mut seen)).ok()?;
    (i32::from(seen.l_type) != libc::F_UNLCK && seen.l_pid != -1).then_some(seen.l_pid)
}

/// Whether `fd` is the description that carries the gate: an OFD lock stands there, and does not stand in the way
/// of `fd`'s own.
pub fn is_held_by(fd: impl AsFd) -> bool {
    let mut seen = flock(libc::F_WRLCK, DATABASE_BYTES);
    let own = fcntl(&fd, FcntlArg::F_OFD_GETLK(&mut seen)).is_ok() && i32::from(seen.l_type) == libc::F_UNLCK;
    own && stands(fd)
}
