//! Descriptors inside a process that is not ours.

use super::fork;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// A descriptor that the host may have closed, and whose number may since have become something else: its inode
/// is compared before every use and before closing.
#[derive(Debug)]
pub struct HostFd {
    raw: RawFd,
    device: u64,
    inode: u64,
    /// Where the description is positioned, if its inode does not tell it from another of the same file.
    position: Option<i64>,
    /// A forked child's copy is closed by the fork handler, and never by the inherited value.
    epoch: u64,
}

impl HostFd {
    pub fn new(fd: OwnedFd) -> io::Result<HostFd> {
        let st = fstat(&fd)?;
        let raw = fd.into_raw_fd();
        fork::remember_descriptor(raw);
        Ok(HostFd { raw, device: st.st_dev, inode: st.st_ino, position: None, epoch: fork::epoch() })
    }

    /// A descriptor of a file that the host may open itself, on the same number: told apart by a position that
    /// nobody seeks to (SQLite reads and writes at offsets of its own and never moves it).
    pub fn of_shared_file(fd: OwnedFd) -> io::Result<HostFd> {
        const MARK: i64 = 0x7475_726e;
        let position = lseek(&fd, MARK, Whence::SeekSet)?;
        let mut own = HostFd::new(fd)?;
        own.position = Some(position);
        Ok(own)
    }

    /// The descriptor, if it is still the one we made.
    pub fn get(&self) -> Option<BorrowedFd<'_>> {
        if self.epoch != fork::epoch() {
            return None;
        }
        // SAFETY: only borrowed for the fstat that finds out whether it is still ours; a closed number is an
        // error (EBADF) there, not undefined behaviour.
        let fd = unsafe { BorrowedFd::borrow_raw(self.raw) };
        let st = fstat(fd).ok()?;
        let there = || lseek(fd, 0, Whence::SeekCur).ok();
        let ours = st.st_dev == self.device && st.st_ino == self.inode;
        (ours && (self.position.is_none() || self.position == there())).then_some(fd)
    }

    /// Closes it if it is still ours.
    fn close(&mut self) {
        let ours = self.get().is_some() || crate::planted::planted("close-unchecked");
        if self.epoch == fork::epoch() {
            fork::forget_descriptor(self.raw);
        }
        if ours && self.raw >= 0 {
            // SAFETY: checked to be the descriptor that we own; owned by nobody else.
            drop(unsafe { OwnedFd::from_raw_fd(self.raw) });
        }
        self.raw = -1;
    }
}

impl Drop for HostFd {
    fn drop(&mut self) {
        self.close();
    }
}

/// While it lives, descriptors 0 to 2 are occupied, so that nothing we open or receive lands there: a host that
/// closed its standard error would write its warnings over the database.
#[derive(Debug)]
pub struct LowDescriptors {
    _fillers: Vec<OwnedFd>,
}

impl LowDescriptors {
    pub fn occupy() -> io::Result<LowDescriptors> {
        let mut fillers = Vec::new();
        if crate::planted::planted("low-descriptors-free") {
            return Ok(LowDescriptors { _fillers: fillers });
        }
        // SAFETY: F_GETFD on any number has no effect.
        while (0..=2).any(|fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1) {
            let fd: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into();
            if fd.as_raw_fd() > 2 {
                break;
            }
            fillers.push(fd);
        }
        Ok(LowDescriptors { _fillers: fillers })
    }
}
