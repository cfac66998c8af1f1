//! Where the file is, and whether a broker would take it there: judged by the broker's own rules.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{AccessFlags, access};
use turnstile::broker::filesystem::{mount_of, named};
use turnstile::broker::join;
use turnstile::client::companions::beside;
use turnstile::wire::message::Join;

use super::findings::Findings;
use super::settings::Settings;

/// The database, open for reading.
pub struct Database {
    pub file: File,
    /// Without links.
    pub path: PathBuf,
    pub device: u64,
    pub inode: u64,
    pub size: u64,
}

/// `None`: it cannot be looked at.
pub fn look(path: &Path, settings: &Settings, findings: &mut Findings) -> Option<Database> {
    let Ok(real) = path.canonicalize().map_err(|e| unopened(path, &e, findings)) else { return None };
    let directory = real.parent().unwrap_or(Path::new("/"));
    // Before anything touches the file: its filesystem may be one that does not answer.
    let there = named(&real, OFlag::empty());
    let there = there.map_err(|e| unopened(path, &e, findings)).ok()?;
    let own = std::process::id() as i32;
    let Some(mount) = mount_of(&there, own, &[]) else {
        let advice = "name it by a path of this mount namespace";
        findings.problem("place-unknown", "it cannot be told which filesystem it is on", advice);
        return None;
    };
    if !mount.is_local() {
        match settings.config.allow_unsafe {
            true => findings.warning(
                "place-unsafe",
                format!("{}. TURNSTILE_ALLOW_UNSAFE=1 takes it all the same", mount.reason()),
                "let nobody open it through another mount, or on another host",
            ),
            false => findings.problem(
                "place-unsafe",
                mount.reason(),
                "move it to a local filesystem (ext4, xfs, btrfs, tmpfs, ...). If it is certain that everybody uses \
                 this one mount: TURNSTILE_ALLOW_UNSAFE=1",
            ),
        }
    }
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&real) {
        Ok(file) => file,
        Err(e) => {
            unopened(path, &e, findings);
            return None;
        }
    };
    let meta = file.metadata().ok()?;
    if mount.is_local() {
        match refusal(&file, directory, &real, own) {
            Some(reason) => {
                findings.problem("place-refused", format!("a broker refuses it: {reason}"), advice(&reason))
            }
            None => {
                let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
                let what = format!("on {}, device {major}:{minor}, inode {}", mount.kind, meta.ino());
                findings.ok("place", what);
            }
        }
    }
    if meta.nlink() > 1 {
        findings.warning(
            "place-links",
            format!("it has {} names (hard links)", meta.nlink()),
            "let everybody open it by the same name: -wal and -journal are found by it, and another name is refused",
        );
    }
    permissions(&real, directory, findings);
    let (device, inode, size) = (meta.dev(), meta.ino(), meta.len());
    Some(Database { file, path: real, device, inode, size })
}

fn unopened(path: &Path, e: &io::Error, findings: &mut Findings) {
    let name = path.display();
    match e.kind() {
        io::ErrorKind::NotFound => findings.problem(
            "file-missing",
            format!("{name} is not there"),
            "is the name right, in this directory and this container? SQLite makes a new database under it",
        ),
        io::ErrorKind::PermissionDenied => findings.problem(
            "file-forbidden",
            format!("{name} cannot be opened: {e}"),
            "give this user the right to read it, and to search its directory",
        ),
        _ => findings.problem("file-unreadable", format!("{name} cannot be opened: {e}"), "mend that first"),
    }
}

/// Why a broker would refuse a join with this file from here.
fn refusal(file: &File, directory: &Path, path: &Path, pid: i32) -> Option<String> {
    let directory = named(directory, OFlag::O_DIRECTORY).map_err(|e| e.to_string());
    let join = Join {
        name: path.file_name().map(|name| name.as_bytes().to_vec()),
        has_shm: false,
        guest: false,
        allow_unsafe: false,
        sqlite_version: String::new(),
        library: 0,
    };
    let descriptors: Result<Vec<OwnedFd>, String> = directory.and_then(|directory| {
        Ok(vec![file.try_clone().map_err(|e| e.to_string())?.into(), directory.into()])
    });
    match descriptors {
        Ok(descriptors) => join::judge(&join, descriptors, pid, false).err().map(|(_, reason)| reason),
        Err(reason) => Some(reason),
    }
}

fn advice(reason: &str) -> &'static str {
    if reason.contains("bind mount") {
        "mount the directory into the container, not the file"
    } else {
        "name the database itself"
    }
}

fn permissions(path: &Path, directory: &Path, findings: &mut Findings) {
    let may = |path: &Path, what| access(path, what).is_ok();
    match (may(path, AccessFlags::W_OK), may(directory, AccessFlags::W_OK)) {
        (true, true) => {}
        (true, false) => findings.warning(
            "directory-read-only",
            format!("this user may write the file, and not into its directory {}", directory.display()),
            "SQLite makes -wal and -journal there: give it the right to, else writes fail",
        ),
        (false, _) => findings.warning(
            "file-read-only",
            "this user may only read it: its locks travel as messages, and it holds no wal-index of its own",
            "right for a reader. Who is to write needs the right to write the file and its directory",
        ),
    }
}

/// Size of the file beside the database with this suffix, if there is one.
pub fn size_beside(path: &Path, suffix: &str) -> Option<u64> {
    fs::metadata(beside(path, suffix)).ok().map(|meta| meta.len())
}
