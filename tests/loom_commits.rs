//! Commits that share a sync, in every run of a few seats (tests/model): what is said to be durable is on the disk,
//! nobody sleeps for ever, also when a writer or a leader stops anywhere, and a failed sync gives all one answer.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, SEATS, Scenario, World, check, choose, sleep, wake};
use std::cell::Cell;
use turnstile::lock::Request;
use turnstile::lock::commits::{Awaited, Commits, Place};
use turnstile::lock::park::Rounds;
use turnstile::segment::atomic::{AtomicU32, SeqCst};

/// Longer waits than this are for a sync that somebody is making.
const PATIENCE: u64 = 1000;

/// One seat's way to wait for a sync. `impatient`: a leader may have died, so its waits come to an end.
struct Beds<'a> {
    actor: &'a Actor,
    impatient: bool,
    now: Cell<u64>,
}

impl<'a> Beds<'a> {
    fn new(actor: &'a Actor, impatient: bool) -> Beds<'a> {
        Beds { actor, impatient, now: Cell::new(1) }
    }

    fn commits(&self) -> Commits<'_> {
        Commits { words: &self.actor.world.commits, rounds: self }
    }
}

impl Rounds for Beds<'_> {
    /// futex(2). Waiting for a group to fill ends by itself; waiting for a sync only where its leader may be gone.
    fn sleep(&self, round: &AtomicU32, seen: u32, micros: u64) {
        if micros < PATIENCE || self.impatient {
            self.now.set(self.now.get() + micros);
        } else if round.load(SeqCst) == seen {
            sleep(self.actor.id as usize);
        }
    }

    fn wake_all(&self, _: &AtomicU32) {
        (1..=SEATS).filter(|s| *s != self.actor.id as usize).for_each(wake);
    }

    fn micros(&self) -> u64 {
        self.now.get()
    }
}

/// fdatasync(2) of what is written by now. After an error the kernel takes the pages for written; it tells every open
/// file of the error, each once.
fn sync(world: &World, told: &Cell<u32>, fails: bool) -> bool {
    let disk = &world.disk;
    let written = disk.written.get();
    world.step();
    if fails && choose(2) == 1 {
        disk.dropped.set(disk.dropped.get() | written & !disk.synced.get());
        disk.errors.set(disk.errors.get() + 1);
    }
    disk.synced.set(disk.synced.get() | written & !disk.dropped.get());
    told.replace(disk.errors.get()) == disk.errors.get()
}

/// The seat's commit is written, gets its number, is published.
fn publish(a: &Actor, commits: Commits, bit: u32) -> Option<Awaited> {
    a.get(Request::Turn, false);
    let disk = &a.world.disk;
    if commits.has_failed() {
        // The WAL is cut back: what failed is not in it any more.
        let numbers = disk.numbers.get();
        let failed = (0..16).filter(|i| numbers[*i] > commits.durable()).fold(0, |bits, i| bits | 1 << i);
        assert_eq!(failed & disk.durable.get(), 0, "said to be durable, and cut off");
        [&disk.written, &disk.published, &disk.synced].iter().for_each(|c| c.set(c.get() & !failed));
        disk.dropped.set(0);
        commits.repaired();
    }
    let place = |length| Place { generation: 1, length };
    let number = if turnstile::planted::planted("number-before-frames") {
        let number = commits.issue(place(32), place(64));
        a.world.step();
        disk.written.set(disk.written.get() | bit);
        number
    } else {
        disk.written.set(disk.written.get() | bit);
        commits.issue(place(32), place(64))
    };
    let mut numbers = disk.numbers.get();
    numbers[bit.trailing_zeros() as usize] = number.map_or(0, |n| n.number);
    disk.numbers.set(numbers);
    disk.published.set(disk.published.get() | bit);
    assert!(a.seat().end_turn());
    number
}

/// What is said of the commits `seen`: they are on the disk, and will be.
fn found(world: &World, durable: bool, seen: u32) {
    if durable {
        assert_eq!(world.disk.synced.get() & seen, seen, "said to be durable, and not on the disk");
        world.disk.durable.set(world.disk.durable.get() | seen);
    }
}

fn commit(a: &Actor, impatient: bool, fails: bool) {
    commit_as(a, impatient, fails, 1 << a.id);
}

fn commit_as(a: &Actor, impatient: bool, fails: bool, bit: u32) {
    let beds = Beds::new(a, impatient);
    let Some(awaited) = publish(a, beds.commits(), bit) else { return }; // a sync had failed before
    let told = Cell::new(a.world.disk.errors.get());
    let durable = beds.commits().wait(awaited, || sync(&a.world, &told, fails));
    found(&a.world, durable, bit);
}

fn read(a: &Actor, impatient: bool) {
    let beds = Beds::new(a, impatient);
    let seen = a.world.disk.published.get();
    let Some(awaited) = beds.commits().pending() else { return };
    let told = Cell::new(0);
    let durable = beds.commits().wait(awaited, || sync(&a.world, &told, false));
    found(&a.world, durable, seen);
}

#[test]
fn two_commits_share_a_sync() {
    let commits = |a: &Actor| commit(a, false, false);
    check(&["round-ends-quietly", "number-before-frames"], || {
        Scenario::new().seat(1, commits).seat(2, commits).preemptions(4)
    });
}

#[test]
fn three_commits_share_syncs() {
    let commits = |a: &Actor| commit(a, false, false);
    check(&[], || Scenario::new().seat(1, commits).seat(2, commits).seat(3, commits).preemptions(2));
}

#[test]
fn a_reader_waits_for_what_it_sees() {
    let commits = |a: &Actor| commit(a, false, false);
    let reads = |a: &Actor| read(a, false);
    check(&[], || Scenario::new().seat(1, commits).seat(2, commits).seat(3, reads).preemptions(2));
}

#[test]
fn a_writer_or_leader_dies() {
    let commits = |a: &Actor| commit(a, true, false);
    let reads = |a: &Actor| read(a, true);
    check(&["leader-waited-for"], || {
        Scenario::new().mortal(1, commits).seat(2, commits).seat(3, reads).preemptions(2)
    });
}

#[test]
fn a_failed_sync_has_one_answer() {
    let twice = |a: &Actor| {
        commit(a, false, true);
        commit_as(a, false, false, 1 << (8 + a.id));
    };
    let once = |a: &Actor| commit(a, false, false);
    check(&["failed-sync-tried-again", "failure-forgotten"], || {
        Scenario::new().seat(1, twice).seat(2, once).preemptions(2)
    });
}
