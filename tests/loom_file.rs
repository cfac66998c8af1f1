//! SHARED, RESERVED, PENDING and EXCLUSIVE (rollback mode), in every run of a few seats (tests/model).

#![cfg(feature = "loom")]

mod model;

use model::{Actor, Scenario, check, file, unlock};
use turnstile::lock::{Ask, FileLevel, Request, Verdict};
use turnstile::segment::atomic::Relaxed;
use turnstile::segment::layout::{PROBATION_OPEN, PROBATION_OVER};

fn asks(a: &Actor, level: FileLevel) -> bool {
    a.wait(Ask { request: file(level), ahead: false }, true) != Verdict::Busy
}

/// A read transaction. It waits for writers, and is never refused.
fn read(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    a.world.enter_reader(a.id);
    a.world.leave_reader(a.id);
    a.seat().release(unlock(FileLevel::None));
}

/// A write transaction that was not announced: its RESERVED may be refused, its EXCLUSIVE waits for the readers.
fn write(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    if asks(a, FileLevel::Reserved) && asks(a, FileLevel::Exclusive) {
        a.world.enter(a.id);
        a.world.leave(a.id);
    }
    a.seat().release(unlock(FileLevel::None));
}

/// The same with its turn taken first: nobody refuses it anything.
fn write_in_turn(a: &Actor) {
    a.get(file(FileLevel::Shared), true);
    a.get(file(FileLevel::Reserved), false);
    a.get(file(FileLevel::Exclusive), false);
    a.world.enter(a.id);
    a.world.leave(a.id);
    a.seat().release(unlock(FileLevel::None));
}

/// EXCLUSIVE straight from SHARED: a question, as at a last close.
fn close(a: &Actor) {
    a.get(file(FileLevel::Shared), false);
    if asks(a, FileLevel::Exclusive) {
        a.world.enter(a.id);
        a.world.leave(a.id);
    }
    a.seat().release(unlock(FileLevel::None));
}

#[test]
fn a_writer_and_a_reader() {
    check(&["reader-leaves-quietly"], || Scenario::new().seat(1, write).seat(2, read));
}

#[test]
fn a_writer_and_two_readers() {
    check(&["sleepy-before-parked"], || {
        Scenario::new().seat(1, write).seat(2, read).seat(3, read).preemptions(3)
    });
}

#[test]
fn two_writers_and_a_reader() {
    check(&[], || Scenario::new().seat(1, write_in_turn).seat(2, write_in_turn).seat(3, read).preemptions(2));
}

#[test]
fn two_writers_that_were_not_announced() {
    check(&[], || Scenario::new().seat(1, write).seat(2, write).preemptions(4));
}

#[test]
fn a_last_close_beside_a_reader_and_a_writer() {
    check(&[], || Scenario::new().seat(1, write).seat(2, close).seat(3, read).preemptions(3));
}

/// Nobody has looked for a hot journal: one seat at a time is let in until one has.
#[test]
fn one_at_a_time_on_probation() {
    let look = |a: &Actor| {
        let verdict = a.wait(Ask { request: file(FileLevel::Shared), ahead: false }, true);
        assert_ne!(verdict, Verdict::Busy);
        if let Verdict::Granted { probation: true, .. } = verdict {
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.seat().journal_is_clear();
        }
        a.seat().release(unlock(FileLevel::None));
    };
    check(&["hold-before-probation", "no-probation"], || {
        Scenario::new()
            .setup(|w| w.words.file.0.probation.store(PROBATION_OPEN, Relaxed))
            .seat(1, look)
            .seat(2, look)
            .seat(3, look)
            .finally(|w| assert_eq!(w.words.file.0.probation.load(Relaxed), PROBATION_OVER))
            .preemptions(2)
    });
}

/// The first that finds the journal hot rolls it back; the others wait for that and then read. One gives up before
/// it has looked.
#[test]
fn a_hot_journal_is_rolled_back_once() {
    let roll = |a: &Actor| {
        let verdict = a.wait(Ask { request: file(FileLevel::Shared), ahead: false }, true);
        if let Verdict::Granted { probation: true, .. } = verdict {
            a.get(Request::File { level: FileLevel::Exclusive, hot_journal: true }, false);
            a.world.enter(a.id);
            a.world.leave(a.id);
            a.seat().release(unlock(FileLevel::Shared));
        }
        a.world.enter_reader(a.id);
        a.world.leave_reader(a.id);
        a.seat().release(unlock(FileLevel::None));
    };
    let leaves = |a: &Actor| {
        a.get(file(FileLevel::Shared), false);
        a.seat().release(unlock(FileLevel::None));
    };
    check(&[], || {
        Scenario::new()
            .setup(|w| w.words.file.0.probation.store(PROBATION_OPEN, Relaxed))
            .seat(1, roll)
            .seat(2, roll)
            .seat(3, leaves)
            .preemptions(2)
    });
}
