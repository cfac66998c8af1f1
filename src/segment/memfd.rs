//! Sealed memfds: sized once, then neither shrunk nor grown, so nobody can raise SIGBUS in anybody.

use crate::planted::planted;
use memmap2::MmapOptions;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{ftruncate, geteuid};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// asm-generic/mman-common.h; not every C library has it.
const MADV_POPULATE_WRITE: i32 = 23;

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
    is_sealed(&fd) && fstat(&fd).is_ok_and(|st| st.st_size == size as i64)
}

/// And made by a broker of this user, of ordinary pages: what a broker checks before it maps what a client has sent. A
/// client's own could be of huge pages (`MFD_HUGETLB`). Whoever touches one of those that is not there is killed by
/// SIGBUS when the system has none left.
pub fn is_own(fd: impl AsFd, size: usize) -> bool {
    // A memfd answers both by itself.
    let own = || fstat(&fd).is_ok_and(|st| st.st_uid == geteuid().as_raw());
    let plain = || fstatfs(&fd).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
    is_sealed_to(&fd, size) && (own() && plain() || planted("anybodys-segment"))
}

/// Allocates the pages of `[offset, offset + len)`, so that touching them cannot fail later for want of memory. `offset`: at a
/// page's beginning.
///
/// By touching them, not by fallocate(2): that waits for the inode's lock, and a member that writes into the memfd from a
/// buffer whose page is on a filesystem of its own (FUSE) holds that lock until its filesystem has answered.
pub fn allocate(fd: impl AsFd, offset: usize, len: usize) -> nix::Result<()> {
    let error = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::ENOMEM));
    let map =
        MmapOptions::new().offset(offset as u64).len(len).map_raw(fd.as_fd().as_raw_fd()).map_err(error)?;
    // SAFETY: the range is this mapping's. Its pages are made present, and keep what they hold.
    let rc = unsafe { libc::madvise(map.as_mut_ptr().cast(), len, MADV_POPULATE_WRITE) };
    match Errno::result(rc) {
        // Linux before 5.14.
        Err(Errno::EINVAL) => {}
        done if !planted("pages-by-fallocate") => return done.map(drop),
        _ => {}
    }
    fallocate(fd.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, offset as i64, len as i64)
}

/// A read-only descriptor of the same memfd, for a client that may not write.
pub fn reopen_read_only(fd: impl AsFd) -> std::io::Result<OwnedFd> {
    // Our own memfd through our own /proc: this uses no right that the broker has on a client's file.
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(std::fs::File::open(path)?.into())
}
