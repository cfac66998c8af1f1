//! A seat: asking, waiting, giving back, on either lane.

use super::Lost;
use super::host::HostFd;
use super::joining::Connected;
use super::lane::{FastLane, thread_id};
use super::link::Link;
use super::resting::Home;
use super::session::Session;
use super::shared::Shared;
use crate::lock::rules::Attempt;
use crate::lock::seat::{Seat, begins_transaction};
use crate::lock::{Ask, Release, Verdict};
use crate::planted::planted;
use crate::segment::atomic::{Relaxed, SeqCst};
use crate::segment::wal_index::WalIndex;
use crate::wire::message::{Blocker, ConnectionKey, FromBroker, Joined, Mode, Role, SeatKey, ToBroker};
use std::cell::Cell;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One connection's seat.
#[derive(Debug)]
pub struct Member {
    pub(super) connected: Arc<Connected>,
    pub(super) joined: Joined,
    pub(super) shared: Option<Arc<Shared>>,
    /// Its locks are taken in the segment itself, not by messages.
    pub(super) fast: Option<FastLane>,
    /// The connection of its last request.
    pub(super) connection: Cell<ConnectionKey>,
    /// Where it was taken, if it may rest there; the count that it rests under.
    pub(super) home: Option<Home>,
    pub(super) count: u32,
}

/// How a lock request ended.
#[derive(Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The wait was ended because it would never have.
    pub deadlock: bool,
    /// The limit was reached or the statement interrupted.
    pub gave_up: bool,
    pub blocker: Option<Blocker>,
}

impl Outcome {
    pub fn at_once(verdict: Verdict) -> Outcome {
        Outcome { verdict, deadlock: false, gave_up: false, blocker: None }
    }
}

impl Member {
    pub(super) fn new(connected: Arc<Connected>, joined: Joined, shared: Option<Arc<Shared>>) -> Member {
        let fast = shared.as_ref().filter(|_| !planted("no-fast-lane"));
        let fast = fast.and_then(|shared| FastLane::new(shared, joined.seat));
        Member { connected, joined, shared, fast, connection: Cell::new(0), home: None, count: 0 }
    }

    /// Which way its lock requests travel: "fast" or "socket".
    pub fn lane(&self) -> &'static str {
        if self.fast.is_some() { "fast" } else { "socket" }
    }

    pub(super) fn with_seat<T>(&self, body: impl FnOnce(&FastLane, &Seat) -> T) -> Option<T> {
        let fast = self.fast.as_ref()?;
        fast.with(self.session(), self.connection.get(), |seat| body(fast, seat))
    }

    pub fn mode(&self) -> Mode {
        self.joined.mode
    }

    pub fn role(&self) -> Role {
        self.joined.role
    }

    pub fn seat(&self) -> SeatKey {
        self.joined.seat
    }

    pub fn session(&self) -> &Session {
        &self.connected.session
    }

    pub fn shared(&self) -> Option<&Arc<Shared>> {
        self.shared.as_ref()
    }

    /// The segment may be used and, where its locks travel by messages, the session still stands: a broker that is
    /// gone changes nothing for members on the fast lane.
    pub fn is_whole(&self) -> bool {
        !self.is_poisoned() && (self.fast.is_some() || self.link().is_ok())
    }

    /// The link over which the broker knows the seat. On the socket lane the next broker is waited for, if this one is
    /// gone; on the fast lane it goes on without.
    fn link(&self) -> Result<Arc<Link>, Lost> {
        let session = self.session();
        let whole = || !self.is_poisoned();
        let link = match self.fast.is_some() || planted("socket-lane-is-impatient") {
            true => session.link()?,
            false => session.link_patiently(whole)?,
        };
        match session.has(self.joined.seat, self.joined.count) && whole() {
            true => Ok(link),
            false => Err(Lost),
        }
    }

    /// Asks, and asks the next broker again if this one ends before it has answered: what it granted and could not say
    /// the next one takes back first.
    fn again<T>(&self, mut ask: impl FnMut(&Arc<Link>) -> Result<T, Lost>) -> Result<T, Lost> {
        for _ in 0..4 {
            let answer = ask(&self.link()?);
            if answer.is_ok() {
                return answer;
            }
        }
        Err(Lost)
    }

    /// What has no answer.
    pub(super) fn say(&self, message: &ToBroker, fds: &[i32]) -> Result<(), Lost> {
        self.again(|link| link.send(message, fds))
    }

    /// On the fast lane: what the request comes to without waiting. `None`: it must wait, or travels by messages.
    pub fn try_lock(&self, ask: Ask, connection: ConnectionKey) -> Result<Option<Verdict>, Lost> {
        self.connection.set(connection);
        let attempt = self.with_seat(|fast, seat| {
            if !fast.shared().is_open() && begins_transaction(seat, ask) {
                return if fast.shared().poisoned() { None } else { Some(Attempt::Done(Verdict::Busy)) };
            }
            let attempt = seat.attempt(ask);
            // Looked at again after it, as the broker looks for locks after it has set it: it sees this one, or
            // this sees that the segment is not to be used any more.
            if fast.shared().poisoned() {
                return None;
            }
            Some(attempt)
        });
        match attempt {
            None | Some(Some(Attempt::Wait { .. })) => Ok(None),
            Some(Some(Attempt::Done(verdict))) => Ok(Some(verdict)),
            Some(None) => Err(Lost),
        }
    }

    /// What [`Member::try_lock`] said must wait is not waited for. (On the socket lane the broker answers each request.)
    pub fn refuse(&self) {
        self.with_seat(|_, seat| seat.request_refused());
    }

    /// Asks for a lock and waits as long as the rules say and `give_up` allows. When it gives up, the request
    /// is answered as it stands: a wait ahead then has its lock without the turn.
    pub fn lock(
        &self,
        ask: Ask,
        connection: ConnectionKey,
        mut give_up: impl FnMut() -> bool,
    ) -> Result<Outcome, Lost> {
        self.connection.set(connection);
        let session = self.session();
        let seat = self.joined.seat;
        let mut enough = || self.waits_in_vain() || give_up();
        if let Some(fast) = &self.fast {
            let tell = || {
                let _ = self.say(&ToBroker::Waiting { seat }, &[]);
            };
            let outcome = fast.with(session, connection, |seat| fast.wait(seat, ask, enough, tell));
            return self.in_time(outcome.ok_or(Lost)?);
        }
        let outcome = self.again(|link| self.lock_by_message(link, ask, connection, &mut enough))?;
        self.in_time(outcome)
    }

    fn lock_by_message(
        &self,
        link: &Arc<Link>,
        ask: Ask,
        connection: ConnectionKey,
        give_up: impl FnMut() -> bool,
    ) -> Result<Outcome, Lost> {
        let (seat, id) = (self.joined.seat, self.session().new_id());
        link.send(&ToBroker::Lock { id, seat, ask, connection, thread: thread_id() }, &[])?;
        let (answer, gave_up) = match link.await_answer(id, give_up)? {
            Some(answer) => (answer, false),
            None => {
                link.send(&ToBroker::Cancel { seat }, &[])?;
                (link.answer_within(id, Duration::from_secs(10))?.ok_or_else(|| link.lose())?, true)
            }
        };
        let FromBroker::Lock { verdict, deadlock, blocker, .. } = answer.0 else { return Err(Lost) };
        if let Verdict::Granted { .. } = verdict {
            self.session().note(link, |had| Session::holds(had, seat, |h| h.takes(ask.request)))?;
        }
        Ok(Outcome { verdict, deadlock, gave_up, blocker })
    }

    /// Whom the seat waits for, if the broker can say.
    pub fn blocker(&self) -> Option<Blocker> {
        let (id, seat) = (self.session().new_id(), self.joined.seat);
        let link = self.link().ok()?;
        match link.ask(&ToBroker::AskBlocker { id, seat }, id, &[]) {
            Ok((FromBroker::Blocker { blocker, .. }, _)) => blocker,
            _ => None,
        }
    }

    pub fn release(&self, release: Release) -> Result<(), Lost> {
        if self.with_seat(|_, seat| seat.release(release)).is_some() {
            return Ok(());
        }
        let seat = self.joined.seat;
        // Noted first: whatever becomes of the message, the next broker takes the lock for given back.
        let (_, link) = self.session().give(|had| Session::holds(had, seat, |h| h.gives(release)));
        match link.is_some_and(|link| link.send(&ToBroker::Unlock { seat, release }, &[]).is_ok()) {
            true => Ok(()),
            false => self.link().map(drop),
        }
    }

    /// Whether another seat holds RESERVED.
    pub fn reserved_by_other(&self) -> Result<bool, Lost> {
        if let Some(reserved) = self.with_seat(|_, seat| seat.reserved_by_other()) {
            return Ok(reserved);
        }
        let (id, seat) = (self.session().new_id(), self.joined.seat);
        match self.again(|link| link.ask(&ToBroker::CheckReserved { id, seat }, id, &[]))?.0 {
            FromBroker::Reserved { by_other, .. } => Ok(by_other),
            _ => Err(Lost),
        }
    }

    pub fn journal_is_clear(&self) -> Result<(), Lost> {
        if self.with_seat(|_, seat| seat.journal_is_clear()).is_some() {
            return Ok(());
        }
        self.say(&ToBroker::JournalClear { seat: self.joined.seat }, &[])
    }

    pub fn turn_is_used(&self) -> Result<(), Lost> {
        self.say(&ToBroker::TurnUsed { seat: self.joined.seat }, &[])
    }

    /// What the turn is for that is about to be taken ahead ([`SeatWords::turn_for`]).
    ///
    /// [`SeatWords::turn_for`]: crate::segment::layout::SeatWords::turn_for
    pub fn turn_is_for(&self, what: u32) {
        self.with_seat(|_, seat| {
            if let Some(words) = seat.table.seat(seat.id).filter(|w| w.turn_for.load(Relaxed) != what) {
                words.turn_for.store(what, Relaxed);
            }
        });
    }

    /// Its commits wait for a sync after their turn: it gives the turn to the next at once.
    pub fn hurries(&self, hurries: bool) {
        if let Some(fast) = &self.fast {
            fast.hurries(hurries);
        }
    }

    /// Takes wal-index slots outside any transaction, if nobody has them.
    pub fn fence(&self, slots: u8) -> bool {
        self.with_seat(|_, seat| slots == 0 || seat.table.try_slots_exclusive(seat.id, slots))
            .unwrap_or(false)
    }

    pub fn unfence(&self, slots: u8) {
        self.with_seat(|_, seat| seat.table.release_slots_exclusive(seat.id, slots));
    }

    /// The seat has the turn.
    pub fn has_turn(&self) -> bool {
        self.with_seat(|_, seat| seat.has_turn()).unwrap_or(false)
    }

    /// The seat is known not to have the turn. (On the socket lane the broker alone knows.)
    pub fn has_no_turn(&self) -> bool {
        self.with_seat(|_, seat| !seat.has_turn()).unwrap_or(false)
    }

    /// The connection asks for a lock on another file: a turn that was taken ahead here, and not used, is not for
    /// this file. True: it had one. (On the socket lane the broker sees it by itself.)
    pub fn went_elsewhere(&self) -> bool {
        self.with_seat(|_, seat| seat.went_elsewhere()).unwrap_or(false)
    }

    /// Opens the wal-index. On the fast lane `alone` is called if nobody else has it open; else the broker sees to it.
    /// False: it cannot be opened.
    pub fn open_wal_index(&self, alone: impl Fn(WalIndex)) -> Result<bool, Lost> {
        if self.fast.is_some() {
            let region0 = self.shared.as_ref().ok_or(Lost)?.region(0).map_err(|_| Lost)?;
            // SAFETY: the first region stays mapped as long as `shared` is.
            let index = unsafe { WalIndex::new(region0) };
            let end = Instant::now() + Duration::from_secs(10);
            let mut tries = 0;
            let alone = || alone(index);
            while !self.with_seat(|_, seat| seat.open_wal_index(alone)).unwrap_or(true) {
                if Instant::now() >= end {
                    return Err(Lost);
                }
                // Whoever is opening it needs some instructions, if it is running.
                tries += 1;
                match tries {
                    0..64 => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            return Ok(true);
        }
        let id = self.session().new_id();
        let seat = self.joined.seat;
        Ok(self.wal_index(id, ToBroker::OpenWalIndex { id, seat })?.is_some())
    }

    pub fn close_wal_index(&self) -> Result<(), Lost> {
        if self.with_seat(|_, seat| seat.close_wal_index()).is_some() {
            return Ok(());
        }
        self.say(&ToBroker::CloseWalIndex { seat: self.joined.seat }, &[])
    }

    /// At least `regions` regions; `None` when there is no memory for them.
    pub fn grow_wal_index(&self, regions: u32) -> Result<Option<u32>, Lost> {
        if let Some(shared) = self.shared.as_ref().filter(|_| self.fast.is_some()) {
            return Ok(shared.grow(regions));
        }
        let id = self.session().new_id();
        let seat = self.joined.seat;
        self.wal_index(id, ToBroker::GrowWalIndex { id, seat, regions })
    }

    fn wal_index(&self, id: u64, message: ToBroker) -> Result<Option<u32>, Lost> {
        match self.again(|link| link.ask(&message, id, &[]))?.0 {
            FromBroker::WalIndex { ok, regions, .. } => Ok(ok.then_some(regions)),
            _ => Err(Lost),
        }
    }

    /// Keeps a read-write descriptor that was opened for a read-only connection.
    pub fn keep(&self, fd: HostFd) {
        match &self.shared {
            Some(shared) => shared.keep(fd),
            // Guest mode: closing it would drop the POSIX locks of this process's connections at any time.
            None => std::mem::forget(fd),
        }
    }

    /// The WAL behind `fd` is due for a checkpoint. The broker is given it with the first one: most short-lived programs have
    /// gone before.
    pub fn wal_grew(&self, fd: BorrowedFd) -> Result<(), Lost> {
        let seat = self.joined.seat;
        let words = self.shared.as_ref().and_then(|s| s.checkpoint());
        if words.is_some_and(|w| w.wal_sent.swap(1, SeqCst) == 0) {
            self.say(&ToBroker::WalFile { seat }, &[fd.as_raw_fd()])?;
        }
        self.say(&ToBroker::WalGrew { seat }, &[])
    }

    /// Tells the broker's log what may not be printed in the host's output.
    pub fn log(&self, text: &str) {
        let _ = self.session().send(&ToBroker::Log { text: text.chars().take(1000).collect() }, &[]);
    }
}

/// The broker's status report as JSON.
pub fn status_report(session: &Session) -> Result<Vec<u8>, Lost> {
    let id = session.new_id();
    let mut json = Vec::new();
    let link = session.link()?;
    let mut answer = link.ask(&ToBroker::Status { id }, id, &[])?.0;
    loop {
        match answer {
            FromBroker::Status { part, last, .. } => {
                json.extend(part);
                if last {
                    return Ok(json);
                }
            }
            _ => return Err(Lost),
        }
        answer = link.answer_within(id, Duration::from_secs(10))?.ok_or(Lost)?.0;
    }
}
