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
/// The first and the last of them, as `/proc` names them.
pub const FIRST_BYTE: u64 = DATABASE_BYTES.0 as u64;
pub const LAST_BYTE: u64 = FIRST_BYTE + DATABASE_BYTES.1 as u64 - 1;
/// `UNIX_SHM_BASE` (os_unix.c): eight lock slots and the dead-man switch.
const SHM_BYTES: (i64, i64) = (120, 9);

/// Who stands in the way of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// A plain SQLite client, or anybody else with a lock that is no gate: with its pid as far as this pid namespace can
    /// see it, -1 of an open file description's.
    Plain(i32),
    /// Another broker's gate, or that of members whose broker is gone.
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

/// A lock that was seen in the way is a gate: an open file description's write lock on all of the bytes. It leaves room for no
/// other lock, so what the kernel names first is all there is. A read lock anybody may have who can open the file for
/// reading: it is a plain client's.
fn is_gate(seen: &libc::flock, (start, len): (i64, i64)) -> bool {
    if planted("any-lock-is-a-gate") {
        return i32::from(seen.l_type) != libc::F_UNLCK && seen.l_pid == -1;
    }
    let all = seen.l_start <= start && (seen.l_len == 0 || seen.l_start + seen.l_len >= start + len);
    i32::from(seen.l_type) == libc::F_WRLCK && seen.l_pid == -1 && all
}

fn take(fd: impl AsFd, bytes: (i64, i64)) -> Result<(), GateError> {
    match fcntl(&fd, FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK, bytes))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            let mut seen = flock(libc::F_WRLCK, bytes);
            fcntl(&fd, FcntlArg::F_OFD_GETLK(&mut seen)).map_err(GateError::Unlockable)?;
            Err(GateError::Conflict(match is_gate(&seen, bytes) && !planted("other-gate-is-plain") {
                true => Conflict::OtherGate,
                false => Conflict::Plain(seen.l_pid),
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
/// locked and the descriptors come back. `nonce`: of the segment that it is for. The gate is closed without `shm` where
/// the gate of a database that has been deleted or replaced holds that file.
pub fn close(
    database: OwnedFd,
    shm: Option<OwnedFd>,
    nonce: u64,
) -> Result<Gate, (GateError, OwnedFd, Option<OwnedFd>)> {
    if let Err(e) = take(&database, DATABASE_BYTES) {
        return Err((e, database, shm));
    }
    let mut shm = shm;
    match shm.as_ref().filter(|_| !planted("no-shm-gate")).map(|fd| take(fd, SHM_BYTES)) {
        None | Some(Ok(())) => {}
        // Whoever closes a gate locks the database first. So this gate is another database's, which had this name and was
        // deleted or replaced. It keeps plain clients from `-shm` as well as ours would.
        Some(Err(GateError::Conflict(Conflict::OtherGate))) if !planted("shm-of-the-deleted") => shm = None,
        Some(Err(e)) => {
            drop_lock(&database, DATABASE_BYTES);
            return Err((e, database, shm));
        }
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

/// Whether a gate stands on the database, seen through `fd`.
///
/// Asked as a process-associated lock, which conflicts with an OFD lock even on the same description. Asked of the kernel
/// itself: under `turnstile run` the C library's `fcntl` is ours, and asks who holds what we hold while we ask.
pub fn stands(fd: impl AsFd) -> bool {
    stands_on(fd, DATABASE_BYTES)
}

/// The same of a `-shm` file: no plain client has it in use.
pub fn stands_on_shm(fd: impl AsFd) -> bool {
    stands_on(fd, SHM_BYTES)
}

fn stands_on(fd: impl AsFd, bytes: (i64, i64)) -> bool {
    let mut seen = flock(libc::F_WRLCK, bytes);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is borrowed for the call, the lock is ours.
    let done = unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_GETLK, &raw mut seen) };
    done == 0 && is_gate(&seen, bytes)
}

/// The pid of a process with a lock on the database that is no gate, seen through `fd`; 0 if it is of another pid namespace,
/// -1 of an open file description's lock.
pub fn plain_holder(fd: impl AsFd) -> Option<i32> {
    let mut seen = flock(libc::F_WRLCK, DATABASE_BYTES);
    fcntl(&fd, FcntlArg::F_GETLK(&mut seen)).ok()?;
    (i32::from(seen.l_type) != libc::F_UNLCK && !is_gate(&seen, DATABASE_BYTES)).then_some(seen.l_pid)
}

/// Whether `fd` is the description that carries the gate: an OFD lock stands there, and does not stand in the way
/// of `fd`'s own.
pub fn is_held_by(fd: impl AsFd) -> bool {
    let mut seen = flock(libc::F_WRLCK, DATABASE_BYTES);
    let own = fcntl(&fd, FcntlArg::F_OFD_GETLK(&mut seen)).is_ok() && i32::from(seen.l_type) == libc::F_UNLCK;
    own && stands(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planted::fails_without;

    fn file() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    fn lock(fd: impl AsFd, kind: i32, bytes: (i64, i64)) {
        fcntl(fd, FcntlArg::F_OFD_SETLK(&flock(kind, bytes))).unwrap();
    }

    #[test]
    fn a_lock_that_does_not_shut_everybody_out_is_no_gate() {
        fails_without("any-lock-is-a-gate", || {
            let part = (DATABASE_BYTES.0 + 7, 1);
            for (kind, bytes) in [
                (libc::F_RDLCK, part),
                (libc::F_RDLCK, DATABASE_BYTES),
                (libc::F_RDLCK, (0, 0)),
                (libc::F_WRLCK, part),
            ] {
                let file = tempfile::NamedTempFile::new().unwrap();
                let stranger = file.reopen().unwrap();
                lock(&stranger, kind, bytes);
                let own: OwnedFd = file.reopen().unwrap().into();
                assert!(!stands(&own) && !is_held_by(&own) && !is_held_by(&stranger), "{kind} {bytes:?}");
                assert_eq!(plain_holder(&own), Some(-1));
                let closed = close(own, None, 7).map_err(|(e, ..)| e);
                assert!(matches!(closed, Err(GateError::Conflict(Conflict::Plain(-1)))), "{closed:?}");
            }
        });
    }

    #[test]
    fn the_gate_of_a_deleted_database_does_not_keep_its_names_next_one_open() {
        fails_without("shm-of-the-deleted", || {
            let (old, new, shm) = (file(), file(), file());
            let reopened = |f: &tempfile::NamedTempFile| OwnedFd::from(f.reopen().unwrap());
            let before = close(reopened(&old), Some(reopened(&shm)), 7).map_err(|(e, ..)| e).unwrap();
            let after = close(reopened(&new), Some(reopened(&shm)), 8).map_err(|(e, ..)| e).unwrap();
            assert!(stands(&new) && stands_on_shm(&shm) && after.shm().is_none());
            // Neither gate's end opens the other's.
            after.open();
            assert!(!stands(&new) && stands(&old) && stands_on_shm(&shm));
            before.open();
            assert!(!stands(&old) && !stands_on_shm(&shm));
        });
    }

    #[test]
    fn a_gate_is_one_to_who_has_it_and_to_others() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let gate = close(file.reopen().unwrap().into(), None, 7).map_err(|(e, ..)| e).unwrap();
        let other: OwnedFd = file.reopen().unwrap().into();
        assert!(stands(&other) && !is_held_by(&other) && is_held_by(gate.database()));
        assert_eq!(plain_holder(&other), None);
        let closed = close(other, None, 7).map_err(|(e, ..)| e);
        assert!(matches!(closed, Err(GateError::Conflict(Conflict::OtherGate))), "{closed:?}");
    }
}
