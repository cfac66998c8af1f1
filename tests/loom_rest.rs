//! Seats that rest, in every run of a few closers, one that comes back, and the broker (tests/model): the gate never
//! opens over a seat in use, and never stays shut when none is.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, BROKER, Scenario, World, check, choose, post, wait_for_post};
use turnstile::lock::SeatId;
use turnstile::lock::queue::{Lane, Queue};
use turnstile::lock::rest::Rest;
use turnstile::segment::atomic::SeqCst;

/// Where the gate is open, in `World::mail`; below it, that the seat of that number has said it leaves.
const GATE: usize = 3;

/// Seat 4 is nobody's: its word of `mail` is the gate's.
fn setup(world: &World) {
    world.table().members.clear(4);
}

/// The connection is open.
fn use_it(a: &Actor) {
    assert_eq!(a.world.mail[GATE].load(SeqCst), 0, "seat {} is in use and the gate is open", a.id);
    a.world.enter_reader(a.id);
    a.world.leave_reader(a.id);
    assert_eq!(a.world.mail[GATE].load(SeqCst), 0, "the gate was opened over seat {}", a.id);
}

fn say_leave(a: &Actor) {
    a.world.mail[a.id as usize - 1].store(1, SeqCst);
    post(BROKER);
}

/// Closes the connection. The count that the seat rests under, if it does.
fn close(a: &Actor) -> Option<u32> {
    match a.table().rest(a.id) {
        Rest::Rests(count) => return Some(count),
        Rest::Last => say_leave(a),
        Rest::Closed => {}
    }
    None
}

fn open_and_close(a: &Actor) {
    use_it(a);
    close(a);
}

/// Opens again, if its seat still rests.
fn twice(a: &Actor) {
    use_it(a);
    if let Some(count) = close(a)
        && a.table().resume(a.id, count)
    {
        use_it(a);
        close(a);
    }
}

/// Leaves as one that may not rest.
fn leave(a: &Actor) {
    use_it(a);
    say_leave(a);
}

/// The broker clears a seat.
fn clear(a: &Actor, seat: SeatId) {
    Lane { queue: &mut Queue::default(), table: a.table(), parking: &a.futex }.remove(seat);
}

/// As `broker::joining` does it, with every seat that says so.
fn broker(a: &Actor) {
    let clear = |seat| clear(a, seat);
    let mut seats: Vec<SeatId> = a.table().members.iter().collect();
    while !seats.is_empty() {
        wait_for_post(BROKER);
        for seat in seats.clone() {
            if a.world.mail[seat as usize - 1].swap(0, SeqCst) != 0 {
                clear(seat);
                seats.retain(|s| *s != seat);
            }
        }
        if seats.iter().all(|s| a.table().rests(*s)) {
            seats.retain(|s| {
                let closed = a.table().close_resting(*s);
                if closed {
                    clear(*s);
                }
                !closed
            });
        }
    }
    a.world.mail[GATE].store(1, SeqCst);
}

/// Somebody is in use, or the gate is open.
fn closed_means_closed(world: &World) {
    assert_eq!(world.mail[GATE].load(SeqCst), 1, "nobody is left and the gate is shut");
}

fn scenario() -> Scenario {
    Scenario::new().setup(setup).finally(closed_means_closed)
}

#[test]
fn two_close_at_once() {
    check(&["rest-looks-first"], || {
        let out = |w: &World| w.table().members.clear(3);
        scenario().setup(out).seat(1, open_and_close).seat(2, open_and_close).seat(BROKER as SeatId, broker)
    });
}

#[test]
fn three_close_at_once() {
    check(&["rest-looks-first"], || {
        scenario()
            .seat(1, open_and_close)
            .seat(2, open_and_close)
            .seat(3, open_and_close)
            .seat(BROKER as SeatId, broker)
            .preemptions(4)
    });
}

#[test]
fn one_comes_back_while_another_leaves() {
    check(&["closed-unasked"], || {
        let out = |w: &World| w.table().members.clear(3);
        scenario().setup(out).seat(1, twice).seat(2, leave).seat(BROKER as SeatId, broker)
    });
}

#[test]
fn two_come_back_while_the_broker_closes() {
    check(&["closed-unasked", "rest-looks-first"], || {
        scenario().seat(1, twice).seat(2, twice).seat(3, leave).seat(BROKER as SeatId, broker).preemptions(3)
    });
}

/// The seat's number is another's by the time that its first owner comes back.
#[test]
fn a_number_that_was_given_out_again_is_not_taken_back() {
    check(&["count-stands-still"], || {
        let alone = |w: &World| [2, 3].into_iter().for_each(|s| w.table().members.clear(s));
        Scenario::new()
            .setup(setup)
            .setup(alone)
            .setup(|w| w.table().members.set(2)) // in use all the time
            .seat(1, |a| {
                let Some(count) = close(a) else { return };
                a.world.mail[0].store(1, SeqCst);
                if choose(2) == 1 && a.table().resume(a.id, count) {
                    a.world.enter(a.id);
                    a.world.leave(a.id);
                }
            })
            .seat(BROKER as SeatId, |a| {
                // Takes the number for another process, which lets its seat rest and uses it again.
                if a.world.mail[0].load(SeqCst) == 0 || !a.table().close_resting(1) {
                    return;
                }
                clear(a, 1);
                a.table().hand_out(1);
                let Rest::Rests(count) = a.table().rest(1) else { panic!("seat 2 is in use") };
                assert!(a.table().resume(1, count), "its own seat is taken by a stranger");
                a.world.enter(1);
                a.world.leave(1);
            })
    });
}

/// The broker has been killed. Nobody may come back once the gate is open, and it does not stay shut.
#[test]
fn the_last_one_out_opens_the_gate_in_the_brokers_place() {
    let last_out = |a: &Actor| {
        use_it(a);
        if a.table().close_all(a.id) {
            a.world.mail[GATE].store(1, SeqCst);
        }
    };
    check(&["closed-unasked"], || {
        let rests = |w: &World| assert!(matches!(w.table().rest(3), Rest::Rests(0)));
        scenario().setup(rests).seat(1, last_out).seat(2, last_out).seat(3, move |a| {
            if a.table().resume(3, 0) {
                last_out(a);
            }
        })
    });
}

/// Frames in the WAL and in the database file, in `World::mail`.
const FRAMES: usize = 0;
const COPIED: usize = 1;

/// Closed means complete: of those that close at once, somebody has copied what all of them committed.
#[test]
fn the_last_of_two_that_close_at_once_copies_all() {
    check(&["closing-looks-first"], || {
        let open = |w: &World| {
            w.table().members.clear(4);
            [1, 2, 3].into_iter().for_each(|s| w.table().set_wal_open(s, true));
        };
        let close = |a: &Actor| {
            a.world.mail[FRAMES].fetch_add(1, SeqCst);
            if a.table().closes_last(a.id) {
                let frames = a.world.mail[FRAMES].load(SeqCst);
                a.world.mail[COPIED].fetch_max(frames, SeqCst);
            }
            a.table().closed(a.id);
        };
        let complete = |w: &World| {
            let at = |i: usize| w.mail[i].load(SeqCst);
            assert_eq!(at(COPIED), at(FRAMES), "all are closed and not everything is copied");
        };
        Scenario::new()
            .setup(open)
            .finally(complete)
            .seat(1, close)
            .seat(2, close)
            .seat(3, close)
            .preemptions(3)
    });
}
