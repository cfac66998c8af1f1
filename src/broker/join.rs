//! Judging what a client sends to join with. Descriptors are the proof of access; nothing said is believed.

use super::database::{Home, Identity};
use super::filesystem::mount_of;
use crate::planted::planted;
use crate::segment::statx::statx;
use crate::wire::keeper::KeptHome;
use crate::wire::message::{Join, Refusal, Role};
use crate::wire::receiver::Judged;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};

/// A refusal and its sentence for people.
pub type Refused = (Refusal, String);

/// A join whose descriptors passed.
#[derive(Debug)]
pub struct Candidate {
    pub identity: Identity,
    pub role: Role,
    pub home: Home,
    pub database: OwnedFd,
    pub shm: Option<OwnedFd>,
    /// There is a `-shm` that the client could not open for writing, so its locks cannot be looked at.
    pub shm_unseen: bool,
}

impl Candidate {
    /// As a receiver passes it on.
    pub fn told(self) -> (Judged, Vec<OwnedFd>) {
        let Home { directory, name } = self.home;
        let judged = Judged {
            device: self.identity.device,
            inode: self.identity.inode,
            role: self.role,
            home: KeptHome { device: directory.device, inode: directory.inode, name },
            shm: self.shm.is_some(),
            shm_unseen: self.shm_unseen,
        };
        (judged, [Some(self.database), self.shm].into_iter().flatten().collect())
    }

    /// As a receiver has judged it.
    pub fn of(judged: Judged, fds: Vec<OwnedFd>) -> Result<Candidate, Refused> {
        let mut fds = fds.into_iter();
        let lost = || (Refusal::Exhausted, "not all of its descriptors arrived".to_owned());
        let database = fds.next().ok_or_else(lost)?;
        let shm = if judged.shm { Some(fds.next().ok_or_else(lost)?) } else { None };
        let KeptHome { device, inode, name } = judged.home;
        Ok(Candidate {
            identity: Identity { device: judged.device, inode: judged.inode },
            role: judged.role,
            home: Home { directory: Identity { device, inode }, name },
            database,
            shm,
            shm_unseen: judged.shm_unseen,
        })
    }
}

fn identity(st: &FileStat) -> Identity {
    Identity { device: st.st_dev, inode: st.st_ino }
}

fn refuse<T>(why: Refusal, reason: impl Into<String>) -> Result<T, Refused> {
    Err((why, reason.into()))
}

/// Judges the descriptors of a join. `lenient`: unsafe filesystems were explicitly allowed.
pub fn judge(join: &Join, fds: Vec<OwnedFd>, peer_pid: i32, lenient: bool) -> Result<Candidate, Refused> {
    use Refusal::{BadDescriptor, UnsafePlace};
    let mut fds = fds.into_iter();
    let (Some(database), Some(directory)) = (fds.next(), fds.next()) else {
        return refuse(BadDescriptor, "a join needs the database's descriptor and its directory's");
    };
    let shm = fds.next().filter(|_| join.has_shm);

    // The filesystem first: a file on a hostile one must not be touched.
    let mut mounts = Vec::new();
    for fd in [Some(&database), Some(&directory), shm.as_ref()].into_iter().flatten() {
        match mount_of(fd, peer_pid, &mounts) {
            Some(mount) if mount.is_local() || lenient || planted("any-filesystem") => mounts.push(mount),
            Some(mount) => return refuse(UnsafePlace, mount.reason()),
            None => return refuse(UnsafePlace, "the broker cannot tell which filesystem it is on"),
        }
    }

    let role = role_of(&database)?;
    let stat = fstat(&database).map_err(|e| (BadDescriptor, format!("fstat: {e}")))?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return refuse(BadDescriptor, "it is not a regular file");
    }
    let home = home_of(join, &stat, &directory, mounts[0].id, mounts[1].id)?;
    let shm_name = [&home.name[..], b"-shm"].concat();
    let there = beside(&directory, &shm_name);
    let shm = match (shm, &there) {
        (Some(fd), There::File(there)) => {
            let st = fstat(&fd).map_err(|e| (BadDescriptor, format!("fstat: {e}")))?;
            if identity(&st) != identity(there) || role_of(&fd)? != Role::ReadWrite {
                return refuse(BadDescriptor, "the -shm descriptor is not this database's -shm file");
            }
            Some(fd)
        }
        // None was sent, or a plain client's last close has just removed it.
        _ => None,
    };
    let shm_unseen = shm.is_none() && !matches!(there, There::Nothing);
    Ok(Candidate { identity: identity(&stat), role, home, database, shm, shm_unseen })
}

/// Read-write or read-only by the descriptor's own open mode. Descriptors that prove no access, or that SQLite
/// would never use, are refused: an `O_PATH` descriptor reads as read-only and anyone can get one.
fn role_of(fd: &OwnedFd) -> Result<Role, Refused> {
    let bits = fcntl(fd, FcntlArg::F_GETFL).map_err(|e| (Refusal::BadDescriptor, format!("fcntl: {e}")))?;
    let flags = OFlag::from_bits_retain(bits);
    let odd = OFlag::O_APPEND | OFlag::O_DIRECT;
    let path_only = flags.contains(OFlag::O_PATH) && !planted("o-path-is-access");
    match bits & libc::O_ACCMODE {
        _ if path_only => refuse(Refusal::BadDescriptor, "an O_PATH descriptor proves no access to the file"),
        _ if flags.intersects(odd) => refuse(Refusal::BadDescriptor, "opened with O_APPEND or O_DIRECT"),
        libc::O_RDWR => Ok(Role::ReadWrite),
        libc::O_RDONLY => Ok(Role::ReadOnly),
        _ => refuse(Refusal::BadDescriptor, "opened write-only"),
    }
}

/// The directory and name are believed only if the name, in that directory, is this very file, on the same
/// mount, without following a link: `-wal` and `-journal` will be looked for beside it.
fn home_of(
    join: &Join,
    file: &FileStat,
    directory: &OwnedFd,
    file_mount: u64,
    directory_mount: u64,
) -> Result<Home, Refused> {
    let plain =
        |n: &Vec<u8>| !n.is_empty() && !n.contains(&b'/') && !n.contains(&0) && n != b"." && n != b"..";
    let Some(name) = join.name.clone().filter(plain) else {
        return refuse(Refusal::BadDescriptor, "the file's name is missing or not a plain name");
    };
    let dir =
        fstat(directory).map_err(|e| (Refusal::BadDescriptor, format!("fstat of the directory: {e}")))?;
    let there = beside(directory, &name);
    let mounted_over = matches!(there, There::AnotherMount);
    if (mounted_over || file_mount != directory_mount) && !planted("file-mounts-unseen") {
        return refuse(
            Refusal::UnsafePlace,
            "it is a bind mount of a single file: its -wal would be made beside the mount point and others would \
             not find it; mount the directory instead",
        );
    }
    if !matches!(&there, There::File(there) if identity(there) == identity(file)) {
        let name = super::session::printable_name(&name);
        let reason = format!(
            "'{name}' in the directory it was opened from is not this file (moved, replaced or a link)"
        );
        return refuse(Refusal::UnsafePlace, reason);
    }
    Ok(Home { directory: identity(&dir), name })
}

/// What a name in a directory leads to.
enum There {
    Nothing,
    File(FileStat),
    /// Something is mounted over it, which is not asked anything: it may be a filesystem that never answers.
    AnotherMount,
}

/// Without following a link. (The directory itself can be kept locked, by who reads it into a page that never comes. What is
/// in the kernel's cache, as a file that has just been opened is, is found all the same.)
fn beside(directory: &OwnedFd, name: &[u8]) -> There {
    let Ok(name) = CString::new(name) else { return There::Nothing };
    let follows = planted("claim-follows-links");
    let no_link = if follows { OFlag::empty() } else { OFlag::O_NOFOLLOW };
    let crosses = follows || planted("file-mounts-unseen");
    let no_mount = if crosses { ResolveFlag::empty() } else { ResolveFlag::RESOLVE_NO_XDEV };
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | no_link).resolve(no_mount);
    match openat2(directory, name.as_c_str(), how) {
        Ok(file) => fstat(&file).map_or(There::Nothing, There::File),
        Err(Errno::EXDEV) => There::AnotherMount,
        // A sandbox that does not know the call.
        Err(Errno::ENOSYS | Errno::EPERM) => beside_by_name(directory, &name),
        Err(_) => There::Nothing,
    }
}

fn beside_by_name(directory: &OwnedFd, name: &CStr) -> There {
    // STATX_MNT_ID differs from the directory's when a file is mounted over the name.
    let mount = |name: &CStr, flags: i32| {
        let flags = flags | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
        let stx = statx(directory.as_raw_fd(), name, flags, libc::STATX_MNT_ID)?;
        (stx.stx_mask & libc::STATX_MNT_ID != 0).then_some(stx.stx_mnt_id)
    };
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) if mount(name, 0) != mount(c"", libc::AT_EMPTY_PATH) => There::AnotherMount,
        Ok(st) => There::File(st),
        Err(_) => There::Nothing,
    }
}
