//! Which broker: a given socket, the host's, or the user's own.

use super::config::environment;
use crate::planted::planted;
use nix::unistd::geteuid;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The socket of a broker that serves the whole host.
pub const HOST_SOCKET: &str = "/run/turnstile/broker.sock";

/// The socket that a broker of this user listens on by default, with its directory made (0700) and checked.
///
/// Root: [`HOST_SOCKET`]. Others: `$XDG_RUNTIME_DIR/turnstile/broker.sock`, else a private directory in `/tmp`.
pub fn default_socket() -> io::Result<PathBuf> {
    let Some(dir) = own_directory() else { return Ok(HOST_SOCKET.into()) };
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(named(&dir, &e)),
        _ => {}
    }
    private(&dir)?;
    Ok(dir.join("broker.sock"))
}

/// The directory of this user's own broker; none for root, whose broker is the host's.
fn own_directory() -> Option<PathBuf> {
    let uid = geteuid();
    if uid.is_root() {
        return None;
    }
    Some(match environment("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(run) if run.is_absolute() && run.is_dir() => run.join("turnstile"),
        _ => PathBuf::from(format!("/tmp/turnstile-{uid}")),
    })
}

/// The sockets to try, in order: a user's process finds the host's broker before its own. Nothing is made here, and
/// the user's directory is looked at only after the host's broker was tried: anybody could have put something into
/// `/tmp` in its place.
pub fn candidates() -> impl Iterator<Item = io::Result<PathBuf>> {
    let own = || {
        let dir = own_directory()?;
        Some(match private(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(dir.join("broker.sock")),
        })
    };
    std::iter::once(Ok(HOST_SOCKET.into())).chain(std::iter::once_with(own).flatten())
}

/// Root has given the host's place to this user, and nobody else can have put a socket there: `/run` is root's, and in its
/// directory nobody but its owner makes a file (systemd's `RuntimeDirectory=`; in a container, what is mounted there).
pub fn is_hosts(path: &Path, uid: u32) -> bool {
    if path != Path::new(HOST_SOCKET) {
        return false;
    }
    let owner = |dir: Option<&Path>| {
        let meta = fs::symlink_metadata(dir?).ok()?;
        let closed = meta.mode() & 0o022 == 0 || planted("hosts-place-is-anyones");
        (meta.is_dir() && closed).then_some(meta.uid())
    };
    let directory = path.parent();
    owner(directory.and_then(Path::parent)) == Some(0) && owner(directory) == Some(uid)
}

fn named(dir: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", dir.display()))
}

/// The directory must be ours, closed to others, and no link (somebody else could have made it in `/tmp` first).
fn private(dir: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir).map_err(|e| named(dir, &e))?;
    if meta.is_dir() && meta.uid() == geteuid().as_raw() && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    let what = format!("{} is not a private directory of this user", dir.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

/// Whether this process is in a pid namespace of its own: a container, whose broker belongs on the host.
pub fn in_container() -> bool {
    /// `PROC_PID_INIT_INO`, include/linux/proc_ns.h: the initial pid namespace's inode number.
    const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
    let own_namespace = fs::metadata("/proc/self/ns/pid").is_ok_and(|m| m.ino() != INITIAL_PID_NAMESPACE);
    own_namespace || Path::new("/.dockerenv").exists() || Path::new("/run/.containerenv").exists()
}
