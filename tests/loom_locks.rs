//! The lock table's owner words and hints, in every run of a few seats (tests/model).

#![cfg(feature = "loom")]

mod model;

use model::{Actor, READ, Scenario, WRITE, World, check, is_granted, one, unwrite};
use turnstile::lock::{Ask, Release, Request, Slots, slot};
use turnstile::segment::atomic::Relaxed;

const OTHER: u8 = READ + 1;

fn exclusively(a: &Actor, mask: u8) {
    if a.table().try_slots_exclusive(a.id, mask) {
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.table().release_slots_exclusive(a.id, mask);
    }
}

fn shared(a: &Actor, mask: u8) {
    if a.table().try_slots_shared(a.id, mask) {
        a.world.enter_reader(a.id);
        a.world.leave_reader(a.id);
        a.table().release_slots_shared(a.id, mask);
    }
}

/// Whoever holds a slot shared is looked at by whoever wants it.
fn holders_are_hinted(world: &World) {
    let readers = world.readers.get();
    for seat in (1..=model::SEATS as u32).filter(|s| readers >> s & 1 != 0) {
        let hint = world.maps.slot_hints[0].load(Relaxed) >> (2 * (seat - 1)) & 0b11;
        assert_ne!(hint, 0, "seat {seat} holds a slot and has no hint");
    }
}

#[test]
fn an_owner_excludes_a_reader() {
    check(&["shared-looks-first"], || {
        Scenario::new()
            .seat(1, |a| exclusively(a, 1 << READ))
            .seat(2, |a| shared(a, 1 << READ))
            .always(holders_are_hinted)
    });
}

#[test]
fn an_owner_excludes_readers_that_come_again() {
    check(&[], || {
        Scenario::new()
            .seat(1, |a| (0..2).for_each(|_| exclusively(a, 1 << READ)))
            .seat(2, |a| (0..2).for_each(|_| shared(a, 1 << READ)))
            .seat(3, |a| shared(a, 1 << READ))
            .always(holders_are_hinted)
            .preemptions(4)
    });
}

#[test]
fn several_slots_are_taken_all_or_none() {
    check(&[], || {
        Scenario::new()
            .seat(1, |a| exclusively(a, 1 << READ | 1 << OTHER))
            .seat(2, |a| exclusively(a, 1 << slot::CHECKPOINT | 1 << READ))
            .seat(3, |a| shared(a, 1 << READ | 1 << OTHER))
            .always(holders_are_hinted)
    });
}

/// Like `exclusively`, where another owner of another slot is no harm.
fn wants(a: &Actor, mask: u8) {
    if a.table().try_slots_exclusive(a.id, mask) {
        assert!(a.world.readers.get() == 0 || mask & 1 << READ == 0, "a reader was overlooked");
        a.table().release_slots_exclusive(a.id, mask);
    }
}

/// Two seats want different slots and lower hints while they look (each looks for its 64th time); the readers come
/// and go.
#[test]
fn hints_are_lowered_beside_a_reader() {
    check(&["hint-lowered-in-one-step"], || {
        Scenario::new()
            .seat(1, |a| wants(a, 1 << READ))
            .seat(2, |a| (0..2).for_each(|_| wants(a, 1 << OTHER)))
            .seat(3, |a| (0..2).for_each(|_| shared(a, 1 << READ)))
            .always(holders_are_hinted)
            .preemptions(4)
    });
}

/// A hint that two find worth lowering.
#[test]
fn one_lowers_a_hint_at_a_time() {
    check(&["hints-lowered-by-two"], || {
        Scenario::new()
            .setup(|w| {
                assert!(w.table().try_slots_shared(3, 1 << READ));
                w.table().release_slots_shared(3, 1 << READ);
            })
            .seat(1, |a| wants(a, 1 << READ))
            .seat(2, |a| wants(a, 1 << OTHER))
            .seat(3, |a| shared(a, 1 << READ))
            .always(holders_are_hinted)
    });
}

/// Of those that open the wal-index at once one may find itself alone, and nobody is beside it then.
#[test]
fn one_opens_the_wal_index_alone() {
    let open = |a: &Actor| {
        let seat = a.seat();
        let opened = seat.open_wal_index(|| {
            assert_eq!(a.world.readers.get(), 0, "the wal-index is open and is invalidated");
            a.world.enter(a.id);
            a.world.leave(a.id);
        });
        if opened {
            a.world.enter_reader(a.id);
            a.world.leave_reader(a.id);
            seat.close_wal_index();
        }
    };
    check(&[], || Scenario::new().seat(1, open).seat(2, open).seat(3, open).preemptions(4));
}

fn anew() -> Slots {
    Slots::new(slot::READ0 + 1, 4).unwrap()
}

/// `inside` stands for the index's header: a checkpoint goes by it to the end, and who begins the WAL anew changes it.
fn checkpoint(a: &Actor) {
    let request = Request::ShmExclusive { slots: one(slot::CHECKPOINT), blocking: false };
    if is_granted(a.wait(Ask { request, ahead: false }, true)) {
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.seat().release(Release::ShmExclusive { slots: one(slot::CHECKPOINT), keep_turn: false });
    }
}

/// walRestartLog, under WRITE.
fn begin_anew(a: &Actor) {
    a.get(WRITE(), false);
    let request = Request::ShmExclusive { slots: anew(), blocking: false };
    if is_granted(a.wait(Ask { request, ahead: false }, true)) {
        a.world.enter(a.id);
        a.world.leave(a.id);
        a.seat().release(Release::ShmExclusive { slots: anew(), keep_turn: false });
    }
    a.seat().release(unwrite());
}

const NEW_BEGINNING: [&str; 2] = ["new-beginning-beside-checkpoint", "checkpoint-beside-new-beginning"];

#[test]
fn no_wal_is_begun_anew_beside_a_checkpoint() {
    check(&NEW_BEGINNING, || Scenario::new().seat(1, checkpoint).seat(2, begin_anew));
}

#[test]
fn no_wal_is_begun_anew_beside_checkpoints_that_come_again() {
    check(&NEW_BEGINNING, || {
        Scenario::new()
            .seat(1, |a| (0..2).for_each(|_| checkpoint(a)))
            .seat(2, |a| (0..2).for_each(|_| begin_anew(a)))
            .seat(3, checkpoint)
            .preemptions(2)
    });
}

/// One that begins the WAL anew itself is not in its own way, and a reader's mark in nobody's.
#[test]
fn a_truncating_checkpoint_beside_a_writer_and_a_reader() {
    let truncate = |a: &Actor| {
        let request = Request::ShmExclusive { slots: one(slot::CHECKPOINT), blocking: false };
        assert!(is_granted(a.wait(Ask { request, ahead: false }, true)));
        a.world.enter(a.id);
        let request = Request::ShmExclusive { slots: anew(), blocking: false };
        if is_granted(a.wait(Ask { request, ahead: false }, true)) {
            a.seat().release(Release::ShmExclusive { slots: anew(), keep_turn: false });
        }
        a.world.leave(a.id);
        a.seat().release(Release::ShmExclusive { slots: one(slot::CHECKPOINT), keep_turn: false });
    };
    let mark = |a: &Actor| {
        if a.table().try_slots_exclusive(a.id, 1 << READ) {
            a.table().release_slots_exclusive(a.id, 1 << READ);
        }
    };
    check(&[], || Scenario::new().seat(1, truncate).seat(2, begin_anew).seat(3, mark).preemptions(3));
}
