//! Messages for a peer that has no room for them just now.

use crate::wire::socket;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Messages that are kept, with their descriptors.
#[derive(Debug, Default)]
pub struct Outbox(VecDeque<(Vec<u8>, Vec<OwnedFd>)>);

/// `false`: there is no room.
fn sent(socket: &OwnedFd, bytes: &[u8], raw: &[i32]) -> io::Result<bool> {
    match socket::send(socket, bytes, raw) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sends, or keeps it for when there is room, `most` messages at most. Descriptors are duplicated only if it must
    /// be kept.
    pub fn send(
        &mut self,
        socket: &OwnedFd,
        bytes: Vec<u8>,
        fds: &[&OwnedFd],
        most: usize,
    ) -> io::Result<()> {
        if self.is_empty() {
            let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
            if sent(socket, &bytes, &raw)? {
                return Ok(());
            }
        }
        if self.0.len() >= most {
            return Err(io::Error::other("the client does not read its answers"));
        }
        let kept = fds.iter().map(|fd| fd.try_clone()).collect::<io::Result<Vec<_>>>()?;
        self.0.push_back((bytes, kept));
        Ok(())
    }

    /// The first message that was kept cannot be sent: it is lost.
    pub fn lose_first(&mut self) {
        self.0.pop_front();
    }

    /// Sends what was kept; true when nothing is left.
    pub fn flush(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        while let Some((bytes, fds)) = self.0.front() {
            let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
            if !sent(socket, bytes, &raw)? {
                return Ok(false);
            }
            self.0.pop_front();
        }
        Ok(true)
    }
}
