//! Who sleeps is woken, and nobody is woken for nothing.

use crate::lanes::{Bench, Lanes, always, granted, rule, seats, slots};
use turnstile::lock::rules::Attempt;
use turnstile::lock::{Ask, FileLevel, Release, Request, Slots, Verdict, slot};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{NOTIFIED, PARKED};

fn recovery() -> Slots {
    Slots::new(slot::CHECKPOINT, 2).unwrap()
}

/// A waiter stands among the sleepers first, then says that it is asleep, then looks. Whoever wakes all sleepers
/// between the first two does not wake it: the next one must.
#[test]
fn a_sleeper_that_was_not_asleep_yet_when_all_were_woken_is_woken_by_the_next() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = Bench::new(lanes);
        b.wal(&[1, 2, 3]);
        assert!(granted(b.write(1)));
        assert!(granted(b.exclusive(1, recovery())));
        let request = Request::ShmShared(slots(slot::RECOVER));
        let ask = Ask { request, ahead: false };
        let looks = || b.with(3, |seat| seat.attempt(ask));
        assert_eq!(looks(), Attempt::Wait { for_turn: false });
        b.with(3, |seat| seat.begin_wait(request, false));
        b.unwrite(1);
        b.with(3, |seat| seat.mark(PARKED));
        assert_eq!(looks(), Attempt::Wait { for_turn: false });
        assert_eq!(b.words(3).park.load(SeqCst), PARKED);
        b.unexclusive(1, recovery());
        assert_eq!(b.words(3).park.load(SeqCst), NOTIFIED);
    }
}

/// The seat that is admitted may take its time.
#[test]
fn who_waits_for_the_end_of_a_probation_sleeps() {
    for lanes in crate::lanes::ALL_LANES {
        let b = Bench::fresh(lanes);
        b.shared(1);
        assert_eq!(b.file(2, FileLevel::Shared), None);
        assert_eq!(b.file(3, FileLevel::Shared), None);
        assert!(b.settle().is_empty()); // fails if they keep each other awake
        b.with(1, |seat| seat.journal_is_clear());
        assert_eq!(b.settle().len(), 2);
    }
}

/// A wait goes from the line to a lock while the broker tries it: it looks once more, now asleep for the lock.
#[test]
fn a_brokered_seat_that_waits_for_something_else_now_is_woken_for_that() {
    let b = Bench::new(Lanes::EvenBrokered);
    assert!(granted(b.read(1, true)));
    b.shared(3);
    assert!(granted(b.hot_exclusive(3)));
    assert_eq!(b.shared_ahead(2), None);
    assert!(b.settle().is_empty());
    b.release(1, Release::Turn);
    assert!(b.run_broker().is_empty());
    assert_eq!(b.holder(), Some(2));
    assert!(!b.broker_is_due());
    b.unlock(3, FileLevel::None);
    assert!(b.broker_is_due(), "nobody tells the broker");
    assert_eq!(seats(&b.settle()), [2]);
}

#[test]
fn the_end_of_each_thing_that_is_waited_for_wakes_its_waiters() {
    // SHARED behind PENDING, and EXCLUSIVE behind SHARED, one of two readers leaving by its death.
    always(|b| {
        b.shared(2);
        b.shared(4);
        b.shared(1);
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert_eq!(b.file(3, FileLevel::Shared), None);
        assert_eq!(b.file(6, FileLevel::Shared), None);
        b.unlock(2, FileLevel::None);
        assert!(b.settle().is_empty());
        b.remove(4);
        assert_eq!(seats(&b.settle()), [1]);
        b.unlock(1, FileLevel::Shared);
        let mut ended = seats(&b.settle());
        ended.sort_unstable();
        assert_eq!(ended, [3, 6]);
    });
    // EXCLUSIVE that is given up, PENDING with it: a roller's, not a RESERVED holder's.
    always(|b| {
        b.shared(1);
        b.shared(2);
        assert_eq!(b.hot_exclusive(1), None);
        assert_eq!(b.file(3, FileLevel::Shared), None);
        assert_eq!(b.give_up(1), Some(Verdict::Busy));
        assert_eq!(seats(&b.settle()), [3]);
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert_eq!(b.give_up(1), Some(Verdict::Busy));
        assert_eq!(b.table().pending(), Some(1));
        assert_eq!(b.file(4, FileLevel::Shared), None);
        assert!(b.settle().is_empty());
    });
    // WRITE, outside any read transaction.
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.write(1)));
        assert_eq!(b.write(2), None);
        assert_eq!(b.write(3), None);
        assert!(b.settle().is_empty());
        b.remove(1);
        let first = b.settle();
        assert_eq!(first.len(), 1);
        b.unwrite(first[0].0);
        assert_eq!(b.settle().len(), 1);
    });
}

/// Snapshots of `sqlite3_snapshot_open` hold CHECKPOINT shared (wal.c, sqlite3WalSnapshotCheck).
#[test]
fn a_snapshot_that_is_checked_keeps_checkpoints_out() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.ask(1, Request::ShmShared(slots(slot::CHECKPOINT)), false)));
        assert_eq!(b.exclusive(2, slots(slot::CHECKPOINT)), Some(Verdict::Busy));
        assert_eq!(b.table().slot_owner(slot::CHECKPOINT), None);
    });
}

#[test]
fn a_file_lock_is_not_given_up_with_what_another_thread_waits_for() {
    rule("any-wait-gives-the-file-up", |b| {
        assert!(granted(b.read(1, true)));
        b.shared(2);
        assert!(granted(b.file(2, FileLevel::Exclusive)));
        let request = Request::ShmExclusive { slots: slots(slot::WRITE), blocking: true };
        assert_eq!(b.submit(2, Ask { request, ahead: false }), None);
        assert_eq!(b.give_up(2), Some(Verdict::Busy));
        assert_eq!(b.table().exclusive(), Some(2));
    });
}
