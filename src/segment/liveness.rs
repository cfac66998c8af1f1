//! A session's liveness byte: the first of a memfd of its own, which its process has locked as long as it lives.

use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::AsFd;

/// The pid that holds the liveness byte; `None`: it is free.
pub fn owner(memfd: impl AsFd) -> Option<i32> {
    // SAFETY: libc::flock is plain data for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_len = 1;
    match fcntl(&memfd, FcntlArg::F_GETLK(&mut lock)) {
        Ok(_) if i32::from(lock.l_type) == libc::F_UNLCK => None,
        Ok(_) => Some(lock.l_pid),
        // Cannot be asked: not proven free.
        Err(_) => Some(0),
    }
}
