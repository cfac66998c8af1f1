//! The files beside a database, `-wal`, `-shm` and `-journal`: whose they are, and who may write them.
//!
//! SQLite makes such a file with the database's mode, and as root with its owner and group, too (os_unix.c,
//! `findCreateFileMode`). Anybody else's file belongs to that user. So where a user comes first who may only read, or who may
//! write by the database's group alone, the owner cannot write the file: "attempt to write a readonly database", for as
//! long as the file is there. Here whoever may write the database may write its companions, whoever has made them: the
//! file gets an access control list that says so (acl(5)).
//!
//! The list must be there before anybody else sees the file. So a missing one is made here ([`prepare`]), with its list,
//! and then linked under its name. SQLite gives an empty file the database's mode again each time that it opens it
//! (`robust_open`), which would take the list's rights away; so the file has one byte. SQLite takes a WAL that is shorter
//! than its header for an empty one, and writes over a `-shm` file that it is the first to open.

use super::host::LowDescriptors;
use crate::planted::planted;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, lstat, stat};
use nix::unistd::{Gid, Uid, fchown, ftruncate, getegid, geteuid, linkat};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// `POSIX_ACL_XATTR_VERSION` and the tags of entries, linux/posix_acl_xattr.h and linux/posix_acl.h.
const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NOBODY: u32 = u32::MAX;
const ATTRIBUTE: &CStr = c"system.posix_acl_access";
const READ_WRITE: u16 = 6;

/// What SQLite calls the file with this suffix beside a database.
pub fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Why a companion was not made.
#[derive(Debug, thiserror::Error)]
pub enum Unshared {
    #[error(
        "it would be a file that those who may write the database cannot write, and its filesystem cannot say \
         otherwise ({0}): let a program of the database's owner open it first"
    )]
    Filesystem(Errno),
    #[error(
        "it would be a file that the database's owner cannot write, and this user namespace does not know the \
         owner: let a program of the database's owner open it first"
    )]
    UserNamespace,
}

/// Who may do what with a file: its owner, its group, and whom its access control list names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    /// Each three bits, as in a mode.
    owner: u16,
    group: u16,
    other: u16,
    users: BTreeMap<u32, u16>,
    groups: BTreeMap<u32, u16>,
}

impl Rights {
    /// `list`: its access control list, as the kernel gives it.
    fn new(st: &FileStat, list: Option<Vec<u8>>) -> Rights {
        let bits = |shift: u32| (st.st_mode >> shift & 7) as u16;
        let mut rights = Rights {
            uid: st.st_uid,
            gid: st.st_gid,
            owner: bits(6),
            group: bits(3),
            other: bits(0),
            users: BTreeMap::new(),
            groups: BTreeMap::new(),
        };
        let entries = list.as_deref().and_then(|bytes| bytes.strip_prefix(&VERSION.to_le_bytes()));
        let entries = || entries.unwrap_or_default().as_chunks::<8>().0.iter().map(|e| entry(*e));
        // The mode's group bits are the list's mask then, which bounds what it gives.
        let mask = entries().find(|(tag, ..)| *tag == MASK).map_or(7, |(_, bits, _)| bits);
        for (tag, bits, id) in entries() {
            match tag {
                GROUP_OBJ => rights.group = bits & mask,
                USER => drop(rights.users.insert(id, bits & mask)),
                GROUP => drop(rights.groups.insert(id, bits & mask)),
                _ => {}
            }
        }
        rights
    }

    /// Of an open file.
    pub fn of(file: impl AsFd) -> nix::Result<Rights> {
        let st = fstat(&file)?;
        Ok(Rights::new(&st, list_of(&format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))))
    }

    /// Of what is at a path, which is no link.
    pub fn at(path: &Path) -> nix::Result<Rights> {
        let file = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        Rights::of(file)
    }

    /// Whether a user of that group, and no other that is known, may write it.
    pub fn may_write(&self, uid: u32, gid: u32) -> bool {
        let groups =
            || (gid == self.gid).then_some(self.group).into_iter().chain(self.groups.get(&gid).copied());
        let bits = match self.users.get(&uid) {
            _ if uid == 0 => 7,
            _ if uid == self.uid => self.owner,
            Some(bits) => *bits,
            None if groups().next().is_some() => groups().fold(0, |all, bits| all | bits),
            None => self.other,
        };
        bits & 2 != 0
    }

    pub fn owner(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// The same rights for a file of that owner and group.
    fn with_owner(&self, uid: u32, gid: u32) -> Rights {
        let (mut users, mut groups) = (self.users.clone(), self.groups.clone());
        users.insert(self.uid, self.owner);
        let own = users.remove(&uid).unwrap_or(0);
        groups.insert(self.gid, self.group);
        let group = groups.remove(&gid).unwrap_or(self.other);
        // Who has made it uses it, as with plain SQLite.
        Rights { uid, gid, owner: own | READ_WRITE, group, other: self.other, users, groups }
    }

    fn is_plain(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    fn mode(&self) -> u32 {
        u32::from(self.owner & 6) << 6 | u32::from(self.group & 6) << 3 | u32::from(self.other & 6)
    }

    /// As the kernel takes it. Nobody may execute such a file.
    fn list(&self) -> Vec<u8> {
        let mask = self.users.values().chain(self.groups.values()).fold(self.group, |all, bits| all | bits);
        let mut entries = vec![(USER_OBJ, self.owner, NOBODY)];
        entries.extend(self.users.iter().map(|(uid, bits)| (USER, *bits, *uid)));
        entries.push((GROUP_OBJ, self.group, NOBODY));
        entries.extend(self.groups.iter().map(|(gid, bits)| (GROUP, *bits, *gid)));
        entries.extend([(MASK, mask, NOBODY), (OTHER, self.other, NOBODY)]);
        let bytes = |(tag, bits, id): &(u16, u16, u32)| {
            [&tag.to_le_bytes()[..], &(bits & 6).to_le_bytes()[..], &id.to_le_bytes()[..]].concat()
        };
        [VERSION.to_le_bytes().to_vec(), entries.iter().flat_map(bytes).collect()].concat()
    }

    /// Gives an open file these rights.
    fn give(&self, file: &OwnedFd) -> nix::Result<()> {
        let path = c_path(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let list = self.list();
        // SAFETY: two strings and as many bytes as are said, all outlive the call.
        let rc =
            unsafe { libc::setxattr(path.as_ptr(), ATTRIBUTE.as_ptr(), list.as_ptr().cast(), list.len(), 0) };
        Errno::result(rc).map(drop)
    }
}

fn entry([a, b, c, d, e, f, g, h]: [u8; 8]) -> (u16, u16, u32) {
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]) & 7, u32::from_le_bytes([e, f, g, h]))
}

fn c_path(path: &str) -> nix::Result<CString> {
    CString::new(path).map_err(|_| Errno::EINVAL)
}

/// The access control list of a file; `None`: it has none, or its filesystem knows none.
fn list_of(path: &str) -> Option<Vec<u8>> {
    let path = c_path(path).ok()?;
    let mut bytes = vec![0u8; 4096];
    // SAFETY: two strings and as many bytes as are said, all outlive the call.
    let length =
        unsafe { libc::getxattr(path.as_ptr(), ATTRIBUTE.as_ptr(), bytes.as_mut_ptr().cast(), bytes.len()) };
    bytes.truncate(usize::try_from(length).ok()?);
    Some(bytes)
}

/// Whether SQLite's own file would have other rights than the database.
fn differs(rights: &Rights) -> bool {
    if planted("companions-of-the-first") {
        return false;
    }
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    !rights.is_plain() || uid != 0 && (uid != rights.uid || gid != rights.gid && rights.group != rights.other)
}

/// SQLite is about to open the companion at `path`, and makes it if it is not there. Then it is made here if SQLite's would
/// be one that somebody cannot write who may write the database.
pub fn prepare(database: impl AsFd, path: &Path) -> Result<(), Unshared> {
    let Ok(rights) = Rights::of(database) else { return Ok(()) };
    if !differs(&rights) || lstat(path).is_ok() {
        return Ok(());
    }
    match make(&rights, path) {
        // Somebody else was faster; or SQLite is not allowed to make it either, and says so.
        Ok(()) | Err(Errno::EEXIST | Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ENOENT) => Ok(()),
        Err(Errno::EINVAL) if !is_mapped(rights.uid) => Err(Unshared::UserNamespace),
        Err(e) => Err(Unshared::Filesystem(e)),
    }
}

fn make(rights: &Rights, path: &Path) -> nix::Result<()> {
    let _low = LowDescriptors::occupy().map_err(|_| Errno::EMFILE)?;
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let nobodys = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = openat(&directory, ".", OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC, nobodys)?;
    if geteuid().is_root() {
        fchown(&file, Some(Uid::from_raw(rights.uid)), Some(Gid::from_raw(rights.gid)))?;
    }
    let st = fstat(&file)?;
    if !is_mapped(rights.uid) {
        return Err(Errno::EINVAL);
    }
    let rights = rights.with_owner(st.st_uid, st.st_gid);
    match rights.is_plain() {
        true => fchmod(&file, Mode::from_bits_truncate(rights.mode()))?,
        false => rights.give(&file)?,
    }
    ftruncate(&file, 1)?;
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(nix::fcntl::AT_FDCWD, own.as_str(), &directory, name, AtFlags::AT_SYMLINK_FOLLOW)
}

/// In a user namespace files of users that it does not know look like the overflow user's (user_namespaces(7)).
fn is_mapped(uid: u32) -> bool {
    let table = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let knows = |line: &str| {
        let mut numbers = line.split_whitespace().filter_map(|n| n.parse::<u64>().ok());
        let (Some(first), _, Some(count)) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        (first..first + count).contains(&u64::from(uid))
    };
    table.is_empty() || table.lines().any(knows)
}

/// SQLite has opened the companion at `path`. An empty one of this user's has got the database's mode again, or was made by
/// a plain program: its list is set anew.
pub fn share(database: impl AsFd, path: &Path) {
    let Ok(rights) = Rights::of(database) else { return };
    if !differs(&rights) {
        return;
    }
    let Ok(_low) = LowDescriptors::occupy() else { return };
    // A descriptor that is only a path's: closing it drops no POSIX lock of this process's.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(file) = open(path, flags, Mode::empty()) else { return };
    let Ok(st) = fstat(&file) else { return };
    // One of several links may be another file of this user's, which somebody has linked here.
    let own =
        st.st_mode & libc::S_IFMT == libc::S_IFREG && st.st_nlink == 1 && st.st_uid == geteuid().as_raw();
    let wanted = rights.with_owner(st.st_uid, st.st_gid);
    let has = Rights::of(&file).map(|has| Rights { owner: has.owner | READ_WRITE, ..has });
    if own && !wanted.is_plain() && is_mapped(rights.uid) && has != Ok(wanted.clone()) {
        // Where the filesystem knows no lists, `turnstile doctor` names the file.
        let _ = wanted.give(&file);
    }
}

/// The name by which the database was opened leads to another file: the database has been deleted or renamed, and what lies
/// beside that name is the other one's.
pub fn is_replaced(database: impl AsFd, path: &Path) -> bool {
    let (Ok(own), Ok(there)) = (fstat(database), stat(path)) else { return false };
    (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino) && !planted("companions-by-name")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(uid: u32, gid: u32, mode: u16) -> Rights {
        let bits = |shift: u16| mode >> shift & 7;
        let (users, groups) = (BTreeMap::new(), BTreeMap::new());
        Rights { uid, gid, owner: bits(6), group: bits(3), other: bits(0), users, groups }
    }

    #[test]
    fn a_companion_has_the_databases_rights_whoever_makes_it() {
        let database = rights(1, 10, 0o664);
        let readers = database.with_owner(3, 30);
        for (who, may) in
            [((1, 1), true), ((2, 10), true), ((2, 20), false), ((3, 30), true), ((4, 30), false)]
        {
            assert_eq!(readers.may_write(who.0, who.1), may, "{who:?}");
        }
        // The owner's own is one without a list, if its group is the database's.
        assert!(database.with_owner(1, 10).is_plain());
        assert_eq!(database.with_owner(1, 10).mode(), 0o664);
        assert!(!rights(1, 10, 0o644).with_owner(3, 10).may_write(2, 10));
    }

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let file = tempfile::tempfile().unwrap();
        let st = fstat(&file).unwrap();
        let wanted = rights(1, 10, 0o664).with_owner(st.st_uid, 30);
        // What the kernel shows as the group's bits is the mask.
        let mut shown = st;
        (shown.st_mode, shown.st_gid) = (libc::S_IFREG | 0o664, 30);
        assert_eq!(Rights::new(&shown, Some(wanted.list())), wanted);
    }
}
