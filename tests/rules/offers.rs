//! A turn that is offered: accepted, withdrawn, passed over, taken back.

use crate::lanes::{Bench, Lanes, always, granted, seats, slots};
use turnstile::lock::turn::Streak;
use turnstile::lock::unused::uses;
use turnstile::lock::{FileLevel, Request, SeatId, Verdict, slot};
use turnstile::segment::atomic::SeqCst;

/// Seat 1 has the turn, the others wait for it, in this order.
fn line(b: &Bench, waiting: &[SeatId]) {
    b.wal(&[1]);
    b.wal(waiting);
    assert!(granted(b.read(1, true)));
    for seat in waiting {
        assert_eq!(b.read(*seat, true), None);
    }
    assert!(b.settle().is_empty());
    assert_eq!(b.turn().line(), waiting);
}

#[test]
fn the_turn_goes_from_hand_to_hand() {
    always(|b| {
        line(&b, &[2, 3]);
        b.wal(&[4]);
        b.unread(1, false);
        assert_eq!(b.turn().load().offered_to(), Some(2));
        // Nobody gets it in between, whatever it asks for.
        assert_eq!(b.read(4, true), None);
        b.shared(5);
        assert_eq!(b.file(5, FileLevel::Reserved), Some(Verdict::Busy));
        assert!(granted(b.read(1, false)));
        assert_eq!(b.write(1), Some(Verdict::Busy));
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.holder(), Some(2));
    });
}

#[test]
fn an_offer_to_a_seat_that_gives_up_goes_to_the_next() {
    always(|b| {
        line(&b, &[2, 3]);
        b.unread(1, false);
        assert!(granted(b.give_up(2)));
        assert_eq!(seats(&b.settle()), [3]);
        assert_eq!(b.holder(), Some(3));
        assert!(b.turn().line().is_empty());
    });
    // To nobody, if nobody is there.
    always(|b| {
        line(&b, &[2]);
        b.unread(1, false);
        assert!(granted(b.give_up(2)));
        assert!(b.settle().is_empty());
        assert!(b.turn().load().is_free());
        b.wal(&[4]);
        assert!(granted(b.read(4, true)));
    });
}

/// Seat 2 leaves the line when seat 1 has looked who is first and has not made the offer yet.
#[test]
fn an_offer_to_a_seat_that_has_just_left_is_withdrawn() {
    always(|b| {
        line(&b, &[2, 3]);
        let leaves = || {
            if b.is_waiting(2) {
                assert!(granted(b.give_up(2)));
            }
            Streak::Over
        };
        assert!(b.turn().end(1, leaves));
        assert!(b.turn().load().offered_to() != Some(2));
        b.lane(|_| ());
        assert_eq!(seats(&b.settle()), [3]);
    });
}

/// The same, and it stands in the line again, as the last.
#[test]
fn an_offer_on_an_old_view_of_the_line_is_not_made() {
    always(|b| {
        line(&b, &[2, 3]);
        let asks_anew = || {
            if b.turn().first().is_some_and(|(_, first)| first == 2) {
                assert!(granted(b.give_up(2)));
                b.unread(2, false);
                assert_eq!(b.read(2, true), None);
            }
            Streak::Over
        };
        assert!(b.turn().end(1, asks_anew));
        assert_eq!(b.turn().load().offered_to(), Some(3));
        b.lane(|_| ());
        assert_eq!(seats(&b.settle()), [3]);
        assert_eq!(b.turn().line(), [2]);
    });
}

/// The maker of the offer has died before it could look whether the seat is still there, and that seat before it
/// could see the offer: whoever comes by withdraws it.
#[test]
fn an_offer_that_its_maker_left_behind_is_withdrawn_by_who_finds_it() {
    always(|b| {
        line(&b, &[2]);
        b.wal(&[4]);
        b.unread(1, false);
        assert_eq!(b.turn().load().offered_to(), Some(2));
        b.words(2).ticket.store(0, SeqCst);
        b.table().line.clear(2);
        assert!(granted(b.read(4, true)));
        assert_eq!(b.holder(), Some(4));
    });
}

/// Seat 2 has had a streak a moment ago, and an offer since then that it did not take: that is no streak of its.
#[test]
fn who_gave_up_an_offer_comes_last() {
    let b = Bench::new(Lanes::Fast).with_streaks();
    b.wal(&[1, 2, 3]);
    assert!(granted(b.read(2, true)));
    assert_eq!(b.read(1, true), None);
    assert!(b.settle().is_empty());
    b.unread(2, false); // its streak begins, and it does not come back in time
    assert_eq!(seats(&b.settle()), [1]);
    assert_eq!(b.read(2, true), None);
    assert_eq!(b.read(3, true), None);
    assert!(b.settle().is_empty());
    b.lane(|lane| lane.turn().end(1, || Streak::Over));
    assert_eq!(b.turn().load().offered_to(), Some(2));
    assert!(granted(b.give_up(2)));
    b.unread(2, false);
    assert_eq!(b.read(2, true), None);
    assert_eq!(seats(&b.settle()), [3]);
    assert_eq!(b.turn().line(), [2]);
}

#[test]
fn a_seat_that_is_first_and_does_not_come_is_passed_over() {
    let offered = |b: &Bench| b.unread(1, false);
    let free = |b: &Bench| {
        // A streak that its holder did not go on with.
        b.lane(|lane| lane.turn().end(1, || Streak::Young));
        assert!(b.turn().load().is_free());
    };
    for leave in [&offered as &dyn Fn(&Bench), &free] {
        // Seat 2 is stopped; seats 3 and 4 run.
        for lanes in [Lanes::Fast, Lanes::OddBrokered] {
            let b = Bench::new(lanes);
            line(&b, &[2, 3, 4]);
            leave(&b);
            b.lane(|lane| lane.turn().pass_over(2));
            assert_eq!(b.turn().line(), [3, 4, 2]);
            let mut served = b.run_broker();
            if !b.is_brokered(3) {
                served.extend(b.run(3).map(|verdict| (3, verdict)));
            }
            assert_eq!(seats(&served), [3]);
            // Seat 2 goes on: it has lost its place, not its wait.
            assert!(b.settle().is_empty());
            b.unread(3, false);
            assert_eq!(seats(&b.settle()), [4]);
            b.unread(4, false);
            assert_eq!(seats(&b.settle()), [2]);
        }
    }
}

#[test]
fn a_seat_that_is_passed_over_as_it_comes_keeps_what_it_has() {
    always(|b| {
        line(&b, &[2, 3]);
        b.unread(1, false);
        assert_eq!(seats(&b.settle()), [2]);
        b.lane(|lane| lane.turn().pass_over(2));
        assert!(b.settle().is_empty());
        assert_eq!(b.holder(), Some(2));
        assert_eq!(b.words(2).ticket.load(SeqCst), 0);
        assert_eq!(b.turn().line(), [3]);
    });
    // Alone in the line: it is the next one after itself.
    always(|b| {
        line(&b, &[2]);
        b.unread(1, false);
        b.lane(|lane| lane.turn().pass_over(2));
        assert_eq!(seats(&b.settle()), [2]);
    });
}

fn is_used(b: &Bench) -> bool {
    uses(b.turn(), 1)
}

/// The broker looks whether the turn is in use, and takes it back if not. Seat 1 takes WRITE in between.
#[test]
fn a_turn_that_is_put_to_use_is_not_taken_back() {
    // Before the broker looks.
    always(|b| {
        line(&b, &[2]);
        let used = || {
            assert!(granted(b.write(1)));
            is_used(&b)
        };
        assert!(!b.turn().revoke(1, used));
        assert_eq!(b.holder(), Some(1));
        assert!(b.settle().is_empty());
    });
    // After it.
    always(|b| {
        line(&b, &[2]);
        let used = || {
            let used = is_used(&b);
            assert!(granted(b.write(1)));
            used
        };
        assert!(!b.turn().revoke(1, used));
        assert_eq!(b.holder(), Some(1));
        assert!(b.settle().is_empty());
        // And the next time it is looked at anew.
        b.unwrite(1);
        assert_eq!(seats(&b.settle()), [2]);
    });
    // Over a rollback journal.
    always(|b| {
        assert!(granted(b.shared_ahead(1)));
        assert_eq!(b.shared_ahead(2), None);
        let used = || {
            let used = is_used(&b);
            assert!(granted(b.file(1, FileLevel::Reserved)));
            used
        };
        assert!(!b.turn().revoke(1, used));
        assert_eq!(b.holder(), Some(1));
    });
}

/// It has the lock's word and has not looked at the turn again: the broker was faster.
#[test]
fn a_write_lock_whose_turn_was_taken_back_meanwhile_is_given_back() {
    always(|b| {
        line(&b, &[2]);
        assert!(b.lane(|lane| lane.turn().revoke(1, || false)));
        assert!(b.table().try_slots_exclusive(1, 1 << slot::WRITE));
        assert!(!b.turn().confirm(1));
        b.table().release_slots_exclusive(1, 1 << slot::WRITE);
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.write(1), Some(Verdict::Busy), "its snapshot will be stale");
        assert_eq!(b.table().slot_owner(slot::WRITE), None);
        assert!(granted(b.write(2)));
    });
}

/// Somebody has joined the line while the broker was at it: nothing is decided on an old view, and nothing is left
/// that stands in the way later.
#[test]
fn a_turn_is_not_taken_back_on_an_old_view() {
    always(|b| {
        line(&b, &[2]);
        b.wal(&[3]);
        let joins = || {
            assert_eq!(b.read(3, true), None);
            false
        };
        assert!(!b.turn().revoke(1, joins));
        assert_eq!(b.holder(), Some(1));
        assert!(b.turn().confirm(1));
        assert!(b.lane(|lane| lane.turn().revoke(1, || is_used(&b))));
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn only_its_holders_turn_is_taken_back_or_ended() {
    always(|b| {
        line(&b, &[2, 3]);
        assert!(!b.turn().revoke(2, || false));
        assert!(!b.with(3, |seat| seat.end_turn()));
        assert!(!b.turn().confirm(2));
        assert_eq!(b.holder(), Some(1));
        b.unread(1, false);
        assert!(!b.turn().revoke(1, || false), "it is offered");
        assert!(!b.turn().confirm(2), "and not yet accepted");
        assert_eq!(seats(&b.settle()), [2]);
    });
}

/// The turn before the checkpoint lock: the WAL stands still under it. It ends with that lock, whatever else the
/// checkpoint takes and gives back.
#[test]
fn a_turn_that_came_with_the_checkpoint_lock_ends_with_it() {
    always(|b| {
        b.wal(&[1, 2]);
        let request = Request::ShmExclusive { slots: slots(slot::CHECKPOINT), blocking: false };
        assert!(granted(b.ask(1, request, true)));
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.read(2, true), None);
        assert!(granted(b.write(1)));
        b.unwrite(1);
        assert!(b.settle().is_empty());
        b.unexclusive(1, slots(slot::CHECKPOINT));
        assert_eq!(seats(&b.settle()), [2]);
    });
}

/// Its turn was taken with WRITE for a checkpoint; the next one is not.
#[test]
fn a_turn_is_a_checkpoints_for_once() {
    always(|b| {
        b.wal(&[1]);
        assert!(granted(b.exclusive(1, slots(slot::CHECKPOINT))));
        assert!(granted(b.write(1)));
        b.unwrite(1);
        b.unexclusive(1, slots(slot::CHECKPOINT));
        assert_eq!(b.holder(), None);
        assert!(granted(b.shared_ahead(1)));
        assert!(granted(b.write(1))); // recovery
        b.unwrite(1);
        assert_eq!(b.holder(), Some(1));
    });
}
