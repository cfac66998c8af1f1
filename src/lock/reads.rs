//! Open read transactions: who has one, since when, and what of the WAL it holds back. For reports, not for a decision.
//!
//! A member says by itself when it begins to read, in its seat's own words: nobody else hears of a read on the fast lane.
//! Like every word of a seat's it may be any number.

use super::seat::Seat;
use super::table::Table;
use super::{SeatId, slot};
use crate::planted::planted;
use crate::segment::atomic::Relaxed;
use crate::segment::layout::READS;

/// A read lock, as an index into [`SeatWords::reads_since`](crate::segment::layout::SeatWords::reads_since).
pub type Read = usize;

/// SHARED, where no wal-index is open: a transaction of a rollback journal. In WAL mode a connection keeps it for life.
pub const SHARED: Read = READS - 1;

/// Milliseconds in one count of the word, as a power of two: 128, and 32 bits of them are enough for 17 years.
const COUNT: u32 = 7;

impl Seat<'_> {
    /// To be called before the lock is taken: who sees the lock then finds no time of an earlier transaction's.
    #[inline]
    pub(super) fn reads_begin(&self, read: Read) {
        if let Some(since) = self.table.seat(self.id).and_then(|own| own.reads_since.get(read))
            && !planted("reads-without-time")
        {
            since.store((self.parking.coarse_millis() >> COUNT) as u32, Relaxed);
        }
    }
}

/// An open read transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    pub read: Read,
    /// Milliseconds, as the seat says; `None`: it has not said, or nothing that can be.
    pub open_ms: Option<u64>,
}

impl Table<'_> {
    /// The seat's open read transactions: of a whole process, on the libc lane, there may be several. `now`: milliseconds of
    /// the clock by which the seat says since when; asked if there is one.
    pub fn open_reads(self, seat: SeatId, now: impl Fn() -> u64) -> Vec<Open> {
        let Some(words) = self.seat(seat) else { return Vec::new() };
        let slots = self.slots_shared(seat);
        let by_file = self.file_shared(seat) && !self.wal_open(seat) && !self.file_write_held(seat);
        let held = (0..SHARED).filter(|read| slots & 1 << (slot::READ0 + *read as u8) != 0);
        let open = |read: Read| {
            let since = u64::from(words.reads_since[read].load(Relaxed)) << COUNT;
            // One that is to come is by another clock, or a lie.
            Open { read, open_ms: (since != 0).then(|| now().checked_sub(since)).flatten() }
        };
        held.chain(by_file.then_some(SHARED)).map(open).collect()
    }
}
