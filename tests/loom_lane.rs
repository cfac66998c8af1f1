//! Both lanes on one table: the broker for seats on the socket lane, beside members on the segment, in every run of a
//! few (tests/model). The broker sleeps until there is a message.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, Scenario, Step, check, file, one, unlock};
use turnstile::lock::{Ask, FileLevel, Release, Request, Slots, Verdict, slot};

fn ask(request: Request) -> Step {
    Step::Ask(Ask { request, ahead: false })
}

fn turn() -> Vec<Step> {
    vec![ask(Request::Turn), Step::Inside, Step::Release(Release::Turn)]
}

fn read() -> Vec<Step> {
    vec![ask(file(FileLevel::Shared)), Step::InsideReader, Step::Release(unlock(FileLevel::None))]
}

fn write() -> Vec<Step> {
    let ahead = Step::Ask(Ask { request: file(FileLevel::Shared), ahead: true });
    let [reserved, exclusive] = [FileLevel::Reserved, FileLevel::Exclusive].map(|l| ask(file(l)));
    vec![ahead, reserved, exclusive, Step::Inside, Step::Release(unlock(FileLevel::None))]
}

fn member_reads(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    a.world.enter_reader(a.id);
    a.world.leave_reader(a.id);
    a.seat().release(unlock(FileLevel::None));
}

fn member_writes(a: &Actor) {
    a.get(file(FileLevel::Shared), true);
    a.get(file(FileLevel::Reserved), false);
    a.get(file(FileLevel::Exclusive), false);
    a.world.enter(a.id);
    a.world.leave(a.id);
    a.seat().release(unlock(FileLevel::None));
}

#[test]
fn the_turn_goes_from_lane_to_lane() {
    check(&[], || Scenario::new().seat(1, Actor::take_and_end).socket(2, turn()).broker());
}

#[test]
fn two_on_the_socket_lane_and_a_member() {
    check(&[], || {
        Scenario::new()
            .seat(1, Actor::take_and_end)
            .socket(2, turn())
            .socket(3, turn())
            .broker()
            .preemptions(2)
    });
}

#[test]
fn a_member_writes_beside_readers_on_the_socket_lane() {
    check(&[], || {
        Scenario::new().seat(1, member_writes).socket(2, read()).socket(3, read()).broker().preemptions(1)
    });
}

#[test]
fn a_writer_on_the_socket_lane_beside_a_reader_on_each() {
    check(&[], || {
        Scenario::new().seat(1, member_reads).socket(2, write()).socket(3, read()).broker().preemptions(1)
    });
}

#[test]
fn a_writer_on_the_socket_lane_beside_two_members() {
    check(&[], || {
        Scenario::new()
            .seat(1, member_reads)
            .seat(3, member_writes)
            .socket(2, write())
            .broker()
            .preemptions(2)
    });
}

#[test]
fn a_reader_on_the_socket_lane_beside_a_writer_that_comes_again() {
    let closes_twice = |a: &Actor| {
        for _ in 0..2 {
            a.get(file(FileLevel::Shared), false);
            let ask = Ask { request: file(FileLevel::Exclusive), ahead: false };
            if a.wait(ask, true) != Verdict::Busy {
                a.world.enter(a.id);
                a.world.leave(a.id);
            }
            a.seat().release(unlock(FileLevel::None));
            a.next_round();
        }
    };
    check(&["woken-request-forgotten"], || {
        Scenario::new().seat(1, closes_twice).socket(2, read()).broker().preemptions(4)
    });
}

/// Who finds a recovery going on waits for it, be it one that does not begin after all.
#[test]
fn a_recovery_ends_for_those_that_wait() {
    let looks = |a: &Actor| {
        a.get(Request::ShmShared(one(slot::RECOVER)), false);
        a.seat().release(model::unshare(slot::RECOVER));
    };
    let recovers = |a: &Actor| {
        let slots = Slots::new(slot::CHECKPOINT, 2).unwrap();
        let ask = Ask { request: Request::ShmExclusive { slots, blocking: false }, ahead: false };
        if a.wait(ask, true) != Verdict::Busy {
            a.seat().release(Release::ShmExclusive { slots, keep_turn: false });
        }
    };
    check(&["recovery-not-called-off"], || {
        Scenario::new().seat(1, looks).seat(2, looks).seat(3, recovers).preemptions(4)
    });
}
