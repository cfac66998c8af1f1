//! statx(2) without the C library: musl has the function since 1.2.5 alone, and whoever is preloaded with a name that is
//! not there stops the program.

use std::ffi::CStr;
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;

/// `None`: it failed. What was not known is not set in `stx_mask`.
pub fn statx(directory: RawFd, path: &CStr, flags: i32, mask: u32) -> Option<libc::statx> {
    // SAFETY: statx is plain data for which all-zero is valid.
    let mut found: libc::statx = unsafe { zeroed() };
    // SAFETY: the path ends with NUL, and the kernel writes one statx; any numbers are valid arguments.
    let rc = unsafe { libc::syscall(libc::SYS_statx, directory, path.as_ptr(), flags, mask, &raw mut found) };
    const { assert!(size_of::<libc::statx>() == 256) }; // as the kernel has it
    (rc == 0).then_some(found)
}
