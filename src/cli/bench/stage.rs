//! One run: a case on one side, in a directory of its own that is gone afterwards.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use super::files;
use super::outcome::Run;
use super::task::{self, Side, Tally, Task, Window, now};
use super::workloads::Case;
use crate::cli::processes::{Group, Signals, Stop, cleaned};

/// What `--busy-timeout` is when it is not given. Plain SQLite would fail nearly every contended write at 0.
pub const PLAIN_WRITERS_BUSY_TIMEOUT_MS: u32 = 5000;
/// How long processes may take to get ready, and to end after the last operation, before they are killed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where and how cases are run.
pub struct Stage<'a> {
    /// This program.
    pub program: &'a Path,
    pub signals: &'a Signals,
    pub directory: &'a Path,
    /// Of the broker that turnstile's side uses.
    pub socket: &'a Path,
    pub measured: Duration,
    pub busy_timeout_ms: Option<u32>,
}

impl Stage<'_> {
    pub fn warm_up(&self) -> Duration {
        (self.measured / 5).min(Duration::from_millis(300))
    }

    pub fn busy_timeout_ms(&self, case: Case, side: Side, number: usize) -> u32 {
        let writes = case.workload.operation_of(number, case.processes).writes();
        let usual = match side {
            Side::Plain if writes => PLAIN_WRITERS_BUSY_TIMEOUT_MS,
            _ => 0,
        };
        self.busy_timeout_ms.unwrap_or(usual)
    }

    pub fn run(&self, case: Case, side: Side) -> Result<Run, Stop> {
        let name = format!("{}-{}-{}", case.workload.name, case.processes, side.name());
        let directory = tempfile::Builder::new().prefix(&name).tempdir_in(self.directory);
        let directory = directory.map_err(Stop::doing("cannot make a directory"))?;
        let made = files::make(case.workload, directory.path());
        made.map_err(Stop::doing(format!("cannot make a database in {}", directory.path().display())))?;

        let commands = self.commands(case, side, directory.path());
        let group = commands.and_then(Group::start);
        let mut group = group.map_err(Stop::doing("cannot start the workers"))?;
        group.ready(self.signals, PATIENCE)?;
        let window = self.window(case);
        window.save(directory.path()).map_err(Stop::doing("cannot tell the workers when to begin"))?;
        let waits =
            Duration::from_millis(self.busy_timeout_ms.unwrap_or(PLAIN_WRITERS_BUSY_TIMEOUT_MS).into());
        let finished = group.finish(self.signals, self.warm_up() + self.measured + waits + PATIENCE)?;

        let (mut tallies, faults) = collect(directory.path(), &finished.endings);
        if !faults.is_empty() {
            // What a worker wrote that did not come to its end is not known.
            return Ok(Run { faults, ..Run::of(&[], self.measured) });
        }
        let mut written = tallies.clone();
        for (number, tally) in written.iter_mut().enumerate() {
            if !case.workload.operation_of(number, case.processes).writes() {
                tally.acknowledged = 0;
            }
        }
        let found = files::check(case.workload, directory.path(), &written);
        let beside = tallies.split_off(case.processes);
        let mut run = Run::of(&tallies, self.measured);
        run.add_errors(&beside);
        run.written = found.written;
        run.faults = found.faults;
        directory.close().map_err(Stop::doing("cannot remove a run's directory"))?;
        Ok(run)
    }

    /// Soon, but late enough for all processes to have heard of it.
    fn window(&self, case: Case) -> Window {
        let nanoseconds = |time: Duration| time.as_nanos() as u64;
        let start = now() + 10_000_000 + 500_000 * case.processes as u64;
        let begin = start + nanoseconds(self.warm_up());
        Window { start, begin, end: begin + nanoseconds(self.measured) }
    }

    /// The measured processes first.
    fn commands(&self, case: Case, side: Side, directory: &Path) -> io::Result<Vec<Command>> {
        let beside = case.workload.beside.map_or(0, |(processes, _)| processes);
        (0..case.processes + beside).map(|n| self.command(case, side, directory, n)).collect()
    }

    fn command(&self, case: Case, side: Side, directory: &Path, number: usize) -> io::Result<Command> {
        let task = Task {
            workload: case.workload.name.to_owned(),
            side,
            number,
            beside: number >= case.processes,
            busy_timeout_ms: self.busy_timeout_ms(case, side, number),
            fill_ms: (self.measured / 2).as_millis().clamp(1, 1000) as u32,
        };
        let mut command = cleaned(Command::new(self.program));
        command.arg("bench-worker").arg(directory).arg(serde_json::to_string(&task)?);
        if side == Side::Turnstile {
            command.env("TURNSTILE_SOCKET", self.socket);
        }
        command.stderr(File::create(error_file(directory, number))?);
        Ok(command)
    }
}

/// The tallies of all processes, and why some have none.
fn collect(directory: &Path, endings: &[Option<(ExitStatus, Instant)>]) -> (Vec<Tally>, Vec<String>) {
    let (mut tallies, mut faults) = (Vec::new(), Vec::new());
    for (number, ending) in endings.iter().enumerate() {
        let tally = match ending {
            None => Err("did not end, and was killed".to_owned()),
            Some((status, _)) if !status.success() => {
                Err(format!("{status}: {}", last_words(directory, number)))
            }
            Some(_) => {
                task::load(&task::result_file(directory, number)).map_err(|e| format!("no result: {e}"))
            }
        };
        match tally {
            Ok(tally) => tallies.push(tally),
            Err(e) => faults.push(format!("process {number}: {e}")),
        }
    }
    (tallies, faults)
}

fn error_file(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("{number}.err"))
}

fn last_words(directory: &Path, number: usize) -> String {
    let text = fs::read(error_file(directory, number)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing").to_owned()
}
