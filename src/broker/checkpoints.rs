//! The checkpointer: a child process that copies WALs back into their databases, off everybody's commit path.
//!
//! The broker's loop must never do I/O on a client's file, and runs no SQL: so it only passes on descriptors that
//! members have sent, says which WAL has grown, and sees to it that there is a checkpointer. It says in the segment
//! whether its checkpointer is on duty; where it is not, members checkpoint as SQLite does.

use super::blame::Deaths;
use super::database::{Database, State};
use super::filesystem::mount_of;
use super::server::Server;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::CHECKPOINTER;
use crate::wire::checkpoint::{FromCheckpointer, Outcome, ToCheckpointer};
use crate::wire::message::{Role, SeatKey};
use crate::wire::socket;
use nix::sys::epoll::EpollFlags;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// What it has to do with one database.
#[derive(Debug, Default)]
pub struct Checkpoints {
    /// As the last member that opened it has sent it.
    wal: Option<OwnedFd>,
    /// The checkpointer knows the database: only once it has something to do there.
    introduced: bool,
    /// The checkpointer has been asked, and has not answered.
    since: Option<Instant>,
    /// While it was at work here.
    pub(super) deaths: Deaths,
    /// Asked in vain: not again before the next tick.
    paused: bool,
    /// The last broker's checkpointer may still be at work on it.
    pub predecessor: bool,
    /// It cannot be checkpointed here, and why.
    pub unable: Option<String>,
    /// Checkpoints that have copied something, and what the last one left.
    pub done: u64,
    pub frames: u32,
    pub backfilled: u32,
}

impl Checkpoints {
    pub fn is_running(&self) -> bool {
        self.since.is_some()
    }

    pub fn has_wal(&self) -> bool {
        self.wal.is_some()
    }

    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Somebody may be copying: this broker's checkpointer, or the last one's.
    pub fn is_busy(&self) -> bool {
        self.is_running() || self.predecessor
    }

    pub fn wal(&self) -> Option<&OwnedFd> {
        self.wal.as_ref()
    }

    pub(super) fn take_wal(&mut self) -> Option<OwnedFd> {
        self.wal.take()
    }

    /// As the last broker has got it from a member.
    pub fn adopt_wal(&mut self, wal: OwnedFd) {
        self.wal = Some(wal);
    }
}

impl Database {
    /// Who checkpoints, for `status`: `None`, the broker; else why members do.
    pub fn checkpoints_by_members(&self) -> Option<&str> {
        match self.checkpoint_words() {
            None => Some("guest mode"),
            Some(words) if words.duty.load(SeqCst) != 0 => None,
            Some(_) => Some(self.checkpoints.unable.as_deref().unwrap_or("the broker has no checkpointer")),
        }
    }

    /// Members may ask again after a checkpoint in vain.
    pub fn resume_checkpoints(&mut self) {
        if std::mem::take(&mut self.checkpoints.paused) {
            self.answer_writers();
        }
    }

    /// The checkpoint is over: writers may ask for the next one, and those that wait for it go on.
    pub(super) fn answer_writers(&self) {
        if let Some(words) = self.checkpoint_words() {
            words.asked.store(0, SeqCst);
            futex::wake_all(&words.asked);
        }
    }

    /// From now on members checkpoint.
    pub(super) fn leave_to_members(&mut self, reason: &str) {
        if self.checkpoints.unable.is_none() {
            tracing::warn!(database = ?self.identity, "checkpoints are left to its members: {reason}");
            self.checkpoints.unable = Some(reason.to_owned());
        }
        if let Some(words) = self.checkpoint_words().filter(|_| !planted("given-up-in-silence")) {
            words.duty.store(0, SeqCst);
            self.answer_writers();
        }
    }
}

impl Server {
    /// A database has been founded: its members need not checkpoint.
    pub(super) fn offer_checkpoints(&mut self, number: u32) {
        let founder = self.databases.get(&number).map_or(0, |d| d.founder);
        let given_up = self.checkpointer.given_up.clone().or_else(|| self.given_up_on(founder));
        let Some(db) = self.databases.get_mut(&number) else { return };
        match given_up {
            _ if self.options.checkpointer.is_none() => {}
            Some(reason) => db.leave_to_members(&reason),
            None => {
                if let Some(words) = db.checkpoint_words() {
                    words.duty.store(1, SeqCst);
                    db.table().members.set(CHECKPOINTER);
                }
            }
        }
    }

    /// A member has opened the WAL.
    pub(super) fn wal_file(&mut self, session: u64, key: SeatKey, fds: Vec<OwnedFd>) {
        let Some(pid) = self.sessions.get(&session).map(|s| s.peer.pid) else { return };
        let (allowed, foreign) = (self.options.allow_unsafe, self.is_foreign(session));
        let Some(db) = self.databases.get_mut(&key.database) else { return };
        let writes = db.seats.get(&key.seat).is_some_and(|s| s.role == Role::ReadWrite);
        let Some(wal) = fds.into_iter().next().filter(|_| writes && !db.is_guest()) else { return };
        if db.checkpoint_words().is_none_or(|w| w.duty.load(SeqCst) == 0) {
            return;
        }
        // Before anybody touches it. Another user's was looked at by whoever received it.
        match if foreign { None } else { Some(mount_of(&wal, pid, &[])) } {
            None => {}
            Some(Some(mount)) if mount.is_local() || allowed => {}
            Some(Some(mount)) => return db.leave_to_members(&mount.reason()),
            Some(None) => {
                return db.leave_to_members("the broker cannot tell which filesystem its WAL is on");
            }
        }
        self.keeping.wal(key.database, &wal);
        let (before, founder) = (db.checkpoints.wal.replace(wal), db.founder);
        if db.checkpoints.introduced {
            self.pass_wal(key.database);
        }
        before.into_iter().for_each(|wal| self.close(founder, wal));
    }

    /// Tells the checkpointer of a database and its WAL.
    fn introduce(&mut self, number: u32) {
        if let Err(e) = self.start_checkpointer() {
            return self.give_up(&format!("the checkpointer cannot be started: {e}"));
        }
        let Some(db) = self.databases.get(&number) else { return };
        let State::Gated { gate, segment } = &db.state else { return };
        let fds = [&segment.control_fd, &segment.wal_index_fd, gate.database()];
        let message = ToCheckpointer::Database { database: number, nonce: segment.nonce };
        let sent = self.checkpointer.send(&message, &fds);
        self.told(sent);
        self.pass_wal(number);
    }

    fn pass_wal(&mut self, number: u32) {
        let Some(wal) = self.databases.get(&number).and_then(|d| d.checkpoints.wal.as_ref()) else { return };
        let sent = self.checkpointer.send(&ToCheckpointer::Wal { database: number }, &[wal]);
        self.told(sent);
    }

    /// The WAL of a database is due.
    pub(super) fn wal_grew(&mut self, number: u32) {
        let Some(db) = self.databases.get_mut(&number) else { return };
        let state = &mut db.checkpoints;
        if state.is_running() || state.unable.is_some() {
            return;
        }
        if state.wal.is_none() || state.predecessor {
            return self.pause_checkpoints(number); // somebody will send it, or it will end
        }
        if !self.may_checkpoint(number, Instant::now()) {
            return self.pause_checkpoints(number);
        }
        self.order_checkpoint(number);
    }

    fn order_checkpoint(&mut self, number: u32) {
        let Some(db) = self.databases.get_mut(&number) else { return };
        if !std::mem::replace(&mut db.checkpoints.introduced, true) {
            self.introduce(number);
        }
        let Some(db) = self.databases.get_mut(&number).filter(|d| d.checkpoints.unable.is_none()) else {
            return;
        };
        db.checkpoints.since = Some(Instant::now());
        self.checkpointing.insert(number);
        let sent = self.checkpointer.send(&ToCheckpointer::Checkpoint { database: number }, &[]);
        self.told(sent);
    }

    fn pause_checkpoints(&mut self, number: u32) {
        if let Some(db) = self.databases.get_mut(&number) {
            db.checkpoints.paused = true;
            self.paused.insert(number);
        }
    }

    /// The database's last member has left. True: the checkpointer says when it has closed what it has of it.
    pub(super) fn end_checkpoints(&mut self, number: u32) -> bool {
        let introduced = self.databases.get(&number).is_some_and(|d| d.checkpoints.introduced);
        if introduced {
            let sent = self.checkpointer.send(&ToCheckpointer::Forget { database: number }, &[]);
            self.told(sent);
        }
        introduced && self.checkpointer.running.is_some()
    }

    /// Something of the checkpointer's to read, or room to write.
    pub(super) fn checkpointer_event(&mut self, flags: EpollFlags) {
        if flags.contains(EpollFlags::EPOLLOUT) {
            let flushed = self.checkpointer.flush();
            self.told(flushed);
        }
        for _ in 0..32 {
            let Some(running) = &self.checkpointer.running else { return };
            let message = match socket::receive(&running.socket).and_then(|p| p.decode()) {
                Ok(message) => message,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // The rest is the pidfd's to say.
                    let _ = self.epoll.delete(&running.socket);
                    return self.checkpointer.kill();
                }
            };
            match message {
                FromCheckpointer::Done { database, outcome } => self.checkpoint_done(database, outcome),
                FromCheckpointer::Forgotten { database } => self.checkpointer_forgot(Some(database)),
                FromCheckpointer::Kick => self.touched.extend(&self.watched),
            }
        }
    }

    fn checkpoint_done(&mut self, number: u32, outcome: Outcome) {
        self.checkpointing.remove(&number);
        self.touched.insert(number);
        let Some(db) = self.databases.get_mut(&number) else { return };
        let state = &mut db.checkpoints;
        let took = state.since.take().map(|since| since.elapsed());
        tracing::debug!(database = number, ?outcome, ?took, "checkpoint");
        match outcome {
            Outcome::Copied { frames, backfilled } => {
                // Readers may stand in the way: not asked again at once.
                let begun_anew = frames < state.frames;
                let moved = frames == backfilled || begun_anew || backfilled > state.backfilled;
                (state.frames, state.backfilled) = (frames, backfilled);
                state.done += 1;
                state.paused = !moved;
            }
            Outcome::Nothing => state.paused = true,
            Outcome::Unable(reason) => db.leave_to_members(&reason),
            Outcome::SyncFailed(reason) => {
                tracing::error!(database = ?db.identity, "{reason}: the segment is poisoned");
                if let State::Gated { segment, .. } = &db.state {
                    segment.control.poison();
                }
            }
        }
        match db.checkpoints.paused {
            true => drop(self.paused.insert(number)),
            false => db.answer_writers(),
        }
        self.drop_if_unused(number);
    }

    /// The kernel says that it is dead: what it held is cleared, and another one started.
    pub(super) fn checkpointer_died(&mut self) {
        let Some(mut running) = self.checkpointer.running.take() else { return };
        let status = running.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
        let _ = self.epoll.delete(&running.socket);
        let _ = self.epoll.delete(&running.pidfd);
        self.checkpointer_forgot(None);
        if !running.replaced {
            self.blame(&status);
        }
        let known: Vec<u32> =
            self.databases.iter().filter(|(_, d)| d.checkpoints.introduced).map(|(n, _)| *n).collect();
        self.checkpointing.clear();
        self.touched.extend(&known);
        for number in &known {
            let Some(db) = self.databases.get_mut(number) else { continue };
            if !planted("dead-checkpointer-keeps-locks") {
                db.lane().remove(CHECKPOINTER);
                db.table().members.set(CHECKPOINTER);
            }
            db.checkpoints.since = None;
            if let Some(words) = db.checkpoint_words() {
                words.brake.store(0, SeqCst);
            }
            db.answer_writers();
        }
        if self.checkpointer.given_up.is_some() {
            return self.drop_all_unused();
        }
        if self.stopping.is_none() {
            tracing::warn!("the checkpointer ended ({status}): another one is started");
        }
        for number in known {
            if self.databases.get(&number).is_some_and(|d| d.seats.is_empty()) {
                self.drop_if_unused(number);
            } else if self.stopping.is_none() && !self.is_unable(number) {
                self.introduce(number);
            }
        }
    }

    fn is_unable(&self, number: u32) -> bool {
        self.databases.get(&number).is_none_or(|d| d.checkpoints.unable.is_some())
    }

    /// No checkpointer: for every database members do it, now and later.
    pub(super) fn give_up(&mut self, reason: &str) {
        tracing::error!("{reason}");
        self.checkpointer.given_up = Some(reason.to_owned());
        self.databases.values_mut().filter(|d| !d.is_guest()).for_each(|d| d.leave_to_members(reason));
        self.drop_all_unused();
    }

    fn drop_all_unused(&mut self) {
        let empty: Vec<u32> =
            self.databases.iter().filter(|(_, d)| d.seats.is_empty()).map(|(n, _)| *n).collect();
        empty.into_iter().for_each(|n| self.drop_if_unused(n));
    }
}
