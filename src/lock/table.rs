//! The lock table in the segment: four file locks and eight wal-index slots, each owned by one seat or shared by
//! many. It answers "may I" and keeps the words; when to wait is [`super::rules`]'s business.
//!
//! Shared: set my bit in my own word, then look at the owner's. Exclusive: take the owner's word, then look at the
//! seats. Each stores before it looks, all in one total order (SeqCst), so of two that meet at least one sees the
//! other and steps back; both may, and SQLite, or the next try, goes on from there.
//!
//! Looking at all seats must be cheap with a thousand of them, and readers on many processors must not write to one
//! line. So a reader writes its own word only, and [`super::hints`] say which seats are worth a look.

use super::hints::Hints;
use super::{SeatId, slot};
use crate::planted::planted;
use crate::segment::atomic::{AtomicU32, AtomicU64, SeqCst};
use crate::segment::layout::{Bitmaps, CHECKPOINTER, Control, FILE_SHARED, LockWords, SeatWords, WAL_OPEN};

/// A bitmap with a bit a seat.
#[derive(Clone, Copy, Debug)]
pub struct Seats<'a>(pub &'a [AtomicU64]);

impl<'a> Seats<'a> {
    fn at(self, seat: SeatId) -> Option<(&'a AtomicU64, u64)> {
        let bit = seat.checked_sub(1)?;
        Some((self.0.get(bit as usize / 64)?, 1 << (bit % 64)))
    }

    pub fn has(self, seat: SeatId) -> bool {
        self.at(seat).is_some_and(|(word, bit)| word.load(SeqCst) & bit != 0)
    }

    pub fn set(self, seat: SeatId) {
        if let Some((word, bit)) = self.at(seat) {
            word.fetch_or(bit, SeqCst);
        }
    }

    pub fn clear(self, seat: SeatId) {
        if let Some((word, bit)) = self.at(seat) {
            word.fetch_and(!bit, SeqCst);
        }
    }

    /// The seats whose bit is set, each word as it was when it was looked at.
    pub fn iter(self) -> impl Iterator<Item = SeatId> + 'a {
        self.0.iter().enumerate().flat_map(|(i, word)| {
            let mut bits = word.load(SeqCst);
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros();
                bits &= bits.wrapping_sub(1);
                (bit < 64).then(|| i as SeatId * 64 + bit + 1)
            })
        })
    }
}

/// The words of one database, wherever they are.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    pub words: &'a LockWords,
    pub members: Seats<'a>,
    pub line: Seats<'a>,
    pub sleepers: Seats<'a>,
    slot_hints: Hints<'a>,
    file_hints: Hints<'a>,
    seats: &'a [SeatWords],
}

impl<'a> Table<'a> {
    pub fn of(control: &'a Control) -> Table<'a> {
        Table::new(&control.locks, &control.bitmaps, &control.seats)
    }

    pub fn new(words: &'a LockWords, maps: &'a Bitmaps, seats: &'a [SeatWords]) -> Table<'a> {
        let used = seats.len().div_ceil(64);
        Table {
            words,
            members: Seats(&maps.members[..used]),
            line: Seats(&maps.line[..used]),
            sleepers: Seats(&maps.sleepers[..used]),
            slot_hints: Hints(&maps.slot_hints[..2 * used]),
            file_hints: Hints(&maps.file_hints[..2 * used]),
            seats,
        }
    }

    /// The seat's words; `None` for a number that is none, as another process may write.
    pub fn seat(&self, seat: SeatId) -> Option<&'a SeatWords> {
        self.seats.get(seat.checked_sub(1)? as usize)
    }

    fn owner_word(&self, one: u8) -> &'a AtomicU32 {
        match usize::from(one & 7) {
            n @ 0..3 => &self.words.writers.0[n],
            n => &self.words.readers.0[n - 3],
        }
    }

    pub fn slot_owner(&self, one: u8) -> Option<SeatId> {
        owner(self.owner_word(one))
    }

    /// The slots of `mask` that are owned by another seat than `seat`.
    fn foreign_owner(&self, seat: SeatId, mask: u8) -> bool {
        bits(mask).any(|s| self.slot_owner(s).is_some_and(|o| o != seat))
    }

    pub fn slots_shared(&self, seat: SeatId) -> u8 {
        self.seat(seat).map_or(0, |s| s.slots.load(SeqCst) as u8)
    }

    pub fn reads(&self, seat: SeatId) -> bool {
        self.slots_shared(seat) & slot::READ_MASK != 0
    }

    /// The slots that `seat` owns exclusively.
    pub fn owned_slots(&self, seat: SeatId) -> u8 {
        bits(0xff).filter(|s| self.slot_owner(*s) == Some(seat)).fold(0, |m, s| m | 1 << s)
    }

    /// The seat begins the WAL anew: it has all these slots.
    pub fn begins_anew(&self, seat: SeatId) -> bool {
        bits(slot::WAL_READERS).all(|s| self.slot_owner(s) == Some(seat))
    }

    /// Another seat begins the WAL anew.
    pub fn begins_anew_elsewhere(&self, seat: SeatId) -> Option<SeatId> {
        let first = self.slot_owner(slot::READ0 + 1).filter(|o| *o != seat)?;
        self.begins_anew(first).then_some(first)
    }

    /// All slots of `mask` shared, or none of them.
    pub fn try_slots_shared(&self, seat: SeatId, mask: u8) -> bool {
        let Some(own) = self.seat(seat) else { return false };
        let before = own.slots.load(SeqCst);
        if planted("shared-looks-first") && !self.foreign_owner(seat, mask) {
            own.slots.store(before | u32::from(mask), SeqCst);
            self.slot_hints.raise(seat);
            return true;
        }
        own.slots.store(before | u32::from(mask), SeqCst);
        self.slot_hints.raise(seat);
        if self.foreign_owner(seat, mask) {
            own.slots.store(before, SeqCst);
            return false;
        }
        true
    }

    /// All slots of `mask` exclusively, or none of them.
    pub fn try_slots_exclusive(&self, seat: SeatId, mask: u8) -> bool {
        let mut taken = 0u8;
        for s in bits(mask) {
            let word = self.owner_word(s);
            if word.load(SeqCst) == seat {
                continue;
            }
            if word.compare_exchange(0, seat, SeqCst, SeqCst).is_err() {
                self.release_slots_exclusive(seat, taken);
                return false;
            }
            taken |= 1 << s;
        }
        // WRITE is never held shared: a read-only client (walIndexReadHdr) asks for it to find out whether somebody
        // has it, and gives it back at once. CHECKPOINT is, by snapshots (sqlite3WalSnapshotCheck).
        if mask & !(1 << slot::WRITE) != 0
            && self.held_by_others(self.slot_hints, seat, u32::from(mask), |s| &s.slots)
        {
            self.release_slots_exclusive(seat, taken);
            return false;
        }
        true
    }

    /// Seats whose holds forbid `seat` an exclusive lock on `mask`. For reports and for what to try next, not for a lock.
    pub fn slots_blocked_by(&self, seat: SeatId, mask: u8) -> Vec<SeatId> {
        let owners = bits(mask).filter_map(|s| self.slot_owner(s));
        let sharers = self.slot_hints.iter().filter(|s| self.slots_shared(*s) & mask != 0);
        owners.chain(sharers).filter(|s| *s != seat).collect()
    }

    pub fn release_slots_shared(&self, seat: SeatId, mask: u8) {
        if let Some(own) = self.seat(seat) {
            own.slots.store(own.slots.load(SeqCst) & !u32::from(mask), SeqCst);
        }
    }

    pub fn release_slots_exclusive(&self, seat: SeatId, mask: u8) {
        for s in bits(mask) {
            give_back(self.owner_word(s), seat);
        }
    }

    pub fn reserved(&self) -> Option<SeatId> {
        owner(&self.words.file.0.reserved)
    }

    pub fn pending(&self) -> Option<SeatId> {
        owner(&self.words.file.0.pending)
    }

    pub fn exclusive(&self) -> Option<SeatId> {
        owner(&self.words.file.0.exclusive)
    }

    pub fn file_shared(&self, seat: SeatId) -> bool {
        self.seat(seat).is_some_and(|s| s.file.load(SeqCst) & FILE_SHARED != 0)
    }

    pub fn set_file_shared(&self, seat: SeatId, held: bool) {
        self.set_file(seat, FILE_SHARED, held);
        if held {
            self.file_hints.raise(seat);
        }
    }

    pub fn wal_open(&self, seat: SeatId) -> bool {
        self.seat(seat).is_some_and(|s| s.file.load(SeqCst) & WAL_OPEN != 0)
    }

    pub fn set_wal_open(&self, seat: SeatId, open: bool) {
        self.set_file(seat, WAL_OPEN, open);
        if open {
            self.file_hints.raise(seat);
        }
    }

    /// Another seat has the wal-index open.
    pub fn wal_open_elsewhere(&self, seat: SeatId) -> bool {
        self.held_by_others(self.file_hints, seat, WAL_OPEN, |s| &s.file)
    }

    pub(super) fn set_file(&self, seat: SeatId, bit: u32, on: bool) {
        if let Some(own) = self.seat(seat) {
            let before = own.file.load(SeqCst);
            own.file.store(if on { before | bit } else { before & !bit }, SeqCst);
        }
    }

    /// Another seat holds SHARED.
    pub fn read_by_others(&self, seat: SeatId) -> bool {
        self.held_by_others(self.file_hints, seat, FILE_SHARED, |s| &s.file)
    }

    /// Of the other seats that hold SHARED, which are some, the broker's checkpointer is the only one.
    pub fn read_by_checkpointer_alone(&self, seat: SeatId) -> bool {
        let others = || self.file_hints.iter().filter(|s| *s != seat && *s != CHECKPOINTER);
        !others().any(|s| self.file_shared(s))
    }

    /// The seats that may have a bit set in their [`SeatWords::file`].
    pub(super) fn file_hinted(&self) -> impl Iterator<Item = SeatId> + 'a {
        self.file_hints.iter()
    }

    /// Seats other than `seat` that hold SHARED. For reports, not for a decision.
    pub fn other_readers(&self, seat: SeatId) -> Vec<SeatId> {
        self.file_hints.iter().filter(|s| *s != seat && self.file_shared(*s)).collect()
    }

    /// The seat holds RESERVED, PENDING or EXCLUSIVE.
    pub fn file_write_held(&self, seat: SeatId) -> bool {
        [self.reserved(), self.pending(), self.exclusive()].contains(&Some(seat))
    }

    /// Gives back RESERVED, PENDING and EXCLUSIVE of `seat`; says whether it had any.
    pub fn release_file_write(&self, seat: SeatId) -> bool {
        let file = &self.words.file.0;
        let mut had = false;
        // EXCLUSIVE first: who sees PENDING free may ask for SHARED at once.
        for word in [&file.exclusive, &file.pending, &file.reserved] {
            had |= give_back(word, seat);
        }
        had
    }

    /// Whether a seat other than `seat` holds any of `bits` in its word.
    fn held_by_others(
        &self,
        hints: Hints<'a>,
        seat: SeatId,
        bits: u32,
        word: impl Fn(&'a SeatWords) -> &'a AtomicU32,
    ) -> bool {
        // Not often: a seat that is between two transactions should mostly find its hint as it left it.
        let lowering = &self.words.file.0.lowering;
        let lowers = self.seat(seat).is_some_and(|own| own.calls.load(SeqCst).is_multiple_of(64))
            && (lowering.compare_exchange(0, seat, SeqCst, SeqCst).is_ok()
                || planted("hints-lowered-by-two"));
        let mut others = hints.iter().filter(|s| *s != seat);
        let held = others.any(|other| {
            let Some(word) = self.seat(other).map(&word) else { return false };
            if lowers && word.load(SeqCst) == 0 {
                hints.lower(other, || word.load(SeqCst) == 0);
            }
            word.load(SeqCst) & bits != 0
        });
        if lowers {
            give_back(lowering, seat);
        }
        held
    }

    /// Everything the seat holds, gone.
    pub fn clear(&self, seat: SeatId) {
        self.release_file_write(seat);
        give_back(&self.words.file.0.opening, seat);
        give_back(&self.words.file.0.lowering, seat);
        self.release_slots_exclusive(seat, 0xff);
        if let Some(own) = self.seat(seat) {
            own.slots.store(0, SeqCst);
            own.file.store(0, SeqCst);
        }
        // Its hints stay: somebody may be lowering them, and a look in vain is all they cost.
    }
}

fn owner(word: &AtomicU32) -> Option<SeatId> {
    Some(word.load(SeqCst)).filter(|o| *o != 0)
}

fn give_back(word: &AtomicU32, seat: SeatId) -> bool {
    word.load(SeqCst) == seat && word.compare_exchange(seat, 0, SeqCst, SeqCst).is_ok()
}

fn bits(mask: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |s| mask & (1 << s) != 0)
}
