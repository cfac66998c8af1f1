//! Waiting, mostly for the turn, in the sleep of SQLite's busy handler.
//!
//! A write lock that is refused, or had with a stale snapshot, is given up by SQLite, and so is the snapshot; then the
//! busy handler sleeps, and all is tried again. In that sleep, in that thread, the turn is waited for: what is tried
//! again has its turn before its snapshot. The busy handler may still give up, or the retry be for another statement, so
//! the turn is a *lease*: an unlock of a read lock does not end it for some milliseconds, and the broker takes it back
//! from a seat that does not use it, like any turn.

use super::database::{Database, Seat};
use crate::client::served::object_of;
use crate::lock::{Ask, FileLevel, Release, Request, Verdict};
use crate::planted::planted;
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a turn outlives the unlocks of a retry.
const LEASE: Duration = Duration::from_millis(10);
/// The busy handler sleeps right after the refusal.
const SOON: Duration = Duration::from_millis(50);
/// SQLite's own busy handler sleeps no longer.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);
/// Waits may last longer than the sleeps that were asked for, because who leaves the line loses its place: so much
/// longer, all that one busy handler asks for taken together. It counts what it asks for, and keeps to its limit.
const OVERTIME: Duration = Duration::from_millis(500);

thread_local! {
    /// What this thread was last refused, and when.
    static REFUSED: RefCell<Option<(Weak<Database>, Missing, Instant)>> = const { RefCell::new(None) };
    /// By how much the sleeps of the busy handler that sleeps again and again have been exceeded, and when the last one
    /// was over.
    static EXCEEDED: Cell<Option<(Duration, Instant)>> = const { Cell::new(None) };
}

/// What would have had to be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    Turn,
    /// Somebody writes the file, over a rollback journal.
    Shared,
    /// Somebody reads it.
    Exclusive,
}

/// This thread has asked for a lock; what it missed, if it was refused.
pub fn note(database: &Database, refused: Option<Missing>) {
    let note = refused.map(|what| (database.weak(), what, Instant::now()));
    let _ = REFUSED.try_with(|last| last.replace(note));
}

/// The turn was got in a sleep, a moment ago.
pub fn is_leased(seat: &Seat) -> bool {
    seat.lease.get().is_some_and(|since| since.elapsed() < LEASE)
}

/// A thread sleeps, by code at `caller`. True: it has.
pub fn sleep(asked: Duration, caller: usize) -> bool {
    let last = REFUSED.try_with(|last| last.take()).ok().flatten();
    let Some((database, what, since)) = last else { return false };
    if asked > LONGEST_SLEEP || since.elapsed() >= SOON || planted("blind-sleep") {
        return false;
    }
    let Some(database) = database.upgrade() else { return false };
    // The busy handler's, not the application's.
    if database.library != object_of(caller) {
        return false;
    }
    let exceeded = EXCEEDED.try_with(Cell::take).ok().flatten();
    let exceeded = exceeded.filter(|(_, since)| since.elapsed() < SOON).map_or(Duration::ZERO, |(by, _)| by);
    let limit = asked + OVERTIME.saturating_sub(exceeded);
    let begun = Instant::now();
    let slept = wait(&database, what, limit);
    let took = begun.elapsed();
    let exceeded = match slept {
        true if took < limit || planted("overtime-for-each-sleep") => None, // it has got what it waited for
        true => Some(exceeded + took.saturating_sub(asked)),
        false => Some(exceeded),
    };
    let _ = EXCEEDED.try_with(|e| e.set(exceeded.map(|by| (by, Instant::now()))));
    slept
}

fn wait(database: &Arc<Database>, what: Missing, limit: Duration) -> bool {
    let held = Cell::new(Some(database.hold()));
    let Some(guard) = held.take() else { return false };
    let missing = |seat: &&Seat| match what {
        // Had already, it is something else that was missing.
        Missing::Turn => !seat.member.has_turn(),
        Missing::Shared => seat.level.get() == FileLevel::None,
        Missing::Exclusive => seat.level.get() == FileLevel::Reserved,
    };
    let seat = database.seat(&guard).filter(|s| !s.waits.get() && s.member.is_whole()).filter(missing);
    let Some(seat) = seat.map(std::ptr::from_ref) else { return false };
    held.set(Some(guard));
    // SAFETY: the seat is the database's, which outlives this; it is touched with the lock held only, which `around` gives
    // back for nothing but sleeping.
    let seat = unsafe { &*seat };
    seat.waits.set(true);
    let around = |sleep: &dyn Fn()| {
        drop(held.take());
        sleep();
        held.set(Some(database.hold()));
    };
    let begun = Instant::now();
    let file = |level| Request::File { level, hot_journal: false };
    let (request, ahead) = match what {
        Missing::Turn => (Request::Turn, true),
        Missing::Shared => (file(FileLevel::Shared), false),
        Missing::Exclusive => (file(FileLevel::Exclusive), false),
    };
    let verdict = seat.member.lock_around(Ask { request, ahead }, &around, || begun.elapsed() >= limit);
    seat.waits.set(false);
    let had = verdict != Verdict::Busy;
    match what {
        Missing::Turn if had => seat.lease.set(Some(Instant::now())),
        // It can be had, and the retry takes it: nobody could take it back from one that does not come. (Another thread
        // has it by now, if the level says so.)
        Missing::Shared if had && seat.level.get() == FileLevel::None => {
            let _ = seat.member.release(Release::File { level: FileLevel::None, keep_turn: false });
        }
        // EXCLUSIVE stays: whether or not it is asked for again, what comes next is the end of the transaction.
        _ => {}
    }
    had || begun.elapsed() >= limit
}
