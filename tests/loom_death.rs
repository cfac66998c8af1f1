//! A seat stops for ever between any two steps, and the broker clears it away, in every run of a few seats
//! (tests/model): nothing of it stays, and the others get on.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, READ, Scenario, WRITE, check, file, is_granted, one, unlock, unshare, unwrite};
use turnstile::lock::{Ask, FileLevel, Release, Request, Slots, Verdict, slot};

fn read(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    a.world.enter_reader(a.id);
    a.world.leave_reader(a.id);
    a.seat().release(unlock(FileLevel::None));
}

fn write(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    let asks = |level| a.wait(Ask { request: file(level), ahead: false }, true) != Verdict::Busy;
    if asks(FileLevel::Reserved) && asks(FileLevel::Exclusive) {
        a.world.enter(a.id);
        a.world.leave(a.id);
    }
    a.seat().release(unlock(FileLevel::None));
}

#[test]
fn one_of_two_dies_over_the_turn() {
    check(&["turn-of-the-dead", "dead-waker-forgotten"], || {
        Scenario::new().mortal(1, Actor::take_and_end).seat(2, Actor::take_and_end)
    });
}

#[test]
fn one_of_three_dies_over_the_turn() {
    check(&[], || {
        Scenario::new()
            .mortal(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .preemptions(2)
    });
}

#[test]
fn one_dies_in_its_streak() {
    let twice = |a: &Actor| {
        a.take_and_end();
        a.take_and_end();
    };
    check(&[], || Scenario::new().streaks().mortal(1, twice).seat(2, Actor::take_and_end).preemptions(3));
}

#[test]
fn one_dies_giving_up() {
    let take_or_give_up = |a: &Actor| {
        if is_granted(a.wait(Ask { request: Request::Turn, ahead: false }, false)) {
            a.use_turn();
        }
    };
    check(&[], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .mortal(2, take_or_give_up)
            .seat(3, Actor::take_and_end)
            .preemptions(2)
    });
}

#[test]
fn an_owner_or_a_reader_dies() {
    let exclusively = |a: &Actor| {
        let mask = 1 << READ | 1 << slot::CHECKPOINT;
        if a.table().try_slots_exclusive(a.id, mask) {
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.table().release_slots_exclusive(a.id, mask);
        }
    };
    let shared = |a: &Actor| {
        if a.table().try_slots_shared(a.id, 1 << READ) {
            a.world.enter_reader(a.id);
            a.world.leave_reader(a.id);
            a.table().release_slots_shared(a.id, 1 << READ);
        }
    };
    check(&[], || {
        Scenario::new()
            .mortal(1, exclusively)
            .mortal(2, shared)
            .seat(3, exclusively)
            .seat(4, shared)
            .preemptions(2)
    });
}

#[test]
fn a_writer_dies_over_a_rollback_journal() {
    check(&[], || Scenario::new().mortal(1, write).seat(2, read).seat(3, read).preemptions(1));
}

#[test]
fn a_reader_dies_before_a_writer() {
    check(&[], || Scenario::new().seat(1, write).mortal(2, read).seat(3, read).preemptions(1));
}

/// A writing transaction: the turn, a read slot, the write lock.
#[test]
fn one_dies_in_a_transaction() {
    let transaction = |a: &Actor| {
        a.get(Request::ShmShared(one(READ)), true);
        a.get(WRITE(), false);
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.seat().release(unwrite());
        a.seat().release(unshare(READ));
    };
    check(&[], || Scenario::new().mortal(1, transaction).seat(2, transaction).preemptions(3));
}

#[test]
fn one_dies_opening_the_wal_index() {
    let open = |a: &Actor| {
        if a.seat().open_wal_index(|| a.world.enter(a.id)) {
            if a.world.inside.get() == a.id {
                a.world.leave(a.id);
            }
            a.seat().close_wal_index();
        }
    };
    check(&[], || Scenario::new().mortal(1, open).seat(2, open).seat(3, open));
}

#[test]
fn one_dies_in_a_hurry() {
    check(&[], || {
        Scenario::new()
            .hurry()
            .mortal(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .preemptions(2)
    });
}

/// One dies over its checkpoint, or beginning the WAL anew; the other gets what it waits for, and never beside it.
#[test]
fn one_dies_over_a_checkpoint_or_a_wal_begun_anew() {
    let exclusively = |a: &Actor, slots: Slots| {
        let request = Request::ShmExclusive { slots, blocking: false };
        if is_granted(a.wait(Ask { request, ahead: false }, true)) {
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.seat().release(Release::ShmExclusive { slots, keep_turn: false });
        }
    };
    let checkpoint = move |a: &Actor| exclusively(a, one(slot::CHECKPOINT));
    let begin_anew = move |a: &Actor| {
        a.get(WRITE(), false);
        exclusively(a, Slots::new(slot::READ0 + 1, 4).unwrap());
        a.seat().release(unwrite());
    };
    check(&[], || {
        Scenario::new().mortal(1, checkpoint).mortal(2, begin_anew).seat(3, checkpoint).preemptions(2)
    });
}
