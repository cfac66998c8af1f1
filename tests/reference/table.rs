//! The lock table of one database: four file locks and eight wal-index slots, each either owned by one seat
//! or shared by many. It answers "may I" and keeps the books; when to wait is [`super::rules`]'s business.

use std::collections::BTreeMap;
use turnstile::lock::{SeatId, slot};

/// What one seat holds shared. Exclusive holds are owner words of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedHolds {
    pub file: bool,
    /// A bit for each wal-index slot.
    pub slots: u8,
}

#[derive(Clone, Debug, Default)]
pub struct LockTable {
    pub reserved: Option<SeatId>,
    pub pending: Option<SeatId>,
    pub exclusive: Option<SeatId>,
    slots: [Option<SeatId>; 8],
    shared: BTreeMap<SeatId, SharedHolds>,
}

impl LockTable {
    pub fn shared_holds(&self, seat: SeatId) -> SharedHolds {
        self.shared.get(&seat).copied().unwrap_or_default()
    }

    pub fn file_shared(&self, seat: SeatId) -> bool {
        self.shared_holds(seat).file
    }

    pub fn set_file_shared(&mut self, seat: SeatId, held: bool) {
        self.shared.entry(seat).or_default().file = held;
        self.forget_if_empty(seat);
    }

    /// Seats other than `seat` that hold the file SHARED.
    pub fn other_readers(&self, seat: SeatId) -> impl Iterator<Item = SeatId> + '_ {
        self.shared.iter().filter(move |(s, h)| **s != seat && h.file).map(|(s, _)| *s)
    }

    /// The seat holds RESERVED, PENDING or EXCLUSIVE.
    pub fn file_write_held(&self, seat: SeatId) -> bool {
        [self.reserved, self.pending, self.exclusive].contains(&Some(seat))
    }

    pub fn reads(&self, seat: SeatId) -> bool {
        self.shared_holds(seat).slots & slot::READ_MASK != 0
    }

    pub fn slot_owner(&self, one: u8) -> Option<SeatId> {
        self.slots[one as usize & 7]
    }

    /// The slots of `mask` that `seat` owns exclusively.
    pub fn owned_slots(&self, seat: SeatId) -> u8 {
        (0..8).filter(|s| self.slots[*s as usize] == Some(seat)).fold(0, |m, s| m | 1 << s)
    }

    /// Another seat owns all the slots of those who read the WAL.
    pub fn begins_anew_elsewhere(&self, seat: SeatId) -> bool {
        let owners: Vec<_> = (4..8).map(|s| self.slots[s]).collect();
        owners[0].is_some_and(|o| o != seat) && owners.iter().all(|o| *o == owners[0])
    }

    /// All slots of `mask` shared, or none of them.
    pub fn try_slots_shared(&mut self, seat: SeatId, mask: u8) -> bool {
        let foreign = (0..8).any(|s| mask & (1 << s) != 0 && self.slots[s].is_some_and(|o| o != seat));
        if foreign {
            return false;
        }
        self.shared.entry(seat).or_default().slots |= mask;
        true
    }

    /// All slots of `mask` exclusively, or none of them.
    pub fn try_slots_exclusive(&mut self, seat: SeatId, mask: u8) -> bool {
        if self.slots_blocked_by(seat, mask).next().is_some() {
            return false;
        }
        for s in 0..8 {
            if mask & (1 << s) != 0 {
                self.slots[s] = Some(seat);
            }
        }
        true
    }

    /// Seats whose holds forbid `seat` an exclusive lock on `mask`.
    pub fn slots_blocked_by(&self, seat: SeatId, mask: u8) -> impl Iterator<Item = SeatId> + '_ {
        let owners = (0..8).filter(move |s| mask & (1 << s) != 0).filter_map(|s| self.slots[s]);
        let sharers = self.shared.iter().filter(move |(_, h)| h.slots & mask != 0).map(|(s, _)| *s);
        owners.chain(sharers).filter(move |s| *s != seat)
    }

    pub fn release_slots_shared(&mut self, seat: SeatId, mask: u8) {
        self.shared.entry(seat).or_default().slots &= !mask;
        self.forget_if_empty(seat);
    }

    pub fn release_slots_exclusive(&mut self, seat: SeatId, mask: u8) {
        for s in 0..8 {
            if mask & (1 << s) != 0 && self.slots[s] == Some(seat) {
                self.slots[s] = None;
            }
        }
    }

    /// Gives back RESERVED, PENDING and EXCLUSIVE of `seat`.
    pub fn release_file_write(&mut self, seat: SeatId) {
        for owner in [&mut self.reserved, &mut self.pending, &mut self.exclusive] {
            if *owner == Some(seat) {
                *owner = None;
            }
        }
    }

    /// Everything the seat holds, gone.
    pub fn clear(&mut self, seat: SeatId) {
        self.release_file_write(seat);
        self.release_slots_exclusive(seat, 0xff);
        self.shared.remove(&seat);
    }

    /// Nobody holds anything.
    pub fn is_idle(&self) -> bool {
        self.shared.is_empty()
            && self.slots.iter().all(Option::is_none)
            && [self.reserved, self.pending, self.exclusive].iter().all(Option::is_none)
    }

    fn forget_if_empty(&mut self, seat: SeatId) {
        if self.shared.get(&seat) == Some(&SharedHolds::default()) {
            self.shared.remove(&seat);
        }
    }
}
