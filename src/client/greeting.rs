//! Connecting to a broker, and saying who this process is.

use super::config::Believed;
use super::host::LowDescriptors;
use super::place;
use crate::segment::layout::LIVENESS_SIZE;
use crate::segment::{memfd, names};
use crate::wire::keeper::Token;
use crate::wire::message::{
    FromBroker, Hello, HelloAnswer, Introduction, PROTOCOL_MAGIC, PROTOCOL_VERSION, ToBroker,
};
use crate::wire::socket::{self, Packet};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there: a broker may be started.
    #[error("no broker listens on {}", .0.display())]
    Absent(PathBuf),
    #[error("may not connect to {}: {}", .0.display(), .1)]
    Forbidden(PathBuf, io::Error),
    /// Of a user that it is not sent anything of.
    #[error(
        "{}: user {} listens there, who is neither root nor this process's user, and gets no file of it \
         (TURNSTILE_BROKER_UID={} in the environment says that it may)",
        .0.display(), .1, .1
    )]
    Untrusted(PathBuf, u32),
    /// Something listens that is not a turnstile broker, or not of this version.
    #[error("{}: {}", .0.display(), .1)]
    Stranger(PathBuf, String),
    #[error("{}: {}", .0.display(), .1)]
    Io(PathBuf, io::Error),
}

/// What a broker says to a session that it admits.
pub struct Welcome {
    pub socket: OwnedFd,
    pub broker_pid: i32,
    pub token: Token,
}

/// How often a broker that ends as we knock is taken for one that is replaced.
const AGAIN: u32 = 3;

/// Connects and introduces this process, whose liveness memfd is given. `limit`: of each answer.
pub fn greet(
    path: &Path,
    believed: &Believed,
    liveness: BorrowedFd,
    limit: Duration,
) -> Result<Welcome, ConnectError> {
    let io_error = |e: io::Error| ConnectError::Io(path.to_owned(), e);
    let _low = LowDescriptors::occupy().map_err(io_error)?;
    let mut tries = 0;
    loop {
        let socket = connect(path, limit)?;
        // Whoever called listen(2), whatever the path and its directory are: the kernel says so (unix(7)).
        let listener = getsockopt(&socket, PeerCredentials).map_err(|e| io_error(e.into()))?.uid();
        if !believed.covers(listener) && !place::is_hosts(path, listener) {
            return Err(ConnectError::Untrusted(path.to_owned(), listener));
        }
        match introduce(path, socket, liveness, limit) {
            // It is replaced as we knock, perhaps: its socket is the next one's.
            Err(ConnectError::Absent(_)) if tries < AGAIN => tries += 1,
            other => return other,
        }
    }
}

fn introduce(
    path: &Path,
    socket: OwnedFd,
    liveness: BorrowedFd,
    limit: Duration,
) -> Result<Welcome, ConnectError> {
    let io_error = |e: io::Error| ConnectError::Io(path.to_owned(), e);
    let introduce = socket::encode(&ToBroker::Introduce(introduction())).map_err(io_error)?;
    let hello = Hello { magic: PROTOCOL_MAGIC, version: PROTOCOL_VERSION };
    let hello = socket::encode(&hello).map_err(io_error)?;
    // Both at once: each answer waited for is a tenth of a millisecond of a short process's life.
    // A broker that has no room for this user says so before it is asked, and closes.
    let sent = socket::send_within(&socket, &hello, &[], limit)
        .and_then(|()| socket::send_within(&socket, &introduce, &[liveness.as_raw_fd()], limit));
    greeted(path, &socket, limit)?;
    sent.map_err(|e| unsent(path, e))?;
    let welcome = await_packet(path, &socket, limit)?;
    match welcome.decode().map_err(io_error)? {
        FromBroker::Welcome { broker_pid, token, .. } => Ok(Welcome { socket, broker_pid, token }),
        FromBroker::Refused { reason, .. } => Err(ConnectError::Stranger(path.to_owned(), reason)),
        _ => Err(ConnectError::Stranger(path.to_owned(), "it did not say welcome".into())),
    }
}

fn connect(path: &Path, limit: Duration) -> Result<OwnedFd, ConnectError> {
    use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound, PermissionDenied, WouldBlock};
    let end = Instant::now() + limit;
    loop {
        let error = match socket::connect_to(path) {
            Ok(fd) => return Ok(fd),
            Err(e) => e,
        };
        return Err(match error.kind() {
            NotFound | ConnectionRefused | NotADirectory => ConnectError::Absent(path.to_owned()),
            PermissionDenied => ConnectError::Forbidden(path.to_owned(), error),
            // The broker's backlog is full: it is there, and busy.
            WouldBlock if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            _ if error.raw_os_error() == Some(libc::EPROTOTYPE)
                || error.raw_os_error() == Some(libc::ENOTSOCK) =>
            {
                ConnectError::Stranger(
                    path.to_owned(),
                    "something else than a turnstile broker listens there".into(),
                )
            }
            _ => ConnectError::Io(path.to_owned(), error),
        });
    }
}

fn await_packet(path: &Path, socket: &OwnedFd, limit: Duration) -> Result<Packet, ConnectError> {
    let stranger = |what: &str| ConnectError::Stranger(path.to_owned(), what.into());
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(stranger("what listens there does not answer as a turnstile broker does"));
        }
        let ready = socket::wait(socket, PollFlags::POLLIN, left);
        if !ready.map_err(|e| ConnectError::Io(path.to_owned(), e))? {
            continue;
        }
        // A peer that closes with something of ours unread is told as an error, once, and before what it said.
        let received = match socket::receive(socket) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => socket::receive(socket),
            other => other,
        };
        return match received {
            Ok(packet) => Ok(packet),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            // A broker that exits while we knock: as if it had not been there.
            Err(e)
                if e.kind() == io::ErrorKind::UnexpectedEof || e.kind() == io::ErrorKind::ConnectionReset =>
            {
                Err(ConnectError::Absent(path.to_owned()))
            }
            Err(e) => Err(ConnectError::Io(path.to_owned(), e)),
        };
    }
}

/// A broker that exits while we knock is as if it had not been there.
fn unsent(path: &Path, e: io::Error) -> ConnectError {
    match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ConnectError::Absent(path.to_owned()),
        _ => ConnectError::Io(path.to_owned(), e),
    }
}

/// The answer to our hello.
fn greeted(path: &Path, socket: &OwnedFd, limit: Duration) -> Result<(), ConnectError> {
    let stranger = |what: String| ConnectError::Stranger(path.to_owned(), what);
    let answer: HelloAnswer = await_packet(path, socket, limit)?
        .decode()
        .map_err(|_| stranger("what listens there is not a turnstile broker".into()))?;
    match answer {
        HelloAnswer { magic, .. } if magic != PROTOCOL_MAGIC => {
            Err(stranger("what listens there is not a turnstile broker".into()))
        }
        HelloAnswer { refused: Some(reason), .. } => Err(stranger(reason)),
        HelloAnswer { version, .. } if version != PROTOCOL_VERSION => {
            Err(stranger(format!("the broker speaks protocol {version}, this extension {PROTOCOL_VERSION}")))
        }
        _ => Ok(()),
    }
}

/// A memfd whose first byte this process locks as long as it lives. POSIX locks go at exit and at exec and are
/// not inherited by a child, which is just what is to be known.
pub fn liveness_memfd() -> io::Result<OwnedFd> {
    let fd = memfd::create(names::LIVENESS, LIVENESS_SIZE)?;
    // SAFETY: libc::flock is plain data for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_len = 1;
    fcntl(&fd, FcntlArg::F_SETLK(&lock))?;
    Ok(fd)
}

fn introduction() -> Introduction {
    let program = small_file("/proc/self/comm").unwrap_or_default().trim().to_owned();
    Introduction { program, pid: std::process::id() as i32, container: container_id() }
}

/// The container's id: 64 hexadecimal digits in a cgroup path.
fn container_id() -> Option<String> {
    let cgroup = small_file("/proc/self/cgroup")?;
    let mut words = cgroup.split(|c: char| !c.is_ascii_hexdigit());
    words.find(|w| w.len() == 64).map(|w| w[..12].to_owned())
}

/// A file of /proc in one read: nobody knows its size before, and growing a buffer takes four or five.
fn small_file(path: &str) -> Option<String> {
    let mut buffer = vec![0; 8192];
    let length = std::fs::File::open(path).and_then(|mut f| f.read(&mut buffer)).ok()?;
    buffer.truncate(length);
    String::from_utf8(buffer).ok()
}
