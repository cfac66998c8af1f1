//! Sleeping and waking, as the operating system does it: the one thing of a wait that is not in the segment.

use super::SeatId;
use super::table::Table;
use crate::segment::atomic::AtomicU32;
use crate::segment::layout::SeatWords;
use std::time::Duration;

/// A process's way to sleep on a seat's futex word and to wake others.
pub trait Parking {
    /// Sleeps while `seat.park` is `state`, for `limit` at most. May return early.
    fn park(&self, seat: &SeatWords, state: u32, limit: Duration);
    /// Wakes a seat whose word has just become `NOTIFIED`.
    fn wake(&self, table: Table<'_>, seat: SeatId);
    /// Microseconds of a monotonic clock.
    fn micros(&self) -> u64;
    /// Milliseconds of the same clock, as coarse as is cheap.
    fn coarse_millis(&self) -> u64;
    /// Whether a seat that gave its turn back may take it again before one that has been woken arrives.
    fn streaks(&self) -> bool;
}

/// A process's way to sleep until a sync has ended.
pub trait Rounds {
    /// Sleeps while `round` is `seen`, for `micros` at most. May return early.
    fn sleep(&self, round: &AtomicU32, seen: u32, micros: u64);
    /// Wakes everybody who sleeps there.
    fn wake_all(&self, round: &AtomicU32);
    /// Microseconds of a monotonic clock.
    fn micros(&self) -> u64;
}
