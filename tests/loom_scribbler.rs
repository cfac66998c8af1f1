//! A member that scribbles over the words between any two accesses: none of the loops that the broker or its
//! checkpointer runs goes on for ever. (The model checkers' words tell of each access, so this is no matter of luck.)

#![cfg(feature = "loom")]

#[path = "model/asleep.rs"]
mod asleep;

use asleep::Asleep;
use std::cell::Cell;
use turnstile::lock::commits::Commits;
use turnstile::lock::park::Rounds;
use turnstile::lock::queue::{Lane, Queue};
use turnstile::lock::seat::{Own, Seat};
use turnstile::lock::table::Table;
use turnstile::lock::turn::{Streak, Turn};
use turnstile::lock::{Ask, FileLevel, Request, SeatId, Slots, slot};
use turnstile::planted::fails_without;
use turnstile::segment::atomic::{AtomicU32, Relaxed, SeqCst};
use turnstile::segment::checked::{Watch, set_watch};
use turnstile::segment::layout::{Bitmaps, CommitWords, LockWords, SeatWords};

const SEATS: usize = 4;
/// Of one call; a thousand tries of each change are all.
const ACCESSES: u64 = 10_000_000;
/// `lock::turn`'s bits.
const HELD: u64 = 1 << 16;
const OFFERED: u64 = 1 << 17;
const CONTENDED: u64 = 1 << 18;
const REVOKING: u64 = 1 << 19;
const GENERATION: u64 = 1 << 32;

#[derive(Default)]
struct Words {
    locks: LockWords,
    maps: Bitmaps,
    seats: [SeatWords; SEATS],
    commits: CommitWords,
}

impl Words {
    fn table(&self) -> Table<'_> {
        Table::new(&self.locks, &self.maps, &self.seats)
    }
}

/// Changes the words before each access that anybody makes.
struct Scribbler {
    words: Words,
    /// The turn's word but for its generation, which is always another one; two of them in turn.
    turns: [Cell<u64>; 2],
    accesses: Cell<u64>,
}

impl Watch for Scribbler {
    fn before(&self, address: usize) {
        let n = self.accesses.get() + 1;
        self.accesses.set(n);
        assert!(n < ACCESSES, "a loop without end");
        let w = &self.words;
        w.locks.turn.0.store(n * GENERATION | self.turns[n as usize % 2].get(), Relaxed);
        w.locks.sleepy.0.store(1, Relaxed);
        for (i, seat) in w.seats.iter().enumerate() {
            // Another ticket each time, and none now and then.
            let ticket = if n % 3 == 0 { 0 } else { n + i as u64 };
            seat.ticket.store(ticket, Relaxed);
            seat.park.store((n % 5) as u32, Relaxed);
        }
        for hints in w.maps.slot_hints.iter().chain(&w.maps.file_hints) {
            // Their own word is changed by who lowers it: only between two accesses to it.
            if std::ptr::from_ref(hints) as usize == address {
                hints.store(0x5555 ^ (n << 32), Relaxed);
            }
        }
        let durable = &w.commits.synced.0.durable;
        durable.store(durable.load(Relaxed) ^ 1, Relaxed);
    }

    fn after(&self, _: usize, _: u64, _: u64) {}
}

impl Rounds for Asleep {
    fn sleep(&self, _: &AtomicU32, _: u32, _: u64) {}
    fn wake_all(&self, _: &AtomicU32) {}
    fn micros(&self) -> u64 {
        0
    }
}

fn scribbler() -> &'static Scribbler {
    struct Nobody;
    impl Watch for Nobody {
        fn before(&self, _: usize) {}
        fn after(&self, _: usize, _: u64, _: u64) {}
    }
    set_watch(Some(&Nobody));
    Box::leak(Box::new(Scribbler {
        words: Words::default(),
        turns: Default::default(),
        accesses: Cell::new(0),
    }))
}

/// Every call, with every pair of states that the turn's word may be scribbled to between two accesses.
fn every_call_ends() {
    let states = [
        0,
        CONTENDED,
        HELD | 1,
        HELD | CONTENDED | 1,
        HELD | REVOKING | 1,
        HELD | CONTENDED | 2,
        OFFERED | CONTENDED | 1,
        OFFERED | CONTENDED | 2,
        OFFERED | CONTENDED | 0xffff,
    ];
    let s = scribbler();
    set_watch(Some(s));
    let table = s.words.table();
    let turn = Turn { table, parking: &Asleep };
    let own = Own::default();
    let seat = Seat { table, id: 1, own: &own, parking: &Asleep, thread: 1, connection: 1 };
    let commits = Commits { words: &s.words.commits, rounds: &Asleep };
    let shared = Request::File { level: FileLevel::Shared, hot_journal: false };
    let exclusive = Request::File { level: FileLevel::Exclusive, hot_journal: true };
    let write = Request::ShmExclusive { slots: Slots::new(slot::WRITE, 1).unwrap(), blocking: true };
    let calls: &[&dyn Fn()] = &[
        &|| {
            let _ = turn.try_take(1, false, |_, _| true);
        },
        &|| {
            let _ = turn.try_take(1, true, |_, _| false);
        },
        &|| turn.enter(1),
        &|| turn.give_up(1),
        &|| {
            let _ = turn.end(1, || Streak::Over);
        },
        &|| {
            let _ = turn.end(1, || Streak::Young);
        },
        &|| {
            let _ = turn.confirm(1);
        },
        &|| {
            let _ = turn.revoke(1, || false);
        },
        &|| turn.kick(),
        &|| turn.pass_over(1),
        &|| turn.clear(1),
        &|| {
            let _ = table.try_slots_exclusive(1, 0b1110);
        },
        &|| {
            let _ = table.read_by_others(1);
        },
        &|| {
            let _ = seat.attempt(Ask { request: shared, ahead: true });
        },
        &|| {
            let _ = seat.attempt(Ask { request: exclusive, ahead: false });
        },
        &|| {
            let _ = seat.attempt(Ask { request: write, ahead: true });
        },
        &|| seat.leave(),
        &|| {
            let _ = commits.end(commits.begin());
        },
        &|| commits.fail(commits.begin()),
        &|| {
            let mut queue = Queue::default();
            let mut lane = Lane { queue: &mut queue, table, parking: &Asleep };
            for id in 1..=SEATS as SeatId {
                let _ = lane.submit(id, Ask { request: Request::Turn, ahead: false }, (1, 1));
            }
            lane.settle();
            (1..=SEATS as SeatId).for_each(|id| lane.remove(id));
        },
    ];
    for (i, call) in calls.iter().enumerate() {
        for one in states {
            for other in states {
                s.turns[0].set(one);
                s.turns[1].set(other);
                s.accesses.set(0);
                table.line.set(2);
                table.members.set(2);
                s.words.commits.issued.0.newest.store(i as u64 + 2, SeqCst);
                // Hints are lowered at every 64th call.
                s.words.seats[0].calls.store(64, Relaxed);
                s.words.locks.file.0.lowering.store(0, Relaxed);
                call();
            }
        }
    }
    set_watch(None);
}

#[test]
fn a_scribbler_keeps_no_loop_going() {
    fails_without("tries-without-end", every_call_ends);
}
