//! The finder's process: it looks for what a broker and its keeper have left to nobody but their members, and may be thrown
//! away at any time. What it finds is [`super::found`]'s.

use super::database::State;
use super::found::{Findings, Member};
use super::server::{SEARCH_SOCKET, Server};
use crate::planted::planted;
use crate::wire::finder::{Found, Search};
use crate::wire::socket;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Then it is done without what it would still have found.
const LIMIT: Duration = Duration::from_secs(2);
/// From the beginning of one search to that of the next.
const BETWEEN: Duration = Duration::from_millis(250);
/// What the finder is told not to look at; more than that it looks at in vain.
const MOST_NAMED: usize = 500;
/// How many finders may be on their way out. One may have met a filesystem that never answers.
const MOST_LEAVING: usize = 8;

#[derive(Debug, Default)]
pub struct Searching {
    running: Option<Running>,
    leaving: Vec<Child>,
    /// Databases of which nobody has come back, as far as was known.
    unclaimed: BTreeSet<u32>,
    last: Option<Instant>,
    begun: u64,
    ended: u64,
}

#[derive(Debug)]
struct Running {
    child: Child,
    socket: OwnedFd,
    since: Instant,
    findings: Findings,
}

impl Searching {
    /// Starts a search, unless one has begun just now.
    fn begin(&mut self, program: &Path, search: &Search, epoll: &Epoll) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        socket::send(&ours, &socket::encode(search)?, &[])?;
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mut command = Command::new(program);
        command.arg("finder").stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let child = command.spawn()?;
        epoll.add(&ours, EpollEvent::new(EpollFlags::EPOLLIN, SEARCH_SOCKET))?;
        let since = Instant::now();
        (self.last, self.begun) = (Some(since), self.begun + 1);
        self.running = Some(Running { child, socket: ours, since, findings: Findings::default() });
        Ok(())
    }

    fn may_begin(&mut self, now: Instant) -> bool {
        self.reap();
        self.running.is_none()
            && self.leaving.len() < MOST_LEAVING
            && self.last.is_none_or(|last| now.duration_since(last) >= BETWEEN)
    }

    /// The number of the search that begins next, or `None`: too many are on their way out.
    pub fn next(&self) -> Option<u64> {
        (self.leaving.len() < MOST_LEAVING).then_some(self.begun + 1)
    }

    /// Whether the members of a database that nobody claims are being looked for: then it is looked at again at the end.
    pub fn looks_for(&mut self, database: u32) -> bool {
        if self.running.is_some() {
            self.unclaimed.insert(database);
        }
        self.running.is_some()
    }

    pub fn has_ended(&self, search: u64) -> bool {
        self.ended >= search
    }

    /// Processes that have ended are no zombies.
    pub fn reap(&mut self) {
        self.leaving.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    pub fn limit(&self) -> Option<Instant> {
        self.running.as_ref().map(|r| r.since + LIMIT)
    }

    /// It has ended, or is ended: nobody waits for its process.
    fn end(&mut self, epoll: &Epoll) -> Option<Findings> {
        let mut running = self.running.take()?;
        let _ = epoll.delete(&running.socket);
        let _ = running.child.kill();
        self.leaving.push(running.child);
        self.ended = self.begun;
        Some(running.findings)
    }
}

impl Server {
    /// Looks for members that were left alone: sees to it that the search of this number begins, if it is time.
    pub(super) fn search(&mut self, now: Instant, number: u64) {
        let Some(program) = self.options.finder.clone() else { return };
        if planted("members-not-looked-for")
            || self.searching.begun >= number
            || !self.searching.may_begin(now)
            || self.stopping.is_some()
        {
            return;
        }
        let gated = self.databases.values().filter_map(|d| match &d.state {
            State::Gated { segment, .. } => Some(segment.nonce),
            State::Guest { .. } => None,
        });
        let search = Search {
            place: self.listener.place(),
            known: gated.take(MOST_NAMED).collect(),
            passed_over: self.users.outcasts().take(MOST_NAMED).collect(),
        };
        if let Err(e) = self.searching.begin(&program, &search, &self.epoll) {
            tracing::error!("cannot look for members of the last broker: {e}");
            // Whoever waits for it need not.
            (self.searching.begun, self.searching.ended) =
                (self.searching.begun + 1, self.searching.begun + 1);
        }
    }

    /// Something of the finder's to read.
    pub(super) fn search_event(&mut self) {
        loop {
            let Some(running) = &mut self.searching.running else { return };
            let packet = match socket::receive(&running.socket) {
                Ok(packet) if !packet.fds_lost => packet,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // It was killed, say.
                _ => return self.end_search(),
            };
            let found = packet.decode();
            let mut fds = packet.fds.into_iter();
            match found {
                Ok(Found::Member { pid, uid, program }) => {
                    // Whoever is not known at the end is dead: nobody may be left out.
                    let (Some(pidfd), Some(liveness)) = (fds.next(), fds.next()) else {
                        return self.end_search();
                    };
                    running.findings.members.push(Member { pid, uid, program, pidfd, liveness });
                }
                Ok(Found::Segment { nonce, uid }) => {
                    if let (Some(a), Some(b), Some(c)) = (fds.next(), fds.next(), fds.next()) {
                        running.findings.segments.push((nonce, uid, [a, b, c]));
                    }
                }
                Ok(Found::Strange { uid }) => {
                    tracing::warn!(uid, "a process imitates members, with files that may never answer");
                    self.users.set_aside(uid);
                }
                Ok(Found::All { complete }) => {
                    running.findings.complete = complete;
                    return self.end_search();
                }
                Err(_) => return self.end_search(),
            }
        }
    }

    /// It has taken too long.
    pub(super) fn limit_search(&mut self, now: Instant) {
        if self.searching.limit().is_some_and(|limit| now >= limit) {
            tracing::warn!("the search for members of the last broker did not end");
            self.end_search();
        }
    }

    fn end_search(&mut self) {
        if let Some(findings) = self.searching.end(&self.epoll) {
            self.take_found(findings);
            for number in mem::take(&mut self.searching.unclaimed) {
                self.drop_if_unused(number);
            }
        }
    }
}
