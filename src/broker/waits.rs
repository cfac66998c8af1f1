//! Waits that would never end are ended: turns that nobody uses, a line that stands still. ([`super::cycles`]: those that wait
//! for each other.)

use super::database::Database;
use super::liveness::pidfd_of_thread;
use super::server::Server;
use super::shares::SLICE;
use crate::lock::queue::blockers;
use crate::lock::turn::Word;
use crate::lock::unused::{Unused, unused, uses};
use crate::lock::{SeatId, Verdict};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::PARKED;
use crate::wire::message::{Blocker, SeatKey};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How often a database is looked at in which somebody waits.
pub const WATCH_TICK: Duration = Duration::from_millis(4);
/// Nanoseconds that a suspect may run without asking for its next lock (a statement may be prepared anew in it).
const SUSPECT_RAN: u64 = 8_000_000;
/// A suspect that sleeps (a page read from a slow disk, wal.c between two tries, a stopped process) is given this
/// long.
const SUSPECT_LIMIT: Duration = Duration::from_millis(200);
const IDLE_SUSPECT_LIMIT: Duration = Duration::from_millis(50);
/// One that is ready to run, and waits for a processor that others have, this long.
const STARVED_LIMIT: Duration = Duration::from_secs(2);
/// So many threads of a process of another pid namespace are looked at to find one.
const MOST_TASKS: usize = 256;
/// A turn that is nobody's and that the first in the line does not take: it is woken again.
const STILL: Duration = Duration::from_millis(8);
/// Then it is somewhere else (a stopped process): the next one's.
const ABSENT: Duration = Duration::from_millis(50);

/// What has been seen of a database in which somebody waits.
#[derive(Debug, Default)]
pub struct Watch {
    /// A turn that is not in use, and since when it looks like that.
    unused: Option<(Unused, Instant)>,
    /// Nanoseconds that its thread had been on a processor when it became suspect; `None` inside: the kernel does
    /// not say.
    ran: Option<Option<u64>>,
    /// A turn that is nobody's although somebody waits.
    still: Option<(Word, Instant, bool)>,
}

impl Server {
    /// Looks at every database in which somebody waits; at those of one user for a slice of the time, and at the others of
    /// its the next time.
    pub(super) fn watch(&mut self, now: Instant) {
        if now.saturating_duration_since(self.last_watch) < WATCH_TICK {
            return;
        }
        self.last_watch = now;
        self.break_cycles(now);
        let (before, after): (Vec<u32>, Vec<u32>) =
            self.watched.iter().partition(|number| **number < self.watch_from);
        let (mut spent, mut left_out) = (BTreeMap::<u32, Duration>::new(), None);
        for number in after.into_iter().chain(before) {
            let Some(founder) = self.databases.get(&number).map(|db| db.founder) else { continue };
            let spent = spent.entry(founder).or_default();
            if *spent >= SLICE {
                left_out.get_or_insert(number);
                continue;
            }
            let begun = Instant::now();
            self.judge_holder(number, now);
            let Some(db) = self.databases.get_mut(&number) else { continue };
            keep_line_moving(db, now);
            if db.waiting().next().is_none() && !db.lane().somebody_waits() {
                db.watch = Watch::default();
                self.watched.remove(&number);
            }
            self.settle(number);
            *spent += begun.elapsed();
        }
        self.watch_from = left_out.unwrap_or(0);
    }

    /// Takes unused turns back from threads that have been running, not from those that wait for a processor:
    /// on a busy machine a thread may be kept from its next instruction for longer than any fixed limit that
    /// the writers behind it would accept.
    fn judge_holder(&mut self, number: u32, now: Instant) {
        let Some(db) = self.databases.get_mut(&number) else { return };
        let seen = unused(db.turn(), db.is_guest(), |seat| db.queue.is_used(seat));
        let Some(seen) = seen else {
            (db.watch.unused, db.watch.ran) = (None, None);
            return;
        };
        let since = match db.watch.unused {
            Some((before, since)) if before == seen => since,
            _ => {
                (db.watch.unused, db.watch.ran) = (Some((seen, now)), None);
                return;
            }
        };
        if now.duration_since(since) < seen.patience() {
            return;
        }
        let Some(seat) = db.seats.get(&seen.seat) else { return };
        let pid = self.sessions.get(&seat.session).map_or(0, |s| s.peer.pid);
        let ran = time_on_processor(pid, seen.thread);
        let Some(first) = db.watch.ran else {
            db.watch.ran = Some(ran);
            return;
        };
        let moved_on = seen.guessed
            || match (first, ran) {
                (Some(before), Some(after)) => after.saturating_sub(before) >= SUSPECT_RAN,
                // Not told, it may be a thread that waits for a processor.
                _ => planted("clock-alone"),
            };
        let waited = now.duration_since(since);
        let limit = if seen.idle && ran.is_some() { IDLE_SUSPECT_LIMIT } else { SUSPECT_LIMIT };
        let is_late =
            || waited >= limit && (waited >= STARVED_LIMIT || !waits_for_processor(pid, seen.thread));
        if moved_on || is_late() {
            let turn = db.turn();
            // It may have ended that turn and taken another since it was looked at.
            let same = || unused(turn, db.is_guest(), |seat| db.queue.is_used(seat)) == Some(seen);
            if turn.revoke(seen.seat, || uses(turn, seen.seat) || !same()) {
                tracing::debug!(
                    database = number,
                    seat = seen.seat,
                    "turn taken back: no write lock followed"
                );
                db.turns_revoked += 1;
            }
            (db.watch.unused, db.watch.ran) = (None, None);
        }
    }

    /// The connection behind a seat: its session, and what it calls itself there.
    pub(super) fn connection_of(&self, key: SeatKey) -> Option<(u64, u64)> {
        let db = self.databases.get(&key.database)?;
        let connection = db.table().seat(key.seat)?.connection.load(SeqCst);
        Some((db.seats.get(&key.seat)?.session, connection))
    }

    pub(super) fn blockers(&self, key: SeatKey) -> Vec<SeatKey> {
        let seats =
            self.databases.get(&key.database).map(|d| blockers(d.turn(), key.seat)).unwrap_or_default();
        seats.into_iter().map(|seat| SeatKey { database: key.database, seat }).collect()
    }

    /// The first one that the seat waits for, described.
    pub(super) fn blocker_of(&self, key: SeatKey) -> Option<Blocker> {
        let blocker = *self.blockers(key).first()?;
        let db = self.databases.get(&blocker.database)?;
        let seat = db.seats.get(&blocker.seat)?;
        let session = self.sessions.get(&seat.session)?;
        let held_ms = match db.turn().load().holder() == Some(blocker.seat) {
            true => db.turn_held_ms(blocker.seat),
            false => seat.since.elapsed().unwrap_or_default().as_millis() as u64,
        };
        Some(Blocker {
            pid: session.pid(),
            program: session.who.program.clone(),
            container: session.who.container.clone(),
            held_ms,
        })
    }

    /// Ends a wait: the request is answered without waiting. A seat on the fast lane is told to do so.
    pub(super) fn end_wait(&mut self, key: SeatKey, deadlock: bool) {
        let blocker = self.blocker_of(key);
        let Some(db) = self.databases.get_mut(&key.database) else { return };
        if !db.lane().is_waiting(key.seat) {
            if deadlock && let Some(words) = db.table().seat(key.seat) {
                words.ended.store(1, SeqCst);
                db.turn().wake(key.seat);
            }
            return; // or it was answered before the cancellation arrived
        }
        let Some(verdict) = db.lane().give_up(key.seat) else { return };
        let Some(seat) = db.seats.get_mut(&key.seat) else { return };
        if let Some(request) = seat.request.take() {
            let session = seat.session;
            let blocker = blocker.filter(|_| verdict == Verdict::Busy || deadlock);
            self.answer(session, request, verdict, deadlock, blocker);
        }
    }
}

impl Database {
    /// Seats that wait, as they say.
    pub(super) fn waiting(&self) -> impl Iterator<Item = SeatId> + '_ {
        self.seats.keys().copied().filter(|seat| self.waits(*seat))
    }

    pub(super) fn waits(&self, seat: SeatId) -> bool {
        self.table().seat(seat).is_some_and(|w| w.waiting.load(SeqCst) != 0)
    }

    /// How long the seat has had the turn, in milliseconds, as the seat says.
    pub fn turn_held_ms(&self, seat: SeatId) -> u64 {
        let since = self.table().seat(seat).map_or(0, |w| w.turn_since.load(SeqCst));
        futex::coarse_millis().saturating_sub(since)
    }
}

/// A turn that is nobody's while somebody waits has been left by one who should have woken the first in the line, or
/// the first in the line does not come.
fn keep_line_moving(db: &mut Database, now: Instant) {
    let turn = db.turn();
    let word = turn.load();
    let first = turn.first().filter(|_| word.holder().is_none());
    let Some(seat) = first.map(|(_, seat)| word.offered_to().unwrap_or(seat)) else {
        db.watch.still = None;
        return;
    };
    let (since, kicked) = match db.watch.still {
        Some((before, since, kicked)) if before == word => (since, kicked),
        _ => {
            db.watch.still = Some((word, now, false));
            return;
        }
    };
    let still = now.duration_since(since);
    if still >= ABSENT {
        turn.pass_over(seat);
        let counters = &turn.table.words.counters.0;
        counters[1].fetch_add(1, SeqCst);
        db.watch.still = None;
    } else if still >= STILL && !kicked {
        let asleep = turn.table.seat(seat).is_some_and(|w| w.park.load(SeqCst) == PARKED);
        if asleep {
            turn.table.words.counters.0[0].fetch_add(1, SeqCst);
            tracing::error!(seat, "the line stood still: its first was asleep beside a free turn");
        }
        turn.kick();
        db.watch.still = Some((word, since, true));
    }
}

/// Nanoseconds that a thread has spent on a processor (`/proc/PID/task/TID/schedstat`, first field). Not told of a
/// process that this pid namespace does not show: a broker in a container of its own.
fn time_on_processor(pid: i32, thread: u32) -> Option<u64> {
    if pid <= 0 || planted("clock-alone") {
        return None;
    }
    let task = task_of(pid, thread)?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{task}/schedstat")).ok()?;
    text.split(' ').next()?.parse().ok()
}

/// The thread is ready to run, and has no processor or has just been given one. False also where the kernel does not say: to
/// tell it, the process must be one that this one may trace (proc_pid_wchan(5), ptrace(2)).
fn waits_for_processor(pid: i32, thread: u32) -> bool {
    let task = if pid > 0 { task_of(pid, thread) } else { None };
    let wchan = task.and_then(|task| std::fs::read_to_string(format!("/proc/{pid}/task/{task}/wchan")).ok());
    wchan.is_some_and(|place| place == "0") && !planted("starved-is-late")
}

/// The number here of a thread of the process: in a container it calls itself by another one, its own namespace's, which
/// is the last of `NSpid` (proc(5)).
fn task_of(pid: i32, thread: u32) -> Option<u32> {
    let calls_itself = |task: u32| {
        let own = format!("/proc/{pid}/task/{task}");
        if !std::path::Path::new(&own).exists() {
            return None;
        }
        // Who reads its status borrows its memory, and if it ends meanwhile, has to unmap that: files that never answer, too.
        let pidfd = pidfd_of_thread(task);
        let said = pidfd.as_ref().map(|fd| format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
        let said = std::fs::read_to_string(said.unwrap_or(format!("{own}/status"))).ok()?;
        said.lines().find_map(|l| l.strip_prefix("NSpid:"))?.split_whitespace().next_back()?.parse().ok()
    };
    if calls_itself(thread) == Some(thread) {
        return Some(thread);
    }
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let numbers = tasks.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok());
    numbers.take(MOST_TASKS).find(|task| calls_itself(*task) == Some(thread))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_found_by_the_number_that_it_has_here() {
        let pid = std::process::id() as i32;
        let (own, other) = std::thread::scope(|scope| {
            let number = || nix::unistd::gettid().as_raw() as u32;
            (number(), scope.spawn(move || (number(), task_of(pid, number()))).join().unwrap())
        });
        assert_eq!(task_of(pid, own), Some(own));
        assert_eq!(other.1, Some(other.0));
        // Another process's.
        assert_eq!(task_of(pid, 1), None);
    }

    #[test]
    fn a_thread_that_is_kept_from_running_is_told_from_one_that_sleeps() {
        crate::planted::fails_without("starved-is-late", || {
            let pid = std::process::id() as i32;
            let (goes_on, number) =
                (std::sync::atomic::AtomicBool::new(true), std::sync::atomic::AtomicU32::new(0));
            let seen = |what: bool, number: u32| {
                let end = Instant::now() + Duration::from_secs(5);
                while waits_for_processor(pid, number) != what && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                }
                waits_for_processor(pid, number) == what
            };
            std::thread::scope(|scope| {
                let (goes_on, number) = (&goes_on, &number);
                let own = || nix::unistd::gettid().as_raw() as u32;
                let busy = scope.spawn(move || {
                    number.store(own(), SeqCst);
                    while goes_on.load(SeqCst) {}
                    // Asleep from here on.
                    number.store(0, SeqCst);
                    std::thread::park();
                });
                while number.load(SeqCst) == 0 {
                    std::thread::yield_now();
                }
                let thread = number.load(SeqCst);
                let runs = seen(true, thread);
                goes_on.store(false, SeqCst);
                while number.load(SeqCst) != 0 {
                    std::thread::yield_now();
                }
                let sleeps = seen(false, thread);
                busy.thread().unpark();
                assert!(runs && sleeps, "{runs} {sleeps}");
            });
        });
    }

    #[test]
    fn a_threads_time_is_told_if_its_process_is_seen() {
        let (pid, thread) = (std::process::id() as i32, nix::unistd::gettid().as_raw() as u32);
        assert!(time_on_processor(pid, thread).is_some());
        assert_eq!(time_on_processor(pid, u32::MAX), None);
        assert_eq!(time_on_processor(0, thread), None);
    }
}
