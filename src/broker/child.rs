//! The checkpointer's process: started when there is something to checkpoint, told what to do, watched.

use super::blame::Deaths;
use super::outbox::Outbox;
use super::server::{CHECKPOINTER_PIDFD, CHECKPOINTER_SOCKET, Server};
use crate::wire::checkpoint::ToCheckpointer;
use crate::wire::socket;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// The process, if there is one.
#[derive(Debug, Default)]
pub struct Checkpointer {
    pub(super) running: Option<Running>,
    /// While it was at work nowhere.
    pub(super) deaths: Deaths,
    /// While it was at work at one database, by the user that opened that first.
    pub(super) deaths_by_user: BTreeMap<u32, Deaths>,
    /// It could not be started, or ended too often.
    pub(super) given_up: Option<String>,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) child: Child,
    pub(super) socket: OwnedFd,
    pub(super) pidfd: OwnedFd,
    /// When it was last looked at, and since when it is known to be stopped.
    pub(super) looked: Option<Instant>,
    pub(super) stopped: Option<Instant>,
    /// It was killed because it stayed so.
    pub(super) replaced: bool,
    outbox: Outbox,
}

impl Server {
    pub(super) fn told(&mut self, sent: io::Result<()>) {
        if let Err(e) = sent {
            // Its death is seen by its pidfd, and everything is said again to the next one.
            tracing::debug!("cannot talk to the checkpointer: {e}");
            self.checkpointer.kill();
        }
        self.watch_for_room_of_checkpointer();
    }

    fn watch_for_room_of_checkpointer(&self) {
        if let Some(running) = &self.checkpointer.running {
            let out = if running.outbox.is_empty() { EpollFlags::empty() } else { EpollFlags::EPOLLOUT };
            let mut event = EpollEvent::new(EpollFlags::EPOLLIN | out, CHECKPOINTER_SOCKET);
            let _ = self.epoll.modify(&running.socket, &mut event);
        }
    }

    pub(super) fn start_checkpointer(&mut self) -> io::Result<()> {
        let Some(program) = &self.options.checkpointer else { return Err(io::ErrorKind::Unsupported.into()) };
        if self.checkpointer.running.is_some() {
            return Ok(());
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        // Its standard input, so that no number must be told; its log is ours.
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mut command = Command::new(program);
        command.arg("checkpointer").stdin(theirs).stdout(Stdio::null());
        let child = command.spawn()?;
        let pid = child.id() as i32;
        let Some(pidfd) = super::liveness::pidfd_of_child(pid) else {
            return Err(io::Error::other("no pidfd for it"));
        };
        self.epoll.add(&ours, EpollEvent::new(EpollFlags::EPOLLIN, CHECKPOINTER_SOCKET))?;
        self.epoll.add(&pidfd, EpollEvent::new(EpollFlags::EPOLLIN, CHECKPOINTER_PIDFD))?;
        tracing::info!(pid, "checkpointer started");
        let (looked, stopped, replaced) = (None, None, false);
        let outbox = Outbox::default();
        self.checkpointer.running =
            Some(Running { child, socket: ours, pidfd, looked, stopped, replaced, outbox });
        Ok(())
    }
}

impl Checkpointer {
    /// Its pid, for `status`.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|r| r.child.id())
    }

    pub(super) fn send(&mut self, message: &ToCheckpointer, fds: &[&OwnedFd]) -> io::Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        // It is ours: however much is kept, it will be read, or its reader is dead.
        running.outbox.send(&running.socket, socket::encode(message)?, fds, usize::MAX)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.outbox.flush(&running.socket).map(drop)
    }

    pub(super) fn kill(&mut self) {
        if let Some(running) = &mut self.running {
            let _ = running.child.kill();
        }
    }
}
