//! The reference model: the lock and turn rules as one state machine that answers one request after the other.
//!
//! The broker ran it when every request came to it by the socket. What members now do on shared words, each at its
//! own moment, must come to what this comes to in one of the orders in which it may have happened. It has no clock,
//! no lanes, no offers and no streaks; a seat number is all it knows of a seat.

#![allow(dead_code, reason = "a test crate uses its part")]

pub mod rules;
pub mod table;
pub mod turn;

use rules::Attempt;
use std::collections::{BTreeMap, BTreeSet};
use table::LockTable;
use turn::{Ticket, Turn};
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Verdict, slot};

#[derive(Clone, Copy, Debug)]
struct Waiting {
    seat: SeatId,
    ask: Ask,
}

/// After a writer died over a rollback journal: SHARED is given to one seat at a time until somebody has seen
/// whether the journal is hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probation {
    Over,
    Open { admitted: Option<SeatId> },
}

/// A turn that somebody waits for and its seat does not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unused {
    pub seat: SeatId,
    /// The seat holds no lock at all.
    pub idle: bool,
}

/// The locks, the turn and the waiting requests of one database.
#[derive(Debug)]
pub struct Locks {
    pub table: LockTable,
    pub turn: Turn,
    waiting: BTreeMap<Ticket, Waiting>,
    ticket_of: BTreeMap<SeatId, Ticket>,
    next_ticket: Ticket,
    /// Seats whose turn was taken for the request that is being made.
    took_turn: BTreeSet<SeatId>,
    pub probation: Probation,
    /// Seats that have the wal-index open.
    wal: BTreeSet<SeatId>,
}

impl Locks {
    /// A database that nobody has looked at yet: its journal may be hot, so it starts on probation.
    pub fn new() -> Locks {
        Locks {
            table: LockTable::default(),
            turn: Turn::default(),
            waiting: BTreeMap::new(),
            ticket_of: BTreeMap::new(),
            next_ticket: 1,
            took_turn: BTreeSet::new(),
            probation: Probation::Open { admitted: None },
            wal: BTreeSet::new(),
        }
    }

    /// A seat's request. `None`: it is in line, and [`Locks::settle`] will answer.
    pub fn submit(&mut self, seat: SeatId, ask: Ask) -> Option<Verdict> {
        self.forget_request(seat);
        match self.attempt(seat, ask, None) {
            Attempt::Done(verdict) => Some(verdict),
            Attempt::Wait { for_turn } => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.waiting.insert(ticket, Waiting { seat, ask });
                self.ticket_of.insert(seat, ticket);
                if for_turn {
                    self.turn.enter_line(seat, ticket);
                }
                None
            }
        }
    }

    /// Tries one waiting request again.
    pub fn serve(&mut self, seat: SeatId) -> Option<Verdict> {
        let ticket = *self.ticket_of.get(&seat)?;
        let waiting = *self.waiting.get(&ticket)?;
        match self.attempt(seat, waiting.ask, Some(ticket)) {
            Attempt::Done(verdict) => {
                self.forget_request(seat);
                Some(verdict)
            }
            Attempt::Wait { for_turn } => {
                if for_turn {
                    self.turn.enter_line(seat, ticket);
                }
                None
            }
        }
    }

    /// Tries every waiting request again, first come first, and returns those that ended.
    pub fn settle(&mut self) -> Vec<(SeatId, Verdict)> {
        let mut ended = Vec::new();
        loop {
            let before = ended.len();
            for seat in self.waiting().collect::<Vec<_>>() {
                ended.extend(self.serve(seat).map(|verdict| (seat, verdict)));
            }
            if ended.len() == before {
                return ended;
            }
        }
    }

    /// The wait is over (limit, interrupt, a cycle): the lock without waiting and, for a wait ahead, without
    /// the turn. `None` if the seat waits for nothing.
    pub fn give_up(&mut self, seat: SeatId) -> Option<Verdict> {
        let ticket = *self.ticket_of.get(&seat)?;
        let ask = self.waiting.get(&ticket)?.ask;
        self.forget_request(seat);
        match self.attempt(seat, Ask { ahead: false, ..ask }, None) {
            Attempt::Done(verdict) => Some(verdict),
            Attempt::Wait { .. } => {
                // PENDING stays with a RESERVED holder and goes back from a hot-journal roller. It is not given up with what
                // another thread of a seat that is a whole process waits for.
                let asked = matches!(ask.request, Request::File { .. });
                if asked && self.table.reserved != Some(seat) {
                    self.table.release_file_write(seat);
                }
                self.refused(seat);
                Some(Verdict::Busy)
            }
        }
    }

    /// Gives a lock back. Ends the seat's turn where a transaction ends.
    pub fn release(&mut self, seat: SeatId, release: Release) {
        match release {
            Release::File { level, keep_turn } => self.release_file(seat, level, keep_turn),
            Release::ShmShared { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                self.table.release_slots_shared(seat, mask);
                let writes = self.table.slot_owner(slot::WRITE) == Some(seat);
                // The unlock before a retry, and walRestartLog's, which holds WRITE, are not a transaction's end.
                let kept = keep_turn || writes;
                if mask & slot::READ_MASK != 0 && !self.table.reads(seat) && !kept {
                    self.turn.end(seat);
                }
            }
            Release::ShmExclusive { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                self.table.release_slots_exclusive(seat, mask);
                // WRITE outside a read transaction is recovery. A checkpoint's turn came with its lock.
                let transaction = mask & (1 << slot::WRITE) != 0 && self.table.reads(seat);
                let comes_with = self.turn.holder().filter(|h| h.seat == seat).map_or(0, |h| h.comes_with);
                if (transaction || mask & comes_with != 0) && !keep_turn {
                    self.turn.end(seat);
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
        let admitted = Probation::Open { admitted: Some(seat) };
        if self.table.exclusive == Some(seat) && self.probation == admitted {
            self.probation = Probation::Over; // the hot journal has been rolled back
        }
        self.table.release_file_write(seat);
        if level == FileLevel::None {
            self.table.set_file_shared(seat, false);
            if self.probation == admitted {
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

    /// The seat opened the wal-index. True: it is the only one.
    pub fn open_wal_index(&mut self, seat: SeatId) -> bool {
        self.journal_is_clear(seat);
        let alone = self.wal.iter().all(|s| *s == seat);
        self.wal.insert(seat);
        // One that waits to be alone, to leave WAL mode, has been overtaken.
        let exclusive =
            |w: &Waiting| matches!(w.ask.request, Request::File { level: FileLevel::Exclusive, .. });
        let waits = |s: &SeatId| self.waiting.values().any(|w| w.seat == *s && exclusive(w));
        if let Some(leaver) = self.table.reserved.filter(waits) {
            self.leaver_gives_way(leaver);
        }
        alone
    }

    /// A seat that waits for EXCLUSIVE with RESERVED, while others are in WAL mode, has no turn: they may have to write
    /// before they go.
    fn leaver_gives_way(&mut self, leaver: SeatId) {
        if self.table.reserved == Some(leaver) && self.wal.iter().any(|s| *s != leaver) {
            self.turn.end(leaver);
        }
    }

    pub fn close_wal_index(&mut self, seat: SeatId) {
        self.wal.remove(&seat);
    }

    pub fn has_wal_index(&self, seat: SeatId) -> bool {
        self.wal.contains(&seat)
    }

    /// `xCheckReservedLock`: the RESERVED lock alone.
    pub fn reserved_by_other(&self, seat: SeatId) -> bool {
        self.table.reserved.is_some_and(|o| o != seat)
    }

    /// The same connection goes to another file.
    pub fn went_elsewhere(&mut self, seat: SeatId) -> bool {
        !self.writes(seat) && self.turn.end(seat)
    }

    fn writes(&self, seat: SeatId) -> bool {
        self.table.file_write_held(seat) || self.table.slot_owner(slot::WRITE) == Some(seat)
    }

    /// The seat is gone. A writer that dies over a rollback journal leaves a hot journal.
    pub fn remove(&mut self, seat: SeatId) {
        let left_journal = self.table.file_write_held(seat) && !self.wal.contains(&seat);
        self.forget_request(seat);
        self.took_turn.remove(&seat);
        self.turn.end(seat);
        self.table.clear(seat);
        self.wal.remove(&seat);
        if left_journal || self.probation == (Probation::Open { admitted: Some(seat) }) {
            self.probation = Probation::Open { admitted: None };
        }
    }

    /// The holder's turn, if somebody waits for it and it is not in use.
    pub fn unused(&self) -> Option<Unused> {
        let h = self.turn.holder().filter(|_| self.turn.somebody_waits())?;
        if self.writes(h.seat) || self.is_waiting(h.seat) {
            return None;
        }
        let file = self.table.file_shared(h.seat) && !self.wal.contains(&h.seat);
        Some(Unused { seat: h.seat, idle: !self.table.reads(h.seat) && !file })
    }

    /// Whom the seat waits for, if it waits.
    pub fn blockers(&self, seat: SeatId) -> Vec<SeatId> {
        let Some(w) = self.ticket_of.get(&seat).and_then(|t| self.waiting.get(t)) else { return Vec::new() };
        let mut blockers: Vec<SeatId> = Vec::new();
        if self.wants_turn(seat, w.ask) {
            return self.turn.holder().map(|h| h.seat).into_iter().collect();
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
                if matches!(w.ask.request, Request::ShmExclusive { slots, .. } if slots.is_checkpoint()) {
                    // Who begins the WAL anew.
                    blockers.extend(self.table.slot_owner(slot::READ0 + 1));
                }
            }
            Request::Turn => {}
        }
        blockers.retain(|b| *b != seat);
        blockers.sort_unstable();
        blockers.dedup();
        blockers
    }

    /// Waiting seats, first come first.
    pub fn waiting(&self) -> impl Iterator<Item = SeatId> + '_ {
        self.waiting.values().map(|w| w.seat)
    }

    pub fn is_waiting(&self, seat: SeatId) -> bool {
        self.ticket_of.contains_key(&seat)
    }

    fn forget_request(&mut self, seat: SeatId) {
        if let Some(ticket) = self.ticket_of.remove(&seat) {
            self.waiting.remove(&ticket);
            self.turn.leave_line(ticket);
        }
    }
}
