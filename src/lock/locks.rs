//! The locks, the turn and the waiting requests of one database: asking, waiting, giving back, dying.
//!
//! What a request means is in [`super::rules`]; turns that nobody uses are in [`super::unused`].

use super::rules::Attempt;
use super::table::LockTable;
use super::turn::{Ticket, Turn};
use super::{Ask, FileLevel, Release, Request, SeatId, Verdict, slot};
use crate::planted::planted;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    seat: SeatId,
    ask: Ask,
    since: Instant,
}

/// After a writer died over a rollback journal: SHARED is given to one seat at a time until somebody has seen
/// whether the journal is hot, else every reader would try to roll it back and all but one would get BUSY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probation {
    Over,
    Open { admitted: Option<SeatId> },
}

/// The locks, the turn and the waiting requests of one database.
#[derive(Debug)]
pub struct Locks {
    pub(super) table: LockTable,
    pub(super) turn: Turn,
    waiting: BTreeMap<Ticket, Waiting>,
    pub(super) ticket_of: BTreeMap<SeatId, Ticket>,
    next_ticket: Ticket,
    pub(super) probation: Probation,
    /// Seats that have the wal-index open.
    pub(super) wal: BTreeSet<SeatId>,
    /// When the seat with the turn last took or gave back a lock here.
    pub(super) touched: Instant,
    /// Guest mode: only turns are taken here, the locks are the unix VFS's.
    pub(super) guest: bool,
    /// Turns taken back because their seat did not use them.
    pub turns_revoked: u64,
}

impl Locks {
    /// A database that nobody has looked at yet: its journal may be hot, so it starts on probation.
    pub fn new(now: Instant) -> Locks {
        Locks {
            table: LockTable::default(),
            turn: Turn::default(),
            waiting: BTreeMap::new(),
            ticket_of: BTreeMap::new(),
            next_ticket: 1,
            probation: Probation::Open { admitted: None },
            wal: BTreeSet::new(),
            touched: now,
            guest: false,
            turns_revoked: 0,
        }
    }

    /// A database in guest mode.
    pub fn guest(now: Instant) -> Locks {
        Locks { guest: true, ..Locks::new(now) }
    }

    /// A seat's request. `None`: it is in line, and [`Locks::settle`] will answer. A seat that asks again while
    /// it is in line gives up its first request.
    pub fn submit(&mut self, seat: SeatId, ask: Ask, now: Instant) -> Option<Verdict> {
        self.forget_request(seat);
        match self.attempt(seat, ask, None, now) {
            Attempt::Done(verdict) => Some(verdict),
            Attempt::Wait { for_turn } => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.waiting.insert(ticket, Waiting { seat, ask, since: now });
                self.ticket_of.insert(seat, ticket);
                if for_turn {
                    self.turn.enter_line(seat, ticket);
                }
                None
            }
        }
    }

    /// Tries every waiting request again, first come first, and returns those that ended.
    /// To be called after anything that may have freed something.
    pub fn settle(&mut self, now: Instant) -> Vec<(SeatId, Verdict)> {
        let mut ended = Vec::new();
        loop {
            let before = ended.len();
            let tickets: Vec<Ticket> = self.waiting.keys().copied().collect();
            for ticket in tickets {
                let Some(w) = self.waiting.get(&ticket).copied() else { continue };
                match self.attempt(w.seat, w.ask, Some(ticket), now) {
                    Attempt::Done(verdict) => {
                        self.forget_request(w.seat);
                        ended.push((w.seat, verdict));
                    }
                    Attempt::Wait { for_turn: true } => self.turn.enter_line(w.seat, ticket),
                    Attempt::Wait { for_turn: false } => {}
                }
            }
            if ended.len() == before {
                return ended;
            }
        }
    }

    /// The wait is over (limit, interrupt, a cycle): the lock without waiting and, for a wait ahead, without
    /// the turn. A read is never refused for want of a turn: wal.c would make a hundred retries of it and then
    /// `SQLITE_PROTOCOL`. `None` if the seat waits for nothing.
    pub fn give_up(&mut self, seat: SeatId, now: Instant) -> Option<Verdict> {
        let ticket = *self.ticket_of.get(&seat)?;
        let ask = self.waiting.get(&ticket)?.ask;
        self.forget_request(seat);
        if planted("wait-ahead-fails") && ask.ahead {
            return Some(Verdict::Busy);
        }
        let last = Ask { ahead: false, ..ask };
        match self.attempt(seat, last, None, now) {
            Attempt::Done(verdict) => Some(verdict),
            Attempt::Wait { .. } => {
                // PENDING stays with a RESERVED holder (as in unixLock: its busy handler retries with it and new
                // readers stay out) and goes back from a hot-journal roller.
                if self.table.reserved != Some(seat) {
                    self.table.release_file_write(seat);
                }
                Some(Verdict::Busy)
            }
        }
    }

    /// Gives a lock back. Ends the seat's turn where a transaction ends.
    pub fn release(&mut self, seat: SeatId, release: Release, now: Instant) {
        self.touch(seat, now);
        match release {
            Release::File { level, keep_turn } => self.release_file(seat, level, keep_turn),
            Release::ShmShared { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                self.table.release_slots_shared(seat, mask);
                let writes = self.table.slot_owner(slot::WRITE) == Some(seat);
                let reads = self.table.shared_holds(seat).slots & slot::READ_MASK != 0;
                // Two unlocks look like the end of a read transaction and are not: the one that SQLite makes
                // because its header changed while it waited (it asks again at once), and walRestartLog, which
                // drops and retakes READ(0) while it holds WRITE.
                let kept = (keep_turn && !planted("turn-ends-at-retry"))
                    || (writes && !planted("turn-ends-at-restart"));
                if mask & slot::READ_MASK != 0 && !reads && !kept {
                    self.turn.end(seat);
                }
            }
            Release::ShmExclusive { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                self.table.release_slots_exclusive(seat, mask);
                if mask & (1 << slot::WRITE) != 0 {
                    let reads = self.table.shared_holds(seat).slots & slot::READ_MASK != 0;
                    // WRITE outside a read transaction is recovery: the turn, if the seat has it, was taken
                    // for the transaction that follows. A checkpoint's came with its WRITE and goes with it.
                    let with_write = self.turn.holder().is_some_and(|h| h.seat == seat && h.with_write);
                    if (reads || with_write) && !keep_turn {
                        self.turn.end(seat);
                    }
                }
            }
            Release::Turn => {
                self.turn.end(seat);
            }
        }
    }

    fn release_file(&mut self, seat: SeatId, level: FileLevel, keep_turn: bool) {
        // EXCLUSIVE without RESERVED rolled back somebody's hot journal: the transaction comes after it.
        let wrote = self.table.reserved == Some(seat);
        if self.table.exclusive == Some(seat) && self.probation == (Probation::Open { admitted: Some(seat) })
        {
            self.probation = Probation::Over; // the hot journal has been rolled back
        }
        self.table.release_file_write(seat);
        if level == FileLevel::None {
            self.table.set_file_shared(seat, false);
            if self.probation == (Probation::Open { admitted: Some(seat) }) {
                self.probation = Probation::Open { admitted: None };
            }
        }
        if (wrote || level == FileLevel::None) && !keep_turn {
            self.turn.end(seat);
        }
    }

    /// The seat admitted on probation read past the journal check: there is no hot journal.
    pub fn journal_is_clear(&mut self, seat: SeatId) {
        if self.probation == (Probation::Open { admitted: Some(seat) }) {
            self.probation = Probation::Over;
        }
    }

    /// The seat opened the wal-index. True: it is the only one, so what the index holds is nobody's truth and
    /// must be invalidated first (the unix VFS truncates `-shm` under its dead-man switch for the same reason).
    pub fn open_wal_index(&mut self, seat: SeatId, now: Instant) -> bool {
        self.touch(seat, now);
        self.journal_is_clear(seat);
        let alone = self.wal.iter().all(|s| *s == seat);
        self.wal.insert(seat);
        alone
    }

    pub fn has_wal_index(&self, seat: SeatId) -> bool {
        self.wal.contains(&seat)
    }

    pub fn close_wal_index(&mut self, seat: SeatId) {
        self.wal.remove(&seat);
    }

    /// `xCheckReservedLock`: the RESERVED lock alone. Counting PENDING would make a reader take a half-written
    /// file for a clean one, because a hot-journal roller holds PENDING without RESERVED.
    pub fn reserved_by_other(&self, seat: SeatId) -> bool {
        let held = |owner: Option<SeatId>| owner.is_some_and(|o| o != seat);
        held(self.table.reserved) || (planted("pending-counts-as-reserved") && held(self.table.pending))
    }

    /// Guest mode: the seat has taken the unix VFS's write lock, its turn is in use.
    pub fn turn_is_used(&mut self, seat: SeatId) {
        self.turn.mark_used(seat);
    }

    /// The same connection goes to another file: if its turn here was taken ahead and no write lock followed,
    /// its statement does not write this file.
    pub fn went_elsewhere(&mut self, seat: SeatId) -> bool {
        let unused = !self.table.file_write_held(seat) && self.table.slot_owner(slot::WRITE) != Some(seat);
        unused && !planted("turn-kept-elsewhere") && self.turn.end(seat)
    }

    /// The seat is gone (left, or proven dead). A writer that dies over a rollback journal leaves a hot journal.
    pub fn remove(&mut self, seat: SeatId) {
        let left_journal = self.table.file_write_held(seat) && !self.wal.contains(&seat);
        self.forget_request(seat);
        self.turn.end(seat);
        self.table.clear(seat);
        self.wal.remove(&seat);
        if self.probation == (Probation::Open { admitted: Some(seat) }) {
            self.probation = Probation::Open { admitted: None };
        }
        if left_journal {
            self.probation = Probation::Open { admitted: None };
        }
    }

    /// Whom the seat waits for, if it waits.
    pub fn blockers(&self, seat: SeatId) -> Vec<SeatId> {
        let Some(w) = self.ticket_of.get(&seat).and_then(|t| self.waiting.get(t)) else { return Vec::new() };
        let mut blockers: Vec<SeatId> = Vec::new();
        if self.wants_turn(seat, w.ask) {
            if let Some(h) = self.turn.holder() {
                blockers.push(h.seat);
            }
            return blockers;
        }
        match w.ask.request {
            Request::File { level: FileLevel::Shared, .. } => {
                blockers.extend(self.table.pending);
                blockers.extend(self.table.exclusive);
                if let Probation::Open { admitted: Some(a) } = self.probation {
                    blockers.push(a);
                }
            }
            Request::File { .. } => blockers.extend(self.table.other_readers(seat)),
            Request::ShmShared(s) | Request::ShmExclusive { slots: s, .. } => {
                blockers.extend(self.table.slots_blocked_by(seat, s.mask().unwrap_or(0)));
            }
            Request::Turn => {}
        }
        blockers.retain(|b| *b != seat);
        blockers.sort_unstable();
        blockers.dedup();
        blockers
    }

    pub fn table(&self) -> &LockTable {
        &self.table
    }

    pub fn turn(&self) -> &Turn {
        &self.turn
    }

    /// Waiting seats, first come first, and since when.
    pub fn waiting(&self) -> impl Iterator<Item = (SeatId, Ask, Instant)> + '_ {
        self.waiting.values().map(|w| (w.seat, w.ask, w.since))
    }

    pub fn is_waiting(&self, seat: SeatId) -> bool {
        self.ticket_of.contains_key(&seat)
    }

    pub(super) fn touch(&mut self, seat: SeatId, now: Instant) {
        if self.turn.held_by(seat) {
            self.touched = now;
        }
    }

    fn forget_request(&mut self, seat: SeatId) {
        if let Some(ticket) = self.ticket_of.remove(&seat) {
            self.waiting.remove(&ticket);
            self.turn.leave_line(ticket);
        }
    }
}
