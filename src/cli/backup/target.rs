//! The copy's file: without a name until it is complete and on the disk, where the filesystem can do that (`O_TMPFILE`), else
//! under a name of its own that is removed when something goes wrong.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, fallocate, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat};
use nix::unistd::{
    Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fsync, ftruncate, geteuid, linkat, unlinkat,
};
use turnstile::planted::planted;
use turnstile::segment::gate;

use super::Failure;

/// What SQLite keeps beside a database.
const COMPANIONS: [&str; 3] = ["-wal", "-journal", "-shm"];

pub struct Target {
    /// As it was given.
    path: PathBuf,
    name: CString,
    directory: OwnedFd,
    copy: OwnedFd,
    /// What it is called until it has its name; `None`: nothing.
    temporary: Option<CString>,
    source: Source,
}

/// What is to be known of the database, which is not opened here: closing it would drop SQLite's locks on it.
struct Source {
    path: PathBuf,
    stat: FileStat,
    has_acl: bool,
}

impl Target {
    /// A file for a copy of the database `source` that shall be called `path`, if that may be.
    pub fn make(path: &Path, source: &Path, force: bool) -> Result<Target, Failure> {
        let shown = path.display();
        let stat = nix::sys::stat::stat(source)
            .map_err(|e| Failure::Failed(format!("{}: {}", source.display(), said(e))))?;
        let source = Source { path: source.to_owned(), stat, has_acl: has_acl(source) };
        let file_name = path.file_name().filter(|_| !path.as_os_str().as_bytes().ends_with(b"/"));
        let file_name = file_name.ok_or_else(|| Failure::Failed(format!("{shown} is no name for a file")))?;
        let name =
            CString::new(file_name.as_bytes()).map_err(|_| Failure::Failed(format!("{shown}: no name")))?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(parent, flags, Mode::empty());
        let directory = directory.map_err(|e| {
            Failure::Failed(format!("the directory {} cannot be opened: {}", parent.display(), said(e)))
        })?;
        let (copy, temporary) = make_file(&directory, &name).map_err(|e| {
            Failure::Failed(format!("no file can be made in {}: {}", parent.display(), said(e)))
        })?;
        let target = Target { path: path.to_owned(), name, directory, copy, temporary, source };
        target.may_be(force)?;
        Ok(target)
    }

    /// Whether a copy may have this name: asked before it is made, and again before it gets it.
    fn may_be(&self, force: bool) -> Result<(), Failure> {
        let shown = self.path.display();
        let refuse = |why: String| Err(Failure::Failed(format!("{shown} {why}")));
        if planted("backup-over-anything") {
            return Ok(());
        }
        if let Some(what) = self.of_the_source() {
            return refuse(what);
        }
        if let Some(beside) = self.companion() {
            return refuse(format!(
                "would be read together with {beside}, which lies there: it is a database in use, or one that was not closed. \
                 Choose another name"
            ));
        }
        let stat = match fstatat(&self.directory, self.name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(()),
            Err(e) => return refuse(format!("cannot be looked at: {}", said(e))),
        };
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFLNK {
            return refuse("is a symbolic link: name the file itself".into());
        }
        if kind != SFlag::S_IFREG {
            return refuse("is no file".into());
        }
        if !force {
            return refuse("is there already: choose another name, or replace it with --force".into());
        }
        // Who has it open as a database holds a lock on it, but for a rollback journal between two transactions.
        let there =
            openat(&self.directory, self.name.as_c_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        match there.map(|there| gate::stands(&there) || gate::plain_holder(&there).is_some()) {
            Ok(false) => Ok(()),
            Ok(true) => refuse("is a database in use: who has it open would go on with the old file".into()),
            Err(e) => refuse(format!("cannot be told from a database in use: {}", said(e))),
        }
    }

    /// What of the database that is copied this name is.
    fn of_the_source(&self) -> Option<String> {
        let here = fstat(&self.directory).ok()?;
        let database = self.source.path.display();
        if let Ok(there) = fstatat(&self.directory, self.name.as_c_str(), AtFlags::empty())
            && (there.st_dev, there.st_ino) == (self.source.stat.st_dev, self.source.stat.st_ino)
        {
            return Some(format!("is {database} itself"));
        }
        let home = self.source.path.parent()?.metadata().ok()?;
        let rest = self.name.to_bytes().strip_prefix(self.source.path.file_name()?.as_bytes())?;
        let of_it = (here.st_dev, here.st_ino) == (home.dev(), home.ino());
        (of_it && COMPANIONS.iter().any(|c| c.as_bytes() == rest))
            .then(|| format!("is a name that SQLite uses for {database}"))
    }

    /// A file beside it that SQLite would take for a part of it. An empty one is none.
    fn companion(&self) -> Option<String> {
        COMPANIONS[..2].iter().find_map(|suffix| {
            let name = CString::new([self.name.as_bytes(), suffix.as_bytes()].concat()).ok()?;
            let stat = fstatat(&self.directory, name.as_c_str(), AtFlags::empty()).ok()?;
            (stat.st_size > 0).then(|| OsStr::from_bytes(name.as_bytes()).to_string_lossy().into_owned())
        })
    }

    /// Takes the room at once, so that a disk that is too small is found before anything is copied.
    pub fn make_room(&self, bytes: u64) -> Result<(), Failure> {
        if bytes == 0 {
            return Ok(());
        }
        loop {
            return match fallocate(&self.copy, FallocateFlags::empty(), 0, bytes as i64) {
                Err(Errno::EINTR) => continue,
                Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
                Err(e) => Err(Failure::Failed(format!(
                    "no room for {} MiB beside {}: {}",
                    (bytes >> 20) + 1,
                    self.path.display(),
                    said(e)
                ))),
            };
        }
    }

    pub fn unwritten(e: Errno) -> Failure {
        Failure::Failed(format!("the copy cannot be written: {}", said(e)))
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.copy.as_fd()
    }

    /// A name by which this process can open it.
    pub fn descriptor_path(&self) -> String {
        format!("/proc/self/fd/{}", self.copy.as_raw_fd())
    }

    /// All is written: its length, its owner and permissions, and onto the disk.
    pub fn finish(&self, bytes: u64) -> Result<(), Failure> {
        ftruncate(&self.copy, bytes as i64).map_err(Target::unwritten)?;
        self.give_away().map_err(|e| Failure::Failed(format!("the copy's permissions: {}", said(e))))?;
        if !planted("backup-unsynced") {
            fsync(&self.copy).map_err(Target::unwritten)?;
        }
        Ok(())
    }

    /// The database's owner as far as that can be had; then who may read the database may read the copy, and nobody else.
    fn give_away(&self) -> nix::Result<()> {
        let wanted = &self.source.stat;
        if planted("backup-readable") {
            return fchmod(&self.copy, Mode::from_bits_truncate(0o666));
        }
        if geteuid().is_root() {
            let _ = fchown(&self.copy, Some(Uid::from_raw(wanted.st_uid)), None);
        }
        let _ = fchown(&self.copy, None, Some(Gid::from_raw(wanted.st_gid)));
        let mut mode = wanted.st_mode & 0o666 & !current_umask();
        // Another group gets what everybody had, at most. And with an ACL the group's bits are a mask, and not the group's.
        if fstat(&self.copy)?.st_gid != wanted.st_gid || self.source.has_acl {
            mode &= !0o070 | (mode & 0o007) << 3;
        }
        fchmod(&self.copy, Mode::from_bits_truncate(mode))
    }

    /// Gives it its name.
    pub fn publish(mut self, force: bool) -> Result<(), Failure> {
        self.may_be(force)?;
        let named = match force || planted("backup-over-anything") {
            true => self.replace(),
            false => self.name_it(),
        };
        let shown = self.path.display().to_string();
        named.map_err(|e| match e {
            Errno::EEXIST => {
                Failure::Failed(format!("{shown} has come into being meanwhile: it is left alone"))
            }
            e => Failure::Failed(format!("the copy cannot be called {shown}: {}", said(e))),
        })?;
        self.temporary = None;
        fsync(&self.directory)
            .map_err(Failure::doing(format!("{shown} is complete, and its directory is not synced")))
    }

    fn replace(&mut self) -> nix::Result<()> {
        let temporary = match &self.temporary {
            Some(temporary) => temporary.clone(),
            None => {
                let temporary = temporary_name(&self.name);
                self.link(&temporary)?;
                self.temporary.insert(temporary).clone()
            }
        };
        renameat(&self.directory, temporary.as_c_str(), &self.directory, self.name.as_c_str())
    }

    fn name_it(&self) -> nix::Result<()> {
        let Some(temporary) = &self.temporary else { return self.link(&self.name) };
        let (from, to) = (temporary.as_c_str(), self.name.as_c_str());
        match rename_to_nothing(&self.directory, from, to) {
            // A filesystem that does not know of it.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                linkat(&self.directory, from, &self.directory, to, LinkatFlags::empty())?;
                unlinkat(&self.directory, from, UnlinkatFlags::NoRemoveDir)
            }
            done => done,
        }
    }

    fn link(&self, name: &CString) -> nix::Result<()> {
        let from = self.descriptor_path();
        linkat(AT_FDCWD, from.as_str(), &self.directory, name.as_c_str(), LinkatFlags::AT_SYMLINK_FOLLOW)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && !planted("backup-litters")
        {
            let _ = unlinkat(&self.directory, temporary.as_c_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// For its owner alone, until it is known whose it will be.
fn make_file(directory: &OwnedFd, name: &CString) -> nix::Result<(OwnedFd, Option<CString>)> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    if !planted("backup-named") {
        match openat(directory, ".", flags | OFlag::O_TMPFILE, mode) {
            Ok(file) => return Ok((file, None)),
            // A filesystem, or a kernel, that does not know of it.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => return Err(e),
        }
    }
    let temporary = temporary_name(name);
    let file = openat(
        directory,
        temporary.as_c_str(),
        flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW,
        mode,
    )?;
    Ok((file, Some(temporary)))
}

/// `.NAME.backup-PID-TIME`, shortened where a name has an end.
fn temporary_name(name: &CString) -> CString {
    let nanos =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    let end = format!(".backup-{}-{nanos}", std::process::id());
    let bytes = &name.as_bytes()[..name.as_bytes().len().min(200)];
    CString::new([b".", bytes, end.as_bytes()].concat()).unwrap_or_default()
}

/// renameat2(2) with RENAME_NOREPLACE, which musl has no name for.
fn rename_to_nothing(directory: &OwnedFd, from: &CStr, to: &CStr) -> nix::Result<()> {
    let fd = directory.as_raw_fd();
    // SAFETY: a descriptor that is open, and two strings.
    let done = unsafe {
        libc::syscall(libc::SYS_renameat2, fd, from.as_ptr(), fd, to.as_ptr(), libc::RENAME_NOREPLACE)
    };
    Errno::result(done).map(drop)
}

/// As Linux tells it; 077 where it does not. (umask(2) tells it only by setting another one, for all threads.)
fn current_umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok()).unwrap_or(0o077)
}

fn has_acl(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return true };
    // SAFETY: two strings, and no place for a value: its size is asked for.
    let size = unsafe {
        libc::getxattr(path.as_ptr(), c"system.posix_acl_access".as_ptr(), std::ptr::null_mut(), 0)
    };
    size > 0
}

/// What the system says, in words.
fn said(e: Errno) -> String {
    io::Error::from(e).to_string()
}
