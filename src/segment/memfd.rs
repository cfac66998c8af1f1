//! Sealed memfds: sized once, then neither shrunk nor grown, so nobody can raise SIGBUS in anybody.

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

/// A memfd of `size` zero bytes, sparse, mode 0600, close-on-exec, sealed.
pub fn create(name: &CStr, size: usize) -> nix::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::sys::stat::fchmod(&fd, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    ftruncate(&fd, size as i64)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals()))?;
    Ok(fd)
}

/// True if `fd` is a memfd with all three seals.
pub fn is_sealed(fd: impl AsFd) -> bool {
    // Only a memfd answers F_GET_SEALS; no other file is asked anything.
    fcntl(&fd, FcntlArg::F_GET_SEALS).is_ok_and(|bits| SealFlag::from_bits_truncate(bits).contains(seals()))
}

/// And of this size: what a member checks before it maps what it was sent.
pub fn is_sealed_to(fd: impl AsFd, size: usize) -> bool {
    is_sealed(&fd) && nix::sys::stat::fstat(&fd).is_ok_and(|st| st.st_size == size as i64)
}

/// Allocates the pages of `[offset, offset + len)`, so that touching them cannot fail later for want of memory.
pub fn allocate(fd: impl AsFd, offset: usize, len: usize) -> nix::Result<()> {
    fallocate(fd.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, offset as i64, len as i64)
}

/// A read-only descriptor of the same memfd, for a client that may not write.
pub fn reopen_read_only(fd: impl AsFd) -> std::io::Result<OwnedFd> {
    // Our own memfd through our own /proc: this uses no right that the broker has on a client's file.
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(std::fs::File::open(path)?.into())
}
