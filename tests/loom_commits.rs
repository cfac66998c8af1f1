//! Commits that share a sync, in every run of a few seats (tests/model): what is said to be durable is on the disk,
//! nobody sleeps for ever, also when a writer or a leader stops anywhere, and a failed sync gives all one answer.

#![cfg(feature = "loom")]

mod model;

use model::{Actor, SEATS, Scenario, World, check, choose, sleep, wake};
use std::cell::Cell;
use turnstile::lock::Request;
use turnstile::lock::commits::{Commits, Number, Place};
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
fn publish(a: &Actor, commits: Commits) -> Number {
    a.get(Request::Turn, false);
    let disk = &a.world.disk;
    let place = |length| Place { generation: 1, length };
    let number = if turnstile::planted::planted("number-before-frames") {
        let number = commits.issue(place(32), place(64));
        a.world.step();
        disk.written.set(disk.written.get() | 1 << a.id);
        number
    } else {
        disk.written.set(disk.written.get() | 1 << a.id);
        commits.issue(place(32), place(64))
    };
    disk.published.set(disk.published.get() | 1 << a.id);
    assert!(a.seat().end_turn());
    number.unwrap_or(0)
}

/// What is found of `number`, whose snapshot holds the commits `seen`.
fn found(world: &World, number: Number, durable: bool, seen: u32) {
    let disk = &world.disk;
    match durable {
        true => {
            assert_eq!(disk.synced.get() & seen, seen, "said to be durable, and not on the disk");
            disk.durable.set(disk.durable.get().max(number));
        }
        false => disk.failed.set(if disk.failed.get() == 0 { number } else { disk.failed.get().min(number) }),
    }
    let (durable, failed) = (disk.durable.get(), disk.failed.get());
    assert!(failed == 0 || durable < failed, "{failed} failed, and {durable} after it is durable");
}

fn commit(a: &Actor, impatient: bool, fails: bool) {
    let beds = Beds::new(a, impatient);
    let number = publish(a, beds.commits());
    if number == 0 {
        return; // a sync had failed before
    }
    let told = Cell::new(0);
    let durable = beds.commits().wait(number, || sync(&a.world, &told, fails));
    found(&a.world, number, durable, 1 << a.id);
}

fn read(a: &Actor, impatient: bool) {
    let beds = Beds::new(a, impatient);
    let seen = a.world.disk.published.get();
    let Some(number) = beds.commits().pending() else { return };
    let told = Cell::new(0);
    let durable = beds.commits().wait(number, || sync(&a.world, &told, false));
    found(&a.world, number, durable, seen);
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
    let commits = |a: &Actor| commit(a, false, true);
    check(&["failed-sync-tried-again"], || Scenario::new().seat(1, commits).seat(2, commits).preemptions(4));
}
