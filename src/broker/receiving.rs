//! Packets with descriptors of other users: received by a process of their own for each user, which may be thrown away. The
//! broker looks whether a packet has descriptors before it receives it, and never has one that is not passed on by such a
//! process.

use super::foreign::MOST_ASIDE;
use super::server::{KEYS, MOST_A_ROUND, RECEIVER, Server};
use crate::wire::receiver::{Receive, Received};
use crate::wire::socket::{self, Packet};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A receiver asks no file anything. One that does not answer for so long is thrown away.
const LIMIT: Duration = Duration::from_secs(2);
/// It ends when its user has sent nothing for so long.
const IDLE: Duration = Duration::from_secs(10);
/// So many receivers of one user may be on their way out.
const MOST_LEAVING: usize = 4;

/// By numbers from the same row as sessions'.
#[derive(Debug, Default)]
pub struct Receivers {
    running: BTreeMap<u64, Receiver>,
    leaving: Vec<(u32, Child)>,
}

#[derive(Debug)]
struct Receiver {
    uid: u32,
    child: Child,
    socket: OwnedFd,
    /// Sessions whose packet it was asked for, and when.
    asked: BTreeMap<u64, Instant>,
    used: Instant,
}

impl Receivers {
    fn reap(&mut self) {
        self.leaving.retain_mut(|(_, child)| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// When one of them will have taken too long.
    pub fn limit(&self) -> Option<Instant> {
        let asked = self.running.values().flat_map(|r| r.asked.values());
        asked.min().map(|at| *at + LIMIT)
    }
}

impl Server {
    /// There is a packet with descriptors in the session's socket, and it is not to be received here.
    pub(super) fn receive_elsewhere(&mut self, id: u64) {
        if let Err(reason) = self.ask_receiver(id) {
            self.end_session(id, &reason);
        }
    }

    fn ask_receiver(&mut self, id: u64) -> Result<(), String> {
        let session = self.sessions.get(&id).ok_or("gone")?;
        let (uid, pid) = (session.peer.uid, session.peer.pid);
        let socket = session.socket.as_ref().ok_or("gone")?;
        if self.users.is_outcast(uid) {
            return Err(format!("user {uid} has sent {MOST_ASIDE} descriptors that may never answer"));
        }
        let message = socket::encode(&Receive { session: id, pid }).map_err(|e| e.to_string())?;
        let raw = [socket.as_raw_fd()];
        // Its next packets wait until this one is here.
        let _ = self.epoll.delete(socket);
        let known = self.receivers.running.iter().find(|(_, r)| r.uid == uid).map(|(n, _)| *n);
        let number = match known {
            Some(number) => number,
            None => self.start_receiver(uid).map_err(|e| format!("no process to receive in: {e}"))?,
        };
        let receiver = self.receivers.running.get_mut(&number).ok_or("gone")?;
        socket::send(&receiver.socket, &message, &raw).map_err(|e| format!("its receiver: {e}"))?;
        receiver.used = Instant::now();
        receiver.asked.insert(id, receiver.used);
        Ok(())
    }

    fn start_receiver(&mut self, uid: u32) -> io::Result<u64> {
        self.receivers.reap();
        if self.receivers.leaving.iter().filter(|(user, _)| *user == uid).count() >= MOST_LEAVING {
            return Err(io::Error::other("those before do not end"));
        }
        let program = self.options.receiver.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mut command = Command::new(program);
        command.arg("receiver").stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let child = command.spawn()?;
        let number = self.next_session;
        self.next_session += 1;
        self.epoll.add(&ours, EpollEvent::new(EpollFlags::EPOLLIN, number * KEYS + RECEIVER))?;
        tracing::debug!(uid, pid = child.id(), "receiver started");
        let (asked, used) = (BTreeMap::new(), Instant::now());
        self.receivers.running.insert(number, Receiver { uid, child, socket: ours, asked, used });
        Ok(number)
    }

    /// Something of a receiver's to read.
    pub(super) fn receiver_event(&mut self, number: u64) {
        for _ in 0..MOST_A_ROUND {
            let Some(receiver) = self.receivers.running.get_mut(&number) else { return };
            if !self.shares.has_more(receiver.uid) {
                return;
            }
            let begun = Instant::now();
            let answer = socket::receive(&receiver.socket).and_then(|p| Ok((p.decode::<Received>()?, p)));
            let (answer, packet) = match answer {
                Ok(answer) => answer,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.throw_away(number),
            };
            let uid = receiver.uid;
            receiver.asked.remove(&answer.session);
            if let Some((count, _)) = &answer.strange {
                (0..*count).for_each(|_| self.users.set_aside(uid));
            }
            let Some(socket) = self.sessions.get(&answer.session).and_then(|s| s.socket.as_ref()) else {
                continue;
            };
            let _ = self.epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, answer.session * KEYS));
            self.watch_for_room(answer.session);
            let Received { session, bytes, fds_lost, too_much, strange } = answer;
            let fds_lost = fds_lost || packet.fds_lost;
            let whole = Packet { bytes, fds: packet.fds, fds_lost, too_much };
            if let Err(reason) = self.received(session, whole, strange.map(|(_, why)| why)) {
                self.end_session(session, &reason);
            }
            self.shares.charge(uid, begun.elapsed());
        }
    }

    /// Those that do not answer are thrown away, and those that have nothing to do.
    pub(super) fn limit_receivers(&mut self, now: Instant) {
        let late = |r: &Receiver| r.asked.values().any(|at| now.duration_since(*at) >= LIMIT);
        let idle = |r: &Receiver| r.asked.is_empty() && now.saturating_duration_since(r.used) >= IDLE;
        let done = self.receivers.running.iter().filter(|(_, r)| late(r) || idle(r));
        let done: Vec<u64> = done.map(|(number, _)| *number).collect();
        done.into_iter().for_each(|number| self.throw_away(number));
        self.receivers.reap();
    }

    fn throw_away(&mut self, number: u64) {
        let Some(mut receiver) = self.receivers.running.remove(&number) else { return };
        let _ = self.epoll.delete(&receiver.socket);
        let _ = receiver.child.kill();
        self.receivers.leaving.push((receiver.uid, receiver.child));
        for session in receiver.asked.into_keys() {
            self.end_session(session, "what it sent could not be received");
        }
    }
}
