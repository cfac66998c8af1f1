//! The broker's loop driven by hand, with time as it is told: for `fuzz/` alone (the feature `fuzzing`).

use super::database::State;
use super::options::Options;
use super::server::{ServeError, Server};
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

pub struct Rig {
    server: Server,
    events: Vec<EpollEvent>,
    now: Instant,
}

impl Rig {
    pub fn new(options: Options) -> Result<Rig, ServeError> {
        let server = Server::new(options)?;
        Ok(Rig { server, events: vec![EpollEvent::empty(); 128], now: Instant::now() })
    }

    /// A connection of this process, already accepted.
    pub fn connect(&mut self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (client, broker) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        self.server.admit(broker)?;
        Ok(client)
    }

    /// A round of the loop, so much later.
    pub fn round(&mut self, later: Duration) -> io::Result<()> {
        self.now = self.now.max(Instant::now()) + later;
        self.server.hear(&mut self.events, EpollTimeout::ZERO, None)?;
        self.server.look_after(self.now);
        Ok(())
    }

    /// The memfds of a gated database: control and wal-index.
    pub fn segment(&self, database: u32) -> Option<[&OwnedFd; 2]> {
        match &self.server.databases.get(&database)?.state {
            State::Gated { segment, .. } => Some([&segment.control_fd, &segment.wal_index_fd]),
            State::Guest { .. } => None,
        }
    }

    pub fn databases(&self) -> Vec<u32> {
        self.server.databases.keys().copied().collect()
    }

    /// There is a checkpointer.
    pub fn is_checkpointing(&self) -> bool {
        self.server.checkpointer.pid().is_some()
    }

    pub fn sessions(&self) -> usize {
        self.server.sessions.len()
    }
}
