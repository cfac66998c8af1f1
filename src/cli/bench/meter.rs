//! Doing an operation again and again inside a window of time, and what that took.

use hdrhistogram::Histogram;
use rusqlite::ErrorCode;

use super::task::{Tally, Window, now};

/// Two significant digits (values are right to 1 %), from 1 ns to an hour.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 2).expect("bounds that the crate allows")
}

/// Does `operation` until the window ends. It is told how many were acknowledged before, and is done again with
/// the same number when it failed. One of `sampling` is measured.
pub fn measure(
    window: Window,
    sampling: u32,
    mut operation: impl FnMut(u64) -> rusqlite::Result<()>,
) -> Tally {
    let mut meter = Meter::new(window);
    let mut before = now();
    while before < window.end {
        for _ in 1..sampling {
            match operation(meter.tally.acknowledged) {
                Ok(()) if meter.wanted.is_none() => meter.succeeded_unseen(),
                result => meter.unmeasured(now(), result),
            }
        }
        let began = if sampling > 1 { now() } else { before };
        let result = operation(meter.tally.acknowledged);
        before = now();
        meter.measured(began, before, result);
    }
    meter.finish(before)
}

struct Meter {
    window: Window,
    tally: Tally,
    latency: Histogram<u64>,
    /// Since when an operation is tried that has only failed so far.
    wanted: Option<u64>,
    /// Whether the clock was in the window when it was last looked at.
    inside: bool,
}

impl Meter {
    fn new(window: Window) -> Meter {
        Meter { window, tally: Tally::default(), latency: histogram(), wanted: None, inside: false }
    }

    #[inline]
    fn succeeded_unseen(&mut self) {
        self.tally.acknowledged += 1;
        self.tally.operations += u64::from(self.inside);
    }

    fn measured(&mut self, began: u64, ended: u64, result: rusqlite::Result<()>) {
        // One that began in the warm-up and ended now has waited all that time: it counts.
        if result.is_ok() && ended >= self.window.begin {
            self.latency.saturating_record(ended - began);
            self.tally.slowest_ns = self.tally.slowest_ns.max(ended - began);
        }
        self.outcome(began, ended, result);
    }

    fn unmeasured(&mut self, at: u64, result: rusqlite::Result<()>) {
        self.outcome(at, at, result);
    }

    fn outcome(&mut self, began: u64, ended: u64, result: rusqlite::Result<()>) {
        self.inside = (self.window.begin..=self.window.end).contains(&ended);
        match result {
            Ok(()) => {
                self.succeeded_unseen();
                let since = self.wanted.take().unwrap_or(began);
                self.waited(since, ended);
            }
            Err(e) => {
                self.wanted.get_or_insert(began);
                if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) {
                    self.tally.busy += u64::from(ended >= self.window.begin);
                } else {
                    self.tally.errors += 1;
                    self.tally.first_error.get_or_insert_with(|| e.to_string());
                }
            }
        }
    }

    fn waited(&mut self, since: u64, until: u64) {
        if until >= self.window.begin {
            self.tally.worst_wait_ns = self.tally.worst_wait_ns.max(until - since);
        }
    }

    fn finish(mut self, at: u64) -> Tally {
        if let Some(since) = self.wanted {
            self.waited(since, at);
        }
        let seen = self.latency.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value()));
        self.tally.latency = seen.collect();
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::ffi;

    const WINDOW: Window = Window { start: 0, begin: 100, end: 200 };

    fn failure(code: i32) -> rusqlite::Result<()> {
        Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None))
    }

    #[test]
    fn the_warm_up_is_acknowledged_and_not_measured() {
        let mut meter = Meter::new(WINDOW);
        meter.measured(10, 90, Ok(()));
        meter.measured(90, 110, Ok(()));
        meter.measured(110, 250, Ok(()));
        let tally = meter.finish(250);
        assert_eq!((tally.acknowledged, tally.operations), (3, 1));
        // What ended after the window is not in its rate, but nobody's wait is forgotten.
        assert_eq!((tally.slowest_ns, tally.worst_wait_ns), (140, 140));
        assert_eq!(tally.latency.iter().map(|(_, n)| n).sum::<u64>(), 2);
    }

    #[test]
    fn a_wait_lasts_from_the_first_try_to_the_success() {
        let mut meter = Meter::new(WINDOW);
        meter.measured(80, 95, failure(ffi::SQLITE_BUSY));
        meter.measured(95, 120, failure(ffi::SQLITE_BUSY_SNAPSHOT));
        meter.measured(120, 150, Ok(()));
        let tally = meter.finish(150);
        assert_eq!((tally.busy, tally.errors, tally.operations), (1, 0, 1));
        assert_eq!((tally.slowest_ns, tally.worst_wait_ns), (30, 70));
    }

    #[test]
    fn one_that_never_succeeds_has_waited_to_the_end() {
        let mut meter = Meter::new(WINDOW);
        meter.measured(110, 190, failure(ffi::SQLITE_BUSY));
        meter.measured(190, 220, failure(ffi::SQLITE_IOERR));
        let tally = meter.finish(220);
        assert_eq!((tally.busy, tally.errors, tally.worst_wait_ns), (1, 1, 110));
        assert!(tally.first_error.is_some() && tally.latency.is_empty());
    }

    #[test]
    fn sampled_operations_are_all_counted() {
        let begin = now();
        let window = Window { start: begin, begin, end: begin + 2_000_000 };
        let mut done = 0;
        let tally = measure(window, 64, |acknowledged| {
            assert_eq!(acknowledged, done);
            done += 1;
            Ok(())
        });
        assert_eq!((tally.acknowledged, tally.operations % 64), (done, tally.acknowledged % 64));
        let measured: u64 = tally.latency.iter().map(|(_, n)| n).sum();
        assert_eq!(measured, done / 64);
    }
}
