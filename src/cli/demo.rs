//! `turnstile demo`: the same work on plain SQLite and on turnstile, side by side, with whatever is found here.
//!
//! * [`programs`]: what is found. [`workloads`]: what is run with it. [`worker`] and `worker.py`: the processes
//!   that write.
//! * [`processes`]: starting them together, and ending all of them whatever happens.
//! * [`outcome`]: what they did. [`report`]: the table.

mod outcome;
mod processes;
mod programs;
mod report;
pub mod worker;
mod workloads;

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use processes::{Process, Signals, Stop, cleaned};
use programs::Programs;
use report::Report;
use workloads::{Side, Stage, Workload};

const AFTER_HELP: &str = "\
It runs, each on plain SQLite and then on turnstile, on new files in a temporary directory:

  16 sqlite3 shells that start at once on one new file, and each set WAL mode, create a table if there
     is none, and insert a row. Needs sqlite3.
  8 Python processes that insert a row per commit, without a busy timeout. Needs a python3 whose sqlite3
     module can load extensions (distributions' can).
  8 programs with SQLite linked in that insert a row per commit, with a busy timeout of 5 s. Needs nothing.

What is missing is skipped, and said. The demo starts a broker of its own, for these files alone, and ends it.
TMPDIR chooses the place: the disk under it is what commits are written to.

Exit status: 0 if turnstile's side had no failure and lost no row, 1 if not, 2 if the demo could not be run,
128 and the signal's number if a signal stopped it.";

/// Arguments of `turnstile demo`.
#[derive(clap::Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct DemoArgs {
    /// How long the processes of each timed workload write.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Keep the directory with the databases and the broker's log, and say where it is.
    #[arg(long)]
    keep: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: DemoArgs) -> ExitCode {
    match demo(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(stop) => {
            say(format_args!("turnstile demo: {stop}"));
            match stop {
                Stop::Signal(signal) => ExitCode::from(128 + signal as u8),
                Stop::Failed(_) => ExitCode::from(2),
            }
        }
    }
}

/// Runs everything and prints the result; whether turnstile's side was flawless.
fn demo(args: &DemoArgs) -> Result<bool, Stop> {
    let signals = Signals::take()?;
    let programs = Programs::find(&signals)?;
    let directory = make_directory(args.keep)?;
    let mut broker = Broker::start(&programs.turnstile, directory.path(), &signals)?;
    let stage = Stage {
        programs: &programs,
        signals: &signals,
        directory: directory.path(),
        socket: &broker.socket,
        seconds: args.seconds,
    };
    let results = perform(&stage)?;
    let report = Report { seconds: args.seconds, results, broker: broker.fault() };
    drop(broker);
    let kept = args.keep.then(|| directory.path());
    let text = match args.json {
        true => format!("{:#}", report.json(&programs, kept)),
        false => format!("\n{}", report.table()),
    };
    let _ = writeln!(io::stdout(), "{text}");
    Ok(report.is_good())
}

/// Runs each workload that can be run, on both sides, and says so.
fn perform(stage: &Stage) -> Result<Vec<(Workload, Side, outcome::Outcome)>, Stop> {
    let here: Vec<_> = Workload::ALL.into_iter().filter(|w| w.missing(stage.programs).is_none()).collect();
    for workload in Workload::ALL {
        if let Some(missing) = workload.missing(stage.programs) {
            say(format_args!("skipped: {}: {}.", workload.who(), missing.reason));
            say(format_args!("         To have it: {}.", missing.remedy));
        }
    }
    let phases = here.iter().flat_map(|w| Side::BOTH.map(|side| (*w, side)));
    let mut results = Vec::new();
    for (number, (workload, side)) in phases.enumerate() {
        let time = match workload {
            Workload::Shells => "about 1 s".to_owned(),
            _ => format!("{} s", stage.seconds),
        };
        let of = here.len() * 2;
        say(format_args!("[{}/{of}] {}, {} ({time})", number + 1, workload.who(), side.name()));
        results.push((workload, side, stage.run(workload, side)?));
    }
    Ok(results)
}

/// Removed when dropped, unless it is to be kept.
fn make_directory(keep: bool) -> Result<TempDir, Stop> {
    let made = tempfile::Builder::new().prefix("turnstile-demo-").disable_cleanup(keep).tempdir();
    let directory = made.map_err(Stop::doing("cannot make a temporary directory (TMPDIR chooses where)"))?;
    if keep {
        say(format_args!("the demo's files are kept in {}", directory.path().display()));
    }
    Ok(directory)
}

/// A broker for the demo's databases alone. Dropped, it is ended.
struct Broker {
    process: Process,
    socket: PathBuf,
    log: PathBuf,
}

impl Broker {
    /// Starts it and waits until it listens.
    fn start(program: &Path, directory: &Path, signals: &Signals) -> Result<Broker, Stop> {
        const LIMIT: Duration = Duration::from_secs(10);
        let (socket, log) = (directory.join("broker.sock"), directory.join("broker.log"));
        let start = || {
            let (ready, tell) = io::pipe()?;
            fcntl(&ready, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            let mut command = cleaned(Command::new(program));
            command.arg("serve").arg("--socket").arg(&socket).args(["--everyone", "no", "--ready-fd"]);
            command.arg(tell.as_raw_fd().to_string());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
            let number = tell.as_raw_fd();
            // SAFETY: one system call between fork and exec, on a descriptor that `tell` keeps open.
            unsafe {
                command.pre_exec(move || {
                    fcntl(BorrowedFd::borrow_raw(number), FcntlArg::F_SETFD(FdFlag::empty()))?;
                    Ok(())
                });
            }
            Ok((ready, Process::start(&mut command, Signal::SIGTERM)?))
        };
        let (mut ready, process) = start().map_err(Stop::doing::<io::Error>("cannot start the broker"))?;
        let mut broker = Broker { process, socket, log };
        let until = Instant::now() + LIMIT;
        while broker.process.ended().is_none() && Instant::now() < until {
            signals.wait(until, Some(ready.as_fd()))?;
            if ready.read(&mut [0]).is_ok_and(|n| n == 1) {
                return Ok(broker);
            }
        }
        Err(Stop::Failed(format!("the broker did not start: {}", broker.last_words())))
    }

    /// It should still be there when the work is done.
    fn fault(&mut self) -> Option<String> {
        let (status, _) = self.process.ended()?;
        Some(format!("the broker ended before its time ({status}): {}", self.last_words()))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().next_back().unwrap_or("its log is empty").to_owned()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process.end(Duration::from_secs(5));
    }
}

/// A line on standard error; nobody may be listening.
fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
