//! Leaving WAL mode: SQLite asks for EXCLUSIVE, lets go of it, and asks again from RESERVED. Whoever came in between is in
//! WAL mode still.

use crate::lanes::{granted, rule, seats};
use turnstile::lock::FileLevel;

#[test]
fn who_came_in_before_wal_mode_was_left_may_write() {
    rule("leaver-keeps-turn", |b| {
        b.shared(1);
        assert!(granted(b.file(1, FileLevel::Reserved)));
        b.wal(&[2]);
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert!(b.settle().is_empty());
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
        b.unwrite(2);
        b.unread(2, false);
        b.with(2, |seat| seat.close_wal_index());
        b.unlock(2, FileLevel::None);
        assert_eq!(seats(&b.settle()), [1]);
        assert_eq!(b.table().exclusive(), Some(1));
    });
}

#[test]
fn who_opens_its_index_while_wal_mode_is_being_left_may_write() {
    rule("leaver-keeps-turn", |b| {
        b.shared(1);
        b.shared(2); // has read that the file is in WAL mode
        assert!(granted(b.file(1, FileLevel::Reserved)));
        assert_eq!(b.file(1, FileLevel::Exclusive), None);
        assert!(b.settle().is_empty());
        assert_eq!(b.holder(), Some(1));
        b.with(2, |seat| assert!(seat.open_wal_index(|| {})));
        assert!(b.settle().is_empty());
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
        b.unwrite(2);
        b.unread(2, false);
        b.with(2, |seat| seat.close_wal_index());
        b.unlock(2, FileLevel::None);
        assert_eq!(seats(&b.settle()), [1]);
    });
}
