//! A database's words, and the checks that look at all of them.

use super::asleep::Asleep;
use super::engine::{mix, step};
use std::cell::Cell;
use turnstile::lock::SeatId;
use turnstile::lock::park::Parking;
use turnstile::lock::table::Table;
use turnstile::lock::turn::{Ticket, Turn, Word};
use turnstile::segment::atomic::{AtomicU32, Relaxed, SeqCst};
use turnstile::segment::layout::{Bitmaps, CommitWords, LockWords, SeatWords};

pub const SEATS: usize = 4;

/// What is written of commits, a bit each, and what of that would be there after power loss.
#[derive(Default)]
pub struct Disk {
    pub written: Cell<u32>,
    pub published: Cell<u32>,
    pub synced: Cell<u32>,
    /// What a failed sync has dropped: the kernel takes it for written from then on.
    pub dropped: Cell<u32>,
    pub errors: Cell<u32>,
    /// What was said to be durable.
    pub durable: Cell<u32>,
    /// The numbers of the commits.
    pub numbers: Cell<[u64; 16]>,
}

impl Disk {
    pub fn state(&self) -> u64 {
        let bits = [&self.written, &self.published, &self.synced, &self.dropped, &self.errors, &self.durable]
            .map(|c| u64::from(c.get()));
        bits.into_iter().chain(self.numbers.get()).fold(0, mix)
    }
}

/// A database's words, and what the checks know of it.
#[derive(Default)]
pub struct World {
    pub words: LockWords,
    pub maps: Bitmaps,
    pub seats: [SeatWords; SEATS],
    pub commits: CommitWords,
    pub disk: Disk,
    /// Who is where only one may be.
    pub inside: Cell<SeatId>,
    /// Who is where several may be (a bit each).
    pub readers: Cell<u32>,
    /// Messages between the broker and clients on the socket lane.
    pub mail: [AtomicU32; SEATS],
    /// Seats that have entered the line (a bit each).
    pub standing: Cell<u32>,
    /// The turn's word at the last look, and who had it last.
    pub last: Cell<Option<Word>>,
    pub had: Cell<SeatId>,
    /// A holder's streak is possible, and ends at any moment.
    pub streaks: Cell<bool>,
    /// Seats give the turn to whoever is awake, for a while.
    pub hurry: Cell<bool>,
    /// Where seats sleep in loom's runs.
    pub beds: Vec<(loom::sync::Mutex<()>, loom::sync::Condvar)>,
}

impl World {
    pub fn table(&self) -> Table<'_> {
        Table::new(&self.words, &self.maps, &self.seats)
    }

    pub fn turn<'a>(&'a self, parking: &'a dyn Parking) -> Turn<'a> {
        Turn { table: self.table(), parking }
    }

    pub fn holder(&self) -> Option<SeatId> {
        self.turn(&Asleep).load().holder()
    }

    /// `seat` is where nobody else may be.
    pub fn enter(&self, seat: SeatId) {
        let other = self.inside.replace(seat);
        assert_eq!(other, 0, "seats {seat} and {other} at once");
        assert_eq!(self.readers.get() & !(1 << seat), 0, "seat {seat} beside readers");
        self.step();
    }

    pub fn leave(&self, seat: SeatId) {
        assert_eq!(self.inside.replace(0), seat, "somebody else has come in");
    }

    /// `seat` is where only others of its kind may be.
    pub fn enter_reader(&self, seat: SeatId) {
        assert_eq!(self.inside.get(), 0, "reader {seat} beside a writer");
        self.readers.set(self.readers.get() | 1 << seat);
        self.step();
    }

    /// Here, too, another thread may go on.
    pub fn step(&self) {
        match self.beds.is_empty() {
            true => step(),
            false => drop(self.words.counters.0[0].fetch_add(1, SeqCst)),
        }
    }

    pub fn leave_reader(&self, seat: SeatId) {
        self.readers.set(self.readers.get() & !(1 << seat));
    }

    /// Who takes the turn, or is offered it, is the first of those that stand in the line; but for a streak.
    pub fn first_come_first_served(&self) {
        let word = self.turn(&Asleep).load();
        let before = self.last.replace(Some(word));
        let named = |w: Word| w.holder().or(w.offered_to());
        let Some(seat) = named(word) else { return };
        let streak = self.streaks.get() && before.is_some_and(Word::is_free) && self.had.get() == seat;
        if word.holder().is_some() {
            self.standing.set(self.standing.get() & !(1 << seat));
            self.had.set(seat);
        }
        if before.and_then(named) == Some(seat) || streak || self.hurry.get() {
            return;
        }
        if word.offered_to().is_some() && ticket(self, seat) == 0 {
            return; // it has just left; that offer will be withdrawn
        }
        // Who is not in the line came last.
        let came = |seat| Some(ticket(self, seat)).filter(|t| *t != 0).unwrap_or(Ticket::MAX);
        let stands = |seat: &SeatId| self.standing.get() >> seat & 1 != 0;
        let overtaken = (1..=SEATS as SeatId).filter(stands).find(|s| came(*s) < came(seat));
        assert!(overtaken.is_none(), "the turn is given to seat {seat} before {overtaken:?}");
    }

    /// Nothing is held, offered or waited for.
    pub fn is_quiet(&self) {
        let t = self.table();
        assert!(self.turn(&Asleep).load().is_free(), "the turn is lost: {:?}", self.turn(&Asleep).load());
        assert_eq!(t.line.iter().next(), None, "the line is not empty");
        let owned = (0..8).find_map(|s| t.slot_owner(s));
        assert_eq!(owned.or(t.reserved()).or(t.pending()).or(t.exclusive()), None, "an owner is left");
        for (i, s) in self.seats.iter().enumerate() {
            let held = [&s.slots, &s.file, &s.waiting].map(|w| w.load(Relaxed));
            assert_eq!((held, s.ticket.load(Relaxed)), ([0; 3], 0), "seat {} has left something", i + 1);
        }
        let file = &self.words.file.0;
        assert_eq!((file.opening.load(Relaxed), file.lowering.load(Relaxed)), (0, 0));
    }

    pub fn describe(&self, offset: usize) -> String {
        let address = std::ptr::from_ref(self) as usize + offset;
        let place = |name: &str, base: usize, size: usize| {
            (base..base + size).contains(&address).then(|| format!("{name}+{}", address - base))
        };
        fn at<T>(value: &T) -> (usize, usize) {
            (std::ptr::from_ref(value) as usize, size_of::<T>())
        }
        let w = &self.words;
        let mut known = vec![
            ("turn".into(), at(&w.turn.0)),
            ("tickets".into(), at(&w.tickets.0)),
            ("reserved".into(), at(&w.file.0.reserved)),
            ("pending".into(), at(&w.file.0.pending)),
            ("exclusive".into(), at(&w.file.0.exclusive)),
            ("probation".into(), at(&w.file.0.probation)),
            ("opening".into(), at(&w.file.0.opening)),
            ("lowering".into(), at(&w.file.0.lowering)),
            ("writers".into(), at(&w.writers.0)),
            ("readers".into(), at(&w.readers.0)),
            ("sleepy".into(), at(&w.sleepy.0)),
            ("mail".into(), at(&self.mail)),
            ("line".into(), at(&self.maps.line)),
            ("newest".into(), at(&self.commits.issued.0.newest)),
            ("durable".into(), at(&self.commits.synced.0.durable)),
            ("leading".into(), at(&self.commits.synced.0.leading)),
            ("synced".into(), at(&self.commits.synced.0)),
            ("round".into(), at(&self.commits.rounds.0.round)),
            ("round asleep".into(), at(&self.commits.rounds.0.asleep)),
            ("sleepers".into(), at(&self.maps.sleepers)),
            ("slot hints".into(), at(&self.maps.slot_hints)),
            ("file hints".into(), at(&self.maps.file_hints)),
        ];
        for (i, s) in self.seats.iter().enumerate() {
            known.push((format!("{}.slots", i + 1), at(&s.slots)));
            known.push((format!("{}.file", i + 1), at(&s.file)));
            known.push((format!("{}.ticket", i + 1), at(&s.ticket)));
            known.push((format!("{}.park", i + 1), at(&s.park)));
            known.push((format!("{}.waiting", i + 1), at(&s.waiting)));
            known.push((format!("{}.brokered", i + 1), at(&s.brokered)));
        }
        known.iter().find_map(|(n, (b, s))| place(n, *b, *s)).unwrap_or_else(|| format!("+{offset}"))
    }
}

pub fn ticket(world: &World, seat: SeatId) -> Ticket {
    world.seats[seat as usize - 1].ticket.load(Relaxed)
}
