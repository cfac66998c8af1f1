//! The turn, in every run of a few seats (tests/model): one holder, first come first served, no wake-up lost, nothing
//! left behind.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, READ, Scenario, World, check, is_granted, one, unshare, unwrite};
use turnstile::lock::rules::Attempt;
use turnstile::lock::slot;
use turnstile::lock::unused::{unused, uses};
use turnstile::lock::{Ask, Release, Request, Verdict};
use turnstile::segment::layout::CHECKPOINTER;

const TURN: Ask = Ask { request: Request::Turn, ahead: false };

/// Waits for the turn, but perhaps not until it comes.
fn take_or_give_up(a: &Actor) {
    if is_granted(a.wait(TURN, false)) {
        a.use_turn();
    }
}

fn take_twice(a: &Actor) {
    a.take_and_end();
    a.take_and_end();
}

#[test]
fn two_seats_take_it_in_turn() {
    check(&["wait-without-second-look"], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .always(World::first_come_first_served)
    });
}

#[test]
fn three_seats_take_it_in_turn() {
    check(&["line-jumped"], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .always(World::first_come_first_served)
            .preemptions(3)
    });
}

#[test]
fn two_seats_twice() {
    check(&["line-without-generation"], || {
        Scenario::new()
            .seat(1, take_twice)
            .seat(2, take_twice)
            .always(World::first_come_first_served)
            .preemptions(4)
    });
}

/// A holder that gave back takes again before the one that it woke has come.
#[test]
fn a_streak_ends_for_who_waits() {
    check(&["no-kick-after-release"], || {
        Scenario::new()
            .streaks()
            .seat(1, take_twice)
            .seat(2, take_twice)
            .always(World::first_come_first_served)
            .preemptions(3)
    });
}

#[test]
fn a_streak_beside_two_that_wait() {
    check(&[], || {
        Scenario::new()
            .streaks()
            .seat(1, take_twice)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .always(World::first_come_first_served)
            .preemptions(2)
    });
}

#[test]
fn giving_up_races_with_an_offer() {
    check(&[], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, take_or_give_up)
            .always(World::first_come_first_served)
    });
}

/// What was offered to one that gives up reaches the next.
#[test]
fn giving_up_ahead_of_one_that_waits() {
    check(&["offer-not-withdrawn"], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, take_or_give_up)
            .seat(3, Actor::take_and_end)
            .always(World::first_come_first_served)
            .preemptions(3)
    });
}

#[test]
fn giving_up_during_a_streak() {
    check(&["left-without-a-look"], || {
        Scenario::new()
            .streaks()
            .seat(1, take_twice)
            .seat(2, take_or_give_up)
            .seat(3, Actor::take_and_end)
            .always(World::first_come_first_served)
            .preemptions(2)
    });
}

/// A transaction: the turn and a read slot, then the write lock, unless the turn was taken back meanwhile.
fn transaction(a: &Actor) {
    a.get(Request::ShmShared(one(READ)), true);
    let write = Request::ShmExclusive { slots: one(slot::WRITE), blocking: false };
    if a.wait(Ask { request: write, ahead: false }, true) != Verdict::Busy {
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.seat().release(unwrite());
    }
    a.seat().release(unshare(READ));
}

/// A writer that has been told so has the turn, until it gives the write lock back.
fn a_writer_has_the_turn(world: &World) {
    let writer = world.inside.get();
    let owner = world.table().slot_owner(slot::WRITE);
    assert!(writer == 0 || owner == Some(writer), "seat {writer} has lost the write lock");
    let holder = world.holder();
    assert!(writer == 0 || holder == Some(writer), "seat {writer} writes in the turn of {holder:?}");
}

/// The broker takes back turns that look unused.
fn revoke(a: &Actor) {
    let turn = a.world.turn(&a.futex);
    if let Some(seen) = unused(turn, false, |_| false) {
        turn.revoke(seen.seat, || uses(turn, seen.seat));
    }
}

#[test]
fn a_turn_that_is_used_is_not_taken_back() {
    check(&["confirm-ignored", "taken-back-in-use"], || {
        Scenario::new()
            .seat(1, transaction)
            .seat(2, transaction)
            .seat(0, revoke)
            .always(a_writer_has_the_turn)
            .preemptions(3)
    });
}

#[test]
fn taking_back_leaves_nobody_asleep() {
    check(&[], || {
        Scenario::new()
            .seat(1, Actor::take_or_lose)
            .seat(2, Actor::take_or_lose)
            .seat(3, Actor::take_or_lose)
            .seat(0, revoke)
            .preemptions(2)
    });
}

/// Even one that has just been taken out of the line.
#[test]
fn taking_back_anything_leaves_nobody_asleep() {
    check(&["taken-back-in-line"], || {
        Scenario::new()
            .seat(1, Actor::take_or_lose)
            .seat(2, Actor::take_or_lose)
            .seat(3, Actor::take_or_lose)
            .seat(0, |a| {
                drop((1..=2).map(|seat| a.world.turn(&a.futex).revoke(seat, || false)).collect::<Vec<_>>())
            })
            .preemptions(2)
    });
}

/// The supervisor puts the first in the line last.
#[test]
fn passing_over_leaves_nobody_asleep() {
    let pass_over = |a: &Actor| {
        let turn = a.world.turn(&a.futex);
        if let Some((_, first)) = turn.first() {
            turn.pass_over(first);
        }
    };
    check(&[], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, take_or_give_up)
            .seat(0, pass_over)
            .preemptions(2)
    });
}

/// Upgrades: a seat that reads asks for the write lock without having taken the turn ahead.
#[test]
fn upgrades_write_in_their_turn() {
    let upgrade = |a: &Actor| {
        a.get(Request::ShmShared(one(READ)), false);
        let write = Request::ShmExclusive { slots: one(slot::WRITE), blocking: false };
        if a.wait(Ask { request: write, ahead: false }, true) != Verdict::Busy {
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.seat().release(unwrite());
        }
        a.seat().release(unshare(READ));
    };
    check(&[], || {
        Scenario::new()
            .seat(1, upgrade)
            .seat(2, upgrade)
            .seat(3, transaction)
            .always(a_writer_has_the_turn)
            .preemptions(2)
    });
}

/// A checkpoint in a turn of its own is no reason to refuse an upgrade: that waits, and is not forgotten at its end.
#[test]
fn an_upgrade_waits_for_the_checkpointer() {
    let upgrade = |a: &Actor| {
        a.get(Request::ShmShared(one(READ)), false);
        a.get(Request::ShmExclusive { slots: one(slot::WRITE), blocking: false }, false);
        a.seat().release(unwrite());
        a.seat().release(unshare(READ));
    };
    let checkpoint = |a: &Actor| {
        let request = Request::ShmExclusive { slots: one(slot::CHECKPOINT), blocking: false };
        // Too late, it does without.
        if let Attempt::Done(_) = a.seat().attempt(Ask { request, ahead: true }) {
            a.seat().release(Release::ShmExclusive { slots: one(slot::CHECKPOINT), keep_turn: false });
        }
    };
    check(&["upgrade-beside-checkpoint"], || {
        Scenario::new().seat(1, upgrade).seat(CHECKPOINTER, checkpoint).always(a_writer_has_the_turn)
    });
}

/// Who holds WRITE in a recovery has no turn; who asks for it in a turn of its own, transaction or checkpoint, waits.
#[test]
fn a_recovery_and_a_checkpoint_beside_a_transaction() {
    let writes = |a: &Actor, blocking: bool| {
        a.get(Request::ShmExclusive { slots: one(slot::WRITE), blocking }, false);
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.seat().release(unwrite());
    };
    check(&[], || {
        Scenario::new()
            .seat(1, move |a| writes(a, false))
            .seat(2, move |a| writes(a, true))
            .seat(3, transaction)
            .preemptions(3)
    });
}

/// Who is awake takes the turn before one that stands in the line and is not: that one is woken each time.
#[test]
fn those_in_a_hurry_leave_nobody_asleep() {
    check(&["no-kick-after-release"], || {
        Scenario::new()
            .hurry()
            .seat(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .preemptions(2)
    });
}
