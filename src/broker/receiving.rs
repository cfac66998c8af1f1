//! Packets with descriptors of other users: received by a process of their own for each user, which may be thrown away. The
//! broker looks whether a packet has descriptors before it receives it, and never has one that is not passed on by such a
//! process. To that process it also gives back what it has no use for any more: the broker closes nothing last that another
//! user has sent.

use super::database::{Database, State};
use super::foreign::{self, MOST_ASIDE};
use super::liveness::peer_of;
use super::server::{KEYS, MOST_A_ROUND, RECEIVER, Server};
use crate::closing::{self, IDLE, LIMIT, MOST_LEAVING};
use crate::planted::planted;
use crate::wire::receiver::{FromReceiver, Received, ToReceiver};
use crate::wire::socket::{self, Packet};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Child;
use std::time::Instant;

/// Whose what is that nobody of one user alone has sent.
const SHARED: u32 = u32::MAX;

/// By numbers from the same row as sessions'.
#[derive(Debug, Default)]
pub struct Receivers {
    running: BTreeMap<u64, Receiver>,
    leaving: Vec<(u32, Child)>,
    /// What nobody could be given yet, by user. It is not closed here.
    waiting: Vec<(u32, mem::ManuallyDrop<OwnedFd>)>,
}

#[derive(Debug)]
struct Receiver {
    uid: u32,
    child: Child,
    socket: OwnedFd,
    /// Sessions whose packet it was asked for, and when.
    asked: BTreeMap<u64, Instant>,
    /// What it was given to close and has not closed, and since when nothing of it.
    closing: u64,
    /// What it was ever given to close.
    given: u64,
    used: Instant,
    /// It does not answer, and those before it did not either: what is to be closed of this user's stays in its queue.
    parked: bool,
}

impl Receiver {
    /// Since when it owes an answer.
    fn owes(&self) -> Option<Instant> {
        if self.parked {
            return None;
        }
        let closing = (self.closing != 0).then_some(self.used);
        self.asked.values().copied().chain(closing).min()
    }
}

impl Receivers {
    fn reap(&mut self) {
        self.leaving.retain_mut(|(_, child)| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// When one of them will have taken too long.
    pub fn limit(&self) -> Option<Instant> {
        self.running.values().filter_map(Receiver::owes).min().map(|at| at + LIMIT)
    }

    /// How many of this user were thrown away and have not ended.
    pub fn stuck(&self, uid: u32) -> usize {
        self.leaving.iter().filter(|(user, _)| *user == uid).count()
    }

    pub fn stuck_users(&self) -> impl Iterator<Item = u32> + '_ {
        let leaving = self.leaving.iter().map(|(uid, _)| *uid);
        leaving.chain(self.running.values().filter(|r| r.parked).map(|r| r.uid)).filter(|uid| *uid != SHARED)
    }

    /// The last that it gets does not answer either.
    pub fn is_parked(&self, uid: u32) -> bool {
        self.running.values().any(|r| r.uid == uid && r.parked)
    }

    /// All that this receiver was given up to the mark is closed, or has taken too long.
    pub fn has_closed(&self, (number, mark): (u64, u64)) -> bool {
        self.running.get(&number).is_none_or(|r| r.parked || r.given - r.closing >= mark)
    }

    /// What it has sent keeps so many from ending that nothing more is received of it.
    pub fn is_outcast(&self, uid: u32) -> bool {
        self.stuck(uid) >= MOST_LEAVING && !planted("hangs-without-limit") || self.is_parked(uid)
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
        if self.receivers.is_outcast(uid) {
            return Err(format!("what user {uid} has sent keeps processes from ending"));
        }
        let message = socket::encode(&ToReceiver::Receive { session: id, pid }).map_err(|e| e.to_string())?;
        let raw = [socket.as_raw_fd()];
        // Its next packets wait until this one is here.
        let _ = self.epoll.delete(socket);
        let number = self.receiver_of(uid).map_err(|e| format!("no process to receive in: {e}"))?;
        let receiver = self.receivers.running.get_mut(&number).ok_or("gone")?;
        socket::send(&receiver.socket, &message, &raw).map_err(|e| format!("its receiver: {e}"))?;
        let now = Instant::now();
        if receiver.closing == 0 {
            receiver.used = now;
        }
        receiver.asked.insert(id, now);
        Ok(())
    }

    fn receiver_of(&mut self, uid: u32) -> io::Result<u64> {
        let known = self.receivers.running.iter().find(|(_, r)| r.uid == uid).map(|(n, _)| *n);
        known.map_or_else(|| self.start_receiver(uid), Ok)
    }

    /// Closes what a user has sent, elsewhere: nothing here waits for it.
    pub(super) fn close(&mut self, uid: u32, fd: OwnedFd) {
        // Where nobody else may connect, nobody else's files are about.
        if !self.closes_elsewhere() {
            return;
        }
        let uid = if self.is_trusted(uid) { SHARED } else { uid };
        self.receivers.waiting.push((uid, mem::ManuallyDrop::new(fd)));
    }

    fn closes_elsewhere(&self) -> bool {
        self.options.everyone && self.options.receiver.is_some() && !planted("closed-by-the-broker")
    }

    /// The same for a Unix socket, which is mostly empty.
    pub(super) fn close_socket(&mut self, uid: u32, socket: OwnedFd) {
        if self.is_trusted(uid) || !self.closes_elsewhere() {
            return;
        }
        if let Err(laden) = socket::close_unless_laden(socket) {
            self.close(uid, laden);
        }
    }

    /// Another descriptor of each, for [`Server::close`]: whoever closes the first does not close the last.
    pub(super) fn seconds(&self, uid: u32, fds: &[OwnedFd]) -> Vec<OwnedFd> {
        let none = self.is_trusted(uid) || fds.is_empty();
        if none { Vec::new() } else { fds.iter().filter_map(|fd| fd.try_clone().ok()).collect() }
    }

    /// The database has been dropped: the files that its members have sent are closed elsewhere.
    pub(super) fn close_database(&mut self, mut db: Database) -> State {
        let (founder, wal) = (db.founder, db.checkpoints.take_wal());
        let mut last = Vec::from_iter(wal);
        if let (true, State::Gated { gate, segment }) = (self.closes_elsewhere(), &db.state) {
            let files = [gate.database(), &segment.control_fd, &segment.wal_index_fd].into_iter();
            last.extend(files.chain(gate.shm()).filter_map(|fd| fd.try_clone().ok()));
            // Members may have put something into it.
            if let Ok(Err(laden)) = gate.hold().broker_end().try_clone().map(socket::close_unless_laden) {
                last.push(laden);
            }
        }
        last.into_iter().for_each(|fd| self.close(founder, fd));
        db.state
    }

    /// Gives away what is to be closed.
    pub(super) fn close_elsewhere(&mut self) {
        for (uid, fd) in foreign::dropped() {
            self.close(uid, fd);
        }
        let mut of: BTreeMap<u32, Vec<OwnedFd>> = BTreeMap::new();
        for (uid, fd) in mem::take(&mut self.receivers.waiting) {
            of.entry(uid).or_default().push(mem::ManuallyDrop::into_inner(fd));
        }
        for (uid, mut fds) in of {
            let number = self.receiver_of(uid).ok();
            while let (Some(number), false) = (number, fds.is_empty())
                && self.give(number, &mut fds)
            {}
            let left = fds.into_iter().map(|fd| (uid, mem::ManuallyDrop::new(fd)));
            self.receivers.waiting.extend(left);
        }
    }

    /// What is to be closed of this user's by now: see [`Receivers::has_closed`].
    pub(super) fn closing_mark(&mut self, uid: u32) -> Option<(u64, u64)> {
        self.close_elsewhere();
        let uid = if self.is_trusted(uid) { SHARED } else { uid };
        if planted("receivers-not-waited-for") {
            return None;
        }
        let of = self.receivers.running.iter().find(|(_, r)| r.uid == uid && r.closing != 0);
        of.map(|(number, r)| (*number, r.given))
    }

    /// Some of them, or false.
    fn give(&mut self, number: u64, fds: &mut Vec<OwnedFd>) -> bool {
        let Some(receiver) = self.receivers.running.get_mut(&number) else { return false };
        if !closing::give(&receiver.socket, fds) {
            return false;
        }
        if receiver.owes().is_none() {
            receiver.used = Instant::now();
        }
        receiver.closing += 1;
        receiver.given += 1;
        true
    }

    /// The broker is about to end: what other users have sent, or may still send, it does not close last.
    pub(super) fn let_go_of_all(&mut self) {
        let ids: Vec<u64> = self.sessions.keys().copied().collect();
        for id in ids {
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            let (uid, socket) = (session.peer.uid, session.socket.take());
            socket.into_iter().for_each(|socket| self.close_socket(uid, socket));
        }
        self.forming.clear();
        if !self.handing_over && self.closes_elsewhere() {
            // Whoever has knocked may have said something already.
            for socket in self.listener.end() {
                let uid = peer_of(&socket).map_or(SHARED, |peer| peer.uid);
                self.close_socket(uid, socket);
            }
        }
        self.close_elsewhere();
    }

    fn start_receiver(&mut self, uid: u32) -> io::Result<u64> {
        self.receivers.reap();
        if self.receivers.stuck(uid) >= MOST_LEAVING && !planted("hangs-without-limit") {
            return Err(io::Error::other("those before do not end"));
        }
        let program = self.options.receiver.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let (child, socket) = closing::start(program)?;
        let number = self.next_session;
        self.next_session += 1;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, number * KEYS + RECEIVER))?;
        tracing::debug!(uid, pid = child.id(), "receiver started");
        let (asked, used) = (BTreeMap::new(), Instant::now());
        self.receivers.running.insert(
            number,
            Receiver { uid, child, socket, asked, closing: 0, given: 0, used, parked: false },
        );
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
            let answer = socket::receive(&receiver.socket).and_then(|p| Ok((p.decode::<FromReceiver>()?, p)));
            let (answer, packet) = match answer {
                Ok(answer) => answer,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.throw_away(number),
            };
            (receiver.used, receiver.parked) = (Instant::now(), false);
            let uid = receiver.uid;
            match answer {
                FromReceiver::Closed => {
                    receiver.closing = receiver.closing.saturating_sub(1);
                    self.receivers_have_closed();
                }
                FromReceiver::Received(answer) => {
                    receiver.asked.remove(&answer.session);
                    self.take_received(uid, answer, packet);
                }
            }
            self.shares.charge(uid, begun.elapsed());
        }
    }

    fn take_received(&mut self, uid: u32, answer: Received, packet: Packet) {
        if let Some((count, _)) = &answer.strange {
            (0..*count).for_each(|_| self.users.set_aside(uid));
        }
        let seconds = self.seconds(uid, &packet.fds);
        if let Some(socket) = self.sessions.get(&answer.session).and_then(|s| s.socket.as_ref()) {
            let _ = self.epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, answer.session * KEYS));
            self.watch_for_room(answer.session);
            let Received { session, bytes, fds_lost, too_much, strange, judged } = answer;
            let fds_lost = fds_lost || packet.fds_lost;
            let whole = Packet { bytes, fds: packet.fds, fds_lost, too_much };
            if let Err(reason) = self.received(session, whole, strange.map(|(_, why)| why), judged) {
                self.end_session(session, &reason);
            }
        } else {
            drop(packet);
        }
        seconds.into_iter().for_each(|fd| self.close(uid, fd));
    }

    /// Those that do not answer are thrown away, and those that have nothing to do.
    pub(super) fn limit_receivers(&mut self, now: Instant) {
        self.receivers.reap();
        let late = |r: &Receiver| r.owes().is_some_and(|at| now.saturating_duration_since(at) >= LIMIT);
        let idle =
            |r: &Receiver| r.owes().is_none() && !r.parked && now.saturating_duration_since(r.used) >= IDLE;
        let done = self.receivers.running.iter().filter(|(_, r)| late(r) || idle(r));
        let done: Vec<u64> = done.map(|(number, _)| *number).collect();
        done.into_iter().for_each(|number| self.throw_away(number));
        for (uid, socket) in self.users.spent() {
            self.close_socket(uid, socket);
        }
        self.close_elsewhere();
    }

    fn throw_away(&mut self, number: u64) {
        let Some(mut receiver) = self.receivers.running.remove(&number) else { return };
        let (uid, late) = (receiver.uid, receiver.owes().is_some());
        let asked = mem::take(&mut receiver.asked);
        let _ = receiver.child.kill();
        let stuck = self.receivers.stuck(uid) + 1;
        if late && stuck >= MOST_LEAVING && !planted("hangs-without-limit") {
            receiver.parked = true;
            self.receivers.running.insert(number, receiver);
            tracing::warn!(
                uid,
                stuck,
                "what this user has sent keeps processes from ending: it is let in no more"
            );
        } else {
            let _ = self.epoll.delete(&receiver.socket);
            self.receivers.leaving.push((uid, receiver.child));
            if late && self.users.may_say(uid) {
                tracing::warn!(uid, stuck, "a process that handles what this user has sent does not answer");
            }
        }
        for session in asked.into_keys() {
            self.end_session(session, "what it sent could not be received");
        }
        self.receivers_have_closed();
    }
}
