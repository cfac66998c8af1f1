//! What a request means: granted at once, in line, or BUSY.
//!
//! SQLite's wal.c and pager.c expect some requests to fail at once and move on, and break when others fail.
//! The table of who waits is in `docs/architecture.md` ("Locks"); the code below is in its order.

use super::turn::Ticket;
use super::{Locks, Probation};
use turnstile::lock::{Ask, FileLevel, Request, SeatId, Slots, Verdict, slot};

/// What one attempt at a request comes to.
pub(super) enum Attempt {
    Done(Verdict),
    /// In line. `for_turn`: it is the turn that is missing, not the lock.
    Wait {
        for_turn: bool,
    },
}

const BUSY: Attempt = Attempt::Done(Verdict::Busy);

impl Locks {
    /// After BUSY the seat holds what it held before the request.
    pub(super) fn attempt(&mut self, seat: SeatId, ask: Ask, ticket: Option<Ticket>) -> Attempt {
        let had_turn = self.turn.held_by(seat);
        let attempt = self.try_request(seat, ask, ticket);
        if self.turn.held_by(seat) && !had_turn {
            self.took_turn.insert(seat);
        }
        match attempt {
            Attempt::Done(Verdict::Granted { .. }) => drop(self.took_turn.remove(&seat)),
            Attempt::Done(Verdict::Busy) => self.refused(seat),
            Attempt::Wait { .. } => {}
        }
        attempt
    }

    pub(super) fn refused(&mut self, seat: SeatId) {
        if self.took_turn.remove(&seat) {
            self.turn.end(seat);
        }
    }

    fn try_request(&mut self, seat: SeatId, ask: Ask, ticket: Option<Ticket>) -> Attempt {
        if self.wants_turn(seat, ask) {
            let comes_with = match ask.request {
                Request::ShmExclusive { slots, .. } => slots.mask().unwrap_or(0),
                _ => 0,
            };
            if !self.turn.try_take(seat, ticket, comes_with) {
                return Attempt::Wait { for_turn: true };
            }
        }
        match ask.request {
            Request::File { level: FileLevel::Shared, .. } => self.file_shared(seat),
            Request::File { level: FileLevel::Reserved, .. } => self.file_reserved(seat),
            Request::File { level: FileLevel::Exclusive, hot_journal } => {
                self.file_exclusive(seat, hot_journal)
            }
            Request::File { .. } => BUSY, // SQLite never asks for PENDING or NONE
            Request::ShmShared(slots) => self.shm_shared(seat, slots),
            Request::ShmExclusive { slots, .. } => self.shm_exclusive(seat, slots),
            Request::Turn => self.granted(seat, false),
        }
    }

    /// The turn comes before this request: a statement that writes begins its snapshot, or a checkpoint asks
    /// for WRITE outside any transaction.
    pub(super) fn wants_turn(&self, seat: SeatId, ask: Ask) -> bool {
        let wanted = match ask.request {
            Request::Turn => true,
            Request::ShmExclusive { slots, blocking } => {
                slots.is_write() && self.write_is_checkpoint(seat, blocking)
                    || slots.is_checkpoint() && ask.ahead
            }
            Request::ShmShared(_) | Request::File { level: FileLevel::Shared, .. } => ask.ahead,
            Request::File { .. } => false,
        };
        wanted && !self.turn.held_by(seat)
    }

    fn write_is_checkpoint(&self, seat: SeatId, blocking: bool) -> bool {
        let reads = self.table.reads(seat);
        !reads && (blocking || self.table.slot_owner(slot::CHECKPOINT) == Some(seat))
    }

    fn granted(&self, seat: SeatId, probation: bool) -> Attempt {
        Attempt::Done(Verdict::Granted { turn: self.turn.held_by(seat), probation })
    }

    /// Waits in line behind PENDING and EXCLUSIVE: a writer is about to change the file.
    fn file_shared(&mut self, seat: SeatId) -> Attempt {
        let foreign = |owner: Option<SeatId>| owner.is_some_and(|o| o != seat);
        if foreign(self.table.pending) || foreign(self.table.exclusive) {
            return Attempt::Wait { for_turn: false };
        }
        let on_probation = match &mut self.probation {
            Probation::Over => false,
            Probation::Open { admitted: Some(other) } if *other != seat => {
                return Attempt::Wait { for_turn: false };
            }
            Probation::Open { admitted } => {
                *admitted = Some(seat);
                true
            }
        };
        self.table.set_file_shared(seat, true);
        self.granted(seat, on_probation)
    }

    /// BUSY at once when another has it: the seat holds SHARED, and the other will need it gone.
    fn file_reserved(&mut self, seat: SeatId) -> Attempt {
        let foreign = |owner: Option<SeatId>| owner.is_some_and(|o| o != seat);
        let t = &self.table;
        if !t.file_shared(seat) || foreign(t.reserved) || foreign(t.pending) || foreign(t.exclusive) {
            return BUSY;
        }
        if !self.turn.try_take(seat, None, 0) {
            return BUSY;
        }
        self.table.reserved = Some(seat);
        self.journal_is_clear(seat);
        self.granted(seat, false)
    }

    fn file_exclusive(&mut self, seat: SeatId, hot_journal: bool) -> Attempt {
        let foreign = |owner: Option<SeatId>| owner.is_some_and(|o| o != seat);
        let t = &self.table;
        if !t.file_shared(seat) || foreign(t.reserved) || foreign(t.pending) || foreign(t.exclusive) {
            return BUSY;
        }
        let readers_left = t.other_readers(seat).next().is_some();
        let may_wait = t.reserved == Some(seat) || hot_journal;
        if readers_left && !may_wait {
            // Last close, leaving WAL mode, locking_mode=EXCLUSIVE: a question, not a wait.
            return BUSY;
        }
        self.table.pending = Some(seat);
        if readers_left {
            self.leaver_gives_way(seat);
            return Attempt::Wait { for_turn: false };
        }
        self.table.exclusive = Some(seat);
        self.granted(seat, false)
    }

    /// Never waits for the slot itself: BUSY at once, wal.c expects it and moves on. But for RECOVER: wal.c asks for
    /// it to find out whether somebody is recovering, and a BUSY there becomes `SQLITE_BUSY_RECOVERY` at once. The
    /// recovery ends by itself.
    fn shm_shared(&mut self, seat: SeatId, slots: Slots) -> Attempt {
        let Some(mask) = slots.mask() else { return BUSY };
        match self.table.try_slots_shared(seat, mask) {
            true => self.granted(seat, false),
            false if slots.is_recover() => Attempt::Wait { for_turn: false },
            false => BUSY,
        }
    }

    fn shm_exclusive(&mut self, seat: SeatId, slots: Slots) -> Attempt {
        let Some(mask) = slots.mask() else { return BUSY };
        if !slots.is_write() {
            // No WAL is begun anew beside another seat's checkpoint.
            let begins_anew = |mask: u8| mask & slot::WAL_READERS == slot::WAL_READERS;
            let foreign = |owner: Option<SeatId>| owner.is_some_and(|o| o != seat);
            let checkpoints = mask & 1 << slot::CHECKPOINT != 0;
            let beside = foreign(self.table.slot_owner(slot::CHECKPOINT));
            if checkpoints && !beside && self.table.begins_anew_elsewhere(seat) {
                return if slots.is_checkpoint() { Attempt::Wait { for_turn: false } } else { BUSY };
            }
            if !checkpoints && begins_anew(mask) && beside {
                return BUSY;
            }
            return match self.table.try_slots_exclusive(seat, mask) {
                true => self.granted(seat, false),
                false => BUSY,
            };
        }
        let reads = self.table.reads(seat);
        if reads && !self.turn.held_by(seat) {
            // An upgrade: whoever has the turn will make this snapshot stale, so waiting cannot help.
            // The lock is looked at first: a turn must not be taken for a BUSY.
            if self.table.slots_blocked_by(seat, mask).next().is_some() || !self.turn.try_take(seat, None, 0)
            {
                return BUSY;
            }
        }
        // With the turn, and in recovery, only a recovery or a checkpoint stands in the way: wait.
        match self.table.try_slots_exclusive(seat, mask) {
            true => self.granted(seat, false),
            false => Attempt::Wait { for_turn: false },
        }
    }
}
