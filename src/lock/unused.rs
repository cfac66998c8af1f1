//! Turns that nobody uses: taken for a statement that turns out to write elsewhere, or left behind.

use super::SeatId;
use super::slot;
use super::turn::Turn;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{FOR_GUESS, FOR_TRANSACTION};
use std::time::Duration;

/// A turn taken ahead of a snapshot is suspect after this long without the write lock, when somebody waits: the
/// statement writes elsewhere (a temp table, another file), or its thread has not been given the processor yet.
/// Which of the two is the supervisor's to find out: a turn lost between READ and WRITE costs the application a
/// BUSY.
pub const UNUSED_TURN: Duration = Duration::from_millis(20);
/// A turn whose seat holds no lock at all is suspect after this long, when somebody waits. Its seat is mostly
/// about to ask for its read lock again (wal.c even sleeps between tries, and longer each time: a turn lost there
/// makes the next try fail too).
pub const IDLE_TURN: Duration = Duration::from_millis(1);

/// A turn that is not in use, as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unused {
    pub seat: SeatId,
    /// The seat's count of lock calls: another count, another look.
    pub calls: u32,
    pub thread: u32,
    /// The seat holds no lock at all.
    pub idle: bool,
    /// The turn was taken for a whole transaction, which is likely to write.
    pub guessed: bool,
}

/// A turn taken for a transaction that is only likely to write becomes suspect after this long, and is then taken
/// back.
pub const GUESSED_TURN: Duration = Duration::from_secs(1);

impl Unused {
    /// How long it may look like this before it is suspect.
    pub fn patience(&self) -> Duration {
        match (self.idle, self.guessed) {
            (true, _) => IDLE_TURN,
            (_, true) => GUESSED_TURN,
            _ => UNUSED_TURN,
        }
    }
}

/// The holder's turn, if somebody waits for it and it is not in use. `guest`: the locks are not in the table.
pub fn unused(turn: Turn<'_>, guest: bool, used: impl Fn(SeatId) -> bool) -> Option<Unused> {
    let word = turn.load();
    let seat = word.holder()?;
    let table = turn.table;
    let words = table.seat(seat)?;
    turn.first()?;
    if uses(turn, seat) || used(seat) || words.waiting.load(SeqCst) != 0 {
        return None;
    }
    let reads = guest || table.reads(seat) || (table.file_shared(seat) && !table.wal_open(seat));
    if planted(if reads { "unused-turn-kept" } else { "idle-turn-kept" }) {
        return None;
    }
    let turn_for = words.turn_for.load(SeqCst);
    if reads && turn_for == FOR_TRANSACTION {
        return None;
    }
    let guessed = turn_for == FOR_GUESS;
    Some(Unused {
        seat,
        guessed,
        calls: words.calls.load(SeqCst),
        thread: words.thread.load(SeqCst),
        idle: !reads,
    })
}

/// Takes back a turn that the same thread has on another connection, for a transaction that is only likely to write. It
/// cannot go on before this thread's wait is over. False: the turn is another's, or used.
pub fn take_back_own_guess(turn: Turn<'_>, thread: u32) -> bool {
    let own = unused(turn, false, |_| false).filter(|u| u.guessed && u.thread == thread);
    own.is_some_and(|u| !planted("own-guess-stays") && turn.revoke(u.seat, || uses(turn, u.seat)))
}

/// The seat has a write lock.
pub fn uses(turn: Turn<'_>, seat: SeatId) -> bool {
    turn.table.slot_owner(slot::WRITE) == Some(seat) || turn.table.file_write_held(seat)
}
