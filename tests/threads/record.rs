//! Who had the turn, in which order, and whether it was theirs to have.

use super::Answer;
use std::sync::{Mutex, MutexGuard};
use turnstile::lock::SeatId;
use turnstile::lock::seat::STREAK_MICROS;

/// One turn.
#[derive(Clone, Copy, Debug)]
struct Entry {
    seat: SeatId,
    /// Its place in the line, and how long the record was when it came there. 0: it did not wait.
    ticket: u64,
    came: usize,
    /// What the clock said when it was decided whether the seat might take the turn, and when it was decided how to
    /// end it; 0: nobody asked.
    decided: u64,
    ended: u64,
}

#[derive(Default)]
pub struct Record(Mutex<Vec<Entry>>);

impl Record {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap()
    }

    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// The seat has the turn. Answers the entry's number.
    pub fn taken(&self, seat: SeatId, answer: Answer) -> usize {
        let Answer { ticket, came, decided, .. } = answer;
        let mut entries = self.entries();
        entries.push(Entry { seat, ticket, came, decided, ended: 0 });
        entries.len() - 1
    }

    pub fn ended(&self, entry: usize, clock: u64) {
        self.entries()[entry].ended = clock;
    }

    /// While a seat stood in the line nobody went before it who came later, and nobody without a place in the line
    /// but the holder in its streak. Answers how many waited and how many went on in a streak.
    pub fn check(&self) -> (usize, usize) {
        let entries = self.entries();
        let (mut waits, mut streaks) = (0, 0);
        for (at, one) in entries.iter().enumerate().filter(|(_, e)| e.ticket != 0) {
            waits += 1;
            // The turn at `came` may have been taken before this seat stood in the line and written down after it.
            let first = one.came + 1;
            let mut run = first;
            for n in first..at {
                let (before, other) = (entries[n - 1], entries[n]);
                if other.ticket != 0 {
                    assert!(other.ticket < one.ticket, "{one:?} was overtaken by {other:?}");
                    run = n;
                    continue;
                }
                if n == first {
                    continue; // whose streak this may be is not known to this waiter
                }
                streaks += 1;
                assert_eq!(other.seat, before.seat, "{one:?}: {other:?} had no place in the line");
                assert!(before.ended != 0 && other.decided != 0, "{one:?}: {before:?}, {other:?}");
                let lasted = other.decided.saturating_sub(entries[run].ended);
                assert!(lasted <= STREAK_MICROS, "{one:?}: {other:?} after {lasted} µs");
            }
        }
        (waits, streaks)
    }
}
