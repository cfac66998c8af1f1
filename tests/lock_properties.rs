//! The lock rules under random histories: mutual exclusion, one writer, nobody waits without a reason, nothing is
//! left behind.

use proptest::prelude::*;
use std::time::{Duration, Instant};
use turnstile::lock::locks::Locks;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};

const SEATS: SeatId = 5;

#[derive(Clone, Debug)]
enum Step {
    File(SeatId, FileLevel, bool, bool),
    ShmShared(SeatId, u8, bool),
    ShmExclusive(SeatId, u8, u8, bool),
    Unlock(SeatId, FileLevel),
    UnlockShared(SeatId, u8, bool),
    UnlockExclusive(SeatId, u8),
    OpenWal(SeatId),
    JournalClear(SeatId),
    GiveUp(SeatId),
    Die(SeatId),
    Pass(u64),
    Elsewhere(SeatId),
}

fn step() -> impl Strategy<Value = Step> {
    let seat = 1..=SEATS;
    let level = prop_oneof![Just(FileLevel::Shared), Just(FileLevel::Reserved), Just(FileLevel::Exclusive)];
    let down = prop_oneof![Just(FileLevel::None), Just(FileLevel::Shared)];
    prop_oneof![
        4 => (seat.clone(), level, any::<bool>(), any::<bool>()).prop_map(|(s, l, h, a)| Step::File(s, l, h, a)),
        4 => (seat.clone(), 0u8..8, any::<bool>()).prop_map(|(s, o, a)| Step::ShmShared(s, o, a)),
        4 => (seat.clone(), 0u8..8, 1u8..4, any::<bool>()).prop_map(|(s, o, n, b)| Step::ShmExclusive(s, o, n, b)),
        4 => (seat.clone(), down).prop_map(|(s, l)| Step::Unlock(s, l)),
        4 => (seat.clone(), 0u8..8, any::<bool>()).prop_map(|(s, o, r)| Step::UnlockShared(s, o, r)),
        4 => (seat.clone(), 0u8..8).prop_map(|(s, o)| Step::UnlockExclusive(s, o)),
        1 => seat.clone().prop_map(Step::OpenWal),
        1 => seat.clone().prop_map(Step::JournalClear),
        2 => seat.clone().prop_map(Step::GiveUp),
        1 => seat.clone().prop_map(Step::Die),
        2 => (0u64..50).prop_map(Step::Pass),
        1 => seat.prop_map(Step::Elsewhere),
    ]
}

/// Applies a step as a well-behaved seat would: a seat that waits says nothing but that it gives up.
fn apply(locks: &mut Locks, now: &mut Instant, step: &Step) {
    let waits = |locks: &Locks, seat: SeatId| locks.is_waiting(seat);
    match *step {
        Step::File(seat, level, hot_journal, ahead) if !waits(locks, seat) => {
            let request = Request::File { level, hot_journal };
            locks.submit(seat, Ask { request, ahead: ahead && level == FileLevel::Shared }, *now);
        }
        Step::ShmShared(seat, one, ahead) if !waits(locks, seat) => {
            let slots = Slots::new(one, 1).unwrap();
            let ask = Ask { request: Request::ShmShared(slots), ahead: ahead && slots.is_one_read() };
            locks.submit(seat, ask, *now);
        }
        Step::ShmExclusive(seat, first, count, blocking) if !waits(locks, seat) => {
            if let Some(slots) = Slots::new(first, count) {
                locks.submit(
                    seat,
                    Ask { request: Request::ShmExclusive { slots, blocking }, ahead: false },
                    *now,
                );
            }
        }
        Step::Unlock(seat, level) if !waits(locks, seat) => {
            locks.release(seat, Release::File { level, keep_turn: false }, *now)
        }
        Step::UnlockShared(seat, one, retry_expected) if !waits(locks, seat) => {
            let slots = Slots::new(one, 1).unwrap();
            locks.release(seat, Release::ShmShared { slots, keep_turn: retry_expected }, *now);
        }
        Step::UnlockExclusive(seat, one) if !waits(locks, seat) => {
            locks.release(
                seat,
                Release::ShmExclusive { slots: Slots::new(one, 1).unwrap(), keep_turn: false },
                *now,
            );
        }
        Step::OpenWal(seat) if !waits(locks, seat) => {
            locks.open_wal_index(seat, *now);
        }
        Step::JournalClear(seat) => locks.journal_is_clear(seat),
        Step::GiveUp(seat) => {
            locks.give_up(seat, *now);
        }
        Step::Die(seat) => locks.remove(seat),
        Step::Pass(ms) => *now += Duration::from_millis(ms),
        Step::Elsewhere(seat) if !waits(locks, seat) => {
            locks.went_elsewhere(seat);
        }
        _ => {}
    }
    for (_, verdict) in locks.settle(*now) {
        assert!(matches!(verdict, Verdict::Granted { .. } | Verdict::Busy));
    }
}

fn check(locks: &Locks) {
    let table = locks.table();
    for s in 0..slot::COUNT {
        if let Some(owner) = table.slot_owner(s) {
            let others = (1..=SEATS).filter(|x| *x != owner && table.shared_holds(*x).slots & (1 << s) != 0);
            assert_eq!(others.count(), 0, "slot {s} is owned by {owner} and shared");
        }
    }
    if let Some(owner) = table.exclusive {
        assert_eq!(table.other_readers(owner).count(), 0, "EXCLUSIVE beside a reader");
        assert_eq!(table.pending, Some(owner));
        assert!(table.reserved.is_none_or(|r| r == owner));
    }
    assert!(
        locks.turn().holder().is_some() || !locks.turn().somebody_waits(),
        "the line stands still: nobody has the turn and somebody waits for it"
    );
    for (seat, ask, _) in locks.waiting() {
        assert!(!locks.blockers(seat).is_empty(), "seat {seat} waits for nobody: {ask:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_keep_the_rules(steps in prop::collection::vec(step(), 1..80)) {
        let mut now = Instant::now();
        let mut locks = Locks::new(now);
        for step in &steps {
            apply(&mut locks, &mut now, step);
            check(&locks);
        }
        for seat in 1..=SEATS {
            locks.remove(seat);
            locks.settle(now);
            check(&locks);
        }
        prop_assert!(locks.table().is_idle());
        prop_assert!(locks.turn().holder().is_none());
        prop_assert_eq!(locks.waiting().count(), 0);
    }
}
