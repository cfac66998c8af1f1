//! The broker's checkpointer holds locks like everybody, and is in nobody's way for long.

use crate::lanes::{always, granted, rule, seats, slots};
use turnstile::lock::{Ask, FileLevel, Request, Verdict, slot};
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
