//! The locks and the turn with real threads and real futexes: eight seats on the fast lane, two brokered ones, and
//! seats that give up and die on the way. What a model cannot show: that two writers are never in at once, that a
//! wake-up is never lost, that the line is kept to, and that nothing is left in the words.

mod lanes;
mod threads;

use lanes::slots;
use lanes::words::assert_nothing_left;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread::{scope, sleep};
use std::time::Duration;
use threads::broker::{Own, serve};
use threads::{Answer, Player, World};
use turnstile::lock::turn::Turn;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};

const FAST: SeatId = 8;
const BROKERED: SeatId = 2;
const LAST: SeatId = FAST + BROKERED;
const TIME: Duration = Duration::from_millis(1000);

/// What only one seat at a time may touch.
#[derive(Default)]
struct Guarded {
    /// Incremented in two steps.
    counter: AtomicU64,
    /// The seat that is in.
    inside: AtomicU32,
    /// Rollback journal: readers, who are never in beside a writer.
    readers: AtomicU32,
    increments: AtomicU64,
}

impl Guarded {
    fn enter(&self, id: SeatId) {
        assert_eq!(self.inside.swap(id, SeqCst), 0, "seat {id} is not alone");
        // Relaxed: if the locks order nothing, an increment is lost.
        let before = self.counter.load(Relaxed);
        (0..20).for_each(|_| spin_loop());
        self.counter.store(before + 1, Relaxed);
        self.increments.fetch_add(1, Relaxed);
    }

    fn leave(&self, id: SeatId) {
        assert_eq!(self.inside.swap(0, SeqCst), id);
    }
}

/// A seat's own luck, the same in each run.
struct Dice(u64);

impl Dice {
    /// One time in `n`.
    fn one_in(&mut self, n: u64) -> bool {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33).is_multiple_of(n)
    }
}

fn ask(request: Request, ahead: bool) -> Ask {
    Ask { request, ahead }
}

fn file(level: FileLevel, ahead: bool) -> Ask {
    ask(Request::File { level, hot_journal: false }, ahead)
}

fn exclusive(slots: Slots) -> Ask {
    ask(Request::ShmExclusive { slots, blocking: false }, false)
}

fn has_turn(answer: Answer) -> bool {
    match answer.verdict {
        Verdict::Granted { turn, .. } => turn,
        Verdict::Busy => panic!("a read was refused"),
    }
}

fn limit(dice: &mut Dice) -> Option<Duration> {
    dice.one_in(50).then_some(Duration::from_micros(200))
}

/// A transaction in WAL mode: the turn, the read lock, WRITE. Sometimes its writer holds RECOVER for a while, and
/// others wait for the end of that.
fn wal_transaction(p: &mut Player, guarded: &Guarded, dice: &mut Dice) {
    let read = slots(slot::READ0 + 1);
    let (write, recover) = (slots(slot::WRITE), slots(slot::RECOVER));
    if dice.one_in(16) {
        let waited = p.ask(ask(Request::ShmShared(recover), false), None);
        assert!(matches!(waited.verdict, Verdict::Granted { .. }));
        p.release(Release::ShmShared { slots: recover, keep_turn: false });
    }
    let ahead = ask(Request::ShmShared(read), true);
    if dice.one_in(300) {
        return p.die_waiting(ahead);
    }
    let answer = p.ask(ahead, limit(dice));
    if !has_turn(answer) {
        p.release(Release::ShmShared { slots: read, keep_turn: false });
        return;
    }
    let entry = p.world.record.taken(p.id, answer);
    if dice.one_in(300) {
        return p.die();
    }
    let verdict = p.ask(exclusive(write), None).verdict;
    assert_eq!(verdict, Verdict::Granted { turn: true, probation: false }, "WRITE in its turn");
    guarded.enter(p.id);
    if dice.one_in(16) && p.ask(exclusive(recover), None).verdict != Verdict::Busy {
        (0..2000).for_each(|_| spin_loop());
        p.release(Release::ShmExclusive { slots: recover, keep_turn: false });
    }
    guarded.leave(p.id);
    if dice.one_in(300) {
        return p.die();
    }
    let ended = p.release(Release::ShmExclusive { slots: write, keep_turn: false });
    p.world.record.ended(entry, ended);
    p.release(Release::ShmShared { slots: read, keep_turn: false });
}

/// A transaction over a rollback journal: the turn, SHARED, RESERVED, EXCLUSIVE; or a reader's.
fn journal_transaction(p: &mut Player, guarded: &Guarded, dice: &mut Dice) {
    let writes = !dice.one_in(3);
    let down = Release::File { level: FileLevel::None, keep_turn: false };
    if dice.one_in(300) {
        return p.die_waiting(file(FileLevel::Shared, writes));
    }
    let answer = p.ask(file(FileLevel::Shared, writes), None);
    let Verdict::Granted { turn, probation } = answer.verdict else { panic!("SHARED was refused") };
    if !turn {
        guarded.readers.fetch_add(1, SeqCst);
        assert_eq!(guarded.inside.load(SeqCst), 0, "a reader beside a writer");
        if probation {
            p.journal_is_clear();
        }
        (0..100).for_each(|_| spin_loop());
        guarded.readers.fetch_sub(1, SeqCst);
        match dice.one_in(300) {
            true => p.die(),
            false => drop(p.release(down)),
        }
        return;
    }
    let entry = p.world.record.taken(p.id, answer);
    for level in [FileLevel::Reserved, FileLevel::Exclusive] {
        if dice.one_in(300) {
            return p.die();
        }
        let verdict = p.ask(file(level, false), None).verdict;
        assert_eq!(verdict, Verdict::Granted { turn: true, probation: false }, "{level:?} in its turn");
    }
    guarded.enter(p.id);
    assert_eq!(guarded.readers.load(SeqCst), 0, "a writer beside a reader");
    guarded.leave(p.id);
    if dice.one_in(300) {
        return p.die();
    }
    let ended = p.release(down);
    p.world.record.ended(entry, ended);
}

fn play(transaction: fn(&mut Player, &Guarded, &mut Dice)) {
    let world = World::new();
    let guarded = Guarded::default();
    let (to_broker, messages) = channel();
    let counts = scope(|s| {
        let world = &world;
        s.spawn(move || serve(world, &messages));
        let mut players = Vec::new();
        for id in 1..=LAST {
            let to_broker = to_broker.clone();
            let guarded = &guarded;
            players.push(s.spawn(move || {
                let mut player = Player::new(world, id, &to_broker, id > FAST);
                let mut dice = Dice(id.into());
                let mut transactions = 0u64;
                while !world.over.load(SeqCst) {
                    transaction(&mut player, guarded, &mut dice);
                    transactions += 1;
                }
                player.leave();
                transactions
            }));
        }
        drop(to_broker);
        sleep(TIME);
        world.over.store(true, SeqCst);
        players.into_iter().map(|p| p.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(world.lost_wakes.load(SeqCst), 0, "waits that nobody ended");
    assert_eq!(guarded.counter.load(SeqCst), guarded.increments.load(SeqCst), "two writers at once");
    assert!(counts.iter().all(|n| *n > 0), "{counts:?}");
    let (waits, streaks) = world.record.check();
    assert!(waits > 0);
    println!("{counts:?} transactions, {waits} waits for the turn, {streaks} turns in a streak");
    assert_nothing_left(Turn { table: world.table(), parking: &Own }, LAST);
}

#[test]
fn a_wal_under_many_threads() {
    play(wal_transaction);
}

#[test]
fn a_rollback_journal_under_many_threads() {
    play(journal_transaction);
}
