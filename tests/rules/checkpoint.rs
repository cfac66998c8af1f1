//! The broker's checkpointer holds locks like everybody, and is in nobody's way for long.

use crate::lanes::{always, granted, rule, seats, slots};
use turnstile::lock::{Ask, FileLevel, Request, Slots, Verdict, slot};
use turnstile::segment::layout::CHECKPOINTER;

#[test]
fn exclusive_waits_for_the_checkpointer_alone() {
    rule("checkpointer-is-anyone", |b| {
        b.wal(&[1]);
        b.shared(CHECKPOINTER);
        // A last close. It has PENDING meanwhile: the checkpointer sees that, and nobody else gets in.
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert_eq!(b.table().pending(), Some(1));
        assert_eq!(b.file(2, FileLevel::Shared), None);
        assert!(b.settle().is_empty());
        b.unlock(CHECKPOINTER, FileLevel::None);
        assert_eq!(seats(&b.settle()), [1]);
        assert_eq!(b.table().exclusive(), Some(1));
    });
}

#[test]
fn exclusive_beside_others_is_busy_at_once_with_the_checkpointer_there() {
    always(|b| {
        b.wal(&[1, 2]);
        b.shared(CHECKPOINTER);
        assert_eq!(b.file(1, FileLevel::Exclusive), Some(Verdict::Busy));
        assert_eq!(b.table().pending(), None);
        b.unlock(CHECKPOINTER, FileLevel::None);
    });
}

#[test]
fn a_dead_checkpointer_lets_exclusive_through() {
    always(|b| {
        b.wal(&[1]);
        b.shared(CHECKPOINTER);
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        b.remove(CHECKPOINTER);
        assert_eq!(seats(&b.settle()), [1]);
    });
}

#[test]
fn a_checkpoint_that_was_asked_for_waits_for_the_brokers() {
    rule("checkpoint-beside-brokers", |b| {
        b.wal(&[1, 2]);
        let checkpoint = slots(slot::CHECKPOINT);
        assert!(granted(b.exclusive(CHECKPOINTER, checkpoint)));
        // An automatic one does not.
        assert_eq!(b.exclusive(2, checkpoint), Some(Verdict::Busy));
        let request = Request::ShmExclusive { slots: checkpoint, blocking: true };
        assert_eq!(b.submit(1, Ask { request, ahead: false }), None);
        assert!(b.settle().is_empty());
        b.unexclusive(CHECKPOINTER, checkpoint);
        assert_eq!(seats(&b.settle()), [1]);
    });
}

/// It commits nothing, so no snapshot becomes stale: a reader that begins to write waits, and is not refused.
#[test]
fn an_upgrade_waits_for_the_checkpointer() {
    rule("upgrade-beside-checkpoint", |b| {
        b.wal(&[1]);
        let checkpoint = slots(slot::CHECKPOINT);
        let request = Request::ShmExclusive { slots: checkpoint, blocking: false };
        assert!(granted(b.submit(CHECKPOINTER, Ask { request, ahead: true })));
        assert_eq!(b.holder(), Some(CHECKPOINTER));
        assert!(granted(b.read(1, false)));
        assert_eq!(b.write(1), None);
        // With WRITE too, to begin the WAL anew; then without the turn.
        assert!(granted(b.write(CHECKPOINTER)));
        assert!(b.settle().is_empty());
        b.unwrite(CHECKPOINTER);
        b.unexclusive(CHECKPOINTER, checkpoint);
        assert_eq!(seats(&b.settle()), [1]);
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.table().slot_owner(slot::WRITE), Some(1));
    });
}

#[test]
fn an_upgrade_waits_for_a_checkpoint_out_of_turn() {
    rule("upgrade-beside-checkpoint", |b| {
        b.wal(&[1]);
        let both = slots(slot::CHECKPOINT);
        assert!(granted(b.exclusive(CHECKPOINTER, both)));
        b.with(CHECKPOINTER, |seat| assert!(seat.table.try_slots_exclusive(seat.id, 1 << slot::WRITE)));
        assert!(granted(b.read(1, false)));
        assert_eq!(b.write(1), None);
        b.unwrite(CHECKPOINTER);
        assert_eq!(seats(&b.settle()), [1]);
    });
}

/// Whoever stands in the line before it commits first, and its snapshot is stale then.
#[test]
fn an_upgrade_behind_a_writer_is_refused_after_the_checkpoint() {
    always(|b| {
        b.wal(&[1, 2]);
        let checkpoint = slots(slot::CHECKPOINT);
        let request = Request::ShmExclusive { slots: checkpoint, blocking: false };
        assert!(granted(b.submit(CHECKPOINTER, Ask { request, ahead: true })));
        assert!(granted(b.read(1, false)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.write(1), None);
        b.unexclusive(CHECKPOINTER, checkpoint);
        assert!(b.settle().contains(&(1, Verdict::Busy)));
        assert_eq!(b.holder(), Some(2));
    });
}

/// The read slots with which a WAL is begun anew.
fn readers() -> Slots {
    Slots::new(slot::READ0 + 1, 4).unwrap()
}

/// walRestartLog goes on appending after BUSY.
#[test]
fn a_wal_is_not_begun_anew_beside_a_checkpoint() {
    rule("new-beginning-beside-checkpoint", |b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.exclusive(2, slots(slot::CHECKPOINT))));
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        b.unread(1, false);
        assert_eq!(b.exclusive(1, readers()), Some(Verdict::Busy));
        assert_eq!(b.table().owned_slots(1), 1 << slot::WRITE);
        // A mark may be set.
        assert!(granted(b.exclusive(1, slots(slot::READ0 + 1))));
        b.unexclusive(1, slots(slot::READ0 + 1));
        b.unexclusive(2, slots(slot::CHECKPOINT));
        assert!(granted(b.exclusive(1, readers())));
    });
}

#[test]
fn a_checkpoint_waits_until_the_wal_has_been_begun_anew() {
    rule("checkpoint-beside-new-beginning", |b| {
        b.wal(&[1, 2]);
        assert!(granted(b.write(1)));
        assert!(granted(b.exclusive(1, readers())));
        assert_eq!(b.exclusive(2, slots(slot::CHECKPOINT)), None);
        assert!(b.settle().is_empty());
        assert_eq!(b.table().slot_owner(slot::CHECKPOINT), None);
        assert_eq!(turnstile::lock::queue::blockers(b.turn(), 2), [1]);
        b.unexclusive(1, readers());
        assert_eq!(seats(&b.settle()), [2]);
        assert_eq!(b.table().slot_owner(slot::CHECKPOINT), Some(2));
    });
}

#[test]
fn a_checkpoint_outlives_a_writer_that_dies_beginning_the_wal_anew() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.write(1)));
        assert!(granted(b.exclusive(1, readers())));
        assert_eq!(b.exclusive(2, slots(slot::CHECKPOINT)), None);
        b.remove(1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn a_checkpoint_itself_begins_the_wal_anew() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.exclusive(1, slots(slot::CHECKPOINT))));
        assert!(granted(b.write(1)));
        assert!(granted(b.exclusive(1, readers())));
        // Another one is refused as ever.
        assert_eq!(b.exclusive(2, slots(slot::CHECKPOINT)), Some(Verdict::Busy));
    });
}
