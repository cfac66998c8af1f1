//! Turns that nobody uses: taken for a statement that turns out to write elsewhere, or left behind.

use super::SeatId;
use super::locks::Locks;
use super::slot;
use crate::planted::planted;
use std::time::{Duration, Instant};

/// A turn taken ahead of a snapshot is suspect after this long without the write lock, when somebody waits: the
/// statement writes elsewhere (a temp table, another file), or its thread has not been given the processor yet.
/// Which of the two is the supervisor's to find out: a turn lost between READ and WRITE costs the application a
/// BUSY.
pub const UNUSED_TURN: Duration = Duration::from_millis(20);
/// A turn whose seat holds no lock at all is suspect after this long, when somebody waits. Its seat is mostly
/// about to ask for its read lock again (wal.c even sleeps between tries, and longer each time: a turn lost there
/// makes the next try fail too).
pub const IDLE_TURN: Duration = Duration::from_millis(1);

/// A turn that somebody waits for and its seat does not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unused {
    pub seat: SeatId,
    /// Since when it could have been used.
    pub since: Instant,
    /// The seat holds no lock at all.
    pub idle: bool,
}

impl Locks {
    /// When a turn that somebody waits for becomes suspect.
    pub fn next_deadline(&self) -> Option<Instant> {
        if !self.turn.somebody_waits() {
            return None;
        }
        self.unused().map(|u| u.since + if u.idle { IDLE_TURN } else { UNUSED_TURN })
    }

    /// The turn that somebody waits for and that has not been used for its time.
    pub fn suspect(&self, now: Instant) -> Option<Unused> {
        self.unused().filter(|_| self.next_deadline().is_some_and(|due| now >= due))
    }

    /// Takes a suspect's turn back: it has been running all the while, so its statement writes elsewhere.
    pub fn revoke(&mut self, seat: SeatId) {
        if self.turn.end(seat) {
            self.turns_revoked += 1;
        }
    }

    /// The holder's turn, if it is not in use.
    fn unused(&self) -> Option<Unused> {
        let h = self.turn.holder()?;
        let writes = self.table.slot_owner(slot::WRITE) == Some(h.seat) || self.table.file_write_held(h.seat);
        if writes || h.used || self.ticket_of.contains_key(&h.seat) {
            return None;
        }
        let holds = self.table.shared_holds(h.seat);
        let reads =
            self.guest || holds.slots & slot::READ_MASK != 0 || (holds.file && !self.wal.contains(&h.seat));
        if planted(if reads { "unused-turn-kept" } else { "idle-turn-kept" }) {
            return None;
        }
        Some(Unused { seat: h.seat, since: h.since.max(self.touched), idle: !reads })
    }
}
