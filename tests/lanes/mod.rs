//! Seats of both lanes at one table, behind one interface: [`Bench`]. A *fast* seat runs the algorithms itself, as a
//! member does on the segment; a *brokered* one has the broker run them. Nothing here sleeps: a fast seat that waits
//! runs again only when somebody has woken it, the broker only when somebody has sent it something, and once all
//! are quiet nobody may be left asleep whose wait could end. So a wake-up that is lost fails the test that lost it.

#![allow(dead_code, unused_imports, reason = "a test crate uses its part")]

mod requests;
pub mod words;

pub use requests::{granted, seats, slots};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use turnstile::lock::park::Parking;
use turnstile::lock::queue::{Lane, Queue};
use turnstile::lock::rules::Attempt;
use turnstile::lock::seat::{Own, Seat};
use turnstile::lock::table::Table;
use turnstile::lock::turn::Turn;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Verdict};
use turnstile::planted::fails_without;
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::layout::{ARRIVED, CHECKPOINTER, NAPPING, PARKED, RUNNING, SeatWords};
use turnstile::segment::mapping::ControlMap;

/// Which seats of a table are brokered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    Fast,
    Brokered,
    EvenBrokered,
    OddBrokered,
}

pub const ALL_LANES: [Lanes; 4] = [Lanes::Fast, Lanes::Brokered, Lanes::EvenBrokered, Lanes::OddBrokered];

/// Wake-ups that were sent and not yet acted upon; the clock.
#[derive(Debug, Default)]
struct Wakes {
    fast: RefCell<Vec<SeatId>>,
    broker: Cell<bool>,
    micros: Cell<u64>,
}

/// What one side, a member or the broker, knows of sleeping and waking.
#[derive(Clone, Debug)]
struct Side {
    wakes: Rc<Wakes>,
    streaks: Cell<bool>,
    is_broker: bool,
}

impl Parking for Side {
    fn park(&self, _: &SeatWords, _: u32, _: Duration) {
        unreachable!("the bench does not sleep");
    }

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        match table.seat(seat).is_some_and(|w| w.brokered.load(SeqCst) != 0) {
            true if self.is_broker => {} // it tries all its requests again before it sleeps
            true => self.wakes.broker.set(true),
            false => self.wakes.fast.borrow_mut().push(seat),
        }
    }

    fn micros(&self) -> u64 {
        self.wakes.micros.get()
    }

    fn coarse_millis(&self) -> u64 {
        self.wakes.micros.get() / 1000
    }

    fn streaks(&self) -> bool {
        self.streaks.get()
    }
}

/// What a fast seat's process keeps of it.
#[derive(Default)]
struct Fast {
    own: RefCell<Rc<Own>>,
    asks: Cell<Option<Ask>>,
    for_turn: Cell<bool>,
}

const SEATS: usize = 100;

/// Where a seat's is: that of the checkpointer, the last of all numbers, is at 0, which is nobody's.
fn at(id: SeatId) -> usize {
    if id == CHECKPOINTER { 0 } else { id as usize }
}

/// What a seat holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    turn: bool,
    /// It stands in the line, or among the sleepers.
    waits: bool,
    shared: u8,
    owned: u8,
    file_shared: bool,
    reserved: bool,
    pending: bool,
    exclusive: bool,
}

/// A database that has been looked at (no probation), its seats, and a clock that the test moves.
pub struct Bench {
    control: ControlMap,
    lanes: Lanes,
    member: Side,
    broker: Side,
    queue: RefCell<Queue>,
    fast: Vec<Fast>,
    /// What seats held before the requests that have not ended.
    before: RefCell<BTreeMap<SeatId, (Request, Held)>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("with these lanes: {:?}", self.lanes);
        }
    }
}

impl Bench {
    /// As the broker makes it: nobody has looked for a hot journal yet.
    pub fn fresh(lanes: Lanes) -> Bench {
        let wakes = Rc::<Wakes>::default();
        wakes.micros.set(1_000_000);
        let side = |is_broker| Side { wakes: Rc::clone(&wakes), streaks: Cell::new(false), is_broker };
        let mut fast = Vec::new();
        fast.resize_with(SEATS, Fast::default);
        let (member, broker) = (side(false), side(true));
        Bench {
            control: ControlMap::private().unwrap(),
            lanes,
            member,
            broker,
            queue: RefCell::default(),
            fast,
            before: RefCell::default(),
        }
    }

    pub fn new(lanes: Lanes) -> Bench {
        let b = Bench::fresh(lanes);
        b.shared(99);
        b.with(99, |seat| seat.journal_is_clear());
        b.remove(99);
        b
    }

    /// A fast seat that gives its turn back may go on taking it for a while.
    pub fn with_streaks(self) -> Bench {
        self.member.streaks.set(true);
        self
    }

    pub fn is_brokered(&self, seat: SeatId) -> bool {
        match self.lanes {
            Lanes::Fast => false,
            Lanes::Brokered => true,
            Lanes::EvenBrokered => seat.is_multiple_of(2),
            Lanes::OddBrokered => !seat.is_multiple_of(2),
        }
    }

    pub fn table(&self) -> Table<'_> {
        Table::of(self.control.control().unwrap())
    }

    pub fn words(&self, seat: SeatId) -> &SeatWords {
        self.table().seat(seat).unwrap()
    }

    /// The turn, as the broker sees it.
    pub fn turn(&self) -> Turn<'_> {
        Turn { table: self.table(), parking: &self.broker }
    }

    pub fn holder(&self) -> Option<SeatId> {
        self.turn().load().holder()
    }

    pub fn pass_micros(&self, micros: u64) {
        self.member.wakes.micros.update(|now| now + micros);
    }

    /// Runs `body` with the socket lane, as the broker does when a message has come. It will try its requests again.
    pub fn lane<T>(&self, body: impl FnOnce(&mut Lane) -> T) -> T {
        self.member.wakes.broker.set(true);
        self.lane_at_once(body)
    }

    fn lane_at_once<T>(&self, body: impl FnOnce(&mut Lane) -> T) -> T {
        let queue = &mut *self.queue.borrow_mut();
        body(&mut Lane { queue, table: self.table(), parking: &self.broker })
    }

    /// Another broker takes over the words: all that the last one knew is gone with it.
    pub fn broker_dies(&self) {
        *self.queue.borrow_mut() = Queue::default();
        self.lane(|lane| lane.take_over());
    }

    /// Runs `body` as the seat.
    pub fn with<T>(&self, id: SeatId, body: impl FnOnce(&Seat) -> T) -> T {
        self.table().hand_out(id);
        if self.is_brokered(id) {
            return self.lane(|lane| lane.with(id, body));
        }
        let own = Rc::clone(&self.fast[at(id)].own.borrow());
        let (thread, connection) = asker(id);
        body(&Seat { table: self.table(), id, own: &own, parking: &self.member, thread, connection })
    }

    /// A request. `None`: it waits.
    pub fn submit(&self, id: SeatId, ask: Ask) -> Option<Verdict> {
        assert!(!self.is_waiting(id), "seat {id} asks while it waits");
        self.before.borrow_mut().insert(id, (ask.request, self.held(id)));
        if self.is_brokered(id) {
            self.table().hand_out(id);
            let (thread, connection) = asker(id);
            let verdict = self.lane(|lane| lane.submit(id, ask, (connection, thread)));
            return verdict.inspect(|v| self.has_ended(id, *v));
        }
        match self.with(id, |seat| seat.attempt(ask)) {
            Attempt::Done(verdict) => {
                self.has_ended(id, verdict);
                Some(verdict)
            }
            Attempt::Wait { for_turn } => {
                self.fast[at(id)].asks.set(Some(ask));
                self.fast[at(id)].for_turn.set(for_turn);
                self.look_again(id, ask)
            }
        }
    }

    fn held(&self, id: SeatId) -> Held {
        let t = self.table();
        Held {
            turn: self.holder() == Some(id),
            waits: self.turn().line().contains(&id) || t.sleepers.has(id),
            shared: t.slots_shared(id),
            owned: t.owned_slots(id),
            file_shared: t.file_shared(id),
            reserved: t.reserved() == Some(id),
            pending: t.pending() == Some(id),
            exclusive: t.exclusive() == Some(id),
        }
    }

    /// A request has ended. After BUSY the seat holds what it held before: SQLite knows of nothing else, so nobody would
    /// give it back.
    fn has_ended(&self, id: SeatId, verdict: Verdict) {
        let Some((request, mut before)) = self.before.borrow_mut().remove(&id) else { return };
        if verdict != Verdict::Busy {
            return;
        }
        let after = self.held(id);
        if before.reserved && matches!(request, Request::File { level: FileLevel::Exclusive, .. }) {
            // Two that SQLite knows of: PENDING stays with RESERVED (unixLock), and who waits to leave WAL mode lets
            // others have its turn.
            before.pending |= after.pending;
            before.turn &= after.turn;
        }
        assert_eq!(after, before, "what seat {id} holds after BUSY to {request:?}, and before");
    }

    /// A waiting fast seat: one round of the loop in which it waits. `None`: it is about to sleep.
    fn look_again(&self, id: SeatId, ask: Ask) -> Option<Verdict> {
        let fast = &self.fast[at(id)];
        self.with(id, |seat| {
            loop {
                seat.begin_wait(ask.request, fast.for_turn.get());
                seat.mark(PARKED);
                match seat.attempt(ask) {
                    Attempt::Done(verdict) => {
                        seat.end_wait();
                        fast.asks.set(None);
                        self.has_ended(id, verdict);
                        return Some(verdict);
                    }
                    Attempt::Wait { for_turn } if for_turn == fast.for_turn.get() => return None,
                    Attempt::Wait { for_turn } => fast.for_turn.set(for_turn),
                }
                seat.mark(RUNNING);
            }
        })
    }

    /// The seat, woken, is awake and looking; it has not tried yet. False: nobody has woken it.
    pub fn arrive(&self, id: SeatId) -> bool {
        self.comes(id, ARRIVED)
    }

    /// The seat, woken early, leaves the holder the least part of its streak, asleep.
    pub fn nap(&self, id: SeatId) -> bool {
        self.comes(id, NAPPING)
    }

    fn comes(&self, id: SeatId, state: u32) -> bool {
        assert!(!self.is_brokered(id));
        let woken = self.is_waiting(id) && self.words(id).park.load(SeqCst) != PARKED;
        if woken {
            self.with(id, |seat| seat.mark(state));
        }
        woken
    }

    /// What the seat comes to that has been woken and looks again.
    pub fn run(&self, id: SeatId) -> Option<Verdict> {
        let ask = self.fast[at(id)].asks.get().filter(|_| self.arrive(id))?;
        self.look_again(id, ask)
    }

    /// Somebody has sent the broker something that it has not looked at.
    pub fn broker_is_due(&self) -> bool {
        self.member.wakes.broker.get()
    }

    /// The broker, if somebody has sent it something: its requests that ended.
    pub fn run_broker(&self) -> Vec<(SeatId, Verdict)> {
        let ended = match self.member.wakes.broker.replace(false) {
            true => self.lane_at_once(|lane| lane.settle()),
            false => Vec::new(),
        };
        ended.iter().for_each(|(id, verdict)| self.has_ended(*id, *verdict));
        ended
    }

    /// Everybody who has been woken runs, in the order of the wake-ups, until all sleep: waits that ended, in the
    /// order in which they did.
    pub fn settle(&self) -> Vec<(SeatId, Verdict)> {
        let mut ended = Vec::new();
        for _ in 0..1000 {
            let woken = std::mem::take(&mut *self.member.wakes.fast.borrow_mut());
            if woken.is_empty() && !self.member.wakes.broker.get() {
                self.assert_all_asleep();
                return ended;
            }
            for id in woken {
                ended.extend(self.run(id).map(|verdict| (id, verdict)));
            }
            ended.extend(self.run_broker());
        }
        panic!("waiting seats wake each other, or themselves, without end");
    }

    /// Whoever waits is asleep, as its word says: or nobody would wake it. And for good reason.
    fn assert_all_asleep(&self) {
        for id in 1..SEATS as SeatId {
            if !self.is_waiting(id) {
                continue;
            }
            assert_eq!(self.words(id).park.load(SeqCst), PARKED, "nobody will wake seat {id}");
            if let Some(ask) = self.fast[at(id)].asks.get() {
                let attempt = self.with(id, |seat| seat.attempt(ask));
                assert!(matches!(attempt, Attempt::Wait { .. }), "seat {id} sleeps beside what it waits for");
            }
        }
        assert_eq!(self.lane_at_once(|lane| lane.settle()), [], "sleeps beside what it waits for");
        assert!(self.member.wakes.fast.borrow().is_empty(), "who looks in vain wakes others");
    }

    pub fn is_waiting(&self, id: SeatId) -> bool {
        self.lane_at_once(|lane| lane.is_waiting(id)) || self.fast[at(id)].asks.get().is_some()
    }

    /// The seat's limit is reached.
    pub fn give_up(&self, id: SeatId) -> Option<Verdict> {
        let verdict = match self.is_brokered(id) {
            true => self.lane(|lane| lane.give_up(id)),
            false => self.fast[at(id)].asks.take().map(|ask| self.with(id, |seat| seat.give_up(ask))),
        };
        verdict.inspect(|v| self.has_ended(id, *v))
    }

    pub fn release(&self, id: SeatId, release: Release) {
        match self.is_brokered(id) {
            true => self.lane(|lane| lane.release(id, release)),
            false => self.with(id, |seat| seat.release(release)),
        }
    }

    /// Nothing of the seat is left.
    pub fn assert_gone(&self, id: SeatId) {
        words::assert_gone(self.turn(), id);
    }

    /// Everybody has gone.
    pub fn assert_nothing_left(&self) {
        words::assert_nothing_left(self.turn(), SEATS as SeatId);
        assert!(!self.lane(|lane| lane.somebody_waits()));
    }

    /// The broker has learned that the seat is dead.
    pub fn remove(&self, id: SeatId) {
        self.fast[at(id)].asks.take();
        self.fast[at(id)].own.take();
        self.before.borrow_mut().remove(&id);
        self.lane(|lane| lane.remove(id));
    }
}

/// Thread and connection.
fn asker(id: SeatId) -> (u32, u64) {
    (id, u64::from(id) + 1000)
}

/// Runs `test` with all lanes.
pub fn always(test: impl Fn(Bench)) {
    ALL_LANES.iter().for_each(|lanes| test(Bench::new(*lanes)));
}

/// Runs `test` with all lanes; in a `planted` build, with each of them, once more without the rule, where it must
/// fail.
pub fn rule(name: &str, test: impl Fn(Bench) + std::panic::RefUnwindSafe) {
    ALL_LANES.iter().for_each(|lanes| fails_without(name, || test(Bench::new(*lanes))));
}
