//! A streak: the holder goes on taking the turn while the next one, woken, is on its way.

use crate::lanes::{Bench, Lanes, granted, seats};
use turnstile::lock::SeatId;
use turnstile::lock::seat::{LEAST_STREAK_MICROS, STREAK_MICROS};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::NOTIFIED;

/// Seat 1, fast, has the turn; the others wait, in this order, asleep.
fn line(lanes: Lanes, waiting: &[SeatId]) -> Bench {
    let b = Bench::new(lanes).with_streaks();
    b.wal(&[1]);
    b.wal(waiting);
    assert!(granted(b.read(1, true)));
    for seat in waiting {
        assert_eq!(b.read(*seat, true), None);
    }
    assert!(b.settle().is_empty());
    b
}

/// One transaction's end and the next one's beginning.
fn again(b: &Bench) -> bool {
    b.unread(1, false);
    let mine = granted(b.read(1, true));
    assert_eq!(mine, b.holder() == Some(1));
    mine
}

#[test]
fn the_holder_goes_on_until_its_time_is_over_and_not_longer() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2, 3]);
        assert!(again(&b)); // here the streak begins
        b.pass_micros(STREAK_MICROS / 2);
        assert!(again(&b));
        b.pass_micros(STREAK_MICROS - STREAK_MICROS / 2 - 1);
        assert!(again(&b));
        b.pass_micros(1);
        assert!(!again(&b));
        assert_eq!(b.turn().load().offered_to(), Some(2));
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.turn().line(), [3, 1], "first come, first served");
    }
}

/// The time runs out between giving back and asking again.
#[test]
fn the_holder_that_comes_back_too_late_stands_in_the_line() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2]);
        b.unread(1, false);
        b.pass_micros(STREAK_MICROS + 1);
        assert_eq!(b.read(1, true), None);
        assert_eq!(seats(&b.settle()), [2]);
        b.unread(2, false);
        b.pass_micros(STREAK_MICROS + 1);
        assert_eq!(seats(&b.settle()), [1]);
    }
}

#[test]
fn the_holder_does_not_go_on_once_the_next_has_arrived() {
    let b = line(Lanes::Fast, &[2, 3]);
    assert!(again(&b));
    assert!(b.arrive(2));
    b.unread(1, false);
    assert_eq!(b.turn().load().offered_to(), Some(2));
    assert_eq!(b.read(1, true), None);
    assert_eq!(seats(&b.settle()), [2]);
    // It arrives between the two.
    let b = line(Lanes::Fast, &[2, 3]);
    b.unread(1, false);
    assert!(b.turn().load().is_free());
    assert!(b.arrive(2));
    assert_eq!(b.read(1, true), None);
    assert_eq!(seats(&b.settle()), [2]);
}

/// Who was woken early naps: the turn changes hands when the streak has lasted its least time, not before, and who
/// naps is woken for it.
#[test]
fn a_napping_waiter_leaves_the_holder_the_least_part_of_its_streak() {
    let b = line(Lanes::Fast, &[2, 3]);
    assert!(again(&b));
    assert!(b.nap(2));
    b.pass_micros(LEAST_STREAK_MICROS - 1);
    assert!(again(&b));
    b.pass_micros(1);
    b.unread(1, false);
    assert_eq!(b.turn().load().offered_to(), Some(2));
    assert_eq!(b.words(2).park.load(SeqCst), NOTIFIED);
    assert_eq!(b.read(1, true), None);
    assert_eq!(seats(&b.settle()), [2]);
}

/// The woken one looks, finds the turn taken again, and goes back to sleep: it is woken again.
#[test]
fn who_came_in_vain_is_woken_again() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2]);
        for _ in 0..3 {
            assert!(again(&b));
            assert!(b.settle().is_empty());
            b.pass_micros(STREAK_MICROS / 4);
        }
        b.unread(1, false);
        assert_eq!(seats(&b.settle()), [2]);
    }
}

#[test]
fn nobody_else_takes_part_in_a_streak() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2]);
        b.wal(&[3, 4]);
        b.unread(1, false);
        assert_eq!(b.read(3, true), None);
        assert_eq!(b.read(4, true), None);
        assert!(granted(b.read(1, true)));
        b.unread(1, false);
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.turn().line(), [3, 4]);
    }
}

/// Neither the streak nor its time is the next turn's.
#[test]
fn each_turn_that_was_waited_for_has_a_streak_of_its_own() {
    let b = line(Lanes::Fast, &[2]);
    assert!(again(&b));
    b.pass_micros(STREAK_MICROS + 1);
    assert!(!again(&b));
    assert_eq!(seats(&b.settle()), [2]);
    // Seat 2's: it begins when it first gives back.
    b.unread(2, false);
    assert!(granted(b.read(2, true)));
    b.pass_micros(STREAK_MICROS + 1);
    b.unread(2, false);
    assert_eq!(b.read(2, true), None);
    assert_eq!(seats(&b.settle()), [1]);
    // And seat 1 has a new one.
    assert!(again(&b));
    b.pass_micros(STREAK_MICROS - 1);
    assert!(again(&b));
    b.pass_micros(1);
    assert!(!again(&b));
}

/// Somebody waited when the turn was taken: the streak's time runs from there, through the first transaction too.
#[test]
fn a_transaction_longer_than_a_streak_is_one() {
    let b = line(Lanes::Fast, &[2, 3]);
    b.unread(1, false);
    assert_eq!(seats(&b.settle()), [2]);
    b.pass_micros(STREAK_MICROS);
    b.unread(2, false);
    assert_eq!(b.turn().load().offered_to(), Some(3));
    assert_eq!(b.read(2, true), None);
    assert_eq!(seats(&b.settle()), [3]);
}

/// A streak begins when somebody waits, however long the seat had the turn to itself before.
#[test]
fn a_turn_without_a_line_uses_up_no_streak() {
    let b = Bench::new(Lanes::Fast).with_streaks();
    b.wal(&[1, 2]);
    assert!(granted(b.read(1, true)));
    for _ in 0..5 {
        b.pass_micros(STREAK_MICROS);
        assert!(again(&b));
    }
    assert_eq!(b.read(2, true), None);
    assert!(b.settle().is_empty());
    assert!(again(&b));
    b.pass_micros(STREAK_MICROS - 1);
    assert!(again(&b));
    b.pass_micros(1);
    assert!(!again(&b));
}

/// The broker's own seats hand over at once: the next request is at hand, and theirs takes a message.
#[test]
fn a_brokered_holder_has_no_streak() {
    for lanes in [Lanes::Brokered, Lanes::OddBrokered] {
        let b = line(lanes, &[2, 3]);
        b.unread(1, false);
        assert_eq!(b.turn().load().offered_to(), Some(2));
        assert_eq!(b.read(1, true), None);
        assert_eq!(seats(&b.settle()), [2]);
    }
}

/// A turn that was left free for a streak, and its holder does not come back.
#[test]
fn a_streak_that_ends_early_leaves_nobody_waiting() {
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2, 3]);
        assert!(again(&b));
        b.unread(1, false);
        assert_eq!(seats(&b.settle()), [2]);
        b.with(2, |seat| seat.leave());
        assert_eq!(seats(&b.settle()), [3]);
    }
    // Nor when the next one gives up on its way.
    for lanes in [Lanes::Fast, Lanes::EvenBrokered] {
        let b = line(lanes, &[2, 3]);
        b.unread(1, false);
        assert!(granted(b.give_up(2)));
        assert_eq!(seats(&b.settle()), [3]);
    }
}

/// A seat's number is given to another connection: what its predecessor had is not its own.
#[test]
fn a_streak_is_not_inherited() {
    let b = line(Lanes::Fast, &[2]);
    b.remove(1);
    b.wal(&[1]);
    assert_eq!(b.read(1, true), None);
    assert_eq!(seats(&b.settle()), [2]);
}
