//! Seats that rest: the connection is closed, and its process keeps the seat for the next one, so that opening a
//! database again needs no message.
//!
//! A seat that rests holds nothing, and must not keep the gate shut. So whoever lets its seat rest says so *first* and
//! looks for one in use *then*: of two that do so at once, at least one sees that the other rests. Who sees nobody
//! takes the seat back and leaves, and the broker, when a seat leaves or dies and all that are left rest, closes
//! these one by one. Resting, taking back and closing are compare-and-swaps of one word, so a seat is not both closed
//! and used. The word counts how often the seat's number was given out: who comes back late finds another count.

use super::SeatId;
use super::table::Table;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{CHECKPOINTER, CLOSED, RESTING, STATE};

/// Added to the word when the seat's number may be given out again.
const ONE: u32 = STATE + 1;

/// How letting a seat rest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// It rests, under this count.
    Rests(u32),
    /// No other seat is in use. This one is, again, and has to leave.
    Last,
    /// No other seat was in use, and the broker has closed this one.
    Closed,
}

impl Table<'_> {
    /// The connection of a seat that holds nothing is closed.
    pub fn rest(self, seat: SeatId) -> Rest {
        let Some(state) = self.seat(seat).map(|s| &s.state) else { return Rest::Closed };
        let count = state.load(SeqCst) & !STATE;
        let seen = planted("rest-looks-first") && self.used_by_others(seat);
        if state.compare_exchange(count, count | RESTING, SeqCst, SeqCst).is_err() {
            return Rest::Closed;
        }
        if seen || self.used_by_others(seat) {
            return Rest::Rests(count);
        }
        match self.resume(seat, count) {
            true => Rest::Last,
            false => Rest::Closed,
        }
    }

    /// Uses a resting seat again. False: it has been closed, and may be somebody else's by now.
    pub fn resume(self, seat: SeatId, count: u32) -> bool {
        let state = self.seat(seat).map(|s| &s.state);
        state.is_some_and(|s| s.compare_exchange(count | RESTING, count, SeqCst, SeqCst).is_ok())
    }

    /// How often the seat's number has been given out, as [`Table::rest`] says it.
    pub fn count(self, seat: SeatId) -> u32 {
        self.seat(seat).map_or(0, |s| s.state.load(SeqCst) & !STATE)
    }

    pub fn rests(self, seat: SeatId) -> bool {
        self.seat(seat).is_some_and(|s| s.state.load(SeqCst) & STATE == RESTING)
    }

    /// Another seat is in use; the checkpointer's keeps nobody out.
    pub fn used_by_others(self, seat: SeatId) -> bool {
        let used = |s: &SeatId| self.seat(*s).is_some_and(|w| w.state.load(SeqCst) & STATE == 0);
        self.members.iter().filter(|s| *s != seat && *s != CHECKPOINTER).any(|s| used(&s))
    }

    /// Closes a seat if it rests under this count.
    pub fn let_go(self, seat: SeatId, count: u32) -> bool {
        let state = self.seat(seat).map(|s| &s.state);
        state.is_some_and(|s| s.compare_exchange(count | RESTING, count | CLOSED, SeqCst, SeqCst).is_ok())
    }

    /// Closes a seat that rests. False: it does not, and stays what it is.
    pub fn close_resting(self, seat: SeatId) -> bool {
        let Some(state) = self.seat(seat).map(|s| &s.state) else { return false };
        let word = state.load(SeqCst);
        if planted("closed-unasked") && word & STATE == RESTING {
            state.store(word & !STATE | CLOSED, SeqCst);
            return true;
        }
        word & STATE == RESTING
            && state.compare_exchange(word, word & !STATE | CLOSED, SeqCst, SeqCst).is_ok()
    }

    /// Its own process does not use it any more. Given out again since, it is somebody else's, and stays.
    pub fn close_own(self, seat: SeatId, count: u32) {
        if let Some(state) = self.seat(seat).map(|s| &s.state) {
            let _ = state.compare_exchange(count, count | CLOSED, SeqCst, SeqCst);
        }
    }

    /// The seat is being cleared: it is not in use any more, whatever it was.
    pub fn close(self, seat: SeatId) {
        if let Some(state) = self.seat(seat).map(|s| &s.state) {
            state.store(state.load(SeqCst) & !STATE | CLOSED, SeqCst);
        }
    }

    /// The seat is cleared. It is not in use before it is handed out: somebody may have seen it among the members.
    pub(super) fn take_back(self, seat: SeatId) {
        if let Some(state) = self.seat(seat).map(|s| &s.state) {
            let one = if planted("count-stands-still") { 0 } else { ONE };
            let closed = if planted("cleared-looks-used") { 0 } else { CLOSED };
            state.store((state.load(SeqCst) & !STATE).wrapping_add(one) | closed, SeqCst);
        }
    }

    /// The seat is a connection's from now on.
    pub fn hand_out(self, seat: SeatId) {
        if let Some(state) = self.seat(seat).map(|s| &s.state) {
            state.store(state.load(SeqCst) & !STATE, SeqCst);
        }
        self.members.set(seat);
    }

    /// What the last one out does when the broker is gone: closes what rests, and says whether nobody is left.
    pub fn close_all(self, seat: SeatId) -> bool {
        self.close(seat);
        if self.used_by_others(seat) {
            return false;
        }
        for other in self.members.iter() {
            self.close_resting(other);
        }
        !self.used_by_others(seat)
    }
}
