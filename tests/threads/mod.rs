//! Seats in threads of their own, asleep on real futexes, and a broker in another: [`World`], [`Player`].

pub mod broker;
pub mod record;

use broker::ToBroker;
use record::Record;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use turnstile::lock::park::Parking;
use turnstile::lock::rules::Attempt;
use turnstile::lock::seat::{LEAST_STREAK_MICROS, Own, Seat};
use turnstile::lock::table::Table;
use turnstile::lock::{Ask, Release, SeatId, Verdict};
use turnstile::segment::futex;
use turnstile::segment::layout::{ARRIVED, NAPPING, NOTIFIED, PARKED, RUNNING, SeatWords};
use turnstile::segment::mapping::ControlMap;

/// A wait that lasts this long and could have ended has not been woken.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// The database and what the test knows of it.
pub struct World {
    control: ControlMap,
    pub record: Record,
    pub over: AtomicBool,
    /// Waits that ended because somebody looked, not because somebody woke.
    pub lost_wakes: AtomicU64,
}

impl World {
    pub fn new() -> World {
        World {
            control: ControlMap::private().unwrap(),
            record: Record::default(),
            over: AtomicBool::new(false),
            lost_wakes: AtomicU64::new(0),
        }
    }

    pub fn table(&self) -> Table<'_> {
        Table::of(self.control.control().unwrap())
    }
}

/// A member's way to sleep and to wake others.
struct Futexes {
    broker: Sender<ToBroker>,
    /// What the clock said last; 0: it was not asked.
    said: Cell<u64>,
}

impl Parking for Futexes {
    fn park(&self, seat: &SeatWords, state: u32, limit: Duration) {
        futex::wait(&seat.park, state, limit);
    }

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        let words = table.seat(seat).unwrap();
        match words.brokered.load(SeqCst) {
            0 => futex::wake(&words.park),
            _ => drop(self.broker.send(ToBroker::Kick)),
        }
    }

    fn micros(&self) -> u64 {
        self.said.set(futex::micros());
        self.said.get()
    }

    fn coarse_millis(&self) -> u64 {
        futex::coarse_millis()
    }

    fn streaks(&self) -> bool {
        true
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub verdict: Verdict,
    /// It stood in the line with this ticket; 0: it did not.
    pub ticket: u64,
    /// The length of the record when it entered the line.
    pub came: usize,
    /// What the clock said when it was decided whether it might take the turn; 0: nobody asked.
    pub decided: u64,
}

/// A seat and its thread.
pub struct Player<'w> {
    pub world: &'w World,
    pub id: SeatId,
    brokered: bool,
    parking: Futexes,
    own: Own,
    answers: (Sender<Answer>, Receiver<Answer>),
}

impl<'w> Player<'w> {
    pub fn new(world: &'w World, id: SeatId, broker: &Sender<ToBroker>, brokered: bool) -> Player<'w> {
        world.table().hand_out(id);
        let parking = Futexes { broker: broker.clone(), said: Cell::new(0) };
        Player { world, id, brokered, parking, own: Own::default(), answers: channel() }
    }

    /// Runs `body` as the seat, on the fast lane.
    fn with<T>(&self, body: impl FnOnce(&Seat) -> T) -> T {
        let (table, id) = (self.world.table(), self.id);
        body(&Seat { table, id, own: &self.own, parking: &self.parking, thread: id, connection: id.into() })
    }

    fn send(&self, message: ToBroker) {
        self.parking.broker.send(message).unwrap();
    }

    /// A request, waiting for its end; or, if it has a `limit`, for that.
    pub fn ask(&self, ask: Ask, limit: Option<Duration>) -> Answer {
        if self.brokered {
            self.send(ToBroker::Submit { id: self.id, ask, answer: self.answers.0.clone() });
            if let Some(limit) = limit {
                if let Ok(answer) = self.answers.1.recv_timeout(limit) {
                    return answer;
                }
                self.send(ToBroker::GiveUp { id: self.id });
            }
            return self.answers.1.recv().unwrap();
        }
        self.with(|seat| self.wait(seat, ask, limit))
    }

    /// As a member waits.
    fn wait(&self, seat: &Seat, ask: Ask, limit: Option<Duration>) -> Answer {
        let look = || {
            self.parking.said.set(0);
            seat.attempt(ask)
        };
        let mut answer = Answer { verdict: Verdict::Busy, ticket: 0, came: 0, decided: 0 };
        let mut for_turn = match look() {
            Attempt::Done(verdict) => return Answer { verdict, decided: self.parking.said.get(), ..answer },
            Attempt::Wait { for_turn } => for_turn,
        };
        let words = seat.table.seat(seat.id).unwrap();
        let begun = Instant::now();
        let (mut overslept, mut woken) = (false, false);
        loop {
            if seat.begin_wait(ask.request, for_turn) && for_turn {
                answer.ticket = words.ticket.load(SeqCst);
                answer.came = self.world.record.len();
            }
            if std::mem::take(&mut woken) && for_turn {
                come(seat, words);
            }
            seat.mark(PARKED);
            match look() {
                Attempt::Done(verdict) => {
                    if overslept {
                        // Or is somebody about to do it?
                        std::thread::sleep(PATIENCE / 10);
                        let asleep = words.park.load(SeqCst) == PARKED;
                        self.world.lost_wakes.fetch_add(asleep.into(), SeqCst);
                    }
                    seat.end_wait();
                    return Answer { verdict, decided: self.parking.said.get(), ..answer };
                }
                Attempt::Wait { for_turn: now } if now != for_turn => {
                    for_turn = now;
                    seat.mark(RUNNING);
                    continue;
                }
                Attempt::Wait { .. } => {}
            }
            seat.parking.park(words, PARKED, limit.unwrap_or(PATIENCE));
            let state = words.park.swap(RUNNING, SeqCst);
            overslept = state == PARKED && limit.is_none();
            woken = state == NOTIFIED;
            if limit.is_some_and(|limit| begun.elapsed() >= limit) {
                self.parking.said.set(0);
                let verdict = seat.give_up(ask);
                return Answer { verdict, ticket: 0, came: 0, decided: self.parking.said.get() };
            }
        }
    }

    /// Says what the clock said when the turn's end was decided, if it was.
    pub fn release(&self, release: Release) -> u64 {
        if self.brokered {
            self.send(ToBroker::Release { id: self.id, release });
            return 0;
        }
        self.parking.said.set(0);
        self.with(|seat| seat.release(release));
        self.parking.said.get()
    }

    pub fn journal_is_clear(&self) {
        match self.brokered {
            true => self.send(ToBroker::JournalIsClear { id: self.id }),
            false => self.with(|seat| seat.journal_is_clear()),
        }
    }

    /// Killed in the middle of what it is doing; another connection is given its number.
    pub fn die(&mut self) {
        self.gone();
        self.own = Own::default();
        self.world.table().hand_out(self.id);
    }

    /// Killed in the middle of a wait.
    pub fn die_waiting(&mut self, ask: Ask) {
        if self.brokered {
            self.send(ToBroker::Submit { id: self.id, ask, answer: channel().0 });
        } else {
            self.with(|seat| {
                if let Attempt::Wait { for_turn } = seat.attempt(ask) {
                    seat.begin_wait(ask.request, for_turn);
                    seat.mark(PARKED);
                }
            });
        }
        self.die();
    }

    /// Closes its connection.
    pub fn leave(&self) {
        if !self.brokered {
            self.with(|seat| seat.leave());
        }
        self.gone();
    }

    fn gone(&self) {
        let (done, cleared) = channel();
        self.send(ToBroker::Gone { id: self.id, done });
        cleared.recv().unwrap();
    }
}

/// As a member comes for its turn that has been woken early.
fn come(seat: &Seat, words: &SeatWords) {
    let turn = seat.turn();
    seat.mark(NAPPING);
    if turn.load().offered_to() != Some(seat.id) {
        seat.parking.park(words, NAPPING, Duration::from_micros(LEAST_STREAK_MICROS));
    }
    seat.mark(ARRIVED);
    for _ in 0..1000 {
        if turn.load().holder().is_none() {
            return;
        }
        std::hint::spin_loop();
    }
}
