//! What a broker's death leaves in the words, and what the next one makes of it.

use crate::lanes::{ALL_LANES, Bench, Lanes, always, granted, seats, slots};
use turnstile::lock::takeover::Holds;
use turnstile::lock::{FileLevel, slot};
use turnstile::planted::fails_without;
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{CLOSED, STATE};

#[test]
fn a_request_that_the_last_broker_was_asked_stands_in_nobodys_way() {
    fails_without("old-requests-wait", || {
        let b = Bench::new(Lanes::Brokered);
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert_eq!(b.read(2, true), None);
        b.broker_dies();
        assert!(b.turn().line().is_empty(), "it still stands in the line");
        b.unread(1, false);
        assert!(granted(b.read(3, true)));
        // Who made it asks again.
        assert_eq!(b.read(2, true), None);
        b.unread(3, false);
        assert_eq!(seats(&b.settle()), [2]);
    });
}

#[test]
fn members_on_the_fast_lane_keep_what_they_have_and_their_place() {
    for lanes in ALL_LANES {
        let b = Bench::new(lanes);
        b.wal(&[1, 2, 3]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        b.broker_dies();
        assert_eq!(b.holder(), Some(1));
        assert_eq!(b.table().slot_owner(slot::WRITE), Some(1));
        if b.is_brokered(2) {
            assert_eq!(b.read(2, true), None);
        }
        b.unwrite(1);
        b.unread(1, false);
        assert_eq!(seats(&b.settle()), [2]);
    }
}

#[test]
fn a_seat_that_was_being_cleared_is_cleared() {
    always(|b| {
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        assert_eq!(b.read(2, true), None);
        let count = b.table().count(1);
        // The broker ended before it had cleared the rest.
        b.table().close(1);
        b.table().members.clear(1);
        b.broker_dies();
        assert_eq!(b.words(1).state.load(SeqCst) & STATE, CLOSED, "until it is handed out again");
        assert_ne!(b.table().count(1), count);
        assert_eq!(b.table().slot_owner(slot::WRITE), None);
        if b.is_brokered(2) {
            assert!(granted(b.read(2, true)));
        } else {
            assert_eq!(seats(&b.settle()), [2]);
        }
    });
}

#[test]
fn what_was_granted_and_not_heard_of_is_taken_back() {
    fails_without("lost-answers-kept", || {
        let b = Bench::new(Lanes::Brokered);
        b.wal(&[1, 2]);
        assert!(granted(b.read(1, true)));
        assert!(granted(b.write(1)));
        b.broker_dies();
        // It has heard of SHARED and no more.
        let holds = Holds { file: FileLevel::Shared, ..Holds::default() };
        assert!(b.lane(|lane| lane.settle_for(1, holds)));
        assert_eq!(b.table().owned_slots(1), 0);
        assert_eq!(b.table().slots_shared(1), 0);
        assert!(b.table().file_shared(1));
        assert_eq!(b.holder(), None);
        assert!(granted(b.read(2, true)));
        assert!(granted(b.write(2)));
    });
}

#[test]
fn a_seat_that_believes_to_hold_what_it_has_not_is_refused() {
    let b = Bench::new(Lanes::Brokered);
    b.wal(&[1]);
    assert!(granted(b.read(1, false)));
    let has = Holds { file: FileLevel::Shared, shared: b.table().slots_shared(1), exclusive: 0 };
    let read = slots(slot::READ0 + 2).mask().unwrap();
    for more in [
        Holds { file: FileLevel::Reserved, ..has },
        Holds { shared: has.shared | read, ..has },
        Holds { exclusive: 1 << slot::WRITE, ..has },
    ] {
        assert!(!b.lane(|lane| lane.settle_for(1, more)), "{more:?}");
    }
    assert!(b.lane(|lane| lane.settle_for(1, has)));
    assert_eq!(b.table().slots_shared(1), has.shared);
    assert!(b.table().file_shared(1));
}
