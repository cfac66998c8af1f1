//! The rules of the lock table and the turn, each with the failure that it is there for, with every mixture of lanes.
//! In a build with the `planted` feature every such test also runs without its rule, and must fail.

mod lanes;
mod rules;

use lanes::{Bench, always, granted, rule, seats, slots};
use turnstile::lock::queue::blockers;
use turnstile::lock::unused::{GUESSED_TURN, IDLE_TURN, UNUSED_TURN, Unused, unused, uses};
use turnstile::lock::{FileLevel, Request, SeatId, Slots, Verdict, slot};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{CHECKPOINTER, FOR_GUESS, FOR_TRANSACTION};

/// The holder's turn, as the broker judges it.
fn unused_turn(b: &Bench) -> Option<Unused> {
    b.lane(|lane| unused(lane.turn(), false, |seat| lane.queue.is_used(seat)))
}

/// What the broker does when it has judged.
fn revoke(b: &Bench, seat: SeatId) -> bool {
    b.lane(|lane| lane.turn().revoke(seat, || uses(lane.turn(), seat)))
}

#[test]
fn first_come_first_served() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.read(3, true), None);
        b.unwrite(1);
        b.unread(1, false);
        // The one that was just served asks again and goes to the end of the line.
        assert_eq!(b.read(1, true), None);
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.holder(), Some(2));
        b.unread(2, false);
        assert_eq!(seats(&b.settle()), [3]);
        b.unread(3, false);
        assert_eq!(seats(&b.settle()), [1]);
    });
}

#[test]
fn the_unlock_before_a_retry_keeps_the_turn() {
    rule("turn-ends-at-retry", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        b.unread(1, true); // the header changed while it waited: wal.c asks again
        assert!(b.settle().is_empty());
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
    });
}

#[test]
fn a_wal_restart_keeps_the_turn() {
    rule("turn-ends-at-restart", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        b.unread(1, false); // walRestartLog, holding WRITE
        assert_eq!(b.holder(), Some(1));
    });
}

#[test]
fn a_turn_does_not_leak_from_a_contended_read() {
    rule("busy-keeps-turn", |b| {
        b.wal(&[1, 2, 3]);
        // Somebody updates the read mark: the read slot is refused, with the turn already taken.
        let mark = slots(slot::READ0 + 1);
        assert!(granted(b.exclusive(3, mark)));
        assert_eq!(b.read(1, true), Some(Verdict::Busy));
        b.unexclusive(3, mark);
        // Seat 1 never comes back.
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
    });
}

#[test]
fn a_checkpoint_that_is_refused_leaves_the_turn_to_writers() {
    rule("busy-keeps-turn", |b| {
        b.wal(&[1, 2, 3]);
        let checkpoint = slots(slot::CHECKPOINT);
        assert!(granted(b.exclusive(3, checkpoint)));
        let request = Request::ShmExclusive { slots: checkpoint, blocking: false };
        assert_eq!(b.ask(1, request, true), Some(Verdict::Busy));
        assert_eq!(b.holder(), None);
        // Nor has it one from a wait for the lock that was in vain: behind a recovery, which has WRITE and no turn.
        b.unexclusive(3, checkpoint);
        assert!(granted(b.write(3)));
        assert!(granted(b.exclusive(1, checkpoint)));
        assert_eq!(b.write(1), None);
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.give_up(1), Some(Verdict::Busy));
        assert_eq!(b.holder(), None);
        b.unwrite(3);
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
    });
}

#[test]
fn a_reader_that_waited_for_the_file_in_vain_leaves_the_turn_to_others() {
    rule("busy-keeps-turn", |b| {
        b.shared(3);
        // A hot journal is rolled back, without a turn.
        assert!(granted(b.hot_exclusive(3)));
        assert_eq!(b.shared_ahead(1), None);
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.give_up(1), Some(Verdict::Busy));
        b.unlock(3, FileLevel::None);
        assert!(granted(b.shared_ahead(2)));
        assert!(granted(b.file(2, FileLevel::Reserved)));
    });
}

#[test]
fn an_upgrade_that_waited_in_vain_leaves_the_turn_to_others() {
    rule("busy-keeps-turn", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, false)));
        // The broker's checkpointer has WRITE without the turn.
        b.with(CHECKPOINTER, |seat| assert!(seat.table.try_slots_exclusive(seat.id, 1 << slot::WRITE)));
        assert_eq!(b.write(1), None);
        assert_eq!(b.give_up(1), Some(Verdict::Busy));
        assert_eq!(b.holder(), None);
        b.unwrite(CHECKPOINTER);
        assert!(granted(b.read(2, true)));
    });
}

#[test]
fn a_turn_of_a_seat_that_never_comes_back_is_taken_back() {
    rule("idle-turn-kept", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        b.unread(1, true); // it will ask again
        assert_eq!(b.read(2, true), None);
        let seen = unused_turn(&b).expect("not in use");
        assert_eq!((seen.seat, seen.idle, seen.patience()), (1, true, IDLE_TURN));
        assert_eq!(unused_turn(&b), Some(seen), "it looks the same until it asks for something");
        assert!(revoke(&b, 1));
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn an_unused_turn_is_suspect_and_can_be_revoked() {
    rule("unused-turn-kept", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true))); // a temp table is filled from here
        assert_eq!(b.read(2, true), None);
        let seen = unused_turn(&b).expect("not in use");
        assert_eq!((seen.seat, seen.idle, seen.patience()), (1, false, UNUSED_TURN));
        assert!(revoke(&b, 1));
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn a_turn_in_use_is_never_suspect() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        assert!(b.settle().is_empty());
        assert_eq!(unused_turn(&b), None);
        assert!(!revoke(&b, 1));
        assert_eq!(b.holder(), Some(1));
    });
    // Over a rollback journal RESERVED says so; in guest mode, where locks are not seen, its message.
    always(|b| {
        assert!(granted(b.shared_ahead(1)));
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.shared_ahead(2), None);
        assert_eq!(unused_turn(&b), None);
    });
    let b = Bench::new(lanes::Lanes::Brokered);
    assert!(granted(b.ask(1, Request::Turn, true)));
    assert_eq!(b.ask(2, Request::Turn, true), None);
    let guest = || b.lane(|lane| unused(lane.turn(), true, |seat| lane.queue.is_used(seat)));
    assert_eq!(guest().map(|u| u.patience()), Some(UNUSED_TURN));
    b.lane(|lane| lane.turn_is_used(1));
    assert_eq!(guest(), None);
}

#[test]
fn a_turn_that_nobody_waits_for_or_whose_seat_waits_itself_is_not_suspect() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert_eq!(unused_turn(&b), None, "nobody waits");
        b.unread(1, false);
        // Seat 3 recovers; seat 1, a checkpoint, has its turn and waits for WRITE.
        assert!(granted(b.write(3)));
        assert!(granted(b.exclusive(1, slots(slot::CHECKPOINT))));
        assert_eq!(b.write(1), None);
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.holder(), Some(1));
        assert_eq!(unused_turn(&b), None, "its seat waits");
    });
}

#[test]
fn a_suspect_that_asks_for_something_is_looked_at_anew() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        let before = unused_turn(&b);
        b.unread(1, true);
        assert!(granted(b.read(1, true)));
        assert_ne!(unused_turn(&b), before);
    });
}

/// `BEGIN IMMEDIATE` may sit idle as long as it likes; a transaction that only looked like one that writes, a while.
#[test]
fn a_turn_for_a_whole_transaction_is_judged_by_what_is_known_of_it() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        b.words(1).turn_for.store(FOR_GUESS, SeqCst);
        assert_eq!(unused_turn(&b).map(|u| u.patience()), Some(GUESSED_TURN));
        b.words(1).turn_for.store(FOR_TRANSACTION, SeqCst);
        assert_eq!(unused_turn(&b), None);
        // Between two tries of its read lock it is nothing but a turn that keeps others waiting.
        b.unread(1, true);
        assert_eq!(unused_turn(&b).map(|u| u.patience()), Some(IDLE_TURN));
    });
}

#[test]
fn a_turn_ahead_is_dropped_when_the_connection_goes_elsewhere() {
    rule("turn-kept-elsewhere", |b| {
        b.wal(&[1]);
        assert!(granted(b.read(1, true)));
        assert!(b.with(1, |seat| seat.went_elsewhere()));
        assert_eq!(b.holder(), None);
    });
    // Not when it has written here: then both files are being written.
    always(|b| {
        b.wal(&[1]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert!(!b.with(1, |seat| seat.went_elsewhere()));
    });
}

#[test]
fn check_reserved_counts_reserved_alone() {
    rule("pending-counts-as-reserved", |b| {
        b.shared(1);
        b.shared(2);
        // Seat 1 has seen a hot journal: PENDING without RESERVED, and waits for seat 2 to go.
        assert_eq!(b.hot_exclusive(1), None);
        let reserved = b.with(2, |seat| seat.reserved_by_other());
        assert!(!reserved, "a reader would take a half-written file for a clean one");
    });
}

#[test]
fn a_wait_ahead_that_ends_has_its_read_lock_without_the_turn() {
    rule("wait-ahead-fails", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.give_up(2), Some(Verdict::Granted { turn: false, probation: false }));
        assert_eq!(b.write(2), Some(Verdict::Busy), "BUSY comes from WRITE");
    });
}

#[test]
fn exclusive_straight_from_shared_does_not_wait_for_readers() {
    rule("exclusive-mode-waits", |b| {
        b.shared(1);
        b.shared(2);
        assert_eq!(b.file(1, FileLevel::Exclusive), Some(Verdict::Busy));
        // And nothing is left behind: no PENDING that keeps readers out.
        assert!(granted(b.file(3, FileLevel::Shared)));
    });
}

#[test]
fn a_dead_writer_over_a_journal_lets_one_in_at_a_time() {
    rule("no-probation", |b| {
        assert!(granted(b.shared_ahead(1)));
        assert!(granted(b.file(1, FileLevel::Reserved)));
        b.remove(1); // killed
        assert_eq!(b.file(2, FileLevel::Shared), Some(Verdict::Granted { turn: false, probation: true }));
        assert_eq!(b.file(3, FileLevel::Shared), None);
        assert!(b.settle().is_empty());
        // Seat 2 finds the journal hot, rolls it back, and seat 3 gets in.
        assert!(granted(b.hot_exclusive(2)));
        b.unlock(2, FileLevel::Shared);
        assert_eq!(b.settle(), [(3, Verdict::Granted { turn: false, probation: false })]);
    });
}

#[test]
fn a_rolled_back_journal_does_not_end_the_rollers_turn() {
    always(|b| {
        assert!(granted(b.shared_ahead(1)));
        assert!(granted(b.hot_exclusive(1)));
        assert_eq!(b.shared_ahead(2), None);
        b.unlock(1, FileLevel::Shared);
        assert!(b.settle().is_empty());
        assert!(granted(b.file(1, FileLevel::Reserved)));
    });
}

#[test]
fn exclusive_from_reserved_waits_for_readers_and_keeps_new_ones_out() {
    always(|b| {
        b.shared(2);
        assert!(granted(b.shared_ahead(1)));
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert_eq!(b.file(3, FileLevel::Shared), None);
        assert!(b.settle().is_empty());
        assert_eq!(blockers(b.turn(), 1), [2]);
        assert_eq!(blockers(b.turn(), 3), [1]);
        b.unlock(2, FileLevel::None);
        assert_eq!(seats(&b.settle()), [1]);
        b.unlock(1, FileLevel::None);
        assert_eq!(seats(&b.settle()), [3]);
    });
}

#[test]
fn reserved_is_busy_at_once_and_takes_a_free_turn() {
    always(|b| {
        b.shared(1);
        b.shared(2);
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.file(2, FileLevel::Reserved), Some(Verdict::Busy));
        b.unlock(1, FileLevel::Shared);
        assert_eq!(b.holder(), None);
        assert!(granted(b.file(2, FileLevel::Reserved)));
    });
}

#[test]
fn recovery_waits_for_write_without_a_turn_and_keeps_the_one_it_has() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.write(2))); // outside any read: recovery
        assert_eq!(b.holder(), None);
        assert_eq!(b.write(1), None);
        b.unwrite(2);
        assert_eq!(seats(&b.settle()), [1]);
        b.unwrite(1);
    });
    // With a turn that was taken at xLock(SHARED): recovery does not end it.
    always(|b| {
        assert!(granted(b.shared_ahead(1)));
        assert!(b.with(1, |seat| seat.open_wal_index(|| {})));
        assert!(granted(b.write(1)));
        b.unwrite(1);
        assert_eq!(b.holder(), Some(1));
    });
}

#[test]
fn who_asks_whether_somebody_recovers_waits_for_the_recovery() {
    rule("recovery-is-busy", |b| {
        b.wal(&[1, 2]);
        let recovery = Slots::new(slot::CHECKPOINT, 2).unwrap();
        assert!(granted(b.write(1)));
        assert!(granted(b.exclusive(1, recovery)));
        assert_eq!(b.ask(2, Request::ShmShared(slots(slot::RECOVER)), false), None);
        assert!(b.settle().is_empty());
        b.unexclusive(1, recovery);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn a_checkpoints_write_is_a_turn_that_ends_with_it() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.exclusive(1, slots(slot::CHECKPOINT))));
        assert!(granted(b.write(1)));
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.read(2, true), None);
        b.unwrite(1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn slots_are_all_or_nothing() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, false)));
        let all_reads = Slots::new(slot::READ0, 5).unwrap();
        assert_eq!(b.exclusive(2, all_reads), Some(Verdict::Busy));
        assert_eq!(b.table().owned_slots(2), 0);
    });
}

#[test]
fn death_clears_everything() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        b.remove(1);
        assert_eq!(seats(&b.settle()), [2]);
        b.remove(2);
        b.assert_nothing_left();
    });
}

#[test]
fn ranges_from_a_peer_are_checked() {
    for (first, count) in [(0, 0), (8, 1), (7, 2), (255, 255), (0, 9)] {
        assert!(Slots::new(first, count).is_none(), "{first} {count}");
    }
    assert_eq!(Slots::new(0, 8).unwrap().mask(), Some(0xff));
}
