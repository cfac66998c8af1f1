//! How the broker wakes others. It never sleeps on a futex itself.

use crate::lock::SeatId;
use crate::lock::park::Parking;
use crate::lock::table::Table;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::SeatWords;
use std::time::Duration;

/// The broker's own requests, made for the socket lane: tried again at each turn of its loop.
#[derive(Debug)]
pub struct Own;

impl Parking for Own {
    fn park(&self, _: &SeatWords, _: u32, _: Duration) {}

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        if let Some(words) = table.seat(seat).filter(|w| w.brokered.load(SeqCst) == 0) {
            futex::wake(&words.park);
        }
    }

    fn micros(&self) -> u64 {
        futex::micros()
    }

    fn coarse_millis(&self) -> u64 {
        futex::coarse_millis()
    }

    /// The next in line gets the turn at once: its request is at hand.
    fn streaks(&self) -> bool {
        false
    }
}
