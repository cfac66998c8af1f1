//! `turnstile demo`: the same work on plain SQLite and on turnstile, side by side, with whatever is found here.
//!
//! * [`programs`]: what is found. [`workloads`]: what is run with it. [`worker`] and `worker.py`: the processes
//!   that write.
//! * [`super::processes`]: starting them together, and ending all of them whatever happens. [`super::own_broker`]: the
//!   broker that they use.
//! * [`outcome`]: what they did. [`report`]: the table.

mod outcome;
mod programs;
mod report;
pub mod worker;
mod workloads;

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use tempfile::TempDir;

use super::own_broker::Broker;
use super::processes::{Signals, Stop};
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

/// A line on standard error; nobody may be listening.
fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
