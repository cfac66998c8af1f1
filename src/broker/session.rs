//! One client process's connection: its socket, what proves that it lives, what still must be sent to it.

use super::clocks;
use super::found::Member;
use super::liveness::{self, Peer};
use super::outbox::Outbox;
use crate::segment::layout::LIVENESS_SIZE;
use crate::segment::liveness as byte;
use crate::segment::memfd;
use crate::wire::keeper::{KeptSession, Token};
use crate::wire::message::{FromBroker, Introduction, SeatKey};
use crate::wire::socket;
use nix::sys::stat::fstat;
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Packets kept for a client that does not read them, before its session is ended.
const OUTBOX_LIMIT: usize = 256;

/// How long a session is looked at many times a second whose socket is gone.
pub const SILENT_LOOKS: Duration = Duration::from_secs(2);

/// A client's word, short and without control characters: it goes into other clients' errors, logs, terminals.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// The same for a file's name, which need not be UTF-8.
pub fn printable_name(name: &[u8]) -> String {
    printable(&String::from_utf8_lossy(name))
}

/// Bytes that nobody can guess.
pub fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| format!("/dev/urandom: {e}"))?;
    Ok(bytes)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for its `Hello`.
    Greeting,
    /// Waiting for its `Introduce`.
    Introducing,
    Open,
    /// The socket is gone; its process may live.
    Silent,
}

#[derive(Debug)]
pub struct Session {
    pub id: u64,
    pub stage: Stage,
    /// Since it has this stage, or connected.
    pub since: Instant,
    pub peer: Peer,
    pub who: Introduction,
    pub seats: BTreeSet<SeatKey>,
    /// See [`Session::clock_ahead`].
    ahead: OnceCell<i64>,
    pub socket: Option<OwnedFd>,
    /// By this the next broker, or this one on another socket, knows it again.
    pub token: Token,
    /// The keeper knows it.
    pub kept: bool,
    /// Seats that it had on another socket and has not claimed yet.
    pub unclaimed: BTreeSet<SeatKey>,
    /// Databases that it has handed back, or had seats in.
    pub proven: BTreeSet<u32>,
    liveness: Option<OwnedFd>,
    /// Found in its process, which has not come back yet and does not know the token.
    found: bool,
    outbox: Outbox,
}

impl Session {
    pub fn new(id: u64, socket: OwnedFd, peer: Peer) -> Session {
        let who = Introduction { program: String::new(), pid: 0, container: None };
        Session {
            id,
            stage: Stage::Greeting,
            since: Instant::now(),
            peer,
            who,
            seats: BTreeSet::new(),
            ahead: OnceCell::new(),
            socket: Some(socket),
            token: Token::default(),
            kept: false,
            unclaimed: BTreeSet::new(),
            proven: BTreeSet::new(),
            liveness: None,
            found: false,
            outbox: Outbox::default(),
        }
    }

    /// Another broker's: silent until it comes back or is proven dead.
    pub fn adopted(kept: KeptSession, pidfd: OwnedFd, liveness: OwnedFd) -> Session {
        Session {
            id: kept.session,
            stage: Stage::Silent,
            since: Instant::now(),
            peer: Peer { uid: kept.uid, pid: kept.pid, pidfd: Some(pidfd) },
            who: kept.who,
            seats: BTreeSet::new(),
            ahead: OnceCell::new(),
            socket: None,
            token: kept.token,
            kept: true,
            unclaimed: BTreeSet::new(),
            proven: BTreeSet::new(),
            liveness: Some(liveness),
            found: false,
            outbox: Outbox::default(),
        }
    }

    /// A process of which broker and keeper are gone.
    pub fn found(id: u64, member: &Member, pidfd: OwnedFd, liveness: OwnedFd) -> Result<Session, String> {
        let who = Introduction { program: printable(&member.program), pid: member.pid, container: None };
        let (uid, pid, token) = (member.uid, member.pid, random()?);
        let kept = KeptSession { session: id, token, uid, pid, who };
        Ok(Session { kept: false, found: true, ..Session::adopted(kept, pidfd, liveness) })
    }

    /// The inode of its liveness memfd.
    pub fn lives_by(&self) -> Option<u64> {
        self.liveness.as_ref().and_then(|fd| fstat(fd).ok()).map(|st| st.st_ino)
    }

    /// The process that this one was found in.
    pub fn is_found_as(&self, other: &Session) -> bool {
        self.found && self.lives_by().is_some() && self.lives_by() == other.lives_by()
    }

    pub fn take_liveness(&mut self) -> Option<OwnedFd> {
        self.liveness.take()
    }

    pub fn liveness(&self) -> Option<&OwnedFd> {
        self.liveness.as_ref()
    }

    /// Takes the client's word for who it is and its liveness memfd for proof that it lives. Fails when nothing
    /// could ever prove its death.
    pub fn introduce(&mut self, who: Introduction, liveness: OwnedFd) -> Result<(), String> {
        // A memfd, and nothing whose filesystem could keep us waiting at each look.
        if !memfd::is_sealed_to(&liveness, LIVENESS_SIZE) {
            return Err("the liveness descriptor is not a sealed memfd".into());
        }
        if self.peer.pidfd.is_none() {
            self.peer.pidfd = liveness::pidfd_of_owner(self.peer.pid, &liveness);
        }
        if self.peer.pidfd.is_none() {
            return Err(
                "this kernel cannot tell the broker when your process ends (SO_PEERPIDFD, Linux 6.5, or a \
                        shared pid namespace is needed)"
                    .into(),
            );
        }
        self.who = Introduction {
            program: printable(&who.program),
            pid: who.pid,
            container: who.container.as_deref().map(printable),
        };
        self.token = random()?;
        self.liveness = Some(liveness);
        self.stage = Stage::Open;
        Ok(())
    }

    /// Its socket is gone and its liveness byte is free: it exec'ed or closed everything; its locks go, as its
    /// POSIX locks would have.
    pub fn let_go(&self) -> bool {
        let free = || self.liveness.as_ref().is_none_or(|fd| byte::owner(fd).is_none());
        self.stage == Stage::Silent && free()
    }

    /// Sends, or keeps it for when there is room. Descriptors are duplicated only if it must be kept.
    pub fn send(&mut self, message: &FromBroker, fds: &[&OwnedFd]) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        self.outbox.send(socket, socket::encode(message)?, fds, OUTBOX_LIMIT)
    }

    /// Sends what was kept; true when nothing is left.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.socket.as_ref().map_or(Ok(true), |socket| self.outbox.flush(socket))
    }

    /// Everything that it was sent.
    pub fn has_read_all(&self) -> bool {
        self.outbox.is_empty() && self.socket.as_ref().is_some_and(socket::all_read)
    }

    pub fn has_unsent(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// By how many milliseconds its process's monotonic clock is ahead of the broker's. Looked at once.
    pub fn clock_ahead(&self) -> i64 {
        *self.ahead.get_or_init(|| clocks::ahead(self.peer.pid))
    }

    /// For logs: `python3 (pid 123)`.
    pub fn label(&self) -> String {
        format!("{} (pid {})", self.who.program, self.pid())
    }

    /// Its pid as the broker sees it, else as it sees itself.
    pub fn pid(&self) -> i32 {
        if self.peer.pid > 0 { self.peer.pid } else { self.who.pid }
    }
}
