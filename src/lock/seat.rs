//! One seat's side of the rules: its requests, what it gives back, and when its turn ends. The same for a member
//! that works on the segment itself and for the broker, which does it on behalf of those who cannot.

use super::park::Parking;
use super::rules::Attempt;
use super::table::Table;
use super::turn::{Streak, Turn};
use super::{Ask, FileLevel, Release, Request, SeatId, Verdict, slot};
use crate::planted::planted;
use crate::segment::atomic::{Relaxed, SeqCst};
use crate::segment::layout::{CHECKPOINTER, PARKED, PROBATION_OPEN, PROBATION_OVER, RUNNING};
use std::cell::Cell;

/// How long, in microseconds, a seat may go on taking the turn while the next one is on its way.
pub const STREAK_MICROS: u64 = 600;
/// How long it may in any case, if it comes back at once: each change of writers costs a wake-up and the reading of
/// what the others have written.
pub const LEAST_STREAK_MICROS: u64 = 300;

/// What a seat knows of itself and nobody else needs to.
#[derive(Debug, Default)]
pub struct Own {
    /// The turn came with these wal-index slots, outside any read transaction (a checkpoint): it ends with them.
    pub(super) comes_with: Cell<u8>,
    /// The turn was taken for the request that is being made. If that ends BUSY, the turn goes back.
    pub(super) for_request: Cell<bool>,
    /// Its commits wait for a sync outside the turn: it takes no streak, and looks a while for the turn before it
    /// stands in the line.
    pub hurries: Cell<bool>,
    /// So many microseconds longer than usual may its streak be: its transactions are long, because each makes its sync
    /// in its turn, and a change of writers after each would cost a wake-up for each.
    pub longer: Cell<u64>,
    in_line: Cell<bool>,
    asleep: Cell<bool>,
    /// When the streak began, in microseconds; 0: there is none.
    streak_since: Cell<u64>,
}

/// A seat at work.
#[derive(Clone, Copy)]
pub struct Seat<'a> {
    pub table: Table<'a>,
    pub id: SeatId,
    pub own: &'a Own,
    pub parking: &'a dyn Parking,
    /// The kernel's id of the thread that asks.
    pub thread: u32,
    /// Tells the connections of its process apart.
    pub connection: u64,
}

/// What a waiting seat waits for, as [`SeatWords::waiting`] says it.
///
/// [`SeatWords::waiting`]: crate::segment::layout::SeatWords::waiting
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    Turn = 1,
    Shared,
    Exclusive,
    Write,
    Recovery,
    Checkpoint,
}

impl WaitsFor {
    pub fn from_code(code: u32) -> Option<WaitsFor> {
        use WaitsFor::{Checkpoint, Exclusive, Recovery, Shared, Turn, Write};
        [Turn, Shared, Exclusive, Write, Recovery, Checkpoint].into_iter().find(|w| *w as u32 == code)
    }

    /// `for_turn`: the turn comes first, and is missing.
    pub fn of(request: Request, for_turn: bool) -> WaitsFor {
        match request {
            _ if for_turn => WaitsFor::Turn,
            Request::Turn => WaitsFor::Turn,
            Request::File { level: FileLevel::Shared, .. } => WaitsFor::Shared,
            Request::File { .. } => WaitsFor::Exclusive,
            Request::ShmShared(_) => WaitsFor::Recovery,
            Request::ShmExclusive { slots, .. } if slots.is_checkpoint() => WaitsFor::Checkpoint,
            Request::ShmExclusive { .. } => WaitsFor::Write,
        }
    }

    /// For `status`, and for the log of a wait in vain.
    pub fn describe(self) -> &'static str {
        match self {
            WaitsFor::Turn => "the turn",
            WaitsFor::Shared => "SHARED",
            WaitsFor::Exclusive => "EXCLUSIVE",
            WaitsFor::Write => "the WAL write lock",
            WaitsFor::Recovery => "a wal-index slot",
            WaitsFor::Checkpoint => "the checkpoint lock",
        }
    }
}

impl<'a> Seat<'a> {
    pub fn turn(&self) -> Turn<'a> {
        Turn { table: self.table, parking: self.parking }
    }

    pub fn has_turn(&self) -> bool {
        self.turn().held_by(self.id)
    }

    /// Another lock call of this seat.
    pub(super) fn count_call(&self) {
        if let Some(own) = self.table.seat(self.id) {
            // Nobody else writes them and nothing depends on their order: they are looked at after milliseconds.
            own.calls.store(own.calls.load(Relaxed).wrapping_add(1), Relaxed);
            if own.connection.load(Relaxed) != self.connection {
                own.connection.store(self.connection, Relaxed);
            }
        }
    }

    /// Takes the turn, if it is this seat's to take.
    pub(super) fn take_turn(&self, comes_with: u8) -> bool {
        let turn = self.turn();
        if turn.held_by(self.id) {
            return true;
        }
        let in_streak = Cell::new(false);
        let hurries = self.own.hurries.get();
        let taken = turn.try_take(self.id, self.own.in_line.get(), |again, first| {
            in_streak.set(again && self.own.streak_since.get() != 0 && self.streak() < Streak::Over);
            in_streak.get() || hurries && turn.is_young(first)
        });
        if taken {
            if !in_streak.get() {
                // With somebody waiting already, the streak begins here: a transaction longer than one has none.
                let contended = self.parking.streaks() && turn.load().is_contended();
                self.own.streak_since.set(if contended { self.parking.micros().max(1) } else { 0 });
            }
            self.own.in_line.set(false);
            self.own.comes_with.set(comes_with);
            self.own.for_request.set(true);
            if let Some(own) = self.table.seat(self.id) {
                own.thread.store(self.thread, Relaxed);
                own.turn_since.store(self.parking.coarse_millis(), Relaxed);
            }
        }
        taken
    }

    /// Ends this seat's turn, if it has it.
    pub fn end_turn(&self) -> bool {
        self.turn().end(self.id, || self.streak())
    }

    /// Called when somebody waits: begins the streak if there is none.
    fn streak(&self) -> Streak {
        if !self.parking.streaks() {
            return Streak::Over;
        }
        if self.own.hurries.get() {
            return Streak::Hurry;
        }
        let now = self.parking.micros().max(1);
        if self.own.streak_since.get() == 0 {
            self.own.streak_since.set(now);
        }
        let longer = self.own.longer.get();
        match now.saturating_sub(self.own.streak_since.get()).saturating_sub(longer) {
            0..LEAST_STREAK_MICROS => Streak::Young,
            LEAST_STREAK_MICROS..STREAK_MICROS => Streak::Old,
            _ => Streak::Over,
        }
    }

    /// Stands where it will be woken. To be called before the attempt that decides whether to sleep.
    /// True: it stands elsewhere than before.
    pub fn begin_wait(&self, request: Request, for_turn: bool) -> bool {
        let Some(own) = self.table.seat(self.id) else { return false };
        if own.waiting.load(SeqCst) == 0 {
            own.ended.store(0, SeqCst);
            own.since.store(self.parking.coarse_millis(), SeqCst);
            own.thread.store(self.thread, SeqCst);
        }
        own.waiting.store(WaitsFor::of(request, for_turn) as u32, SeqCst);
        if for_turn {
            let new = !self.own.in_line.replace(true);
            if new {
                self.turn().enter(self.id);
            }
            new
        } else {
            self.table.sleepers.set(self.id);
            if planted("sleepy-before-parked") {
                self.table.words.sleepy.0.store(1, SeqCst);
            }
            !self.own.asleep.replace(true)
        }
    }

    /// No longer waits; without the turn, if it was waiting for that.
    pub fn end_wait(&self) {
        if self.own.in_line.replace(false) {
            self.turn().give_up(self.id);
        }
        if self.own.asleep.replace(false) {
            self.table.sleepers.clear(self.id);
        }
        if let Some(own) = self.table.seat(self.id) {
            own.park.store(RUNNING, SeqCst);
            own.waiting.store(0, SeqCst);
        }
    }

    /// Says how the seat waits ([`SeatWords::park`]). Once `PARKED`, whoever frees something wakes it.
    ///
    /// [`SeatWords::park`]: crate::segment::layout::SeatWords::park
    pub fn mark(&self, state: u32) {
        if let Some(own) = self.table.seat(self.id) {
            own.park.store(state, SeqCst);
        }
        // Only now: whoever clears it then finds the seat parked. One that cleared it a moment before has taken
        // the seat for running, and the next one to free something would not look at all.
        if state == PARKED && self.own.asleep.get() && !planted("sleepy-before-parked") {
            self.table.words.sleepy.0.store(1, SeqCst);
        }
    }

    /// Wakes everybody who sleeps for something else than the turn.
    pub(super) fn wake_sleepers(&self) {
        wake_sleepers(self.table, self.parking);
    }

    /// The wait is over (limit, interrupt, a cycle): the lock without waiting and, for a wait ahead, without
    /// the turn. A read is never refused for want of a turn: wal.c would make a hundred retries of it and then
    /// `SQLITE_PROTOCOL`.
    pub fn give_up(&self, ask: Ask) -> Verdict {
        self.end_wait();
        if planted("wait-ahead-fails") && ask.ahead {
            return Verdict::Busy;
        }
        match self.attempt(Ask { ahead: false, ..ask }) {
            Attempt::Done(verdict) => verdict,
            Attempt::Wait { .. } => {
                // PENDING stays with a RESERVED holder (as in unixLock: its busy handler retries with it and new readers
                // stay out) and goes back from a hot-journal roller. It is not given up with what another thread waits
                // for, where the seat is a whole process's.
                let asked =
                    matches!(ask.request, Request::File { .. }) || planted("any-wait-gives-the-file-up");
                if asked && self.table.reserved() != Some(self.id) && self.table.release_file_write(self.id) {
                    self.wake_sleepers();
                }
                self.request_refused();
                Verdict::Busy
            }
        }
    }

    /// Gives a lock back. Ends the seat's turn where a transaction ends.
    pub fn release(&self, release: Release) {
        self.count_call();
        match release {
            Release::File { level, keep_turn } => self.release_file(level, keep_turn),
            Release::ShmShared { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                self.table.release_slots_shared(self.id, mask);
                if mask & slot::READ_MASK == 0 || keep_turn && !planted("turn-ends-at-retry") {
                    return;
                }
                // Two unlocks look like the end of a read transaction and are not: the one that SQLite makes
                // because its header changed while it waited (it asks again at once), and walRestartLog, which
                // drops and retakes READ(0) while it holds WRITE.
                let writes = self.table.slot_owner(slot::WRITE) == Some(self.id);
                if !self.table.reads(self.id) && (!writes || planted("turn-ends-at-restart")) {
                    self.end_turn();
                }
            }
            Release::ShmExclusive { slots, keep_turn } => {
                let Some(mask) = slots.mask() else { return };
                let began_anew = mask & slot::WAL_READERS != 0 && self.table.begins_anew(self.id);
                self.table.release_slots_exclusive(self.id, mask);
                // WRITE outside a read transaction is recovery: the turn, if the seat has it, was taken for the
                // transaction that follows. A checkpoint's came with its lock and goes with it.
                let transaction = mask & (1 << slot::WRITE) != 0 && self.table.reads(self.id);
                if (transaction || mask & self.own.comes_with.get() != 0) && !keep_turn {
                    self.own.comes_with.set(0);
                    self.end_turn();
                }
                let checkpoint = mask & 1 << slot::CHECKPOINT != 0 && self.id == CHECKPOINTER;
                if mask & (1 << slot::WRITE | 1 << slot::RECOVER) != 0 || began_anew || checkpoint {
                    self.wake_sleepers();
                }
            }
            Release::Turn => {
                self.end_turn();
            }
        }
    }

    fn release_file(&self, level: FileLevel, keep_turn: bool) {
        // EXCLUSIVE without RESERVED rolled back somebody's hot journal: the transaction comes after it.
        let wrote = self.table.reserved() == Some(self.id);
        let rolled_back = self.table.exclusive() == Some(self.id);
        let probation = &self.table.words.file.0.probation;
        if rolled_back {
            let _ = probation.compare_exchange(self.id, PROBATION_OVER, SeqCst, SeqCst);
        }
        let mut wakes = self.table.release_file_write(self.id);
        if level == FileLevel::None {
            self.table.set_file_shared(self.id, false);
            // Not found out whether there is a hot journal: the next one's.
            wakes |= probation.compare_exchange(self.id, PROBATION_OPEN, SeqCst, SeqCst).is_ok();
            wakes |= self.table.pending().is_some() && !planted("reader-leaves-quietly");
        }
        if (wrote || level == FileLevel::None) && !keep_turn {
            self.end_turn();
        }
        if wakes {
            self.wake_sleepers();
        }
    }

    /// The seat admitted on probation read past the journal check: there is no hot journal.
    pub fn journal_is_clear(&self) {
        let probation = &self.table.words.file.0.probation;
        if probation.load(SeqCst) == self.id
            && probation.compare_exchange(self.id, PROBATION_OVER, SeqCst, SeqCst).is_ok()
        {
            self.wake_sleepers();
        }
    }

    /// Opens the wal-index. `alone` is called if no other seat has it open: what the index holds is then nobody's
    /// truth and must be invalidated (the unix VFS truncates `-shm` under its dead-man switch for the same reason).
    /// False: somebody else is just finding out; ask again soon.
    pub fn open_wal_index(&self, alone: impl FnOnce()) -> bool {
        self.count_call();
        self.journal_is_clear();
        let opening = &self.table.words.file.0.opening;
        if opening.compare_exchange(0, self.id, SeqCst, SeqCst).is_err() {
            return false;
        }
        self.table.set_wal_open(self.id, true);
        if self.table.reserved().is_some() {
            self.wake_sleepers(); // it may be leaving WAL mode, with the turn that this seat will need
        }
        if !self.table.wal_open_elsewhere(self.id) {
            alone();
        }
        let _ = opening.compare_exchange(self.id, 0, SeqCst, SeqCst);
        true
    }

    pub fn close_wal_index(&self) {
        self.table.closed(self.id);
    }

    /// Whether another seat holds RESERVED: the RESERVED word alone. PENDING means a reader takes a half-written
    /// file for a clean one.
    pub fn reserved_by_other(&self) -> bool {
        let foreign = |owner: Option<SeatId>| owner.is_some_and(|o| o != self.id);
        foreign(self.table.reserved())
            || (planted("pending-counts-as-reserved") && foreign(self.table.pending()))
    }

    /// Lets everything go: the seat is about to be given up.
    pub fn leave(&self) {
        self.release(Release::File { level: FileLevel::None, keep_turn: false });
        self.table.clear(self.id);
        self.end_turn();
        self.wake_sleepers();
    }

    /// The same connection goes to another file: if its turn here was taken ahead and no write lock followed,
    /// its statement does not write this file.
    pub fn went_elsewhere(&self) -> bool {
        let writes =
            self.table.file_write_held(self.id) || self.table.slot_owner(slot::WRITE) == Some(self.id);
        self.has_turn() && !writes && !planted("turn-kept-elsewhere") && self.end_turn()
    }
}

/// Whether the request begins a transaction: a read slot or SHARED, and the seat has nothing open. (walRestartLog
/// takes a read slot inside a commit.)
pub fn begins_transaction(seat: &Seat, ask: Ask) -> bool {
    let begins = match ask.request {
        Request::File { level: FileLevel::Shared, .. } => true,
        Request::ShmShared(slots) => slots.is_one_read(),
        _ => false,
    };
    begins && seat.table.owned_slots(seat.id) == 0 && !seat.has_turn()
}

pub(super) fn wake_sleepers(table: Table<'_>, parking: &dyn Parking) {
    let sleepy = &table.words.sleepy.0;
    if sleepy.load(SeqCst) != 0 && sleepy.swap(0, SeqCst) != 0 {
        let turn = Turn { table, parking };
        table.sleepers.iter().for_each(|seat| turn.wake(seat));
    }
}
