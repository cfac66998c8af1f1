//! The rules of the lock table and the turn, each with the failure that it is there for. In a build with the
//! `planted` feature every test also runs without its rule, and must fail.

use std::time::{Duration, Instant};
use turnstile::lock::locks::Locks;
use turnstile::lock::unused::{IDLE_TURN, UNUSED_TURN};
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};
use turnstile::planted::fails_without;

const GRANTED: fn(Option<Verdict>) -> bool = |v| matches!(v, Some(Verdict::Granted { .. }));

/// A database that has been looked at (no probation), with a clock that the test moves.
struct Bench {
    locks: Locks,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        let now = Instant::now();
        let mut bench = Bench { locks: Locks::new(now), now };
        bench.shared(99);
        bench.locks.journal_is_clear(99);
        bench.unlock(99, FileLevel::None);
        bench
    }

    fn ask(&mut self, seat: SeatId, request: Request, ahead: bool) -> Option<Verdict> {
        self.locks.submit(seat, Ask { request, ahead }, self.now)
    }

    fn file(&mut self, seat: SeatId, level: FileLevel) -> Option<Verdict> {
        self.ask(seat, Request::File { level, hot_journal: false }, false)
    }

    fn shared(&mut self, seat: SeatId) {
        assert!(GRANTED(self.file(seat, FileLevel::Shared)));
    }

    /// SHARED or a read slot, with the turn taken ahead.
    fn shared_ahead(&mut self, seat: SeatId) -> Option<Verdict> {
        self.ask(seat, Request::File { level: FileLevel::Shared, hot_journal: false }, true)
    }

    fn read(&mut self, seat: SeatId, ahead: bool) -> Option<Verdict> {
        self.ask(seat, Request::ShmShared(slots(slot::READ0 + 1)), ahead)
    }

    fn write(&mut self, seat: SeatId) -> Option<Verdict> {
        self.ask(seat, Request::ShmExclusive { slots: slots(slot::WRITE), blocking: false }, false)
    }

    fn unlock(&mut self, seat: SeatId, level: FileLevel) {
        self.locks.release(seat, Release::File { level, keep_turn: false }, self.now);
    }

    fn unread(&mut self, seat: SeatId, retry_expected: bool) {
        let release = Release::ShmShared { slots: slots(slot::READ0 + 1), keep_turn: retry_expected };
        self.locks.release(seat, release, self.now);
    }

    fn unwrite(&mut self, seat: SeatId) {
        self.locks.release(
            seat,
            Release::ShmExclusive { slots: slots(slot::WRITE), keep_turn: false },
            self.now,
        );
    }

    fn wal(&mut self, seats: &[SeatId]) {
        for seat in seats {
            self.shared(*seat);
            self.locks.open_wal_index(*seat, self.now);
        }
    }

    fn pass(&mut self, time: Duration) -> Vec<(SeatId, Verdict)> {
        self.now += time;
        self.locks.settle(self.now)
    }

    fn settle(&mut self) -> Vec<(SeatId, Verdict)> {
        self.pass(Duration::ZERO)
    }

    fn turn(&self) -> Option<SeatId> {
        self.locks.turn().holder().map(|h| h.seat)
    }
}

fn slots(one: u8) -> Slots {
    Slots::new(one, 1).unwrap()
}

#[test]
fn first_come_first_served() {
    let mut b = Bench::new();
    b.wal(&[1, 2, 3]);
    assert!(GRANTED(b.read(1, true)));
    assert!(GRANTED(b.write(1)));
    assert_eq!(b.read(2, true), None);
    assert_eq!(b.read(3, true), None);
    b.unwrite(1);
    b.unread(1, false);
    // The one that was just served asks again and goes to the end of the line.
    assert_eq!(b.read(1, true), None);
    assert_eq!(b.settle().iter().map(|(s, _)| *s).collect::<Vec<_>>(), [2]);
    assert_eq!(b.turn(), Some(2));
    b.unread(2, false);
    assert_eq!(b.settle().first().map(|(s, _)| *s), Some(3));
    b.unread(3, false);
    assert_eq!(b.settle().first().map(|(s, _)| *s), Some(1));
}

#[test]
fn the_unlock_before_a_retry_keeps_the_turn() {
    fails_without("turn-ends-at-retry", || {
        let mut b = Bench::new();
        b.wal(&[1, 2]);
        assert!(GRANTED(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        b.unread(1, true); // the header changed while it waited: wal.c asks again
        assert!(b.settle().is_empty());
        assert!(GRANTED(b.read(1, true)));
        assert!(GRANTED(b.write(1)));
    });
}

#[test]
fn a_wal_restart_keeps_the_turn() {
    fails_without("turn-ends-at-restart", || {
        let mut b = Bench::new();
        b.wal(&[1, 2]);
        assert!(GRANTED(b.read(1, true)));
        assert!(GRANTED(b.write(1)));
        b.unread(1, false); // walRestartLog, holding WRITE
        assert_eq!(b.turn(), Some(1));
    });
}

#[test]
fn a_turn_does_not_leak_from_a_contended_read() {
    fails_without("idle-turn-kept", || {
        let mut b = Bench::new();
        b.wal(&[1, 2, 3]);
        // Somebody updates the read mark: the read slot is refused, with the turn already taken.
        let mark = Request::ShmExclusive { slots: slots(slot::READ0 + 1), blocking: false };
        assert!(GRANTED(b.ask(3, mark, false)));
        assert_eq!(b.read(1, true), Some(Verdict::Busy));
        b.locks.release(3, Release::ShmExclusive { slots: slots(slot::READ0 + 1), keep_turn: false }, b.now);
        assert_eq!(b.read(2, true), None);
        // Seat 1 never comes back.
        b.pass(IDLE_TURN);
        let suspect = b.locks.suspect(b.now).expect("suspect");
        assert!(suspect.idle);
        b.locks.revoke(suspect.seat);
        assert_eq!(b.settle().first().map(|(s, _)| *s), Some(2));
    });
}

#[test]
fn an_unused_turn_is_suspect_and_can_be_revoked() {
    fails_without("unused-turn-kept", || {
        let mut b = Bench::new();
        b.wal(&[1, 2]);
        assert!(GRANTED(b.read(1, true))); // a temp table is filled from here
        assert_eq!(b.read(2, true), None);
        b.pass(UNUSED_TURN);
        let suspect = b.locks.suspect(b.now).expect("suspect");
        assert!(!suspect.idle);
        b.locks.revoke(suspect.seat);
        assert_eq!(b.settle().first().map(|(s, _)| *s), Some(2));
        assert_eq!(b.locks.turns_revoked, 1);
    });
}

#[test]
fn a_turn_in_use_is_never_suspect() {
    let mut b = Bench::new();
    b.wal(&[1, 2]);
    assert!(GRANTED(b.read(1, true)));
    assert!(GRANTED(b.write(1)));
    assert_eq!(b.read(2, true), None);
    assert!(b.pass(Duration::from_secs(60)).is_empty());
    assert_eq!(b.locks.suspect(b.now), None);
}

#[test]
fn a_turn_ahead_is_dropped_when_the_connection_goes_elsewhere() {
    fails_without("turn-kept-elsewhere", || {
        let mut b = Bench::new();
        b.wal(&[1]);
        assert!(GRANTED(b.read(1, true)));
        assert!(b.locks.went_elsewhere(1));
        assert_eq!(b.turn(), None);
    });
    // Not when it has written here: then both files are being written.
    let mut b = Bench::new();
    b.wal(&[1]);
    assert!(GRANTED(b.read(1, true)));
    assert!(GRANTED(b.write(1)));
    assert!(!b.locks.went_elsewhere(1));
}

#[test]
fn check_reserved_counts_reserved_alone() {
    fails_without("pending-counts-as-reserved", || {
        let mut b = Bench::new();
        b.shared(1);
        b.shared(2);
        // Seat 1 has seen a hot journal: PENDING without RESERVED, and waits for seat 2 to go.
        let hot = Request::File { level: FileLevel::Exclusive, hot_journal: true };
        assert_eq!(b.ask(1, hot, false), None);
        assert!(!b.locks.reserved_by_other(2), "a reader would take a half-written file for a clean one");
    });
}

#[test]
fn a_wait_ahead_that_ends_has_its_read_lock_without_the_turn() {
    fails_without("wait-ahead-fails", || {
        let mut b = Bench::new();
        b.wal(&[1, 2]);
        assert!(GRANTED(b.read(1, true)));
        assert!(GRANTED(b.write(1)));
        assert_eq!(b.read(2, true), None);
        let verdict = b.locks.give_up(2, b.now);
        assert_eq!(verdict, Some(Verdict::Granted { turn: false, probation: false }));
        assert_eq!(b.write(2), Some(Verdict::Busy), "BUSY comes from WRITE");
    });
}

#[test]
fn exclusive_straight_from_shared_does_not_wait_for_readers() {
    fails_without("exclusive-mode-waits", || {
        let mut b = Bench::new();
        b.shared(1);
        b.shared(2);
        assert_eq!(b.file(1, FileLevel::Exclusive), Some(Verdict::Busy));
        // And nothing is left behind: no PENDING that keeps readers out.
        assert!(GRANTED(b.file(3, FileLevel::Shared)));
    });
}

#[test]
fn a_dead_writer_over_a_journal_lets_one_in_at_a_time() {
    fails_without("no-probation", || {
        let mut b = Bench::new();
        assert!(GRANTED(b.shared_ahead(1)));
        assert!(GRANTED(b.file(1, FileLevel::Reserved)));
        b.locks.remove(1); // killed
        assert_eq!(b.file(2, FileLevel::Shared), Some(Verdict::Granted { turn: false, probation: true }));
        assert_eq!(b.file(3, FileLevel::Shared), None);
        // Seat 2 finds the journal hot, rolls it back, and seat 3 gets in.
        let hot = Request::File { level: FileLevel::Exclusive, hot_journal: true };
        assert!(GRANTED(b.ask(2, hot, false)));
        b.unlock(2, FileLevel::Shared);
        assert_eq!(b.settle(), [(3, Verdict::Granted { turn: false, probation: false })]);
    });
}

#[test]
fn a_rolled_back_journal_does_not_end_the_rollers_turn() {
    let mut b = Bench::new();
    assert!(GRANTED(b.shared_ahead(1)));
    let hot = Request::File { level: FileLevel::Exclusive, hot_journal: true };
    assert!(GRANTED(b.ask(1, hot, false)));
    assert_eq!(b.shared_ahead(2), None);
    b.unlock(1, FileLevel::Shared);
    assert!(b.settle().is_empty());
    assert!(GRANTED(b.file(1, FileLevel::Reserved)));
}

#[test]
fn exclusive_from_reserved_waits_for_readers_and_keeps_new_ones_out() {
    let mut b = Bench::new();
    b.shared(2);
    assert!(GRANTED(b.shared_ahead(1)));
    assert!(GRANTED(b.file(1, FileLevel::Reserved)));
    assert_eq!(b.file(1, FileLevel::Exclusive), None);
    assert_eq!(b.file(3, FileLevel::Shared), None);
    assert_eq!(b.locks.blockers(1), [2]);
    assert_eq!(b.locks.blockers(3), [1]);
    b.unlock(2, FileLevel::None);
    assert!(GRANTED(b.settle().first().map(|(_, v)| *v)));
    b.unlock(1, FileLevel::None);
    assert_eq!(b.settle().first().map(|(s, _)| *s), Some(3));
}

#[test]
fn reserved_is_busy_at_once_and_takes_a_free_turn() {
    let mut b = Bench::new();
    b.shared(1);
    b.shared(2);
    assert!(GRANTED(b.file(1, FileLevel::Reserved)));
    assert_eq!(b.turn(), Some(1));
    assert_eq!(b.file(2, FileLevel::Reserved), Some(Verdict::Busy));
    b.unlock(1, FileLevel::Shared);
    assert_eq!(b.turn(), None);
    assert!(GRANTED(b.file(2, FileLevel::Reserved)));
}

#[test]
fn recovery_waits_for_write_without_a_turn_and_keeps_the_one_it_has() {
    let mut b = Bench::new();
    b.wal(&[1, 2]);
    assert!(GRANTED(b.write(2))); // outside any read: recovery
    assert_eq!(b.turn(), None);
    assert_eq!(b.write(1), None);
    b.unwrite(2);
    assert!(GRANTED(b.settle().first().map(|(_, v)| *v)));
    b.unwrite(1);
    // With a turn that was taken at xLock(SHARED): recovery does not end it.
    let mut b = Bench::new();
    assert!(GRANTED(b.shared_ahead(1)));
    b.locks.open_wal_index(1, b.now);
    assert!(GRANTED(b.write(1)));
    b.unwrite(1);
    assert_eq!(b.turn(), Some(1));
}

#[test]
fn who_asks_whether_somebody_recovers_waits_for_the_recovery() {
    fails_without("recovery-is-busy", || {
        let mut b = Bench::new();
        b.wal(&[1, 2]);
        let recovery =
            Request::ShmExclusive { slots: Slots::new(slot::CHECKPOINT, 2).unwrap(), blocking: false };
        assert!(GRANTED(b.write(1)));
        assert!(GRANTED(b.ask(1, recovery, false)));
        assert_eq!(b.ask(2, Request::ShmShared(slots(slot::RECOVER)), false), None);
        let release =
            Release::ShmExclusive { slots: Slots::new(slot::CHECKPOINT, 2).unwrap(), keep_turn: false };
        b.locks.release(1, release, b.now);
        assert!(GRANTED(b.settle().first().map(|(_, v)| *v)));
    });
}

#[test]
fn a_checkpoints_write_is_a_turn_that_ends_with_it() {
    let mut b = Bench::new();
    b.wal(&[1, 2]);
    let checkpoint = Request::ShmExclusive { slots: slots(slot::CHECKPOINT), blocking: false };
    assert!(GRANTED(b.ask(1, checkpoint, false)));
    assert!(GRANTED(b.write(1)));
    assert_eq!(b.turn(), Some(1));
    assert_eq!(b.read(2, true), None);
    b.unwrite(1);
    assert_eq!(b.settle().first().map(|(s, _)| *s), Some(2));
}

#[test]
fn slots_are_all_or_nothing() {
    let mut b = Bench::new();
    b.wal(&[1, 2]);
    assert!(GRANTED(b.read(1, false)));
    let all_reads = Slots::new(slot::READ0, 5).unwrap();
    let ask = Request::ShmExclusive { slots: all_reads, blocking: false };
    assert_eq!(b.ask(2, ask, false), Some(Verdict::Busy));
    assert_eq!(b.locks.table().owned_slots(2), 0);
}

#[test]
fn death_clears_everything() {
    let mut b = Bench::new();
    b.wal(&[1, 2]);
    assert!(GRANTED(b.read(1, true)));
    assert!(GRANTED(b.write(1)));
    assert_eq!(b.read(2, true), None);
    b.locks.remove(1);
    assert_eq!(b.settle().first().map(|(s, _)| *s), Some(2));
    b.locks.remove(2);
    assert!(b.locks.table().is_idle());
    assert_eq!(b.turn(), None);
}

#[test]
fn ranges_from_a_peer_are_checked() {
    for (first, count) in [(0, 0), (8, 1), (7, 2), (255, 255), (0, 9)] {
        assert!(Slots::new(first, count).is_none(), "{first} {count}");
    }
    assert_eq!(Slots::new(0, 8).unwrap().mask(), Some(0xff));
}
