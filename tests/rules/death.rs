//! A seat that dies, in every position: nothing of it stays, and the next one gets its due.

use crate::lanes::{Bench, Lanes, always, granted, seats, slots};
use turnstile::lock::{FileLevel, Request, SeatId, Slots, Verdict, slot};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{NOTIFIED, PARKED};

/// The seat dies and is proven dead.
fn dies(b: &Bench, id: SeatId) {
    b.remove(id);
    b.assert_gone(id);
}

fn all_reads() -> Slots {
    Slots::new(slot::READ0, 5).unwrap()
}

#[test]
fn with_the_turn() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.read(3, true), None);
        assert!(b.settle().is_empty());
        dies(&b, 1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

/// It has ended its turn, and died before it could wake the next one.
#[test]
fn between_ending_its_turn_and_waking_the_next() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        assert!(b.settle().is_empty());
        let turn = &b.table().words.turn.0;
        turn.store(turn.load(SeqCst) & !(1 << 16), SeqCst); // not held, contended
        assert!(b.turn().load().is_free() && b.turn().load().is_contended());
        dies(&b, 1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn with_the_turn_offered_to_it() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.read(3, true), None);
        assert!(b.settle().is_empty());
        b.unread(1, false);
        assert_eq!(b.turn().load().offered_to(), Some(2));
        dies(&b, 2);
        assert_eq!(seats(&b.settle()), [3]);
    });
}

#[test]
fn as_the_first_in_the_line_in_the_middle_of_it_and_as_its_last() {
    for dead in [2, 3, 4] {
        always(|b| {
            b.wal(&[1, 2, 3, 4]);
            assert!(granted(b.read(1, true)));
            for seat in [2, 3, 4] {
                assert_eq!(b.read(seat, true), None);
            }
            assert!(b.settle().is_empty());
            dies(&b, dead);
            assert!(b.settle().is_empty());
            for seat in [2, 3, 4].into_iter().filter(|s| *s != dead) {
                assert!(!b.turn().line().contains(&dead));
                let before = b.holder().expect("somebody has the turn");
                b.unread(before, false);
                assert_eq!(seats(&b.settle()), [seat]);
            }
        });
    }
}

#[test]
fn woken_and_not_yet_there() {
    let b = Bench::new(Lanes::Fast).with_streaks();
    b.wal(&[1, 2, 3]);
    assert!(granted(b.read(1, true)));
    assert_eq!(b.read(2, true), None);
    assert_eq!(b.read(3, true), None);
    assert!(b.settle().is_empty());
    b.unread(1, false);
    assert!(b.turn().load().is_free(), "seat 1 may go on until seat 2 arrives");
    dies(&b, 2);
    assert_eq!(seats(&b.settle()), [3]);
}

#[test]
fn as_the_owner_of_each_slot() {
    for one in 0..slot::COUNT {
        always(|b| {
            b.wal(&[1, 2]);
            assert!(granted(b.exclusive(1, slots(one))));
            dies(&b, 1);
            assert!(granted(b.exclusive(2, slots(one))));
            dies(&b, 2);
            b.assert_nothing_left();
        });
    }
}

#[test]
fn while_it_takes_several_slots() {
    always(|b| {
        b.wal(&[1, 2]);
        // Some of the words are taken, the seats have not been looked at.
        for word in &b.table().words.readers.0[..3] {
            word.store(1, SeqCst);
        }
        b.with(1, |_| ());
        dies(&b, 1);
        assert!(granted(b.exclusive(2, all_reads())));
    });
}

#[test]
fn as_the_holder_of_shared_locks() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, false)));
        assert_eq!(b.exclusive(2, all_reads()), Some(Verdict::Busy));
        dies(&b, 1);
        assert!(granted(b.exclusive(2, all_reads())));
    });
    always(|b| {
        b.shared(1);
        b.shared(2);
        assert_eq!(b.hot_exclusive(2), None);
        dies(&b, 1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn with_each_of_the_file_locks() {
    // RESERVED, PENDING, EXCLUSIVE: a hot journal may be there, so one at a time is let in.
    for level in [FileLevel::Reserved, FileLevel::Pending, FileLevel::Exclusive] {
        always(|b| {
            assert!(granted(b.shared_ahead(1)));
            assert!(granted(b.file(1, FileLevel::Reserved)));
            if level == FileLevel::Pending {
                b.shared(5);
                assert_eq!(b.file(1, FileLevel::Exclusive), None);
            } else if level == FileLevel::Exclusive {
                assert!(granted(b.file(1, FileLevel::Exclusive)));
            }
            let (two, three) = (b.shared_ahead(2), b.shared_ahead(3));
            assert_eq!((two, three), (None, None));
            assert!(b.settle().is_empty());
            dies(&b, 1);
            assert_eq!(b.settle(), [(2, Verdict::Granted { turn: true, probation: true })]);
            assert_eq!(b.holder(), Some(2));
            // The one on probation dies too: the next one is on probation then.
            dies(&b, 2);
            assert_eq!(b.settle(), [(3, Verdict::Granted { turn: true, probation: true })]);
            b.with(3, |seat| seat.journal_is_clear());
            b.shared(4);
        });
    }
}

/// In WAL mode a dead writer leaves no journal.
#[test]
fn with_reserved_and_the_wal_index_open() {
    always(|b| {
        b.wal(&[1]);
        assert!(granted(b.file(1, FileLevel::Reserved)));
        dies(&b, 1);
        assert_eq!(b.file(2, FileLevel::Shared), Some(Verdict::Granted { turn: false, probation: false }));
    });
}

#[test]
fn asleep() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.write(1)));
        assert_eq!(b.write(2), None);
        assert_eq!(b.write(3), None);
        assert!(b.settle().is_empty());
        dies(&b, 2);
        b.unwrite(1);
        assert_eq!(seats(&b.settle()), [3]);
    });
}

/// It has the turn and sleeps for the lock.
#[test]
fn asleep_with_the_turn() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        assert!(granted(b.write(3))); // a recovery
        assert!(granted(b.exclusive(1, slots(slot::CHECKPOINT))));
        assert_eq!(b.write(1), None);
        assert_eq!(b.read(2, true), None);
        assert!(b.settle().is_empty());
        dies(&b, 1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

/// Sleepers are woken by who takes the mark away that says that there are some.
#[test]
fn between_taking_the_mark_and_waking_the_sleepers() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.write(1)));
        assert_eq!(b.write(2), None);
        assert!(b.settle().is_empty());
        b.table().release_slots_exclusive(1, 1 << slot::WRITE);
        assert_eq!(b.table().words.sleepy.0.swap(0, SeqCst), 1);
        dies(&b, 1);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

/// It has marked a seat as woken and has not made the system call. Nobody wakes a seat that is marked.
#[test]
fn between_marking_a_seat_as_woken_and_waking_it() {
    let marks = |b: &Bench, seat| {
        let marked = b.words(seat).park.compare_exchange(PARKED, NOTIFIED, SeqCst, SeqCst);
        assert!(marked.is_ok());
    };
    let b = Bench::new(Lanes::Fast);
    b.wal(&[1, 2]);
    assert!(granted(b.write(1)));
    assert_eq!(b.write(2), None);
    assert!(b.settle().is_empty());
    b.table().release_slots_exclusive(1, 1 << slot::WRITE);
    marks(&b, 2);
    dies(&b, 1);
    assert_eq!(seats(&b.settle()), [2]);
    // The first in the line.
    let b = Bench::new(Lanes::Fast);
    b.wal(&[1, 2]);
    assert!(granted(b.read(1, true)));
    assert_eq!(b.read(2, true), None);
    assert!(b.settle().is_empty());
    marks(&b, 2);
    b.with(1, |seat| seat.end_turn());
    dies(&b, 1);
    assert_eq!(seats(&b.settle()), [2]);
}

#[test]
fn opening_the_wal_index() {
    always(|b| {
        b.shared(1);
        b.shared(2);
        b.table().words.file.0.opening.store(1, SeqCst);
        b.table().set_wal_open(1, true);
        assert!(!b.with(2, |seat| seat.open_wal_index(|| unreachable!("somebody is finding out"))));
        dies(&b, 1);
        assert_eq!(b.wal(&[2]), [2], "what the dead one left half done is nobody's truth");
    });
}

#[test]
fn lowering_hints() {
    always(|b| {
        b.wal(&[1, 2, 3]);
        b.table().words.file.0.lowering.store(1, SeqCst);
        dies(&b, 1);
        // The hints still do their work: a hold is seen however often somebody has looked.
        assert!(granted(b.read(2, false)));
        for _ in 0..300 {
            assert_eq!(b.exclusive(3, all_reads()), Some(Verdict::Busy));
        }
        b.unread(2, false);
        for _ in 0..300 {
            assert!(granted(b.exclusive(3, all_reads())));
            b.unexclusive(3, all_reads());
            assert!(granted(b.read(2, false)));
            assert_eq!(b.exclusive(3, all_reads()), Some(Verdict::Busy));
            b.unread(2, false);
        }
    });
}

#[test]
fn everywhere_at_once() {
    always(|b| {
        b.wal(&[1, 2, 3, 4, 5]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.write(3), None);
        assert_eq!(b.ask(4, Request::Turn, true), None);
        for dead in [1, 2, 3, 4, 5] {
            dies(&b, dead);
        }
        assert!(b.settle().is_empty());
        b.assert_nothing_left();
        // The numbers are given to others, who find nothing of the dead.
        b.wal(&[1, 2]);
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
        assert_eq!(b.read(1, true), None);
        b.unwrite(2);
        assert_eq!(seats(&b.settle()), [1]);
    });
}

/// A seat that leaves of its own accord.
#[test]
fn leaving() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        assert_eq!(b.write(3), None);
        b.with(1, |seat| seat.leave());
        let mut ended = seats(&b.settle());
        ended.sort_unstable();
        assert_eq!(ended, [2, 3]);
        assert!(b.table().owned_slots(1) == 0 && !b.table().file_shared(1) && !b.table().wal_open(1));
    });
}
