//! Waiting, for one statement: its limit, its retries, what is logged when it was in vain, and the statement that
//! meets a changed schema again and again.

use super::api::Library;
use super::main_file::{MainFile, Service};
use super::statement::{self, Run};
use super::timeouts;
use crate::client::Lost;
use crate::client::activity::Idle;
use crate::client::member::Outcome;
use crate::lock::seat::WaitsFor;
use crate::lock::{Ask, Verdict};
use libsqlite3_sys as ffi;
use std::cell::Cell;
use std::ffi::c_int;
use std::time::{Duration, Instant};

/// A wait that was in vain: the retries of the same run of the same statement do not wait again.
///
/// SQLite's busy handler retries inside one call of `sqlite3_step`, and sleeps by the VFS before it does. An
/// application that tries again may have prepared its statement anew, at the same address: that is no retry.
#[derive(Clone, Copy, Debug)]
pub struct Vain {
    run: Option<Run>,
    /// When it, or the last retry, ended.
    last: Instant,
    /// [`sleeps`] then.
    sleeps: u64,
}

/// Retries come sooner than this after one another (SQLite's busy handler sleeps 100 ms at most).
const RETRY_GAP: Duration = Duration::from_secs(1);
/// What comes as soon as this is one without a sleep (a busy handler of the application's own that spins).
const RETRY_AT_ONCE: Duration = Duration::from_millis(2);

thread_local! {
    static SLEEPS: Cell<u64> = const { Cell::new(0) };
    /// The last wait in vain on this thread: the statement, the file that it was for, and when it ended.
    static IN_VAIN: Cell<Option<(Run, usize, Instant)>> = const { Cell::new(None) };
}

/// How often SQLite has slept on this thread.
fn sleeps() -> u64 {
    SLEEPS.try_with(Cell::get).unwrap_or(0)
}

/// `xSleep` of both VFSes.
pub unsafe extern "C" fn sleep(vfs: *mut ffi::sqlite3_vfs, microseconds: c_int) -> c_int {
    let _ = SLEEPS.try_with(|n| n.set(n.get() + 1));
    match Library::of_vfs(vfs).and_then(|l| l.original.xSleep.map(|f| (f, l.unix))) {
        // SAFETY: the unix VFS's own method, with the unix VFS.
        Some((real, unix)) => unsafe { real(unix, microseconds) },
        None => 0,
    }
}

/// See [`MainFile::note_rerun`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Rerun {
    run: Option<Run>,
    prepared: i32,
    times: u32,
}

/// A wait that has begun.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    since: Instant,
    until: Instant,
}

impl Wait {
    /// The limit is reached, or the statement interrupted.
    pub fn is_over(&self, main: &MainFile) -> bool {
        Instant::now() >= self.until || statement::interrupted(&main.library.api, main.db())
    }
}

impl MainFile {
    /// The turn is about to be taken ahead: counts how often in a row that was for the same statement, prepared
    /// anew because the schema had changed.
    pub fn note_rerun(&mut self) {
        let Some((run, prepared)) = statement::writer(&self.library.api, self.db()) else { return };
        if self.rerun.run == Some(run) {
            return; // wal.c asks again for the same attempt
        }
        let again = self.rerun.run.is_some_and(|r| r.same_statement(run)) && self.rerun.prepared < prepared;
        let times = if again { self.rerun.times + 1 } else { 0 };
        self.rerun = Rerun { run: Some(run), prepared, times };
    }

    /// Whether the turn outlives a transaction that wrote nothing: the running statement has met a changed schema
    /// again and again. It waits for its turn, finds the schema changed by those before it, and is prepared anew
    /// while the next one changes it: after fifty times SQLite gives up. So from the third time on it keeps its
    /// turn while it is prepared. (If it does something else instead, the supervisor takes the turn back.)
    pub fn keeps_turn_for_rerun(&self, unwritten: bool) -> bool {
        unwritten && self.turn && self.reruns() && !crate::planted::planted("reruns-queue-again")
    }

    /// It has been prepared anew again and again.
    pub fn reruns(&self) -> bool {
        self.rerun.times >= 2
    }

    /// The limit of a wait: `PRAGMA busy_timeout` when it was given, else the setting.
    pub fn limit(&self) -> Duration {
        timeouts::of(self.db()).unwrap_or(self.config.wait)
    }

    /// The running statement has waited in vain: its retries do not wait again, nor does it for another file.
    pub(super) fn waited_out(&self) -> bool {
        self.waited_elsewhere() || self.waited_here()
    }

    fn waited_elsewhere(&self) -> bool {
        let last = IN_VAIN.try_with(Cell::get).ok().flatten();
        let Some((run, file, at)) = last.filter(|_| !crate::planted::planted("each-file-waits")) else {
            return false;
        };
        file != std::ptr::from_ref(self) as usize
            && at.elapsed() < RETRY_GAP
            && Some(run) == statement::current_run(&self.library.api, self.db())
    }

    fn waited_here(&self) -> bool {
        let Some(vain) = self.vain else { return false };
        let since = vain.last.elapsed();
        let retried = since < RETRY_AT_ONCE || sleeps() != vain.sleeps;
        retried && since < RETRY_GAP && vain.run == statement::current_run(&self.library.api, self.db())
    }

    /// Begins a wait of the running statement; one that has waited in vain has no time left.
    pub fn begin_wait(&self) -> Wait {
        let since = Instant::now();
        let limit = if self.waited_out() { Duration::ZERO } else { self.limit() };
        Wait { since, until: since + limit }
    }

    /// Ends a wait of the running statement. `vain`: the lock was not had.
    pub fn end_wait(&mut self, vain: bool) {
        if vain {
            let run = statement::current_run(&self.library.api, self.db());
            let file = std::ptr::from_ref(self) as usize;
            let _ = IN_VAIN.try_with(|last| last.set(run.map(|run| (run, file, Instant::now()))));
            self.vain = Some(Vain { run, last: Instant::now(), sleeps: sleeps() });
        }
    }

    /// The statement got what it wanted: a later wait of it is a new one.
    pub fn progress(&mut self) {
        self.vain = None;
        self.second_chance = false;
    }

    /// Asks for a lock, waiting within the limit; `enough` ends the wait early. Logs a wait that was in vain.
    pub fn ask(&mut self, ask: Ask, mut enough: impl FnMut() -> bool) -> Result<Outcome, Lost> {
        let db = self.db();
        self.leave_other_turn();
        let Service::Seat(member) = &self.service else { return Err(Lost) };
        // No handle: a connection of its own.
        let connection = if db.is_null() { std::ptr::from_ref(self) as u64 } else { db as u64 };
        if let Some(verdict) = member.try_lock(ask, connection)? {
            if verdict == Verdict::Busy {
                self.note_retry_refused();
            }
            return Ok(Outcome::at_once(verdict));
        }
        let wait = self.begin_wait();
        let mut hopeless = false;
        let mut idle = Idle::default();
        let blocker = std::cell::RefCell::new(None);
        let mut outcome = member.lock(ask, connection, || {
            hopeless = self.activity.waits_for_itself(ask, &mut idle);
            if hopeless && member.takes_back_own_guess() {
                (hopeless, idle) = (false, Idle::default());
            }
            let over = hopeless || enough() || wait.is_over(self);
            if over {
                blocker.replace(member.blocker());
            }
            over
        })?;
        outcome.deadlock |= hopeless && outcome.gave_up;
        if outcome.verdict == Verdict::Busy && outcome.blocker.is_none() {
            outcome.blocker = blocker.into_inner();
        }
        let vain = outcome.deadlock || (outcome.gave_up && Instant::now() >= wait.until);
        if vain {
            self.log_vain_wait(ask, &outcome, wait.since);
        }
        self.end_wait(vain);
        if outcome.verdict == Verdict::Busy && !vain {
            self.note_retry_refused();
        }
        Ok(outcome)
    }

    /// A retry that was refused at once is still one of the retries.
    fn note_retry_refused(&mut self) {
        let slept = self.vain.is_some_and(|v| v.sleeps != sleeps());
        if slept && self.waited_out() {
            self.end_wait(true);
        }
    }

    fn log_vain_wait(&self, ask: Ask, outcome: &Outcome, since: Instant) {
        let waited = since.elapsed().as_secs_f64();
        let end = if outcome.deadlock { "a deadlock ended it" } else { "the limit was reached" };
        let holder = match &outcome.blocker {
            Some(b) => {
                let container = b.container.as_ref().map(|c| format!(", container {c}")).unwrap_or_default();
                format!("; held by {} (pid {}{container}) for {} ms", b.program, b.pid, b.held_ms)
            }
            None => String::new(),
        };
        let what = WaitsFor::of(ask.request, ask.ahead);
        let text = format!("waited {waited:.3} s for {} on {}: {end}{holder}", what.describe(), self.path);
        self.library.log(ffi::SQLITE_BUSY, &text);
    }
}
