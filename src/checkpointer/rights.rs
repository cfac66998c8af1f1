//! A thread that writes to a client's file has no rights but its descriptors'.
//!
//! A broker of root's would otherwise write to a user's file as root: past the user's quota (`CAP_SYS_RESOURCE`), into the
//! blocks that a filesystem keeps for root (`CAP_SYS_RESOURCE`, or root's uid: ext4_has_free_clusters), and without
//! taking away the file's set-uid bit as a write by anybody else does (`CAP_FSETID`: setattr_should_drop_suidgid). What it
//! may not do then the database's members do themselves.

use nix::errno::Errno;
use turnstile::planted::planted;

/// Whom the kernel's filesystems take it for: nobody who owns anything (`fs.overflowuid`).
const NOBODY: libc::uid_t = 65534;

/// Of this thread alone: the one that is sent the descriptors opens the broker's own memfds anew.
///
/// The process remains its user's (setfsuid(2)): nobody else's process may signal or trace it.
pub fn give_up() -> nix::Result<()> {
    if planted("checkpointer-keeps-rights") {
        return Ok(());
    }
    if nix::unistd::geteuid().is_root() {
        // SAFETY: system calls that take numbers. In a user namespace that does not know these ids they change nothing; a
        // root of such a namespace has no such rights outside.
        unsafe {
            libc::syscall(libc::SYS_setgroups, 0, 0);
            libc::syscall(libc::SYS_setfsgid, NOBODY);
            libc::syscall(libc::SYS_setfsuid, NOBODY);
        }
    }
    /// linux/capability.h
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    // Effective, permitted and inheritable, twice 32 of each.
    let none = [0u32; 6];
    // SAFETY: reads a header and as much data as its version says.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) }).map(drop)
}
