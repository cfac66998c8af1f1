//! Which filesystem a descriptor is on, told without touching the file.
//!
//! A hostile FUSE file blocks `fstat`, `fcntl` and even `close`; `/proc/self/fdinfo` and `mountinfo` are the
//! kernel's own and answer at once.

use crate::planted::planted;
use crate::segment::statx::statx;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

/// Local filesystems whose locks and mappings every process on this kernel shares.
const LOCAL: &[&str] = &[
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "tmpfs",
    "ramfs",
    "overlay",
    "zfs",
    "f2fs",
    "bcachefs",
    "jfs",
    "nilfs2",
    "reiserfs",
    "erofs",
    "squashfs",
    "iso9660",
    "udf",
    "vfat",
    "exfat",
    "ntfs3",
    "ecryptfs",
    "rootfs",
    "devtmpfs",
    "hugetlbfs",
    "ubifs",
    "shiftfs",
];

/// What is at `path`, without touching it: an `O_PATH` descriptor. (`std::fs::OpenOptions` drops that flag on musl, where it is
/// part of `O_ACCMODE`, and opens the file itself.)
pub fn named(path: &Path, flags: OFlag) -> std::io::Result<File> {
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | flags, Mode::empty())?.into())
}

/// A filesystem type and where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    pub kind: String,
    /// It is in our own mount namespace, or another one of the same filesystem is.
    pub own: bool,
}

impl Mount {
    pub fn is_local(&self) -> bool {
        LOCAL.contains(&self.kind.as_str())
    }

    /// Its files are another filesystem's.
    pub fn is_stacked(&self) -> bool {
        matches!(self.kind.as_str(), "overlay" | "ecryptfs" | "shiftfs")
    }

    /// Why a file here is refused, for people.
    pub fn reason(&self) -> String {
        let kind = &self.kind;
        match kind.as_str() {
            "fuse.fuse-overlayfs" => format!(
                "it is in the layers of a rootless container, on FUSE ({kind}): {ONLY_MOUNT}. Keep the database in a \
                 volume or a mounted directory. {OVERRIDE}"
            ),
            // Docker Desktop's, by version and choice; virtual machines'; WSL's for the disks of Windows.
            "fakeowner" | "virtiofs" | "fuse.grpcfuse" | "fuse.osxfs" | "9p" => format!(
                "it is in a directory shared from outside of this kernel ({kind}: Docker Desktop, WSL or a virtual \
                 machine), mostly by FUSE: {ONLY_MOUNT}, and whoever opens it outside sees no lock of these here. \
                 Keep the database in a named volume. {OVERRIDE}"
            ),
            _ if kind.starts_with("fuse") => {
                format!("it is on a FUSE filesystem ({kind}): {ONLY_MOUNT}. {OVERRIDE}")
            }
            "nfs" | "nfs4" | "cifs" | "smb3" | "ceph" | "afs" | "gfs2" | "ocfs2" => {
                format!("it is on a network filesystem ({kind}): other hosts do not see this host's locks")
            }
            _ => format!("it is on a filesystem ({kind}) that turnstile does not know to be local"),
        }
    }
}

const ONLY_MOUNT: &str = "nobody can prove that this is its only mount, and through a second one it would look like \
                          another file: two writers would lose each other's rows";
const OVERRIDE: &str = "TURNSTILE_ALLOW_UNSAFE=1 takes it, at your own risk";

/// The mount that `fd` came through. `peer_pid`: where to look when it is of another mount namespace. `known`: of the
/// other descriptors of the same join, mostly the same; the kernel writes out the whole table at each look.
pub fn mount_of(fd: impl AsFd, peer_pid: i32, known: &[Mount]) -> Option<Mount> {
    let fd = fd.as_fd();
    let id = mount_number(fd)?;
    if let Some(mount) = known.iter().find(|m| m.id == id) {
        return Some(mount.clone());
    }
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let by_id = |table: &str| kind_in(table, |fields| fields.first() == Some(&id.to_string().as_str()));
    let peers = || fs::read_to_string(format!("/proc/{peer_pid}/mountinfo")).ok();
    if let Some(kind) = by_id(&own) {
        return Some(Mount { id, kind, own: true });
    }
    if let Some(kind) = by_id(&peers().unwrap_or_default()) {
        return Some(Mount { id, kind, own: false });
    }
    let kind = kind_by_device(fd, &own)?;
    Some(Mount { id, kind, own: true })
}

/// The number of the mount that `fd` came through, which the kernel fills in by itself: no filesystem is asked, as in
/// [`device_of`]. Where it does not (before Linux 5.8, or a filesystem of FUSE that is not this user's), by the descriptor's
/// `fdinfo`, in which it has to write out all locks as well: somebody may have taken very many.
fn mount_number(fd: BorrowedFd) -> Option<u64> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let stx = statx(fd.as_raw_fd(), c"", flags, libc::STATX_MNT_ID);
    let said = stx.filter(|stx| stx.stx_mask & libc::STATX_MNT_ID != 0 && !planted("mounts-by-fdinfo"));
    if let Some(stx) = said {
        return Some(stx.stx_mnt_id);
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|l| l.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// The type of a filesystem whose mount cannot be seen from here (a broker in a container of its own): of
/// another mount of the same device, else by the magic number, which only a filesystem on a block device is
/// asked for: it answers at once.
fn kind_by_device(fd: BorrowedFd, own_mounts: &str) -> Option<String> {
    let (major, minor) = device_of(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH)?;
    let device = format!("{major}:{minor}");
    if let Some(kind) = kind_in(own_mounts, |fields| fields.get(2) == Some(&device.as_str())) {
        return Some(kind);
    }
    // A file of btrfs has its subvolume's device, which mountinfo does not tell; what is mounted here may.
    let here = |path: &&str| {
        CString::new(*path).is_ok_and(|path| device_of(libc::AT_FDCWD, &path, 0) == Some((major, minor)))
    };
    if mount_points(own_mounts, "btrfs").iter().any(here) {
        return Some("btrfs".into());
    }
    use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, fstatfs};
    const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342); // linux/magic.h; nix has it with glibc alone
    let kind: FsType = (major != 0).then(|| fstatfs(fd).ok())??.filesystem_type();
    let known = [(EXT4_SUPER_MAGIC, "ext4"), (XFS_SUPER_MAGIC, "xfs"), (BTRFS_SUPER_MAGIC, "btrfs")];
    known.iter().find(|(magic, _)| *magic == kind).map(|(_, name)| (*name).to_owned())
}

/// The device of a file. No filesystem is asked: what the kernel has cached will do.
fn device_of(directory: RawFd, path: &CStr, flags: i32) -> Option<(u32, u32)> {
    let flags = flags | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let stx = statx(directory, path, flags, libc::STATX_TYPE)?;
    Some((stx.stx_dev_major, stx.stx_dev_minor))
}

/// Where filesystems of this kind are mounted, but for places that only another kind of filesystem leads to: the way
/// there could be a hostile one's. (Names that mountinfo has to escape are left out.)
fn mount_points<'a>(mountinfo: &'a str, wanted: &str) -> Vec<&'a str> {
    let mounts: Vec<(&str, &str)> = mountinfo.lines().filter_map(mount_point).collect();
    let strange: Vec<&str> = mounts.iter().filter(|(_, kind)| !LOCAL.contains(kind)).map(|m| m.0).collect();
    let led_to_by = |point: &str| strange.iter().any(|s| Path::new(point).starts_with(s));
    let there = mounts.iter().filter(|(point, kind)| *kind == wanted && !led_to_by(point));
    there.map(|m| m.0).collect()
}

/// A line of a mountinfo file: mount point and filesystem type.
fn mount_point(line: &str) -> Option<(&str, &str)> {
    let (fixed, rest) = line.split_once(" - ")?;
    Some((fixed.split(' ').nth(4)?, rest.split(' ').next()?))
}

/// The filesystem type of the first line of a mountinfo file (proc(5)) whose fields match.
fn kind_in(mountinfo: &str, matches: impl Fn(&[&str]) -> bool) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let (fixed, rest) = line.split_once(" - ")?;
        let fields: Vec<&str> = fixed.split(' ').collect();
        matches(&fields).then(|| rest.split(' ').next().unwrap_or_default().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn mountinfo_is_read_by_id_and_optional_fields_are_skipped() {
        let text = "28 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw\n\
                    91 28 0:50 / /mnt rw - fuse.bindfs bindfs rw\n";
        let by_id = |id: &str| kind_in(text, |fields| fields[0] == id);
        assert_eq!(by_id("28").as_deref(), Some("ext4"));
        assert_eq!(by_id("91").as_deref(), Some("fuse.bindfs"));
        assert_eq!(by_id("2"), None);
        assert_eq!(kind_in(text, |fields| fields[2] == "254:0").as_deref(), Some("ext4"));
    }

    #[test]
    fn a_hostile_filesystem_leads_to_no_mount_point() {
        let text = "1 0 0:30 / / rw - btrfs /dev/a rw\n2 1 0:31 /s /data rw - btrfs /dev/a rw\n\
                    3 1 0:50 / /mnt rw - fuse.x x rw\n4 3 0:31 /s /mnt/in rw - btrfs /dev/a rw\n\
                    5 1 0:31 /s /over rw - btrfs /dev/a rw\n6 5 0:51 / /over rw - fuse.x x rw\n";
        assert_eq!(mount_points(text, "btrfs"), ["/", "/data"]);
    }

    #[test]
    fn unknown_kinds_are_not_local_and_each_has_its_reason() {
        for (kind, says) in [
            (
                "fuse.sshfs",
                "is on a FUSE filesystem (fuse.sshfs): nobody can prove that this is its only mount",
            ),
            ("fuse.fuse-overlayfs", "Keep the database in a volume or a mounted directory"),
            ("fakeowner", "Keep the database in a named volume"),
            ("virtiofs", "Docker Desktop"),
            ("fuse.grpcfuse", "nobody can prove that this is its only mount"),
            ("9p", "TURNSTILE_ALLOW_UNSAFE=1"),
            ("nfs4", "other hosts do not see"),
            ("somethingfs", "does not know to be local"),
        ] {
            let mount = Mount { id: 1, kind: kind.into(), own: true };
            assert!(!mount.is_local(), "{kind}");
            assert!(mount.reason().contains(says), "{}", mount.reason());
        }
    }

    #[test]
    fn a_file_of_this_process_has_a_mount() {
        let file = tempfile::tempfile().unwrap();
        assert!(mount_of(&file, std::process::id() as i32, &[]).is_some());
    }

    #[test]
    fn what_locks_a_file_has_does_not_count() {
        use nix::fcntl::{FcntlArg, fcntl};
        use nix::time::{ClockId, clock_gettime};
        let file = tempfile::tempfile().unwrap();
        // From the last one: the kernel looks for the place of each from the first.
        for at in (0..10_000).rev() {
            // SAFETY: libc::flock is plain data for which all-zero is valid.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            (lock.l_type, lock.l_start, lock.l_len) = (libc::F_RDLCK as i16, 2 * at, 1);
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        }
        crate::planted::fails_without("mounts-by-fdinfo", || {
            let spent = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
            let begun = spent();
            (0..5).for_each(|_| drop(mount_of(&file, std::process::id() as i32, &[]).unwrap()));
            assert!(spent() - begun < Duration::from_millis(20), "{:?}", spent() - begun);
        });
    }
}
