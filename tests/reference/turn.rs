//! The turn: the right to be the database's one writer, and the line of tickets for it.
//! First come, first served; no seat is in the line twice.

use std::collections::BTreeMap;
use turnstile::lock::SeatId;

/// A place in the line. Smaller came earlier.
pub type Ticket = u64;

#[derive(Clone, Copy, Debug)]
pub struct Holder {
    pub seat: SeatId,
    /// The turn came with these wal-index slots, outside any read transaction (a checkpoint): it ends with them.
    pub comes_with: u8,
}

#[derive(Clone, Debug, Default)]
pub struct Turn {
    holder: Option<Holder>,
    line: BTreeMap<Ticket, SeatId>,
}

impl Turn {
    pub fn holder(&self) -> Option<Holder> {
        self.holder
    }

    pub fn held_by(&self, seat: SeatId) -> bool {
        self.holder.is_some_and(|h| h.seat == seat)
    }

    /// Seats in the line, first to be served first.
    pub fn line(&self) -> impl Iterator<Item = SeatId> + '_ {
        self.line.values().copied()
    }

    pub fn somebody_waits(&self) -> bool {
        !self.line.is_empty()
    }

    pub fn enter_line(&mut self, seat: SeatId, ticket: Ticket) {
        self.line.insert(ticket, seat);
    }

    pub fn leave_line(&mut self, ticket: Ticket) {
        self.line.remove(&ticket);
    }

    /// Takes a free turn: whoever is first in the line, or anyone (`ticket` none) when nobody waits.
    pub fn try_take(&mut self, seat: SeatId, ticket: Option<Ticket>, comes_with: u8) -> bool {
        if self.held_by(seat) {
            return true;
        }
        let first = self.line.first_key_value().map(|(t, _)| *t);
        let fair = match (first, ticket) {
            (None, _) => true,
            (Some(first), Some(mine)) => mine <= first,
            (Some(_), None) => false,
        };
        if self.holder.is_some() || !fair {
            return false;
        }
        if let Some(ticket) = ticket {
            self.line.remove(&ticket);
        }
        self.holder = Some(Holder { seat, comes_with });
        true
    }

    /// Ends the seat's turn; says whether it had one.
    pub fn end(&mut self, seat: SeatId) -> bool {
        let had = self.held_by(seat);
        if had {
            self.holder = None;
        }
        had
    }
}
