//! The smallest scenarios under loom as well: another checker, by other people, comes to the same answers.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, READ, Scenario, check_under_loom, file, unlock};
use turnstile::lock::{Ask, FileLevel, Verdict};

#[test]
fn an_owner_excludes_a_reader() {
    let exclusively = |a: &Actor| {
        if a.table().try_slots_exclusive(a.id, 1 << READ) {
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.table().release_slots_exclusive(a.id, 1 << READ);
        }
    };
    let shared = |a: &Actor| {
        if a.table().try_slots_shared(a.id, 1 << READ) {
            a.world.enter_reader(a.id);
            a.world.leave_reader(a.id);
            a.table().release_slots_shared(a.id, 1 << READ);
        }
    };
    check_under_loom(&["shared-looks-first"], || Scenario::new().seat(1, exclusively).seat(2, shared));
}

#[test]
fn two_seats_take_it_in_turn() {
    check_under_loom(&["wait-without-second-look"], || {
        Scenario::new().seat(1, Actor::take_and_end).seat(2, Actor::take_and_end).preemptions(4)
    });
}

#[test]
fn three_seats_take_it_in_turn() {
    check_under_loom(&["wait-without-second-look"], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .seat(2, Actor::take_and_end)
            .seat(3, Actor::take_and_end)
            .preemptions(3)
    });
}

#[test]
fn a_writer_waits_for_a_reader() {
    let read = |a: &Actor| {
        a.get(file(FileLevel::Shared), false);
        a.world.enter_reader(a.id);
        a.world.leave_reader(a.id);
        a.seat().release(unlock(FileLevel::None));
    };
    let write = |a: &Actor| {
        a.get(file(FileLevel::Shared), false);
        let asks = |level| a.wait(Ask { request: file(level), ahead: false }, true) != Verdict::Busy;
        if asks(FileLevel::Reserved) && asks(FileLevel::Exclusive) {
            a.world.enter(a.id);
            a.world.leave(a.id);
        }
        a.seat().release(unlock(FileLevel::None));
    };
    check_under_loom(&["reader-leaves-quietly"], || {
        Scenario::new().seat(1, write).seat(2, read).preemptions(3)
    });
}
