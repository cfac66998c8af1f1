//! The broker's side: requests of seats that cannot work on the segment themselves (the socket lane), tried on
//! their behalf, and what only a supervisor may do to a seat.

use super::park::Parking;
use super::rules::Attempt;
use super::seat::{Own, Seat, WaitsFor, wake_sleepers};
use super::table::Table;
use super::turn::Turn;
use super::{Ask, Release, SeatId, Verdict};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{NOTIFIED, PARKED, PROBATION_OPEN};
use std::collections::BTreeMap;

/// How often [`Lane::settle`] tries a request again at most, over all seats. Honest ones need a few rounds; whoever is
/// left is looked at in the broker's next turn, within milliseconds.
const SETTLE_AGAIN: usize = 256;

/// A seat whose requests come by the socket.
#[derive(Debug, Default)]
struct Brokered {
    own: Own,
    thread: u32,
    connection: u64,
    asks: Option<Ask>,
    /// The turn is in use (guest mode, where the write lock is not seen).
    used: bool,
}

impl Brokered {
    fn seat<'a>(&'a self, table: Table<'a>, id: SeatId, parking: &'a dyn Parking) -> Seat<'a> {
        Seat { table, id, own: &self.own, parking, thread: self.thread, connection: self.connection }
    }
}

/// The socket lane of one database.
#[derive(Debug, Default)]
pub struct Queue {
    seats: BTreeMap<SeatId, Brokered>,
    /// Waiting seats, first come first.
    waiting: Vec<SeatId>,
}

impl Queue {
    /// Guest mode: the seat's turn is in use.
    pub fn is_used(&self, id: SeatId) -> bool {
        self.seats.get(&id).is_some_and(|b| b.used)
    }
}

/// The queue at work on a table.
pub struct Lane<'a> {
    pub queue: &'a mut Queue,
    pub table: Table<'a>,
    pub parking: &'a dyn Parking,
}

impl<'a> Lane<'a> {
    /// Runs `body` as the seat.
    pub fn with<T>(&mut self, id: SeatId, body: impl FnOnce(&Seat) -> T) -> T {
        let (table, parking) = (self.table, self.parking);
        body(&self.queue.seats.entry(id).or_default().seat(table, id, parking))
    }

    /// A seat's request. `None`: it is in line, and [`Lane::settle`] will answer. A seat that asks again while
    /// it is in line gives up its first request.
    pub fn submit(&mut self, id: SeatId, ask: Ask, (connection, thread): (u64, u32)) -> Option<Verdict> {
        if self.is_waiting(id) {
            self.forget_request(id);
            self.with(id, |seat| seat.request_refused());
        }
        let brokered = self.queue.seats.entry(id).or_default();
        brokered.thread = thread;
        brokered.connection = connection;
        let verdict = self.with(id, |seat| match seat.attempt(ask) {
            Attempt::Done(verdict) => Some(verdict),
            Attempt::Wait { for_turn } => {
                if let Some(words) = seat.table.seat(id) {
                    words.brokered.store(1, SeqCst);
                }
                seat.begin_wait(ask.request, for_turn);
                None
            }
        });
        if verdict.is_none() {
            self.queue.waiting.push(id);
            if let Some(b) = self.queue.seats.get_mut(&id) {
                b.asks = Some(ask);
            }
        }
        verdict
    }

    /// Tries every waiting request again, first come first, and returns those that ended. The seats whose requests
    /// go on waiting are asleep after it: what is freed from then on wakes the broker.
    pub fn settle(&mut self) -> Vec<(SeatId, Verdict)> {
        let mut ended = Vec::new();
        // A member that scribbles over the words of others could keep them looking woken for ever.
        let mut most = self.queue.waiting.len() + SETTLE_AGAIN;
        while most != 0 {
            let mut again = false;
            for id in self.queue.waiting.clone().into_iter().take(most) {
                let Some(brokered) = self.queue.seats.get(&id) else { continue };
                let Some(ask) = brokered.asks else { continue };
                let seat = brokered.seat(self.table, id, self.parking);
                most -= 1;
                seat.mark(PARKED);
                match seat.attempt(ask) {
                    Attempt::Done(verdict) => {
                        self.forget_request(id);
                        ended.push((id, verdict));
                        again = true;
                    }
                    Attempt::Wait { for_turn } => again |= seat.begin_wait(ask.request, for_turn),
                }
            }
            // A try that steps back wakes the sleepers, those that were tried before it and itself.
            let woken = |id: &SeatId| self.table.seat(*id).is_some_and(|w| w.park.load(SeqCst) != PARKED);
            let woken = self.queue.waiting.iter().any(woken) && !planted("woken-request-forgotten");
            if !again && !woken {
                break;
            }
        }
        ended
    }

    /// Ends the seat's wait as its rules say; `None` if it waits for nothing.
    pub fn give_up(&mut self, id: SeatId) -> Option<Verdict> {
        let ask = self.queue.seats.get(&id)?.asks?;
        self.forget_request(id);
        Some(self.with(id, |seat| seat.give_up(ask)))
    }

    pub fn release(&mut self, id: SeatId, release: Release) {
        self.with(id, |seat| seat.release(release));
        if let Some(b) = self.queue.seats.get_mut(&id) {
            b.used = false;
        }
    }

    /// Guest mode: the seat has taken the unix VFS's write lock, its turn is in use.
    pub fn turn_is_used(&mut self, id: SeatId) {
        self.queue.seats.entry(id).or_default().used = true;
    }

    fn forget_request(&mut self, id: SeatId) {
        self.queue.waiting.retain(|w| *w != id);
        if let Some(b) = self.queue.seats.get_mut(&id) {
            b.asks = None;
        }
        self.with(id, |seat| seat.end_wait());
        if let Some(words) = self.table.seat(id) {
            words.brokered.store(0, SeqCst);
        }
    }

    /// The seat waits for an answer.
    pub fn is_waiting(&self, id: SeatId) -> bool {
        self.queue.waiting.contains(&id)
    }

    /// Some seat of this lane waits.
    pub fn somebody_waits(&self) -> bool {
        !self.queue.waiting.is_empty()
    }

    pub fn turn(&self) -> Turn<'a> {
        Turn { table: self.table, parking: self.parking }
    }

    /// The seat is gone (left, or proven dead): nothing of it stays. A writer that dies over a rollback journal
    /// leaves a hot journal: SHARED is then given to one seat at a time until somebody has seen it, else every
    /// reader would try to roll it back and all but one would get BUSY.
    pub fn remove(&mut self, id: SeatId) {
        self.queue.waiting.retain(|w| *w != id);
        self.queue.seats.remove(&id);
        let table = self.table;
        table.close(id);
        let probation = &table.words.file.0.probation;
        // Before the locks go: nobody may come in between.
        if table.file_write_held(id) && !table.wal_open(id) {
            probation.store(PROBATION_OPEN, SeqCst);
        }
        let _ = probation.compare_exchange(id, PROBATION_OPEN, SeqCst, SeqCst);
        table.clear(id);
        table.sleepers.clear(id);
        self.turn().clear(id);
        if let Some(words) = table.seat(id) {
            for word in [
                &words.park,
                &words.brokered,
                &words.waiting,
                &words.ended,
                &words.thread,
                &words.calls,
                &words.turn_for,
            ] {
                word.store(0, SeqCst);
            }
            words.connection.store(0, SeqCst);
            words.holder.store(0, SeqCst);
        }
        table.members.clear(id);
        table.take_back(id);
        // It may have died among the sleepers that it was waking, or between marking a seat as woken and waking it.
        if planted("dead-waker-forgotten") {
            return wake_sleepers(table, self.parking);
        }
        table.words.sleepy.0.store(1, SeqCst);
        wake_sleepers(table, self.parking);
        let marked = |s: &SeatId| table.seat(*s).is_some_and(|w| w.park.load(SeqCst) == NOTIFIED);
        table.members.iter().filter(marked).for_each(|s| self.parking.wake(table, s));
    }
}

/// Whom the seat waits for, if it waits.
pub fn blockers(turn: Turn<'_>, id: SeatId) -> Vec<SeatId> {
    let table = turn.table;
    let Some(waits) = table.seat(id).and_then(|s| WaitsFor::from_code(s.waiting.load(SeqCst))) else {
        return Vec::new();
    };
    let mut blockers: Vec<SeatId> = Vec::new();
    match waits {
        WaitsFor::Turn => {
            let word = turn.load();
            blockers.extend(word.holder().or(word.offered_to()));
        }
        WaitsFor::Shared => {
            blockers.extend(table.pending());
            blockers.extend(table.exclusive());
            blockers.push(table.words.file.0.probation.load(SeqCst));
        }
        WaitsFor::Exclusive => blockers.extend(table.other_readers(id)),
        WaitsFor::Write => blockers.extend(table.slot_owner(super::slot::WRITE)),
        WaitsFor::Recovery => blockers.extend(table.slot_owner(super::slot::RECOVER)),
        WaitsFor::Checkpoint => {
            blockers.extend(table.slot_owner(super::slot::CHECKPOINT));
            blockers.extend(table.begins_anew_elsewhere(id));
        }
    }
    blockers.retain(|b| *b != id && table.members.has(*b));
    blockers.sort_unstable();
    blockers.dedup();
    blockers
}
