//! A seat at work in a thread of a model, and how it sleeps.

use super::engine::{choose, forget_all_but, mix, post, read_so_far, sleep, wake};
use super::world::World;
use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::Duration;
use turnstile::lock::park::Parking;
use turnstile::lock::rules::Attempt;
use turnstile::lock::seat::{Own, STREAK_MICROS, Seat};
use turnstile::lock::table::Table;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};
use turnstile::planted::planted;
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{ARRIVED, NAPPING, PARKED, RUNNING, SeatWords};

/// Whom the broker is woken as.
pub const BROKER: usize = 0;

/// One thread's way to sleep. Its clock stands still but for what a streak's end needs.
pub struct Futex {
    pub id: SeatId,
    world: Rc<World>,
    streaks: bool,
    now: Cell<u64>,
}

impl Futex {
    pub fn new(world: &Rc<World>, id: SeatId, streaks: bool) -> Futex {
        Futex { id, world: Rc::clone(world), streaks, now: Cell::new(1) }
    }
}

impl Parking for Futex {
    /// futex(2): looks and falls asleep in one step. It has no limit: a wake-up that is lost is never made up for.
    fn park(&self, seat: &SeatWords, state: u32, _: Duration) {
        let bed = self.world.beds.get(self.id as usize);
        let lock = bed.map(|(lock, _)| lock.lock().unwrap());
        if seat.park.load(SeqCst) == state {
            match (bed, lock) {
                (Some((_, bed)), Some(lock)) => drop(bed.wait(lock).unwrap()),
                _ => sleep(self.id as usize),
            }
        }
    }

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        match table.seat(seat).map_or(0, |s| s.brokered.load(SeqCst)) {
            0 => match self.world.beds.get(seat as usize) {
                Some((lock, bed)) => {
                    drop(lock.lock().unwrap());
                    bed.notify_one();
                }
                None => wake(seat as usize),
            },
            _ if self.id as usize == BROKER => {} // it tries again by itself
            _ => post(BROKER),
        }
    }

    fn micros(&self) -> u64 {
        let passes = u64::from(choose(2)) * (STREAK_MICROS + 1);
        self.now.set(self.now.get() + passes + 1);
        self.now.get()
    }

    fn coarse_millis(&self) -> u64 {
        0
    }

    fn streaks(&self) -> bool {
        self.streaks
    }
}

/// A seat at work in a thread of a model.
pub struct Actor {
    pub world: Rc<World>,
    pub id: SeatId,
    pub futex: Futex,
    own: Own,
    round: Cell<u64>,
}

impl Actor {
    pub fn new(world: &Rc<World>, id: SeatId) -> Actor {
        let futex = Futex::new(world, id, world.streaks.get());
        let own = Own::default();
        own.hurries.set(world.hurry.get());
        Actor { world: Rc::clone(world), id, futex, own, round: Cell::new(0) }
    }

    pub fn table(&self) -> Table<'_> {
        self.world.table()
    }

    pub fn seat(&self) -> Seat<'_> {
        let table = self.table();
        Seat {
            table,
            id: self.id,
            own: &self.own,
            parking: &self.futex,
            thread: 0,
            connection: self.id.into(),
        }
    }

    /// As `client::lane::FastLane::wait` does it, without its time limits. `patient`: it does not give up of
    /// itself; else it may after each sleep.
    pub fn wait(&self, ask: Ask, patient: bool) -> Verdict {
        let seat = self.seat();
        let mut for_turn = match seat.attempt(ask) {
            Attempt::Done(verdict) => return verdict,
            Attempt::Wait { for_turn } => for_turn,
        };
        let before = read_so_far();
        loop {
            self.forget(mix(before, for_turn.into()));
            seat.begin_wait(ask.request, for_turn);
            if for_turn {
                self.world.standing.set(self.world.standing.get() | 1 << self.id);
            }
            seat.mark(PARKED);
            if !planted("wait-without-second-look") {
                match seat.attempt(ask) {
                    Attempt::Done(verdict) => {
                        seat.end_wait();
                        return verdict;
                    }
                    Attempt::Wait { for_turn: now } if now != for_turn => {
                        for_turn = now;
                        seat.mark(RUNNING);
                        continue;
                    }
                    Attempt::Wait { .. } => {}
                }
            }
            if !patient && choose(2) == 1 {
                seat.mark(RUNNING);
                let verdict = seat.give_up(ask);
                self.world.standing.set(self.world.standing.get() & !(1 << self.id));
                return verdict;
            }
            seat.parking.park(&self.world.seats[self.id as usize - 1], PARKED, Duration::MAX);
            seat.mark(RUNNING);
            if for_turn {
                // The nap of a member that has been woken early: it ends by itself, at any moment.
                seat.mark(NAPPING);
                seat.mark(ARRIVED);
            }
        }
    }

    /// What it does next depends on nothing that it has read but `known` and what its seat knows.
    pub fn forget(&self, known: u64) {
        let mut hasher = DefaultHasher::new();
        (known, format!("{:?}", self.own), self.futex.now.get()).hash(&mut hasher);
        forget_all_but(hasher.finish());
    }

    /// Waits for it and gets it.
    pub fn get(&self, request: Request, ahead: bool) {
        let verdict = self.wait(Ask { request, ahead }, true);
        assert!(is_granted(verdict), "seat {} was refused {request:?}", self.id);
    }

    /// One turn, as guest mode takes it.
    pub fn take_and_end(&self) {
        self.get(Request::Turn, false);
        self.use_turn();
    }

    pub fn use_turn(&self) {
        self.world.enter(self.id);
        self.world.leave(self.id);
        assert!(self.seat().end_turn());
        self.next_round();
    }

    /// What was read so far does not matter any more.
    pub fn next_round(&self) {
        self.round.set(self.round.get() + 1);
        self.forget(self.round.get());
    }

    /// One turn that may be taken back before it ends.
    pub fn take_or_lose(&self) {
        self.get(Request::Turn, false);
        self.seat().end_turn();
    }
}

pub fn is_granted(verdict: Verdict) -> bool {
    verdict != Verdict::Busy
}

pub const READ: u8 = slot::READ0 + 1;

pub fn one(slot: u8) -> Slots {
    Slots::new(slot, 1).unwrap()
}

pub fn file(level: FileLevel) -> Request {
    Request::File { level, hot_journal: false }
}

pub const WRITE: fn() -> Request = || Request::ShmExclusive { slots: one(slot::WRITE), blocking: false };

pub fn unlock(level: FileLevel) -> Release {
    Release::File { level, keep_turn: false }
}

pub fn unshare(slot: u8) -> Release {
    Release::ShmShared { slots: one(slot), keep_turn: false }
}

pub fn unwrite() -> Release {
    Release::ShmExclusive { slots: one(slot::WRITE), keep_turn: false }
}
