//! The broker's socket: one broker a path, and never a moment at which the path leads nowhere.

use super::filesystem::named;
use crate::planted::planted;
use crate::segment::names::Place;
use crate::wire::socket::{self, new_socket, short_path};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{Backlog, SockType as SocketKind, UnixAddr, bind, getsockname, getsockopt, listen};
use nix::sys::stat::fstat;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("another broker already serves {}", .0.display())]
    Taken(PathBuf),
    #[error("cannot listen on {}: {}", .0.display(), .1)]
    Io(PathBuf, io::Error),
}

/// The right to serve a path: one broker's at a time.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    place: Place,
    _file: Flock<File>,
}

/// A listening socket; its path and lock go with it.
#[derive(Debug)]
pub struct Listener {
    pub socket: OwnedFd,
    /// There was another broker's socket, which had not been removed, or may have been.
    pub replaced: bool,
    lock: Lock,
    /// It is the service manager's, and stays.
    given: bool,
}

impl Lock {
    /// Takes it, if it comes free within `patience`: who has it may be about to end. `everyone`: the directory, if it has
    /// to be made, is open to any uid.
    pub fn take(path: &Path, everyone: bool, patience: Duration) -> Result<Lock, ListenError> {
        let io_error = |e: io::Error| ListenError::Io(path.to_owned(), e);
        if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty() && !d.exists()) {
            let mode = if everyone { 0o755 } else { 0o700 };
            fs::DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(io_error)?;
        }
        let lock_path = with_suffix(path, ".lock");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            // A pipe that somebody has put there would be waited for.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&lock_path)
            .map_err(io_error)?;
        let end = Instant::now() + patience;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    let st = fstat(&*file).map_err(|e| io_error(e.into()))?;
                    let place = Place { device: st.st_dev, inode: st.st_ino };
                    return Ok(Lock { path: path.to_owned(), place, _file: file });
                }
                Err((file, Errno::EWOULDBLOCK)) if Instant::now() < end => file,
                Err((_, Errno::EWOULDBLOCK)) => return Err(ListenError::Taken(path.to_owned())),
                Err((_, e)) => return Err(io_error(e.into())),
            };
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Listener {
    /// Listens on the path, replacing the socket of a broker that died. `everyone`: any uid may connect (the proof
    /// of access is the database's descriptor, not the socket).
    pub fn bind(lock: Lock, everyone: bool) -> Result<Listener, ListenError> {
        let replaced = lock.path.exists();
        let socket = listen_at(&lock.path, everyone).map_err(|e| ListenError::Io(lock.path.clone(), e))?;
        Ok(Listener { socket, replaced, lock, given: false })
    }

    /// The socket of the last broker, in which those who have knocked since are waiting; if its path still leads there.
    pub fn take_on(
        lock: Lock,
        everyone: bool,
        (place, socket): (Place, OwnedFd),
    ) -> Result<Listener, ListenError> {
        let listens = getsockopt(&socket, AcceptConn).unwrap_or(false);
        let listener = Listener { socket, replaced: false, lock, given: false };
        // Again: whoever connects from now on is told that it is this process which listens (unix(7), SO_PEERCRED).
        let listens = listens && listen(&listener.socket, backlog()).is_ok();
        if !listens || listener.leads_to() != Some(place) {
            return Listener::bind(listener.lock, everyone);
        }
        set_permissions(listener.path(), everyone)
            .map_err(|e| ListenError::Io(listener.path().to_owned(), e))?;
        Ok(listener)
    }

    /// The file that the path leads to.
    pub fn leads_to(&self) -> Option<Place> {
        let meta = fs::symlink_metadata(self.path()).ok().filter(|m| m.file_type().is_socket())?;
        Some(Place { device: meta.dev(), inode: meta.ino() })
    }

    /// By which the broker's segments are known to be of this socket.
    pub fn place(&self) -> Place {
        self.lock.place
    }

    /// Listens on a socket that listens there already: the service manager's (sd_listen_fds(3)).
    pub fn given(lock: Lock, socket: OwnedFd) -> Result<Listener, ListenError> {
        let error = |e: io::Error| ListenError::Io(lock.path.clone(), e);
        fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| error(e.into()))?;
        let bits = fcntl(&socket, FcntlArg::F_GETFL).map_err(|e| error(e.into()))?;
        let flags = OFlag::from_bits_retain(bits) | OFlag::O_NONBLOCK;
        fcntl(&socket, FcntlArg::F_SETFL(flags)).map_err(|e| error(e.into()))?;
        // Again: who connects from now on is told that this process listens, not the service manager (unix(7),
        // SO_PEERCRED), and that is whom `--replace` signals.
        listen(&socket, backlog()).map_err(|e| error(e.into()))?;
        Ok(Listener { socket, replaced: true, lock, given: true })
    }

    pub fn is_given(&self) -> bool {
        self.given
    }

    pub fn path(&self) -> &Path {
        &self.lock.path
    }

    /// Nobody comes in any more: those who have knocked. (The service manager's stays, with whoever waits there.)
    pub fn end(&self) -> Vec<OwnedFd> {
        if self.given { Vec::new() } else { socket::end_listening(&self.socket) }
    }

    /// No new connection finds the path after this.
    pub fn unlink(&self) {
        if !self.given {
            let _ = fs::remove_file(self.path());
        }
    }
}

fn backlog() -> Backlog {
    Backlog::new(1024).unwrap_or(Backlog::MAXCONN)
}

/// Of the socket at `path`, and of nothing else: in a directory of another user there may be a link by now.
fn set_permissions(path: &Path, everyone: bool) -> io::Result<()> {
    let follows = planted("socket-mode-follows-links");
    let there = named(path, if follows { OFlag::empty() } else { OFlag::O_NOFOLLOW })?;
    if !there.metadata()?.file_type().is_socket() && !follows {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "what is there is not the broker's socket"));
    }
    let own = Path::new("/proc/self/fd").join(there.as_raw_fd().to_string());
    fs::set_permissions(own, fs::Permissions::from_mode(if everyone { 0o666 } else { 0o600 }))
}

/// Where a socket listens that a broker may serve; an error says what else it is.
pub fn listens_at(fd: BorrowedFd) -> io::Result<PathBuf> {
    let refuse = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let address: UnixAddr = getsockname(fd.as_raw_fd()).map_err(|_| refuse("it is no Unix socket"))?;
    if getsockopt(&fd, SockType)? != SocketKind::SeqPacket {
        return Err(refuse("it is not of the type SOCK_SEQPACKET (ListenSequentialPacket=)"));
    }
    if !getsockopt(&fd, AcceptConn)? {
        return Err(refuse("it does not listen (Accept=no)"));
    }
    address
        .path()
        .filter(|p| p.is_absolute())
        .map(Path::to_owned)
        .ok_or_else(|| refuse("it has no absolute path"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Binds under a temporary name and renames: whoever finds the path finds a socket that listens.
pub(super) fn listen_at(path: &Path, everyone: bool) -> io::Result<OwnedFd> {
    if fs::symlink_metadata(path).is_ok_and(|meta| !meta.file_type().is_socket()) {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is not a socket is in the way",
        ));
    }
    let temporary = with_suffix(path, ".new");
    let _ = fs::remove_file(&temporary);
    let socket = new_socket()?;
    let (_dir, short) = short_path(&temporary)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(&short)?)?;
    set_permissions(&temporary, everyone)?;
    listen(&socket, backlog())?;
    fs::rename(&temporary, path)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planted::fails_without;

    /// In a directory of another user the socket may be a link by the time that its mode is set.
    #[test]
    fn no_other_file_gets_the_sockets_mode() {
        let dir = std::env::temp_dir().join(format!("ts-listen-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let (other, link) = (dir.join("other"), dir.join("link"));
        fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        let mode = |mode| fs::set_permissions(&other, fs::Permissions::from_mode(mode)).unwrap();
        fails_without("socket-mode-follows-links", || {
            mode(0o600);
            for path in [&link, &other] {
                assert!(set_permissions(path, true).is_err());
                assert_eq!(fs::metadata(&other).unwrap().mode() & 0o777, 0o600);
            }
        });
        let socket = listen_at(&dir.join("s"), true).unwrap();
        assert_eq!(fs::metadata(dir.join("s")).unwrap().mode() & 0o777, 0o666);
        drop(socket);
        fs::remove_dir_all(&dir).unwrap();
    }
}
