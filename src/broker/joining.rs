//! From a judged descriptor to a seat: the gate, or guest mode when plain clients hold the file.

use super::database::{Database, Seat, Segment, State};
use super::foreign::{JudgedJoin, Second};
use super::forming::{Forming, Pending};
use super::join::{self, Candidate, Refused};
use super::limits::{MOST_JOINS, READERS, READERS_OF_A_USER, too_many};
use super::server::Server;
use crate::lock::occupied::Occupied;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::wire::message::{FromBroker, Join, Joined, Mode, Refusal, Role, SeatKey};
use std::os::fd::OwnedFd;
use std::time::{Instant, SystemTime};

impl Server {
    /// A `Join` message.
    pub(super) fn join(
        &mut self,
        session: u64,
        id: u64,
        join: Join,
        fds: Vec<OwnedFd>,
        judged: Option<JudgedJoin>,
    ) {
        if let Err((why, reason)) = self.try_join(session, id, join, fds, judged) {
            self.refuse(session, id, why, reason);
        }
    }

    pub(super) fn refuse(&mut self, session: u64, id: u64, why: Refusal, reason: String) {
        if let Some(s) = self.sessions.get(&session)
            && self.users.may_say(s.peer.uid)
        {
            tracing::info!(session, client = s.label(), ?why, "join refused: {reason}");
        }
        self.send(session, &FromBroker::Refused { id, why, reason });
    }

    fn try_join(
        &mut self,
        session: u64,
        id: u64,
        join: Join,
        fds: Vec<OwnedFd>,
        judged: Option<JudgedJoin>,
    ) -> Result<(), Refused> {
        if self.stopping.is_some() {
            return Err((Refusal::Stopping, "the broker is stopping".into()));
        }
        let Some(s) = self.sessions.get(&session) else { return Ok(()) };
        let uid = s.peer.uid;
        // An unsafe place harms its own users; but only the broker's own user may ask for it, because touching
        // a hostile file can hang the broker.
        let own_user = s.peer.uid == nix::unistd::geteuid().as_raw() || s.peer.uid == 0;
        let lenient = self.options.allow_unsafe || (join.allow_unsafe && own_user);
        let candidate = match judged {
            Some(judged) => Candidate::of(judged?, fds)?,
            None => join::judge(&join, fds, s.peer.pid, lenient)?,
        };
        if lenient && join.allow_unsafe {
            tracing::warn!(
                session,
                name = candidate.home.display(),
                "filesystem checks overridden by the client"
            );
        }
        let waiting = self.forming.iter().flat_map(|f| &f.joins).filter(|p| p.session == session).count();
        if waiting >= MOST_JOINS {
            return Err((Refusal::Exhausted, format!("{waiting} joins of this process wait already")));
        }
        let files = [Some(&candidate.database), candidate.shm.as_ref()].into_iter().flatten();
        let seconds = files.filter(|_| !self.is_trusted(uid)).filter_map(|fd| Second::of(uid, fd)).collect();
        let pending = Pending { session, id, join, candidate, _seconds: seconds };
        let identity = pending.candidate.identity;
        if let Some(number) = self.number_of(identity) {
            return self.take_seat(number, pending);
        }
        if let Some(f) =
            self.forming.iter_mut().find(|f| f.joins.iter().any(|p| p.candidate.identity == identity))
        {
            f.joins.push(pending);
            return Ok(());
        }
        let limit = self.options.limits.databases;
        let mine = |p: &Pending| self.sessions.get(&p.session).is_some_and(|s| s.peer.uid == uid);
        let forming = self.forming.iter().filter(|f| f.joins.first().is_some_and(mine)).count();
        if self.users.databases(uid) + forming >= limit && !planted("users-without-limit") {
            return Err(too_many(uid, "databases", limit, "databases"));
        }
        let now = Instant::now();
        self.try_new(Forming::new(pending, now), now);
        Ok(())
    }

    pub(super) fn number_of(&self, identity: super::database::Identity) -> Option<u32> {
        self.numbers.get(&identity).copied()
    }

    /// Who may only read a database does not take all of its seats.
    fn room_for_reader(&self, number: u32, session: u64) -> Result<(), Refused> {
        let Some(db) = self.databases.get(&number) else { return Ok(()) };
        let user = |session: u64| self.sessions.get(&session).map(|s| s.peer.uid);
        let readers = || db.seats.values().filter(|s| s.role == Role::ReadOnly).map(|s| user(s.session));
        let (all, own) = (readers().count(), readers().filter(|uid| *uid == user(session)).count());
        if (all < READERS && own < READERS_OF_A_USER) || planted("readers-take-all") {
            return Ok(());
        }
        let reason = format!(
            "clients that may only read have {all} of its seats, {own} of them this user's: the others are for those who \
             may write"
        );
        Err((Refusal::Exhausted, reason))
    }

    pub(super) fn take_seat(&mut self, number: u32, p: Pending) -> Result<(), Refused> {
        if p.candidate.role == Role::ReadOnly {
            self.room_for_reader(number, p.session)?;
        }
        let Some(db) = self.databases.get_mut(&number) else { return Ok(()) };
        let role = p.candidate.role;
        match &db.home {
            Some(home) if *home != p.candidate.home => {
                let reason = format!(
                    "the same file is in use under another name ('{}', a hard link?): each name would have its own \
                     -wal",
                    home.display()
                );
                return Err((Refusal::UnsafePlace, reason));
            }
            Some(_) => {}
            None if role == Role::ReadWrite => {
                self.keeping.home(number, &p.candidate.home);
                db.is_at(number, p.candidate.home.clone());
            }
            None => {} // a reader's word binds nobody
        }
        if let State::Guest { .. } = db.state
            && !planted("two-libraries-guest")
            && let Some(other) = db.seats.values().find(|s| s.session == p.session)
            && other.library != p.join.library
        {
            let reason = "two SQLite libraries of one process on one file in guest mode would break each other's \
                          POSIX locks";
            return Err((Refusal::UnsafePlace, reason.into()));
        }
        if db.free_seat().is_none()
            && let Some(seat) = db.close_one_resting()
        {
            self.clear_seat(SeatKey { database: number, seat });
        }
        let Some(db) = self.databases.get_mut(&number) else { return Ok(()) };
        let Some(seat) = db.free_seat() else {
            let reason = format!("all {} seats are taken", crate::segment::layout::CHECKPOINTER - 1);
            return Err((Refusal::Exhausted, reason));
        };
        let key = SeatKey { database: number, seat };
        let has_segment = db.has_session(p.session, role);
        let mut fds: Vec<&OwnedFd> = Vec::new();
        let read_only;
        let (mode, nonce) = match &db.state {
            State::Gated { gate, segment } => {
                if !has_segment && role == Role::ReadWrite {
                    fds.extend([&segment.control_fd, &segment.wal_index_fd, gate.hold().descriptor()]);
                } else if !has_segment && planted("read-only-gets-writable") {
                    fds.extend([&segment.control_fd, &segment.wal_index_fd]);
                } else if !has_segment {
                    read_only =
                        read_only_segment(segment).map_err(|e| (Refusal::Exhausted, e.to_string()))?;
                    fds.extend(&read_only);
                }
                (Mode::Gated, segment.nonce)
            }
            State::Guest { .. } => (Mode::Guest, 0),
        };
        let Some(uid) = self.sessions.get(&p.session).map(|s| s.peer.uid) else { return Ok(()) };
        if !fds.is_empty() && !planted("users-without-limit") {
            self.users.send(&self.sessions, (uid, p.session), fds.len(), self.options.limits.descriptors)?;
        }
        let Some(session) = self.sessions.get_mut(&p.session) else { return Ok(()) };
        let count = db.table().count(seat);
        let joined = Joined { seat: key, mode, role, nonce, segment: !fds.is_empty(), count };
        let taken = Seat {
            session: p.session,
            role,
            sqlite_version: super::session::printable(&p.join.sqlite_version),
            library: p.join.library,
            since: SystemTime::now(),
            socket_lane: mode == Mode::Guest || role == Role::ReadOnly,
            heard: Instant::now(),
            request: None,
            count,
        };
        // Before the client knows: the keeper is to know more than the client, and another one that closes looks for
        // seats in use.
        self.keeping.session(session);
        self.keeping.seat(key, &taken);
        if let Some(words) = db.table().seat(seat) {
            words.holder.store(session.lives_by().unwrap_or(0), SeqCst);
        }
        db.table().hand_out(seat);
        if let Err(e) = session.send(&FromBroker::Joined { id: p.id, joined }, &fds) {
            db.table().members.clear(seat);
            self.keeping.seat_gone(key);
            return Err((Refusal::Exhausted, format!("cannot pass the segment: {e}")));
        }
        session.seats.insert(key);
        let unsent = session.has_unsent();
        db.seats.insert(seat, taken);
        if unsent {
            self.watch_for_room(p.session);
        }
        tracing::debug!(database = number, seat, session = p.session, ?role, "joined");
        Ok(())
    }

    /// The seat is given up or its process is dead.
    pub(super) fn remove_seat(&mut self, key: SeatKey) {
        self.clear_seat(key);
        self.drop_if_unused(key.database);
    }

    /// A seat at rest is not kept any more, if it is still this session's and rests under this count.
    pub(super) fn let_go(&mut self, session: u64, key: SeatKey, count: u32) {
        let Some(db) = self.databases.get(&key.database) else { return };
        let own = db.seats.get(&key.seat).is_some_and(|s| s.session == session);
        if own && db.table().let_go(key.seat, count) {
            self.remove_seat(key);
        }
    }

    pub(super) fn clear_seat(&mut self, key: SeatKey) {
        let Some(db) = self.databases.get_mut(&key.database) else { return };
        db.lane().remove(key.seat);
        let session = db.seats.remove(&key.seat).map(|seat| seat.session);
        if let Some(s) = session.and_then(|session| self.sessions.get_mut(&session)) {
            s.seats.remove(&key);
            s.unclaimed.remove(&key);
        }
        self.keeping.seat_gone(key);
        self.touched.insert(key.database);
    }

    /// Nobody is left, or only seats that rest: closed means closed.
    pub(super) fn drop_if_unused(&mut self, number: u32) {
        let Some(occupied) = self.databases.get(&number).map(Database::occupied) else { return };
        match occupied {
            Occupied::BySomebody => return,
            Occupied::ByStrangers => return self.abandon(number),
            Occupied::ByNobody => {}
        }
        let resting = self.databases.get(&number).filter(|_| !planted("the-resting-count"));
        for seat in resting.map(|db| db.close_all_resting()).unwrap_or_default() {
            self.clear_seat(SeatKey { database: number, seat });
        }
        // The checkpointer may be at work: this comes again when it is done.
        if !self.databases.get(&number).is_some_and(|d| d.seats.is_empty() && !d.checkpoints.is_busy()) {
            return;
        }
        let introduced = self.end_checkpoints(number);
        if let Some(db) = self.take_database(number) {
            self.closed.note(db.identity, db.checkpoint_words().map_or(0, |w| w.ended.load(SeqCst)));
            tracing::info!(database = number, "closed: its last member left");
            let founder = db.founder;
            if let State::Gated { gate, segment } = self.close_database(db) {
                // Processes whose seats rested have it mapped.
                segment.control.poison();
                gate.open();
            }
            // Last: what it unlocks by itself it does when no broker is left.
            self.keeping.database_gone(number);
            let keeper = self.departing.iter().any(|d| d.is_of(number)).then(|| self.keeping.ask()).flatten();
            let receiver = self.closing_mark(founder);
            self.departs(number, keeper, introduced, receiver);
        }
    }
}

fn read_only_segment(segment: &Segment) -> std::io::Result<[OwnedFd; 2]> {
    use crate::segment::memfd::reopen_read_only;
    Ok([reopen_read_only(&segment.control_fd)?, reopen_read_only(&segment.wal_index_fd)?])
}
