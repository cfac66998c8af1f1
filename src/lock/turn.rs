//! The turn in the segment: the right to be the database's one writer, and the line for it.
//!
//! One word says who has it. With nobody waiting, taking it and giving it back are one compare-and-swap each. Who
//! must wait draws a ticket, sets its bit in the line and marks the word contended; "next" is whoever in the line
//! has the least ticket, so a dead waiter is nothing but a bit that the broker clears.
//!
//! A wake-up takes some 20 µs, several transactions' worth. So the holder that gives back wakes the next one *early*
//! and leaves the turn free: it may take it again itself (a *streak*) until the other has arrived or the streak has
//! lasted its time, and then it is *offered*: to one seat, which accepts it. An offer to a seat that has left the
//! line meanwhile is withdrawn, by whichever of the two sees the other's store (each stores, then looks).
//!
//! Every change is a compare-and-swap that raises the word's generation, so none is made on an old view.

use super::SeatId;
use super::park::Parking;
use super::table::Table;
use super::tries::tries;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{ARRIVED, NAPPING, NOTIFIED, PARKED, RUNNING};

/// A place in the line. Smaller came earlier.
pub type Ticket = u64;

const SEAT: u64 = 0xffff;
const HELD: u64 = 1 << 16;
const OFFERED: u64 = 1 << 17;
/// Somebody may be in the line.
const CONTENDED: u64 = 1 << 18;
/// The broker is about to take the turn back, unless its seat shows that it uses it.
const REVOKING: u64 = 1 << 19;
const GENERATION: u64 = 1 << 32;
/// No seat's number.
const NOBODY: SeatId = 0;

/// How long the holder has been taking its turn again and again although somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Streak {
    /// Long enough only if the next one is awake and looking for its turn.
    Young,
    /// Long enough if it is near.
    Old,
    Over,
    /// The holder does not come back at once. Whoever is awake may take the turn while the first in the line is woken,
    /// unless that has waited for [`HURRY_MILLIS`].
    Hurry,
}

/// How long others may go before one that stands in the line, while it is not awake.
pub const HURRY_MILLIS: u64 = 4;

/// The turn's word as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    pub fn holder(self) -> Option<SeatId> {
        (self.0 & HELD != 0).then_some(self.seat())
    }

    pub fn offered_to(self) -> Option<SeatId> {
        (self.0 & OFFERED != 0).then_some(self.seat())
    }

    /// Nobody's: free for the first in the line.
    pub fn is_free(self) -> bool {
        self.0 & (HELD | OFFERED) == 0
    }

    pub fn is_contended(self) -> bool {
        self.0 & CONTENDED != 0
    }

    /// Whose it is; if it is free, whose it was last and may be again in a streak, or [`NOBODY`].
    fn seat(self) -> SeatId {
        (self.0 & SEAT) as SeatId
    }

    /// The successor of this word.
    fn next(self, state: u64, seat: SeatId) -> Word {
        let generation = (self.0 & !(GENERATION - 1)).wrapping_add(GENERATION);
        Word(generation | state | (u64::from(seat) & SEAT))
    }

    /// An offer's successor when nobody takes it: free, and nobody's streak.
    fn withdrawn(self) -> Word {
        self.next(CONTENDED, NOBODY)
    }

    fn contended(self) -> u64 {
        self.0 & CONTENDED
    }
}

/// The turn of one database, and who must be woken how.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    pub table: Table<'a>,
    pub parking: &'a dyn Parking,
}

impl<'a> Turn<'a> {
    pub fn load(&self) -> Word {
        Word(self.table.words.turn.0.load(SeqCst))
    }

    fn swap(&self, old: Word, new: Word) -> bool {
        self.table.words.turn.0.compare_exchange(old.0, new.0, SeqCst, SeqCst).is_ok()
    }

    pub fn held_by(&self, seat: SeatId) -> bool {
        self.load().holder() == Some(seat)
    }

    /// Takes the turn if it is the seat's to take: nobody waits, or the seat is first in the line, or `passes` says that
    /// it may go before that one, which is not awake yet. `passes` is told whether the seat had the turn last.
    pub fn try_take(&self, seat: SeatId, in_line: bool, passes: impl Fn(bool, SeatId) -> bool) -> bool {
        for _ in tries() {
            let word = self.load();
            if word.holder() == Some(seat) {
                return true;
            }
            let mine = match word.offered_to() {
                Some(other) if other == seat => true,
                Some(other) if self.ticket(other) == 0 => {
                    // It left the line while the offer was made.
                    self.swap(word, word.withdrawn());
                    continue;
                }
                Some(_) => false,
                None if word.holder().is_some() => false,
                None if !word.is_contended() => true,
                None => match self.first() {
                    None => true,
                    Some((_, first)) if first == seat || planted("line-jumped") => true,
                    Some((_, first)) => {
                        !in_line && !self.has_arrived(first) && passes(word.seat() == seat, first)
                    }
                },
            };
            if !mine {
                return false;
            }
            if self.swap(word, word.next(HELD | word.contended(), seat)) {
                if in_line {
                    self.leave_line(seat);
                }
                return true;
            }
        }
        false
    }

    /// Draws a ticket and stands in the line.
    pub fn enter(&self, seat: SeatId) {
        let Some(own) = self.table.seat(seat) else { return };
        let ticket = self.table.words.tickets.0.fetch_add(1, SeqCst).wrapping_add(1);
        own.ticket.store(ticket, SeqCst);
        self.table.line.set(seat);
        for _ in tries() {
            // A new generation even if the mark is there: a holder that has just found the line empty is about to
            // take the mark away.
            let word = self.load();
            let new = Word((word.0 | CONTENDED).wrapping_add(GENERATION));
            if planted("line-without-generation") && word.is_contended() || self.swap(word, new) {
                return;
            }
        }
    }

    fn leave_line(&self, seat: SeatId) {
        if let Some(own) = self.table.seat(seat) {
            own.ticket.store(0, SeqCst);
        }
        self.table.line.clear(seat);
    }

    /// Leaves the line without the turn; what was meant for this seat goes to the next.
    pub fn give_up(&self, seat: SeatId) {
        self.leave_line(seat);
        if !planted("left-without-a-look") {
            self.kick();
        }
    }

    /// Ends the seat's turn; says whether it had it. `streak` is asked when somebody waits.
    pub fn end(&self, seat: SeatId, streak: impl Fn() -> Streak) -> bool {
        for _ in tries() {
            let word = self.load();
            if word.holder() != Some(seat) {
                return false;
            }
            let first = if word.is_contended() { self.first() } else { None };
            let Some((ticket, next)) = first else {
                if self.swap(word, word.next(0, seat)) {
                    return true;
                }
                continue;
            };
            let offered = match (self.state(next), streak()) {
                (_, Streak::Over) | (ARRIVED, _) => true,
                (_, Streak::Hurry) => !self.is_young(next),
                (NAPPING, streak) => streak == Streak::Old,
                _ => false,
            };
            if !offered {
                if self.swap(word, word.next(CONTENDED, seat)) {
                    if !planted("no-kick-after-release") {
                        self.kick();
                    }
                    return true;
                }
                continue;
            }
            let offer = word.next(OFFERED | CONTENDED, next);
            if self.swap(word, offer) {
                if self.ticket(next) != ticket && !planted("offer-not-withdrawn") {
                    self.kick(); // it has left, perhaps before it could see the offer
                } else {
                    self.wake(next);
                    self.wake_from(next, NAPPING);
                }
                return true;
            }
        }
        false
    }

    /// The seat has just taken a write lock in its turn: whether the turn is still its own. One that the broker
    /// has begun to take back is kept by this.
    pub fn confirm(&self, seat: SeatId) -> bool {
        for _ in tries() {
            let word = self.load();
            if word.holder() != Some(seat) {
                return planted("confirm-ignored");
            }
            if word.0 & REVOKING == 0 || self.swap(word, word.next(HELD | word.contended(), seat)) {
                return true;
            }
        }
        false
    }

    /// Takes the turn back from a seat that does not use it. `used` is asked once the seat, taking a write lock
    /// now, would see that this is going on.
    pub fn revoke(&self, seat: SeatId, used: impl Fn() -> bool) -> bool {
        let word = self.load();
        if word.holder() != Some(seat) {
            return false;
        }
        let revoking = word.next(HELD | REVOKING | word.contended(), seat);
        if !self.swap(word, revoking) {
            return false;
        }
        // Still in the line: it has taken the turn this very moment, and would not wake the next one.
        if used() && !planted("taken-back-in-use") || self.ticket(seat) != 0 && !planted("taken-back-in-line")
        {
            self.swap(revoking, revoking.next(HELD | revoking.contended(), seat));
            return false;
        }
        let free = self.swap(revoking, revoking.next(revoking.contended(), seat));
        if free {
            self.kick();
        }
        free
    }

    /// Wakes whoever may take the turn now, if it is nobody's. An offer to a seat that has left is withdrawn.
    pub fn kick(&self) {
        for _ in tries() {
            let word = self.load();
            if word.holder().is_some() {
                return; // whoever has it will do it
            }
            if let Some(seat) = word.offered_to() {
                if self.ticket(seat) != 0 {
                    return self.wake(seat);
                }
                self.swap(word, word.withdrawn());
                continue;
            }
            let Some((ticket, next)) = self.first() else { return };
            self.wake(next);
            if self.ticket(next) == ticket {
                return;
            }
        }
    }

    /// Puts a seat that is first and does not come for its turn behind all others. The broker's.
    pub fn pass_over(&self, seat: SeatId) {
        if let Some(other) = self.table.seat(seat) {
            let old = other.ticket.load(SeqCst);
            let later = self.table.words.tickets.0.fetch_add(1, SeqCst).wrapping_add(1);
            if old != 0 {
                let _ = other.ticket.compare_exchange(old, later, SeqCst, SeqCst);
            }
        }
        for _ in tries() {
            let word = self.load();
            if word.offered_to() != Some(seat) || self.swap(word, word.withdrawn()) {
                break;
            }
        }
        self.kick();
    }

    /// It has not stood in the line for long.
    pub fn is_young(&self, seat: SeatId) -> bool {
        let since = self.table.seat(seat).map_or(0, |s| s.since.load(SeqCst));
        self.parking.coarse_millis().saturating_sub(since) <= HURRY_MILLIS
    }

    fn ticket(&self, seat: SeatId) -> Ticket {
        self.table.seat(seat).map_or(0, |s| s.ticket.load(SeqCst))
    }

    /// The first in the line.
    pub fn first(&self) -> Option<(Ticket, SeatId)> {
        self.table.line.iter().map(|s| (self.ticket(s), s)).filter(|(ticket, _)| *ticket != 0).min()
    }

    /// Seats in the line, first to be served first.
    pub fn line(&self) -> Vec<SeatId> {
        let mut line: Vec<_> = self.table.line.iter().map(|s| (self.ticket(s), s)).collect();
        line.retain(|(ticket, _)| *ticket != 0);
        line.sort_unstable();
        line.into_iter().map(|(_, seat)| seat).collect()
    }

    /// It is awake and looking.
    fn has_arrived(&self, seat: SeatId) -> bool {
        self.state(seat) == ARRIVED
    }

    fn state(&self, seat: SeatId) -> u32 {
        self.table.seat(seat).map_or(RUNNING, |s| s.park.load(SeqCst))
    }

    /// Wakes a seat that is asleep until it is woken.
    pub fn wake(&self, seat: SeatId) {
        self.wake_from(seat, PARKED);
    }

    fn wake_from(&self, seat: SeatId, state: u32) {
        let Some(words) = self.table.seat(seat) else { return };
        if words.park.load(SeqCst) == state
            && words.park.compare_exchange(state, NOTIFIED, SeqCst, SeqCst).is_ok()
        {
            self.parking.wake(self.table, seat);
        }
    }

    /// Frees the turn of a seat that is dead, or its offer.
    pub fn clear(&self, seat: SeatId) {
        self.leave_line(seat);
        for _ in tries() {
            let word = self.load();
            let keep = word.seat() != seat || planted("turn-of-the-dead");
            if keep || self.swap(word, word.next(word.contended(), NOBODY)) {
                break;
            }
        }
        self.kick();
    }
}
