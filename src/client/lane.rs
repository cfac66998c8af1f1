//! The fast lane: this process's seats at work on the segment itself, without a message and, where nobody is in the
//! way, without a system call.

use super::fork;
use super::member::{Member, Outcome};
use super::session::Session;
use super::shared::Shared;
use crate::lock::park::Parking;
use crate::lock::rules::Attempt;
use crate::lock::seat::{LEAST_STREAK_MICROS, Own, Seat};
use crate::lock::table::Table;
use crate::lock::unused::take_back_own_guess;
use crate::lock::{Ask, SeatId, Verdict};
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::{ARRIVED, NAPPING, NOTIFIED, PARKED, RUNNING, SeatWords};
use crate::wire::message::{SeatKey, ToBroker};
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a waiter that has been woken looks for its turn before it sleeps again: the rest of a short transaction.
const SPIN_MICROS: u64 = 30;
/// How long a waiter whose commits share syncs looks for its turn before it stands in the line.
const HURRY_MICROS: u64 = 100;
/// A turn that is free for so long is not between two transactions of a streak.
const IDLE_MICROS: u64 = 5;
/// A wait is told to the broker, which looks for cycles and for turns that nobody uses, after this long.
const TELL_AFTER: Duration = Duration::from_millis(4);
/// How often a waiter looks at its limit and its interrupt flag.
const SLICE: Duration = Duration::from_millis(10);
/// What a waiter waits for may change so often before it sleeps nevertheless: words that somebody scribbles on may do so
/// for ever.
const CHANGES: u32 = 64;

/// One connection's seat on the fast lane.
#[derive(Debug)]
pub struct FastLane {
    shared: Arc<Shared>,
    key: SeatKey,
    own: Own,
}

/// What is done around each sleep of a wait: it is given the sleep, and calls it.
pub type Around<'a> = &'a dyn Fn(&dyn Fn());

/// Futexes, and for a seat that the broker waits for, a message.
struct Futexes<'a> {
    session: &'a Session,
    database: u32,
    around: Option<Around<'a>>,
}

impl Parking for Futexes<'_> {
    fn park(&self, seat: &SeatWords, state: u32, limit: Duration) {
        let sleep = || futex::wait(&seat.park, state, limit);
        match self.around {
            Some(around) => around(&sleep),
            None => sleep(),
        }
    }

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        let Some(words) = table.seat(seat) else { return };
        match words.brokered.load(SeqCst) {
            0 => futex::wake(&words.park),
            // If the broker is gone, the one that it waits for asks the next one again.
            _ => self.session.send_if_up(&ToBroker::Kick { database: self.database }),
        }
    }

    fn micros(&self) -> u64 {
        futex::micros()
    }

    fn coarse_millis(&self) -> u64 {
        futex::coarse_millis()
    }

    fn streaks(&self) -> bool {
        true
    }
}

impl FastLane {
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    pub fn hurries(&self, hurries: bool) {
        self.own.hurries.set(hurries);
    }

    pub fn longer(&self, micros: u64) {
        self.own.longer.set(micros);
    }

    /// `None`: the segment's layout is another version's, or read-only.
    pub fn new(shared: &Arc<Shared>, key: SeatKey) -> Option<FastLane> {
        shared.table()?.seat(key.seat)?;
        Some(FastLane { shared: Arc::clone(shared), key, own: Own::default() })
    }

    /// Runs `body` as this seat. `None` cannot be: the table was there at the beginning.
    pub fn with<T>(&self, session: &Session, connection: u64, body: impl FnOnce(&Seat) -> T) -> Option<T> {
        self.with_around(session, connection, None, body)
    }

    /// The same; somebody else may use the seat while it sleeps, and `around` sees to it that it is one at a time.
    pub fn with_around<T>(
        &self,
        session: &Session,
        connection: u64,
        around: Option<Around>,
        body: impl FnOnce(&Seat) -> T,
    ) -> Option<T> {
        let parking = Futexes { session, database: self.key.database, around };
        let table = self.shared.table()?;
        let thread = thread_id() as u32;
        Some(body(&Seat { table, id: self.key.seat, own: &self.own, parking: &parking, thread, connection }))
    }

    /// The request, waiting until it is granted, refused, or `give_up` says so, which is asked every few
    /// milliseconds. `tell`: the wait is a long one.
    pub fn wait(&self, seat: &Seat, ask: Ask, give_up: impl FnMut() -> bool, tell: impl Fn()) -> Outcome {
        wait(seat, ask, give_up, tell)
    }
}

impl Member {
    /// See [`take_back_own_guess`].
    pub fn takes_back_own_guess(&self) -> bool {
        self.with_seat(|_, seat| take_back_own_guess(seat.turn(), seat.thread)).unwrap_or(false)
    }

    /// Its streaks may be so many microseconds longer than others'.
    pub fn streaks_longer(&self, micros: u64) {
        if let Some(fast) = &self.fast {
            fast.longer(micros);
        }
    }

    /// As [`Member::lock`] on the fast lane. Meanwhile other threads may use this seat; `around` sees to it that they do
    /// so one at a time.
    pub fn lock_around(&self, ask: Ask, around: Around, mut give_up: impl FnMut() -> bool) -> Verdict {
        let give_up = || self.waits_in_vain() || give_up();
        let Some(fast) = &self.fast else { return Verdict::Busy };
        let tell = || {
            let _ = self.say(&ToBroker::Waiting { seat: self.joined.seat }, &[]);
        };
        let wait = |seat: &Seat| fast.wait(seat, ask, give_up, tell);
        let outcome = fast.with_around(self.session(), self.connection.get(), Some(around), wait);
        self.in_time_or_busy(outcome)
    }
}

/// See [`FastLane::wait`].
pub fn wait(seat: &Seat, ask: Ask, mut give_up: impl FnMut() -> bool, tell: impl Fn()) -> Outcome {
    let begun = Instant::now();
    let mut for_turn = match seat.attempt(ask) {
        Attempt::Done(verdict) => return Outcome::at_once(verdict),
        Attempt::Wait { for_turn } => for_turn,
    };
    if for_turn
        && seat.own.hurries.get()
        && let Some(verdict) = hurry(seat, ask)
    {
        return Outcome::at_once(verdict);
    }
    let (mut told, mut awake) = (false, false);
    let ended = |verdict, deadlock, gave_up| Outcome { verdict, deadlock, gave_up, blocker: None };
    let mut next_look = begun + SLICE;
    let mut changes = 0;
    loop {
        seat.begin_wait(ask.request, for_turn);
        if std::mem::take(&mut awake) && for_turn {
            come(seat);
        }
        seat.mark(PARKED);
        match seat.attempt(ask) {
            Attempt::Done(verdict) => {
                seat.end_wait();
                return ended(verdict, false, false);
            }
            Attempt::Wait { for_turn: now } if now != for_turn && changes < CHANGES => {
                (for_turn, changes) = (now, changes + 1);
                seat.mark(RUNNING);
                continue;
            }
            Attempt::Wait { .. } => {}
        }
        let Some(words) = seat.table.seat(seat.id) else { return ended(Verdict::Busy, false, false) };
        let now = Instant::now();
        let next = if told { next_look } else { next_look.min(begun + TELL_AFTER) };
        seat.parking.park(words, PARKED, next.saturating_duration_since(now));
        awake = words.park.swap(RUNNING, SeqCst) == NOTIFIED;
        changes = 0;
        let now = Instant::now();
        if !told && now >= begun + TELL_AFTER {
            told = true;
            tell();
        }
        if words.ended.swap(0, SeqCst) != 0 {
            return ended(seat.give_up(ask), true, true);
        }
        if now >= next_look {
            next_look = now + SLICE;
            if give_up() {
                return ended(seat.give_up(ask), false, true);
            }
        }
    }
}

/// The holder's transactions are single ones, each followed by a sync outside the turn: its turn will soon be free, and
/// to be awake for it is worth more than a place in a line that is empty. `None`: it is not soon enough, or somebody
/// stands in the line.
fn hurry(seat: &Seat, ask: Ask) -> Option<Verdict> {
    let turn = seat.turn();
    let until = seat.parking.micros() + HURRY_MICROS;
    loop {
        for _ in 0..16 {
            if turn.load().is_free()
                && let Attempt::Done(verdict) = seat.attempt(ask)
            {
                return Some(verdict);
            }
            std::hint::spin_loop();
        }
        if seat.parking.micros() >= until {
            return None;
        }
        std::thread::yield_now();
    }
}

/// The seat has been woken for its turn, early: the holder goes on with its streak meanwhile. It is left the least
/// part of that, asleep, and then looked for.
fn come(seat: &Seat) {
    let turn = seat.turn();
    if seat.own.hurries.get() {
        seat.mark(ARRIVED);
        return look_for(seat, HURRY_MICROS);
    }
    let Some(words) = seat.table.seat(seat.id) else { return };
    // Free and still free: nobody goes on with a streak.
    let word = turn.load();
    let since = seat.parking.micros();
    while turn.load() == word {
        if word.is_free() && seat.parking.micros() > since + IDLE_MICROS {
            return;
        }
        if word.offered_to().is_some() {
            return;
        }
        if seat.parking.micros() > since + SPIN_MICROS {
            break;
        }
        std::hint::spin_loop();
    }
    seat.mark(NAPPING);
    if turn.load().offered_to() != Some(seat.id) {
        seat.parking.park(words, NAPPING, Duration::from_micros(LEAST_STREAK_MICROS));
    }
    seat.mark(ARRIVED);
    look_for(seat, SPIN_MICROS);
}

/// Looks for a turn that is nobody's, for so many microseconds.
fn look_for(seat: &Seat, micros: u64) {
    let turn = seat.turn();
    let until = seat.parking.micros() + micros;
    loop {
        for _ in 0..32 {
            if turn.load().holder().is_none() {
                return;
            }
            std::hint::spin_loop();
        }
        if seat.parking.micros() >= until {
            return;
        }
        std::thread::yield_now();
    }
}

thread_local! {
    static THREAD: Cell<(u64, i32)> = const { Cell::new((0, 0)) };
}

/// The kernel's id of the calling thread, asked once a thread.
pub fn thread_id() -> i32 {
    let epoch = fork::epoch();
    THREAD
        .try_with(|cached| match cached.get() {
            (known, id) if known == epoch => id,
            _ => {
                let id = nix::unistd::gettid().as_raw();
                cached.set((epoch, id));
                id
            }
        })
        .unwrap_or_else(|_| nix::unistd::gettid().as_raw())
}
