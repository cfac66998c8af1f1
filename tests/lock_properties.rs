//! The lock rules under random histories of five seats in all mixtures of lanes. Beside the reference model
//! (`reference`): every verdict, and after every step the holder of the turn, the line, all owners and shared holds, and
//! who waits. And by themselves, with streaks and with seats that run late: mutual exclusion, nobody is forgotten,
//! nothing is left behind.

mod lanes;
mod reference;

use lanes::{ALL_LANES, Bench, Lanes};
use proptest::prelude::*;
use reference::{Locks, Probation};
use turnstile::lock::queue::blockers;
use turnstile::lock::unused::{unused, uses};
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{PARKED, PROBATION_OPEN, PROBATION_OVER};

const SEATS: SeatId = 5;

#[derive(Clone, Debug)]
enum Step {
    Submit(SeatId, Ask),
    Release(SeatId, Release),
    /// A read-only client finds out whether somebody has WRITE, and gives it back at once. Held on to, it would
    /// keep writers out in the model and not in the words: wal.c never does that, so nobody looks for it.
    Probe(SeatId),
    OpenWal(SeatId),
    CloseWal(SeatId),
    JournalClear(SeatId),
    GiveUp(SeatId),
    Die(SeatId),
    Elsewhere(SeatId),
    /// The broker takes back a turn that is not in use.
    Judge,
}

/// What happens between the steps when nobody is in a hurry.
#[derive(Clone, Debug)]
enum Late {
    Step(Step),
    Micros(u64),
    /// The seat has been woken and is awake; or it also looks.
    Arrive(SeatId),
    Nap(SeatId),
    Run(SeatId),
    RunBroker,
    RunAll,
}

fn seat() -> impl Strategy<Value = SeatId> {
    1..=SEATS
}

fn request() -> impl Strategy<Value = Ask> {
    let level = prop_oneof![Just(FileLevel::Shared), Just(FileLevel::Reserved), Just(FileLevel::Exclusive)];
    let file = (level, any::<bool>(), any::<bool>()).prop_map(|(level, hot_journal, ahead)| Ask {
        request: Request::File { level, hot_journal },
        ahead: ahead && level == FileLevel::Shared,
    });
    let shared = (1u8..8, any::<bool>()).prop_map(|(one, ahead)| {
        let slots = lanes::slots(one);
        Ask { request: Request::ShmShared(slots), ahead: ahead && slots.is_one_read() }
    });
    let exclusive =
        (0u8..8, 1u8..4, any::<bool>(), any::<bool>()).prop_map(|(first, count, blocking, ahead)| {
            let slots = Slots::new(first, count.min(8 - first)).unwrap();
            Ask { request: Request::ShmExclusive { slots, blocking }, ahead: ahead && slots.is_checkpoint() }
        });
    let begin_anew = Just(Ask {
        request: Request::ShmExclusive { slots: Slots::new(slot::READ0 + 1, 4).unwrap(), blocking: false },
        ahead: false,
    });
    let write = any::<bool>().prop_map(|blocking| Ask {
        request: Request::ShmExclusive { slots: lanes::slots(slot::WRITE), blocking },
        ahead: false,
    });
    let turn = Just(Ask { request: Request::Turn, ahead: true });
    prop_oneof![4 => file, 4 => shared, 3 => exclusive, 1 => begin_anew, 2 => write, 1 => turn]
}

fn release() -> impl Strategy<Value = Release> {
    let keep_turn = || prop::bool::weighted(0.3);
    let level = prop_oneof![Just(FileLevel::None), Just(FileLevel::Shared)];
    prop_oneof![
        4 => (level, keep_turn()).prop_map(|(level, keep_turn)| Release::File { level, keep_turn }),
        4 => (0u8..8, keep_turn())
            .prop_map(|(one, keep_turn)| Release::ShmShared { slots: lanes::slots(one), keep_turn }),
        4 => (0u8..8, 1u8..5, keep_turn()).prop_map(|(first, count, keep_turn)| {
            Release::ShmExclusive { slots: Slots::new(first, count.min(8 - first)).unwrap(), keep_turn }
        }),
        1 => Just(Release::Turn),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (seat(), request()).prop_map(|(s, ask)| Step::Submit(s, ask)),
        12 => (seat(), release()).prop_map(|(s, release)| Step::Release(s, release)),
        1 => seat().prop_map(Step::Probe),
        1 => seat().prop_map(Step::OpenWal),
        1 => seat().prop_map(Step::CloseWal),
        1 => seat().prop_map(Step::JournalClear),
        2 => seat().prop_map(Step::GiveUp),
        1 => seat().prop_map(Step::Die),
        1 => seat().prop_map(Step::Elsewhere),
        1 => Just(Step::Judge),
    ]
}

fn late() -> impl Strategy<Value = Late> {
    prop_oneof![
        10 => step().prop_map(Late::Step),
        2 => (0u64..200).prop_map(Late::Micros),
        2 => seat().prop_map(Late::Arrive),
        2 => seat().prop_map(Late::Nap),
        4 => seat().prop_map(Late::Run),
        2 => Just(Late::RunBroker),
        1 => Just(Late::RunAll),
    ]
}

fn any_lanes() -> impl Strategy<Value = Lanes> {
    prop::sample::select(ALL_LANES.to_vec())
}

/// The step as a well-behaved seat takes it: one that waits says nothing but that it gives up. With the answer, for
/// comparison.
fn apply(b: &Bench, step: &Step) -> Option<String> {
    let answer = match *step {
        Step::Submit(s, ask) if !b.is_waiting(s) => format!("{:?}", b.submit(s, ask)),
        Step::Release(s, release) if !b.is_waiting(s) => format!("{:?}", b.release(s, release)),
        Step::Probe(s) if !b.is_waiting(s) => {
            let slots = lanes::slots(slot::WRITE);
            let verdict = b.ask(s, Request::ShmShared(slots), false);
            b.release(s, Release::ShmShared { slots, keep_turn: false });
            format!("{verdict:?}")
        }
        Step::OpenWal(s) if !b.is_waiting(s) => {
            let mut alone = false;
            assert!(b.with(s, |seat| seat.open_wal_index(|| alone = true)));
            format!("{alone}")
        }
        Step::CloseWal(s) if !b.is_waiting(s) => format!("{:?}", b.with(s, |seat| seat.close_wal_index())),
        Step::JournalClear(s) => format!("{:?}", b.with(s, |seat| seat.journal_is_clear())),
        Step::GiveUp(s) => format!("{:?}", b.give_up(s)),
        Step::Die(s) => {
            b.remove(s);
            b.assert_gone(s);
            "()".into()
        }
        Step::Elsewhere(s) if !b.is_waiting(s) => format!("{}", b.with(s, |seat| seat.went_elsewhere())),
        Step::Judge => b.lane(|lane| {
            let turn = lane.turn();
            let unused = unused(turn, false, |_| false);
            let revoked = unused.is_some_and(|u| turn.revoke(u.seat, || uses(turn, u.seat)));
            format!("{revoked}")
        }),
        _ => return None,
    };
    Some(answer)
}

/// The same in the model.
fn model(m: &mut Locks, step: &Step) -> String {
    match *step {
        Step::Submit(s, ask) => format!("{:?}", m.submit(s, ask)),
        Step::Release(s, release) => format!("{:?}", m.release(s, release)),
        Step::Probe(s) => {
            let slots = lanes::slots(slot::WRITE);
            let verdict = m.submit(s, Ask { request: Request::ShmShared(slots), ahead: false });
            m.release(s, Release::ShmShared { slots, keep_turn: false });
            format!("{verdict:?}")
        }
        Step::OpenWal(s) => format!("{}", m.open_wal_index(s)),
        Step::CloseWal(s) => format!("{:?}", m.close_wal_index(s)),
        Step::JournalClear(s) => format!("{:?}", m.journal_is_clear(s)),
        Step::GiveUp(s) => format!("{:?}", m.give_up(s)),
        Step::Die(s) => format!("{:?}", m.remove(s)),
        Step::Elsewhere(s) => format!("{}", m.went_elsewhere(s)),
        Step::Judge => format!("{}", m.unused().is_some_and(|u| m.turn.end(u.seat))),
    }
}

/// The waits that ended. Who waits for the turn gets it in the order of the line, and the model knows that order by
/// itself. Of those who sleep for something else, all are woken at once and whoever looks first may have it; on one
/// processor or another that is anyone, so the model serves them in the order in which they did come. But nobody
/// may be left out.
fn settle_both(b: &Bench, m: &mut Locks) {
    for (seat, verdict) in b.settle() {
        assert_eq!(m.serve(seat), Some(verdict), "seat {seat}'s wait");
    }
    assert_eq!(m.settle(), [], "waits that should have ended too");
}

fn compare(b: &Bench, m: &Locks) {
    let t = b.table();
    assert_eq!(b.holder(), m.turn.holder().map(|h| h.seat), "the turn");
    assert!(b.turn().load().offered_to().is_none(), "an offer nobody accepts");
    assert_eq!(b.turn().line(), m.turn.line().collect::<Vec<_>>(), "the line");
    for one in 0..slot::COUNT {
        assert_eq!(t.slot_owner(one), m.table.slot_owner(one), "slot {one}");
    }
    let model = (m.table.reserved, m.table.pending, m.table.exclusive);
    assert_eq!((t.reserved(), t.pending(), t.exclusive()), model, "RESERVED, PENDING, EXCLUSIVE");
    let probation = match t.words.file.0.probation.load(SeqCst) {
        PROBATION_OPEN => Probation::Open { admitted: None },
        PROBATION_OVER => Probation::Over,
        admitted => Probation::Open { admitted: Some(admitted) },
    };
    assert_eq!(probation, m.probation);
    let seen = unused(b.turn(), false, |_| false).map(|u| (u.seat, u.idle));
    assert_eq!(seen, m.unused().map(|u| (u.seat, u.idle)), "a turn that is not in use");
    for s in 1..=SEATS {
        let holds = m.table.shared_holds(s);
        assert_eq!((t.slots_shared(s), t.file_shared(s)), (holds.slots, holds.file), "shared by {s}");
        assert_eq!(t.wal_open(s), m.has_wal_index(s), "wal-index of {s}");
        assert_eq!(b.is_waiting(s), m.is_waiting(s), "whether {s} waits");
        assert_eq!(b.with(s, |seat| seat.reserved_by_other()), m.reserved_by_other(s));
        // For RECOVER the model also names who has it shared, which is in nobody's way.
        let (for_whom, model) = (blockers(b.turn(), s), m.blockers(s));
        assert!(for_whom.iter().all(|other| model.contains(other)), "{s} waits for {for_whom:?}: {model:?}");
        assert_eq!(for_whom.is_empty(), !b.is_waiting(s), "seat {s} waits for {for_whom:?}");
    }
}

/// What holds at every moment, whoever has yet to run.
fn check(b: &Bench) {
    let t = b.table();
    for one in 0..slot::COUNT {
        if let Some(owner) = t.slot_owner(one) {
            let sharers = (1..=SEATS).filter(|s| *s != owner && t.slots_shared(*s) & (1 << one) != 0);
            assert_eq!(sharers.count(), 0, "slot {one} is owned by {owner} and shared");
        }
    }
    if let Some(owner) = t.exclusive() {
        assert!(!(1..=SEATS).any(|s| s != owner && t.file_shared(s)), "EXCLUSIVE beside a reader");
        assert_eq!(t.pending(), Some(owner));
        assert!(t.reserved().is_none_or(|r| r == owner));
    }
    let word = b.turn().load();
    let next = word.offered_to().or(b.turn().first().map(|(_, first)| first));
    if let Some(next) = next.filter(|_| word.holder().is_none()) {
        let awake = match b.is_brokered(next) {
            true => b.broker_is_due(),
            false => b.words(next).park.load(SeqCst) != PARKED,
        };
        assert!(awake, "the line stands still: {next} sleeps beside {word:?}");
    }
}

fn everybody_leaves(b: &Bench) {
    for s in 1..=SEATS {
        b.remove(s);
        b.settle();
        check(b);
    }
    b.assert_nothing_left();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_come_to_what_the_model_says(
        lanes in any_lanes(),
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let b = Bench::fresh(lanes);
        let mut m = Locks::new();
        for step in &steps {
            if let Some(answer) = apply(&b, step) {
                assert_eq!(answer, model(&mut m, step), "{step:?}");
            }
            settle_both(&b, &mut m);
            compare(&b, &m);
            check(&b);
        }
        everybody_leaves(&b);
    }

    #[test]
    fn seats_that_run_late_find_the_rules_kept(
        lanes in any_lanes(),
        steps in prop::collection::vec(late(), 1..150),
    ) {
        let b = Bench::fresh(lanes).with_streaks();
        for step in &steps {
            match step {
                Late::Step(step) => drop(apply(&b, step)),
                Late::Micros(micros) => b.pass_micros(*micros),
                Late::Arrive(s) if !b.is_brokered(*s) => drop(b.arrive(*s)),
                Late::Nap(s) if !b.is_brokered(*s) => drop(b.nap(*s)),
                Late::Run(s) if !b.is_brokered(*s) => {
                    if let Some(Verdict::Granted { turn, .. }) = b.run(*s) {
                        prop_assert_eq!(turn, b.holder() == Some(*s));
                    }
                }
                Late::RunBroker => drop(b.run_broker()),
                Late::RunAll => drop(b.settle()),
                Late::Arrive(_) | Late::Nap(_) | Late::Run(_) => {}
            }
            check(&b);
        }
        b.settle();
        for s in (1..=SEATS).filter(|s| b.is_waiting(*s)) {
            prop_assert!(!blockers(b.turn(), s).is_empty(), "seat {} waits for nobody", s);
        }
        everybody_leaves(&b);
    }
}
