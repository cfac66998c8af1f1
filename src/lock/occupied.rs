//! Whether anybody who lives can be in a database: the one question before a gate is opened, of the broker and of its
//! keeper alike.
//!
//! Who is not proven dead is alive. So a seat of which nobody can say whose it is counts as somebody's, whatever has been
//! lost on the way to who asks: the segment's members are looked at, not only those on record.

use super::SeatId;
use super::table::Table;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{CHECKPOINTER, CLOSED, RESTING, STATE};

/// What is known of the process that has a seat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The kernel says so.
    Dead,
    /// It is known, and not proven dead.
    Lives,
    /// Nobody knows whose the seat is.
    Unknown,
}

/// Whose a seat is.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    pub fate: Fate,
    /// It writes its seat's words itself. The words of one that may only read say nothing of it.
    pub writes: bool,
}

impl Holder {
    pub const UNKNOWN: Holder = Holder { fate: Fate::Unknown, writes: true };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupied {
    /// By somebody who is known to live, and whose end will be seen.
    BySomebody,
    /// Nobody who is known has a seat, but a seat is in use of which nobody knows whose it is. The gate is not to be opened;
    /// who holds on to it would hold it for ever if its holder is dead.
    ByStrangers,
    /// At most by seats that rest.
    ByNobody,
}

impl Table<'_> {
    /// Who is in, as far as it can be known. `seats`: those on record and the segment's members, in any order.
    pub fn occupied(
        self,
        seats: impl Iterator<Item = SeatId>,
        holder: impl Fn(SeatId) -> Holder,
    ) -> Occupied {
        let (mut known, mut used, mut strangers) = (false, false, false);
        for seat in seats.filter(|s| *s != CHECKPOINTER) {
            let Holder { fate, writes } = holder(seat);
            let state = self.seat(seat).map_or(0, |words| words.state.load(SeqCst) & STATE);
            if fate == Fate::Dead || writes && state == CLOSED {
                continue;
            }
            let in_use = !(writes && state == RESTING);
            match fate {
                Fate::Lives => (known, used) = (true, used || in_use),
                _ => strangers |= in_use && !planted("unknown-is-dead"),
            }
        }
        match used || known && strangers {
            true => Occupied::BySomebody,
            false if strangers => Occupied::ByStrangers,
            false => Occupied::ByNobody,
        }
    }

    /// Closes the seats that rest. False: one has been taken in use again at this very moment, and stays.
    pub fn close_all_at_rest(self, seats: impl Iterator<Item = SeatId>) -> bool {
        seats.fold(true, |all, seat| all & (!self.rests(seat) || self.close_resting(seat)))
    }
}
