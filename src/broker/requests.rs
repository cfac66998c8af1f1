//! A session's messages: checked, then turned into lock requests and answers.

use super::database::State;
use super::server::Server;
use super::session::Stage;
use crate::lock::{Ask, FileLevel, Request, Verdict};
use crate::wire::message::{FromBroker, Hello, PROTOCOL_MAGIC, PROTOCOL_VERSION, Role, SeatKey, ToBroker};
use crate::wire::socket::Packet;
use std::time::Instant;

impl Server {
    /// One packet. An error is a broken rule and ends the session.
    pub(super) fn packet(&mut self, id: u64, packet: Packet) -> Result<(), String> {
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
                session.introduce(who, liveness)?;
                let your_pid = session.peer.pid;
                self.watch_pidfd(id);
                let broker_pid = std::process::id() as i32;
                self.send(id, &FromBroker::Welcome { session: id, broker_pid, your_pid });
                Ok(())
            }
            (Stage::Open, ToBroker::Join { id: request, join }) => {
                self.join(id, request, join, packet.fds);
                Ok(())
            }
            (Stage::Open, request @ (ToBroker::Lock { .. } | ToBroker::Cancel { .. })) => {
                self.requests.push((id, request));
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

    /// Lock requests and cancellations, in the order in which they were read.
    pub(super) fn answer_requests(&mut self, now: Instant) {
        for (id, request) in std::mem::take(&mut self.requests) {
            if self.sessions.get(&id).is_none_or(|s| s.stage != Stage::Open) {
                continue;
            }
            // What has been given back may be wanted by somebody who came before.
            self.settle_all(now);
            if let Err(reason) = self.message(id, request) {
                self.end_session(id, &reason);
            }
        }
    }

    fn message(&mut self, id: u64, message: ToBroker) -> Result<(), String> {
        let now = Instant::now();
        match message {
            ToBroker::Lock { id: request, seat, ask, connection, thread } => {
                self.own(id, seat)?;
                self.lock(id, request, seat, ask, (connection, thread), now)
            }
            ToBroker::Cancel { seat } => {
                self.own(id, seat)?;
                self.end_wait(seat, now, false);
                Ok(())
            }
            ToBroker::Unlock { seat, release } => {
                self.own(id, seat)?;
                self.locks(seat)?.release(seat.seat, release, now);
                Ok(())
            }
            ToBroker::CheckReserved { id: request, seat } => {
                self.own(id, seat)?;
                let by_other = self.locks(seat)?.reserved_by_other(seat.seat);
                self.send(id, &FromBroker::Reserved { id: request, by_other });
                Ok(())
            }
            ToBroker::JournalClear { seat } => {
                self.own(id, seat)?;
                self.locks(seat)?.journal_is_clear(seat.seat);
                Ok(())
            }
            ToBroker::TurnUsed { seat } => {
                self.own(id, seat)?;
                self.locks(seat)?.turn_is_used(seat.seat);
                Ok(())
            }
            ToBroker::OpenWalIndex { id: request, seat } => {
                self.own(id, seat)?;
                self.open_wal_index(id, request, seat, now);
                Ok(())
            }
            ToBroker::GrowWalIndex { id: request, seat, regions } => {
                self.own(id, seat)?;
                self.grow_wal_index(id, request, seat, regions);
                Ok(())
            }
            ToBroker::CloseWalIndex { seat } => {
                self.own(id, seat)?;
                self.locks(seat)?.close_wal_index(seat.seat);
                Ok(())
            }
            ToBroker::Leave { id: request, seat } => {
                self.own(id, seat)?;
                self.remove_seat(seat);
                self.send(id, &FromBroker::Left { id: request });
                Ok(())
            }
            ToBroker::Status { id: request } => {
                self.report(id, request);
                Ok(())
            }
            ToBroker::Log { text } => {
                let client = self.sessions.get(&id).map(|s| s.label()).unwrap_or_default();
                let text: String = text.chars().filter(|c| !c.is_control()).take(1000).collect();
                tracing::warn!(client, "{text}");
                Ok(())
            }
            ToBroker::Introduce(_) | ToBroker::Join { .. } => Err("a message out of order".into()),
        }
    }

    /// The seat exists and is this session's.
    fn own(&mut self, session: u64, key: SeatKey) -> Result<(), String> {
        let seat = self.databases.get_mut(&key.database).and_then(|d| d.seats.get_mut(&key.seat));
        match seat {
            Some(seat) if seat.session == session => {
                seat.heard = Instant::now();
                Ok(())
            }
            _ => Err("a seat that is not its own".into()),
        }
    }

    fn locks(&mut self, key: SeatKey) -> Result<&mut crate::lock::locks::Locks, String> {
        self.databases.get_mut(&key.database).map(|d| &mut d.locks).ok_or_else(|| "no such database".into())
    }

    fn lock(
        &mut self,
        session: u64,
        request: u64,
        key: SeatKey,
        ask: Ask,
        (connection, thread): (u64, i32),
        now: Instant,
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
        seat.thread = thread;
        seat.connection = connection;
        let connection = (session, seat.connection);
        // A transaction that is open may still ask for a read slot: walRestartLog takes one inside its commit.
        let in_transaction = db.locks.table().owned_slots(key.seat) != 0 || db.locks.turn().held_by(key.seat);
        let begins = !in_transaction
            && (matches!(ask.request, Request::File { level: FileLevel::Shared, .. })
                || matches!(ask.request, Request::ShmShared(s) if s.is_one_read()));
        let verdict = match stopping && begins {
            true => Some(Verdict::Busy), // no new transactions while the broker stops
            false => db.locks.submit(key.seat, ask, now),
        };
        if verdict.is_none() {
            seat.request = Some(request);
        }
        if verdict == Some(Verdict::Busy) {
            let holder = db.locks.turn().holder();
            tracing::debug!(database = key.database, seat = key.seat, ?ask, ?holder, "busy");
        }
        self.leave_other_turns(connection, key);
        match verdict {
            Some(verdict) => self.answer(session, request, verdict, false, None),
            None => self.break_cycle(key, now),
        }
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
        for (number, db) in &mut self.databases {
            if *number == here.database {
                continue;
            }
            let Some(holder) = db.locks.turn().holder() else { continue };
            let same = db.seats.get(&holder.seat).is_some_and(|s| (s.session, s.connection) == connection);
            if same {
                db.locks.went_elsewhere(holder.seat);
            }
        }
    }

    /// Answers every waiting request that can be answered now.
    pub(super) fn settle_all(&mut self, now: Instant) {
        let mut answers = Vec::new();
        for db in self.databases.values_mut() {
            for (seat, verdict) in db.locks.settle(now) {
                let Some(seat) = db.seats.get_mut(&seat) else { continue };
                if let Some(request) = seat.request.take() {
                    answers.push((seat.session, request, verdict));
                }
            }
        }
        for (session, request, verdict) in answers {
            self.answer(session, request, verdict, false, None);
        }
    }

    fn open_wal_index(&mut self, session: u64, request: u64, key: SeatKey, now: Instant) {
        let mut answer = FromBroker::WalIndex { id: request, regions: 0, ok: false };
        if let Some(db) = self.databases.get_mut(&key.database)
            && let State::Gated { segment, .. } = &mut db.state
        {
            let alone = db.locks.open_wal_index(key.seat, now);
            if alone && !crate::planted::planted("stale-wal-index") {
                segment.invalidate();
            }
            answer = FromBroker::WalIndex { id: request, regions: segment.regions(), ok: true };
        }
        self.send(session, &answer);
    }

    fn grow_wal_index(&mut self, session: u64, request: u64, key: SeatKey, wanted: u32) {
        let mut answer = FromBroker::WalIndex { id: request, regions: 0, ok: false };
        if let Some(db) = self.databases.get_mut(&key.database)
            && db.seats.get(&key.seat).is_some_and(|s| s.role == Role::ReadWrite)
            && let State::Gated { segment, .. } = &mut db.state
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
