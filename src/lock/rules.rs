//! What a request means: granted at once, in line, or BUSY.
//!
//! SQLite's wal.c and pager.c expect some requests to fail at once and move on, and break when others fail.
//! The table of who waits is in `docs/architecture.md` ("Locks"); the code below is in its order.

use super::seat::Seat;
use super::tries::tries;
use super::{Ask, FileLevel, Request, SeatId, Slots, Verdict, reads, slot};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{CHECKPOINTER, PROBATION_OPEN, PROBATION_OVER};

/// What one attempt at a request comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    Done(Verdict),
    /// Not yet. `for_turn`: it is the turn that is missing, not the lock.
    Wait {
        for_turn: bool,
    },
}

const BUSY: Attempt = Attempt::Done(Verdict::Busy);
const WAIT: Attempt = Attempt::Wait { for_turn: false };

impl Seat<'_> {
    /// One attempt at a request. After BUSY the seat holds what it held before the request, whatever was tried first.
    pub fn attempt(&self, ask: Ask) -> Attempt {
        self.count_call();
        let attempt = self.try_request(ask);
        match attempt {
            Attempt::Done(Verdict::Granted { .. }) => self.request_granted(),
            BUSY => self.request_refused(),
            Attempt::Wait { .. } => {}
        }
        attempt
    }

    /// For who does not wait: what would have to is refused.
    pub fn attempt_once(&self, ask: Ask) -> Verdict {
        match self.attempt(ask) {
            Attempt::Done(verdict) => verdict,
            Attempt::Wait { .. } => {
                self.request_refused();
                Verdict::Busy
            }
        }
    }

    /// A request has been granted: what was taken for it stays.
    fn request_granted(&self) {
        self.own.for_request.set(false);
    }

    /// A request has ended BUSY: the turn goes back, if it was taken for that request. SQLite makes no call that would
    /// end it: it holds no lock of which it knows. (What is tried below leaves no lock behind.)
    pub fn request_refused(&self) {
        if self.own.for_request.replace(false) && !planted("busy-keeps-turn") {
            self.own.comes_with.set(0);
            self.end_turn();
        }
    }

    fn try_request(&self, ask: Ask) -> Attempt {
        if self.wants_turn(ask) {
            let comes_with = match ask.request {
                Request::ShmExclusive { slots, .. } => slots.mask().unwrap_or(0),
                _ => 0,
            };
            if !self.take_turn(comes_with) {
                return Attempt::Wait { for_turn: true };
            }
        }
        match ask.request {
            Request::File { level: FileLevel::Shared, .. } => self.file_shared(),
            Request::File { level: FileLevel::Reserved, .. } => self.file_reserved(),
            Request::File { level: FileLevel::Exclusive, hot_journal } => self.file_exclusive(hot_journal),
            Request::File { .. } => BUSY, // SQLite never asks for PENDING or NONE
            Request::ShmShared(slots) => self.shm_shared(slots),
            Request::ShmExclusive { slots, blocking } => self.shm_exclusive(slots, blocking),
            Request::Turn => self.granted(false),
        }
    }

    /// The turn comes before this request: a statement that writes begins its snapshot, or a checkpoint asks
    /// for WRITE outside any transaction.
    fn wants_turn(&self, ask: Ask) -> bool {
        match ask.request {
            Request::Turn => true,
            Request::ShmExclusive { slots, blocking } => {
                let wanted = slots.is_write() && self.write_is_checkpoint(blocking)
                    || slots.is_checkpoint() && ask.ahead;
                wanted && !self.has_turn()
            }
            Request::ShmShared(_) | Request::File { level: FileLevel::Shared, .. } => {
                ask.ahead && !self.has_turn()
            }
            Request::File { .. } => false,
        }
    }

    fn write_is_checkpoint(&self, blocking: bool) -> bool {
        let checkpoints = || self.table.slot_owner(slot::CHECKPOINT) == Some(self.id);
        !self.table.reads(self.id) && (blocking || checkpoints())
    }

    fn granted(&self, probation: bool) -> Attempt {
        Attempt::Done(Verdict::Granted { turn: self.has_turn(), probation })
    }

    fn foreign(&self, owner: Option<SeatId>) -> bool {
        owner.is_some_and(|o| o != self.id)
    }

    fn file_is_closed(&self) -> bool {
        self.foreign(self.table.pending()) || self.foreign(self.table.exclusive())
    }

    /// Waits in line behind PENDING and EXCLUSIVE: a writer is about to change the file.
    fn file_shared(&self) -> Attempt {
        let probation = &self.table.words.file.0.probation;
        // Before the hold is stored: giving it back wakes the sleepers, and this seat is one of them.
        let admitted = probation.load(SeqCst);
        let elsewhere = ![PROBATION_OVER, PROBATION_OPEN, self.id].contains(&admitted);
        let looks = !planted("no-probation") && !planted("hold-before-probation");
        if self.file_is_closed() || (elsewhere && looks) {
            return WAIT;
        }
        let before = self.table.file_shared(self.id);
        if !before {
            self.reads_begin(reads::SHARED);
        }
        self.table.set_file_shared(self.id, true);
        let step_back = || {
            if !before {
                self.table.set_file_shared(self.id, false);
                self.wake_sleepers(); // a writer may have seen the hold and gone to sleep
            }
            WAIT
        };
        if self.file_is_closed() {
            return step_back();
        }
        let on_probation = match probation.load(SeqCst) {
            PROBATION_OVER => false,
            _ if planted("no-probation") => false,
            admitted if admitted == self.id => true,
            PROBATION_OPEN => {
                if probation.compare_exchange(PROBATION_OPEN, self.id, SeqCst, SeqCst).is_err() {
                    return step_back();
                }
                true
            }
            _ => return step_back(),
        };
        self.granted(on_probation)
    }

    /// BUSY at once when another has it: the seat holds SHARED, and the other will need it gone.
    fn file_reserved(&self) -> Attempt {
        let t = &self.table;
        if !t.file_shared(self.id) || self.foreign(t.reserved()) || self.file_is_closed() {
            return BUSY;
        }
        if !self.take_turn(0) {
            return BUSY;
        }
        let reserved = &t.words.file.0.reserved;
        let had = t.reserved() == Some(self.id);
        let mine = had || reserved.compare_exchange(0, self.id, SeqCst, SeqCst).is_ok();
        if !mine || self.file_is_closed() || !self.turn().confirm(self.id) {
            if mine && !had {
                let _ = reserved.compare_exchange(self.id, 0, SeqCst, SeqCst);
            }
            return BUSY;
        }
        self.journal_is_clear();
        self.granted(false)
    }

    fn file_exclusive(&self, hot_journal: bool) -> Attempt {
        let t = &self.table;
        let file = &t.words.file.0;
        if !t.file_shared(self.id) || self.foreign(t.reserved()) || self.file_is_closed() {
            return BUSY;
        }
        if t.pending() != Some(self.id) {
            if file.pending.compare_exchange(0, self.id, SeqCst, SeqCst).is_err() {
                return BUSY;
            }
            // Between two looks somebody may have taken RESERVED; it sees PENDING and steps back, or this does.
            if self.foreign(t.reserved()) || self.foreign(t.exclusive()) {
                return self.give_pending_back();
            }
        }
        if !t.read_by_others(self.id) {
            file.exclusive.store(self.id, SeqCst);
            return self.granted(false);
        }
        if t.reserved() == Some(self.id) && t.wal_open_elsewhere(self.id) && !planted("leaver-keeps-turn") {
            // The file is leaving WAL mode, and somebody came in between the two EXCLUSIVEs of that: it keeps SHARED
            // until it closes, and may have to write before. Plain SQLite's RESERVED does not keep it from that.
            self.end_turn();
        }
        if t.reserved() == Some(self.id) || hot_journal || planted("exclusive-mode-waits") {
            return WAIT;
        }
        // The checkpointer alone: it sees PENDING and lets go.
        if t.read_by_checkpointer_alone(self.id) && !planted("checkpointer-is-anyone") {
            return WAIT;
        }
        // Last close, leaving WAL mode, locking_mode=EXCLUSIVE: a question, not a wait.
        self.give_pending_back()
    }

    fn give_pending_back(&self) -> Attempt {
        let _ = self.table.words.file.0.pending.compare_exchange(self.id, 0, SeqCst, SeqCst);
        self.wake_sleepers();
        BUSY
    }

    /// Never waits for the slot itself: BUSY at once, wal.c expects it and moves on. But for RECOVER: wal.c asks for
    /// it to find out whether somebody is recovering, and a BUSY there becomes `SQLITE_BUSY_RECOVERY` at once. The
    /// recovery ends by itself.
    fn shm_shared(&self, slots: Slots) -> Attempt {
        let Some(mask) = slots.mask() else { return BUSY };
        if let Some(read) = slots.read() {
            self.reads_begin(read);
        }
        match self.table.try_slots_shared(self.id, mask) {
            true => self.granted(false),
            false if slots.is_recover() && !planted("recovery-is-busy") => WAIT,
            false => BUSY,
        }
    }

    fn shm_exclusive(&self, slots: Slots, blocking: bool) -> Attempt {
        let Some(mask) = slots.mask() else { return BUSY };
        if !slots.is_write() {
            // A reader's mark, a single slot, is each transaction's; these two are not.
            let may_meet = mask & 1 << slot::CHECKPOINT != 0 || slots.begin_anew();
            let meets = || if may_meet { self.checkpoint_meets_new_beginning(slots) } else { None };
            if let Some(not_now) = meets() {
                return not_now;
            }
            let had = if may_meet { self.table.owned_slots(self.id) } else { 0 };
            if self.table.try_slots_exclusive(self.id, mask) {
                if let Some(not_now) = meets() {
                    self.table.release_slots_exclusive(self.id, mask & !had);
                    self.wake_sleepers(); // who saw these slots taken, and waits for them
                    return not_now;
                }
                if mask & 1 << slot::CHECKPOINT != 0 && self.table.begins_anew(self.id) {
                    self.wake_sleepers(); // another's checkpoint waits for the end of that, and is BUSY now
                }
                return self.granted(false);
            }
            // An application's own checkpoint would be BUSY at once, beside one that ends by itself.
            let broker = self.table.slot_owner(slot::CHECKPOINT) == Some(CHECKPOINTER);
            if slots.is_checkpoint() && blocking && broker && !planted("checkpoint-beside-brokers") {
                return WAIT;
            }
            // Somebody may have found RECOVER taken in that moment, and waits for the end of that recovery.
            if mask & 1 << slot::RECOVER != 0 && !planted("recovery-not-called-off") {
                self.wake_sleepers();
            }
            return BUSY;
        }
        let in_turn = self.table.reads(self.id) || self.write_is_checkpoint(blocking);
        let had_turn = self.has_turn();
        if in_turn && !had_turn {
            match self.upgrade() {
                Upgrade::InTurn => {}
                Upgrade::BesideCheckpoint => return WAIT,
                Upgrade::Stale => return BUSY,
            }
        }
        let had = self.table.slot_owner(slot::WRITE) == Some(self.id);
        if !self.table.try_slots_exclusive(self.id, mask) {
            // With the turn, and in recovery, only a recovery or a checkpoint stands in the way: wait.
            return WAIT;
        }
        if in_turn && !self.turn().confirm(self.id) {
            // Taken back between the two: whoever has it now would meet this writer.
            if !had {
                self.table.release_slots_exclusive(self.id, mask);
                self.wake_sleepers();
            }
            return BUSY;
        }
        self.granted(false)
    }

    /// No WAL is begun anew beside another seat's checkpoint: what the request comes to if it would be.
    ///
    /// SQLite before 3.51.3 (but 3.50.7 and 3.44.6) reads the index's header under CHECKPOINT, and takes the WAL for what
    /// that says to the end (sqlite3WalCheckpoint). If a writer begins the WAL anew in between, the checkpoint copies
    /// what is left of the old WAL and counts as many frames of the new one as copied, which then are overwritten: the
    /// database is malformed. Later versions look at the salts once more.
    ///
    /// A writer that is told BUSY appends (walRestartLog). A checkpoint waits: to begin anew takes microseconds. Each
    /// takes its slots first and looks for the other's then, so of two at once at least one steps back. The same look
    /// is taken before that, so that mostly nothing has to be given back.
    fn checkpoint_meets_new_beginning(&self, slots: Slots) -> Option<Attempt> {
        let mask = slots.mask()?;
        let checkpoint = self.foreign(self.table.slot_owner(slot::CHECKPOINT));
        if mask & 1 << slot::CHECKPOINT != 0 {
            // Beside another's checkpoint it is not this that is in the way.
            let meets = !checkpoint && self.table.begins_anew_elsewhere(self.id).is_some();
            let answer = if slots.is_checkpoint() { WAIT } else { BUSY };
            return (meets && !planted("checkpoint-beside-new-beginning")).then_some(answer);
        }
        let meets = slots.begin_anew() && checkpoint;
        (meets && !planted("new-beginning-beside-checkpoint")).then_some(BUSY)
    }

    /// A reader asks for WRITE: whoever has the turn will make its snapshot stale, so waiting cannot help. But the
    /// broker's checkpointer commits nothing and lets go by itself; nobody may be told of it by a BUSY.
    fn upgrade(&self) -> Upgrade {
        let checkpointer = |seat| seat == Some(CHECKPOINTER) && !planted("upgrade-beside-checkpoint");
        // The lock first: a turn must not be taken for a BUSY.
        let owner = self.table.slot_owner(slot::WRITE);
        if self.foreign(owner) && !checkpointer(owner) {
            return Upgrade::Stale;
        }
        for _ in tries() {
            if self.take_turn(0) {
                return Upgrade::InTurn;
            }
            let word = self.turn().load();
            if checkpointer(word.holder()) {
                // Not in the line: whoever stands there already will make the snapshot stale.
                return Upgrade::BesideCheckpoint;
            }
            // Else it may have ended its turn between the two looks.
            if !word.is_free() || word.is_contended() {
                break;
            }
        }
        Upgrade::Stale
    }
}

enum Upgrade {
    InTurn,
    BesideCheckpoint,
    Stale,
}
