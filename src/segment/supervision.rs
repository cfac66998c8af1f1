//! Who looks after a segment: one broker, and one checkpointer.
//!
//! Each holds an open-file-description lock on a byte of the control memfd, by a description of its own that it never
//! passes on. The kernel frees it once no thread of its process runs user code any more: a byte that is free proves that
//! whoever had the office is gone, however it ended.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Office {
    Broker = 0,
    Checkpointer = 1,
}

/// An office, held as long as this lives.
#[derive(Debug)]
pub struct Held {
    _description: OwnedFd,
}

fn byte(office: Office) -> libc::flock {
    // SAFETY: libc::flock is plain data for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = office as i64;
    lock.l_len = 1;
    lock
}

/// Takes an office; `None`: somebody has it.
pub fn take(control: impl AsFd, office: Office) -> io::Result<Option<Held>> {
    // Our own memfd through our own /proc: a new description, which nobody else has.
    let path = format!("/proc/self/fd/{}", control.as_fd().as_raw_fd());
    let description: OwnedFd = OpenOptions::new().read(true).write(true).open(path)?.into();
    match fcntl(&description, FcntlArg::F_OFD_SETLK(&byte(office))) {
        Ok(_) => Ok(Some(Held { _description: description })),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Somebody has the office.
pub fn is_held(control: impl AsFd, office: Office) -> bool {
    let mut seen = byte(office);
    match fcntl(&control, FcntlArg::F_OFD_GETLK(&mut seen)) {
        Ok(_) => i32::from(seen.l_type) != libc::F_UNLCK,
        // Cannot be asked: not proven free.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::memfd;

    #[test]
    fn an_office_is_held_by_one_and_ends_with_it() {
        let control = memfd::create(c"control", 4096).unwrap();
        let broker = take(&control, Office::Broker).unwrap();
        assert!(broker.is_some() && is_held(&control, Office::Broker));
        assert!(take(&control, Office::Broker).unwrap().is_none());
        assert!(!is_held(&control, Office::Checkpointer));
        // What is passed on to members is another description.
        drop(control.try_clone().unwrap());
        assert!(is_held(&control, Office::Broker));
        drop(broker);
        assert!(!is_held(&control, Office::Broker));
        assert!(take(&control, Office::Broker).unwrap().is_some());
    }
}
