//! One who waits for nobody.

use std::time::Duration;
use turnstile::lock::SeatId;
use turnstile::lock::park::Parking;
use turnstile::lock::table::Table;
use turnstile::segment::layout::SeatWords;

pub struct Asleep;

impl Parking for Asleep {
    fn park(&self, _: &SeatWords, _: u32, _: Duration) {}
    fn wake(&self, _: Table<'_>, _: SeatId) {}
    fn micros(&self) -> u64 {
        0
    }
    fn coarse_millis(&self) -> u64 {
        0
    }
    fn streaks(&self) -> bool {
        false
    }
}
