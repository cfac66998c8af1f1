//! Packets with descriptors over a `SOCK_SEQPACKET` Unix socket. Nothing here blocks longer than it is told.

use super::{MAX_FDS, MAX_PACKET};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, setsockopt, shutdown, socket, sockopt,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// A received packet.
#[derive(Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// Descriptors were sent that could not be received (this process has no room for more).
    pub fds_lost: bool,
    /// It is longer, or has more descriptors, than any that means something.
    pub too_much: bool,
}

impl Packet {
    /// Decodes the whole packet as one message; bytes left over are an error.
    pub fn decode<T: DeserializeOwned>(&self) -> io::Result<T> {
        let (value, rest) = postcard::take_from_bytes(&self.bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        match rest.is_empty() {
            true => Ok(value),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "bytes left over after a message")),
        }
    }
}

/// A non-blocking, close-on-exec seqpacket socket, connected to `path`.
///
/// A path longer than `sun_path` (107 bytes) is reached through `/proc/self/fd` of its directory.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let fd = new_socket()?;
    match UnixAddr::new(path) {
        Ok(address) => connect(fd.as_raw_fd(), &address)?,
        Err(Errno::ENAMETOOLONG) => {
            let (_dir, short) = short_path(path)?;
            connect(fd.as_raw_fd(), &UnixAddr::new(&short)?)?;
        }
        Err(e) => return Err(e.into()),
    }
    Ok(fd)
}

/// A non-blocking, close-on-exec seqpacket socket.
pub fn new_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// A name for `path` that fits `sun_path`; the descriptor must live as long as the name is used.
pub fn short_path(path: &Path) -> io::Result<(OwnedFd, std::path::PathBuf)> {
    use nix::fcntl::{OFlag, open};
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = open(dir, flags, nix::sys::stat::Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok((dir, short))
}

/// The next connection of a listening socket, non-blocking and close-on-exec.
pub fn accept(listener: impl AsFd) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = nix::sys::socket::accept4(listener.as_fd().as_raw_fd(), flags)?;
    // SAFETY: accept4 has just made this descriptor; it is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whoever connects from now on is refused; returns those who have not been accepted.
pub fn end_listening(listener: impl AsFd) -> Vec<OwnedFd> {
    let _ = shutdown(listener.as_fd().as_raw_fd(), Shutdown::Both);
    std::iter::from_fn(|| accept(&listener).ok()).collect()
}

/// The other end has received everything that was sent, or is closed (unix(7), `SIOCOUTQ`).
pub fn all_read(fd: impl AsFd) -> bool {
    let mut unread: libc::c_int = 0;
    // SAFETY: the kernel writes one int. (`SIOCOUTQ` has `TIOCOUTQ`'s number.)
    let rc = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    rc == 0 && unread == 0
}

/// Encodes a message for [`send`].
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    match bytes.len() <= MAX_PACKET {
        true => Ok(bytes),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "message too long")),
    }
}

/// Sends one packet, or fails with `WouldBlock`. Never raises SIGPIPE.
pub fn send(fd: impl AsFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let iov = [IoSlice::new(bytes)];
    loop {
        match sendmsg::<()>(fd.as_fd().as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sends one packet and waits up to `limit` for room.
pub fn send_within(fd: impl AsFd, bytes: &[u8], fds: &[RawFd], limit: Duration) -> io::Result<()> {
    let end = Instant::now() + limit;
    loop {
        match send(&fd, bytes, fds) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(e);
                }
                wait(&fd, PollFlags::POLLOUT, left)?;
            }
            // So many descriptors are under way, of this user's: others receive theirs meanwhile.
            Err(e) if e.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// The next packet comes with descriptors. It is not received, and neither are they; the errors are [`receive`]'s.
pub fn has_descriptors(fd: impl AsFd) -> io::Result<bool> {
    let mut byte = 0u8;
    let mut iov = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: msghdr is plain data for which all-zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    loop {
        // SAFETY: one byte is written at most; without room for control data the kernel says that there is some, and
        // installs nothing.
        let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut message, libc::MSG_PEEK) };
        match Errno::result(n) {
            Ok(_) => return Ok(message.msg_flags & libc::MSG_CTRUNC != 0),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Closes a Unix socket whose queue nobody else reads, or gives it back: descriptors lie in its queue, or may. Who closes it
/// last closes those, too, and there are files whose `close` never returns. Nothing more comes in from here on.
pub fn close_unless_laden(socket: OwnedFd) -> Result<(), OwnedFd> {
    /// More messages than that nobody leaves unread who means well.
    const MOST: usize = 64;
    let raw = socket.as_raw_fd();
    let _ = shutdown(raw, Shutdown::Both);
    // So that an empty packet can be told from none: with a packet come the credentials of its sender.
    let told = setsockopt(&socket, sockopt::PassCred, &true).is_ok();
    let stream = getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream);
    for _ in 0..if told { MOST } else { 0 } {
        match peek(raw) {
            Ok(Peeked { laden: true, .. }) => break,
            Ok(Peeked { length: 0, sender, .. }) if stream || !sender => return Ok(()),
            // One byte, or one packet, without descriptors: they are received with the first byte of what they came with.
            Ok(_) => drop(nix::sys::socket::recv(raw, &mut [0], MsgFlags::MSG_DONTWAIT)),
            Err(Errno::EAGAIN | Errno::ENOTCONN) => return Ok(()),
            // What the peer did is said once.
            Err(Errno::EINTR | Errno::ECONNRESET | Errno::EPIPE) => {}
            Err(_) => break,
        }
    }
    Err(socket)
}

struct Peeked {
    length: usize,
    /// It came with its sender's credentials, which are only told if that was asked for.
    sender: bool,
    /// There are descriptors.
    laden: bool,
}

/// What comes next. It is not received, and neither are its descriptors.
fn peek(fd: RawFd) -> nix::Result<Peeked> {
    let mut byte = 0u8;
    // For credentials and no more: of descriptors the kernel then says that there are some, and installs none.
    let mut control = [0u64; 4];
    // SAFETY: a calculation.
    const { assert!(unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) } == 32) };
    let mut iov = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: msghdr is plain data for which all-zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the buffers outlive the call and are as long as said; `control` is aligned for cmsghdr.
    let n = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    let length = Errno::result(n)? as usize;
    // SAFETY: filled by the call above. Should there have been room for descriptors after all, they are owned, and closed.
    let installed = unsafe { received_descriptors(&message) };
    let laden = message.msg_flags & libc::MSG_CTRUNC != 0 || !installed.is_empty();
    Ok(Peeked { length, sender: message.msg_controllen != 0, laden })
}

/// Receives one packet, or fails with `WouldBlock`; `UnexpectedEof` when the peer has closed, `InvalidData` when
/// the packet did not fit (what arrived of its descriptors is closed).
pub fn receive(fd: impl AsFd) -> io::Result<Packet> {
    let packet = receive_any(fd)?;
    match packet.too_much {
        false => Ok(packet),
        true => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "a packet too long, or with too many descriptors"))
        }
    }
}

/// The same, but one that did not fit comes with its descriptors: the caller closes them, or does not.
pub fn receive_any(fd: impl AsFd) -> io::Result<Packet> {
    /// `SCM_MAX_FD`, net/scm.h: the kernel lets no packet carry more, so that none is installed and not owned.
    const MOST_FDS: usize = 253;
    let mut bytes = vec![0u8; MAX_PACKET + 1];
    let mut control = [0u64; (MOST_FDS * size_of::<RawFd>()).div_ceil(8) + 4];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data for which all-zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let length = loop {
        // SAFETY: the buffers outlive the call and are as long as said; `control` is aligned for cmsghdr.
        let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        match Errno::result(n) {
            Ok(n) => break n as usize,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    // SAFETY: filled by the call above.
    let fds = unsafe { received_descriptors(&message) };
    let truncated = message.msg_flags & libc::MSG_TRUNC != 0 || length > MAX_PACKET;
    let too_much = truncated || fds.len() > MAX_FDS;
    if length == 0 && fds.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(length);
    Ok(Packet { bytes, fds, fds_lost: message.msg_flags & libc::MSG_CTRUNC != 0, too_much })
}

/// Owns the descriptors that came with a packet, also of one that lost some. (nix hands out none of those then,
/// and they would stay open for ever.)
///
/// # Safety
/// `message` was filled by recvmsg and its control buffer is alive.
unsafe fn received_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: by contract; the CMSG macros stay inside the control buffer.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(h) = header.as_ref() {
            if h.cmsg_level == libc::SOL_SOCKET && h.cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                #[allow(clippy::unnecessary_cast)] // another type in musl
                let length = h.cmsg_len as usize;
                let count = (length - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                // Just installed by the kernel for us; nobody else owns them.
                fds.extend((0..count).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

/// Waits for `flags` on `fd`; false when `limit` passed first.
pub fn wait(fd: impl AsFd, flags: PollFlags, limit: Duration) -> io::Result<bool> {
    let ms = u16::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), flags)];
    match poll(&mut fds, PollTimeout::from(ms)) {
        Ok(n) => Ok(n > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::socketpair;

    /// The broker's end and the other one.
    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, kind, None, flags).unwrap()
    }

    #[test]
    fn a_socket_with_descriptors_in_its_queue_is_not_closed() {
        for kind in [SockType::SeqPacket, SockType::Stream] {
            for before in [&[][..], &[b"".as_slice(), b"xx", b""]] {
                for after in [false, true] {
                    let (ours, theirs) = pair(kind);
                    before.iter().for_each(|bytes| send(&theirs, bytes, &[]).unwrap());
                    send(&theirs, b"y", &[theirs.as_raw_fd()]).unwrap();
                    if after {
                        drop(theirs);
                    }
                    let laden = close_unless_laden(ours).expect_err("closed");
                    assert!(!receive_any(&laden).is_ok_and(|p| p.fds.is_empty()) || !before.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_socket_without_is_closed_however_it_ended() {
        for kind in [SockType::SeqPacket, SockType::Stream] {
            for unread in [&[][..], &[b"x".as_slice()], &[b"", b"xyz", b""]] {
                for after in [false, true] {
                    let (ours, theirs) = pair(kind);
                    unread.iter().for_each(|bytes| send(&theirs, bytes, &[]).unwrap());
                    send(&ours, b"unread", &[]).unwrap();
                    if after {
                        drop(theirs);
                    }
                    assert!(close_unless_laden(ours).is_ok(), "{kind:?} {unread:?} {after}");
                }
            }
        }
    }

    #[test]
    fn who_fills_a_queue_is_not_read_for_ever() {
        let (ours, theirs) = pair(SockType::SeqPacket);
        while send(&theirs, b"x", &[]).is_ok() {}
        assert!(close_unless_laden(ours).is_err());
    }
}
