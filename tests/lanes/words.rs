//! What is left in the words when a seat, or everybody, has gone.

use turnstile::lock::turn::Turn;
use turnstile::lock::{SeatId, slot};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{PROBATION_OPEN, PROBATION_OVER};

/// No bit, no owner word, no ticket of this seat, and nothing of what it said of itself. Hints may stay.
pub fn assert_gone(turn: Turn<'_>, id: SeatId) {
    let t = turn.table;
    for (map, name) in [(t.members, "members"), (t.line, "line"), (t.sleepers, "sleepers")] {
        assert!(!map.has(id), "seat {id} is still among the {name}");
    }
    for one in 0..slot::COUNT {
        assert_ne!(t.slot_owner(one), Some(id), "slot {one}");
    }
    let file = &t.words.file.0;
    for word in
        [&file.reserved, &file.pending, &file.exclusive, &file.probation, &file.opening, &file.lowering]
    {
        assert_ne!(word.load(SeqCst), id, "the file locks: {file:?}");
    }
    let word = turn.load();
    assert_ne!(word.holder(), Some(id));
    assert_ne!(word.offered_to(), Some(id));
    let w = t.seat(id).unwrap();
    let own =
        [&w.slots, &w.file, &w.calls, &w.thread, &w.park, &w.brokered, &w.waiting, &w.ended, &w.turn_for];
    assert!(own.iter().all(|word| word.load(SeqCst) == 0), "{w:?}");
    assert_eq!((w.ticket.load(SeqCst), w.connection.load(SeqCst)), (0, 0), "{w:?}");
}

/// Everybody has gone; seats were numbered 1 to `last`.
pub fn assert_nothing_left(turn: Turn<'_>, last: SeatId) {
    (1..=last).for_each(|id| assert_gone(turn, id));
    let t = turn.table;
    assert!([t.members, t.line, t.sleepers].iter().all(|map| map.iter().next().is_none()));
    let file = &t.words.file.0;
    assert!((0..slot::COUNT).all(|one| t.slot_owner(one).is_none()));
    for word in [&file.reserved, &file.pending, &file.exclusive, &file.opening, &file.lowering] {
        assert_eq!(word.load(SeqCst), 0, "{file:?}");
    }
    assert!([PROBATION_OPEN, PROBATION_OVER].contains(&file.probation.load(SeqCst)));
    assert_eq!(t.words.sleepy.0.load(SeqCst), 0);
    assert!(turn.load().is_free());
}
