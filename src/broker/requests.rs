//! A session's messages: checked, then turned into lock requests and answers.

use super::database::State;
use super::foreign::JudgedJoin;
use super::server::Server;
use super::session::Stage;
use super::settling::Asked;
use crate::lock::queue::Lane;
use crate::lock::seat::begins_transaction;
use crate::lock::{Ask, FileLevel, Request, Verdict};
use crate::planted::planted;
use crate::wire::message::{
    FromBroker, Hello, PROTOCOL_MAGIC, PROTOCOL_VERSION, Refusal, Role, SeatKey, ToBroker,
};
use crate::wire::socket::Packet;
use std::time::Instant;

impl Server {
    /// One packet. An error is a broken rule and ends the session.
    pub(super) fn packet(
        &mut self,
        id: u64,
        packet: Packet,
        judged: Option<JudgedJoin>,
    ) -> Result<(), String> {
        let stage = self.sessions.get(&id).map(|s| s.stage).ok_or("gone")?;
        if packet.fds_lost {
            return Err("descriptors that could not be received".into());
        }
        if stage == Stage::Greeting {
            return self.hello(id, &packet);
        }
        let message: ToBroker = packet.decode().map_err(|e| format!("protocol: {e}"))?;
        match (stage, message) {
            (Stage::Introducing, ToBroker::Introduce(who)) => {
                let liveness = packet.fds.into_iter().next().ok_or("no liveness descriptor")?;
                let session = self.sessions.get_mut(&id).ok_or("gone")?;
                if let Err(reason) = session.introduce(who, liveness) {
                    let (why, said) = (Refusal::UnsafePlace, reason.clone());
                    self.send(id, &FromBroker::Refused { id: 0, why, reason: said });
                    return Err(reason);
                }
                let (your_pid, token) = (session.peer.pid, session.token);
                self.watch_pidfd(id);
                let broker_pid = std::process::id() as i32;
                self.send(id, &FromBroker::Welcome { session: id, broker_pid, your_pid, token });
                Ok(())
            }
            (Stage::Open, ToBroker::Join { id: request, join }) => {
                self.join(id, request, join, packet.fds, judged);
                Ok(())
            }
            (Stage::Open, ToBroker::HandBack { id: request, database, nonce, home }) => {
                self.hand_back(id, request, (database, nonce, home), packet.fds);
                Ok(())
            }
            (Stage::Open, ToBroker::WalFile { seat }) => {
                if self.still_own(id, seat)? {
                    self.wal_file(id, seat, packet.fds);
                }
                Ok(())
            }
            (Stage::Open, request @ (ToBroker::Lock { seat, .. } | ToBroker::Cancel { seat })) => {
                self.own(id, seat)?;
                let since = Instant::now();
                self.requests.push(Asked { session: id, seat, message: request, since });
                Ok(())
            }
            (Stage::Open, message) => self.message(id, message),
            _ => Err("a message out of order".into()),
        }
    }

    fn hello(&mut self, id: u64, packet: &Packet) -> Result<(), String> {
        let hello: Hello = packet.decode().map_err(|_| "not a turnstile client")?;
        if hello.magic != PROTOCOL_MAGIC {
            return Err("not a turnstile client".into());
        }
        if hello.version != PROTOCOL_VERSION {
            let reason = format!(
                "the broker speaks protocol {PROTOCOL_VERSION}, the extension {}: install the same version of both",
                hello.version
            );
            self.greet(id, Some(reason.clone()))?;
            return Err(reason);
        }
        self.greet(id, None)?;
        self.sessions.get_mut(&id).ok_or("gone")?.stage = Stage::Introducing;
        Ok(())
    }

    pub(super) fn message(&mut self, id: u64, message: ToBroker) -> Result<(), String> {
        match message {
            ToBroker::Lock { id: request, seat, ask, connection, thread } => {
                self.own(id, seat)?;
                self.lock(id, request, seat, ask, (connection, thread as u32))
            }
            ToBroker::Cancel { seat } => {
                // Its request may have been answered before this was read, and the seat have left since: that is read
                // behind this, but served before it.
                match self.own(id, seat) {
                    Err(reason) if planted("late-cancel-is-foul") => return Err(reason),
                    Err(_) => {}
                    Ok(()) => self.end_wait(seat, false),
                }
                Ok(())
            }
            ToBroker::Unlock { seat, release } => {
                self.own(id, seat)?;
                self.lane(seat)?.release(seat.seat, release);
                Ok(())
            }
            ToBroker::CheckReserved { id: request, seat } => {
                self.own(id, seat)?;
                let by_other = self.lane(seat)?.with(seat.seat, |s| s.reserved_by_other());
                self.send(id, &FromBroker::Reserved { id: request, by_other });
                Ok(())
            }
            ToBroker::JournalClear { seat } => {
                self.own(id, seat)?;
                self.lane(seat)?.with(seat.seat, |s| s.journal_is_clear());
                Ok(())
            }
            ToBroker::TurnUsed { seat } => {
                self.own(id, seat)?;
                self.lane(seat)?.turn_is_used(seat.seat);
                Ok(())
            }
            ToBroker::Waiting { seat } => {
                self.own(id, seat)?;
                self.watched.insert(seat.database);
                self.look_for_cycle(seat, Instant::now());
                Ok(())
            }
            ToBroker::WalGrew { seat } => {
                if self.still_own(id, seat)? {
                    self.wal_grew(seat.database);
                }
                Ok(())
            }
            ToBroker::Kick { database } => {
                if self.databases.contains_key(&database) {
                    self.touched.insert(database);
                }
                Ok(())
            }
            ToBroker::AskBlocker { id: request, seat } => {
                self.own(id, seat)?;
                let blocker = self.blocker_of(seat);
                self.send(id, &FromBroker::Blocker { id: request, blocker });
                Ok(())
            }
            ToBroker::OpenWalIndex { id: request, seat } => {
                self.own(id, seat)?;
                self.open_wal_index(id, request, seat)
            }
            ToBroker::GrowWalIndex { id: request, seat, regions } => {
                self.own(id, seat)?;
                self.grow_wal_index(id, request, seat, regions);
                Ok(())
            }
            ToBroker::CloseWalIndex { seat } => {
                self.own(id, seat)?;
                self.lane(seat)?.with(seat.seat, |s| s.close_wal_index());
                Ok(())
            }
            ToBroker::Leave { id: request, seat } => {
                self.own(id, seat)?;
                self.leave(id, request, seat);
                Ok(())
            }
            ToBroker::LetGo { seat, count } => {
                self.let_go(id, seat, count);
                Ok(())
            }
            ToBroker::Status { id: request } => {
                self.report(id, request);
                Ok(())
            }
            ToBroker::Log { text } => {
                let Some(session) = self.sessions.get(&id) else { return Ok(()) };
                if !self.users.may_say(session.peer.uid) {
                    return Ok(());
                }
                let client = session.label();
                let text: String = text.chars().filter(|c| !c.is_control()).take(1000).collect();
                tracing::warn!(client, "{text}");
                Ok(())
            }
            ToBroker::Resume { id: request, token } => {
                self.resume(id, request, token);
                Ok(())
            }
            ToBroker::Claim { id: request, seats, last } => {
                self.claim(id, request, seats, last);
                Ok(())
            }
            ToBroker::Introduce(_)
            | ToBroker::Join { .. }
            | ToBroker::HandBack { .. }
            | ToBroker::WalFile { .. } => Err("a message out of order".into()),
        }
    }

    /// The seat exists and is this session's.
    pub(super) fn own(&mut self, session: u64, key: SeatKey) -> Result<(), String> {
        let seat = self.databases.get_mut(&key.database).and_then(|d| d.seats.get_mut(&key.seat));
        match seat {
            Some(seat) if seat.session == session => {
                seat.heard = Instant::now();
                self.touched.insert(key.database);
                Ok(())
            }
            _ => Err("a seat that is not its own".into()),
        }
    }

    /// Of what is said without waiting for an answer: the seat may have come to rest since, and the broker, which sees that
    /// in the segment, have closed it before it reads this. Then it is old news, and no offence.
    fn still_own(&mut self, session: u64, key: SeatKey) -> Result<bool, String> {
        match self.own(session, key) {
            Err(reason) if planted("old-news-is-foul") => Err(reason),
            owned => Ok(owned.is_ok()),
        }
    }

    fn lane(&mut self, key: SeatKey) -> Result<Lane<'_>, String> {
        self.databases.get_mut(&key.database).map(|d| d.lane()).ok_or_else(|| "no such database".into())
    }

    fn lock(
        &mut self,
        session: u64,
        request: u64,
        key: SeatKey,
        ask: Ask,
        asker: (u64, u32),
    ) -> Result<(), String> {
        let stopping = self.stopping.is_some();
        let db = self.databases.get_mut(&key.database).ok_or("no such database")?;
        let seat = db.seats.get_mut(&key.seat).ok_or("no such seat")?;
        if seat.request.is_some() {
            return Err("two requests of one seat at once".into());
        }
        if seat.role == Role::ReadOnly && !readable(ask) {
            // SQLite asks even so: at a last close it tries EXCLUSIVE.
            self.answer(session, request, Verdict::Busy, false, None);
            return Ok(());
        }
        seat.socket_lane = true;
        let mut lane = db.lane();
        let verdict = match stopping && lane.with(key.seat, |seat| begins_transaction(seat, ask)) {
            true => Some(Verdict::Busy), // no new transactions while the broker stops
            false => lane.submit(key.seat, ask, asker),
        };
        if verdict == Some(Verdict::Busy) {
            let turn = db.turn().load();
            tracing::debug!(database = key.database, seat = key.seat, ?ask, ?turn, "busy");
        }
        self.leave_other_turns((session, asker.0), key);
        let Some(verdict) = verdict else {
            self.watched.insert(key.database);
            if let Some(seat) =
                self.databases.get_mut(&key.database).and_then(|db| db.seats.get_mut(&key.seat))
            {
                seat.request = Some(request);
            }
            self.look_for_cycle(key, Instant::now());
            return Ok(());
        };
        self.answer(session, request, verdict, false, None);
        Ok(())
    }

    pub(super) fn answer(
        &mut self,
        session: u64,
        id: u64,
        verdict: Verdict,
        deadlock: bool,
        blocker: Option<crate::wire::message::Blocker>,
    ) {
        self.send(session, &FromBroker::Lock { id, verdict, deadlock, blocker });
    }

    /// The connection asks for a lock on another file: its statement does not write the files where its turn
    /// was taken ahead and nothing followed.
    fn leave_other_turns(&mut self, connection: (u64, u64), here: SeatKey) {
        let Some(session) = self.sessions.get(&connection.0) else { return };
        let elsewhere = session.seats.iter().filter(|key| key.database != here.database);
        let holds = |key: &&SeatKey| {
            self.databases.get(&key.database).is_some_and(|db| db.turn().load().holder() == Some(key.seat))
        };
        let left = elsewhere.filter(holds).filter(|key| self.connection_of(**key) == Some(connection));
        for key in left.copied().collect::<Vec<_>>() {
            if let Ok(mut lane) = self.lane(key) {
                lane.with(key.seat, |seat| seat.went_elsewhere());
                self.touched.insert(key.database);
            }
        }
    }

    fn grow_wal_index(&mut self, session: u64, request: u64, key: SeatKey, wanted: u32) {
        let mut answer = FromBroker::WalIndex { id: request, regions: 0, ok: false };
        if let Some(db) = self.databases.get_mut(&key.database)
            && db.seats.get(&key.seat).is_some_and(|s| s.role == Role::ReadWrite)
            && let State::Gated { segment, .. } = &db.state
        {
            // wal.c extends region by region; more at once would only be memory.
            let next = segment.regions() + 1;
            match segment.grow(wanted.min(next)) {
                Ok(regions) => answer = FromBroker::WalIndex { id: request, regions, ok: true },
                Err(e) => tracing::error!(database = key.database, "cannot grow the wal-index: {e}"),
            }
        }
        self.send(session, &answer);
    }
}

/// Requests that a client without write access may make.
fn readable(ask: Ask) -> bool {
    !ask.ahead
        && match ask.request {
            Request::File { level, .. } => level <= FileLevel::Shared,
            Request::ShmShared(_) => true,
            Request::ShmExclusive { .. } | Request::Turn => false,
        }
}
