//! `turnstile bench`: the same work on plain SQLite and on turnstile, measured by turns on this machine.
//!
//! * [`workloads`]: what is run. [`stage`]: one run of it, in a directory of its own. [`files`]: its databases,
//!   and whether they hold what was acknowledged.
//! * [`worker`]: a process of a run. [`operations`]: what it does, in SQL. [`meter`]: what that took. [`task`]: what
//!   passes between it and us.
//! * [`outcome`]: what the processes did together. [`environment`]: where. [`report`], [`table`], [`chart`]: the result.

mod chart;
mod environment;
mod files;
mod meter;
mod operations;
mod outcome;
mod report;
mod stage;
mod table;
mod task;
pub mod worker;
mod workloads;

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::own_broker::Broker;
use super::processes::{Signals, Stop};
use environment::{Environment, Place};
use outcome::Runs;
use report::{Comparison, Report};
use stage::Stage;
use task::Side;
use workloads::{Case, Counts};

const AFTER_HELP: &str = "\
Each workload is run on plain SQLite and on turnstile, by turns and on new files. Both sides are processes of this
program with its own SQLite; on turnstile's side they use a broker that the benchmark starts for itself.

  turnstile bench --quick                                 a first look, in half a minute
  turnstile bench --only insert-full --processes 1,8      one question, three rounds a side
  turnstile bench --dir /srv/data --json result.json --svg result.svg
                                                          everything, on the disk that matters

After every run the rows in the file are compared with those that were acknowledged.

Exit status: 0 if every check passed, 1 if rows were lost or came twice, a worker died, or turnstile's side met an
error other than BUSY; 2 if the benchmark could not be run; 128 and the signal's number if a signal stopped it.";

/// Arguments of `turnstile bench`.
#[derive(clap::Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// Where the databases are made and removed. Default: the current directory, /var/tmp or TMPDIR, the first
    /// that is on a disk.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Only the workload of this name, or those with this in their names. May be given several times.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// How many processes, for example 1,2,8. Workloads with a fixed number keep it.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_count)]
    processes: Vec<usize>,
    /// How long each run is measured, after a warm-up. Default: 2, with --quick 0.5.
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// How often each workload is run on each side. Default: 3, with --quick 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// One short round, with 1 and 2 processes, without the workloads that need many.
    #[arg(long)]
    quick: bool,
    /// Busy timeout of both sides (sqlite3_busy_timeout). Default: 5000 for plain SQLite's writers, else 0.
    #[arg(long, value_name = "MS")]
    busy_timeout: Option<u32>,
    /// Write everything as JSON to FILE; to standard output if it is '-', and the table to standard error.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a chart of the ratios to FILE.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print the workloads and what they are.
    #[arg(long)]
    list: bool,
}

fn parse_count(text: &str) -> Result<usize, String> {
    // The broker has 1,024 seats a database.
    let count = text.trim().parse().ok().filter(|n| (1..=1000).contains(n));
    count.ok_or_else(|| "expected numbers from 1 to 1000, such as 1,2,8".into())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|s| (0.05..=3600.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds, from 0.05 to 3600".into())
}

pub fn run(args: BenchArgs) -> ExitCode {
    if args.list {
        let _ = writeln!(io::stdout(), "{}", list());
        return ExitCode::SUCCESS;
    }
    match bench(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(stop) => {
            let _ = writeln!(io::stderr(), "turnstile bench: {stop}");
            match stop {
                Stop::Signal(signal) => ExitCode::from(128 + signal as u8),
                Stop::Failed(_) => ExitCode::from(2),
            }
        }
    }
}

fn list() -> String {
    let lines = workloads::ALL.iter().map(|w| {
        let counts = match w.counts {
            Counts::Usually(counts) => counts.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
            Counts::Always(count) => format!("always {count}"),
        };
        let (journal, synchronous) = (format!("{:?}", w.journal), format!("{:?}", w.synchronous));
        let modes = format!("{journal} {synchronous}").to_uppercase();
        let (name, about, words) = (w.name, w.about, w.operation.words());
        format!("{name}\n    {about}\n    {words}\n    {modes}; processes: {counts}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Runs everything and prints the result; whether all checks passed.
fn bench(args: &BenchArgs) -> Result<bool, Stop> {
    let cases = workloads::choose(&args.only, &args.processes, args.quick).map_err(Stop::Failed)?;
    let (seconds, rounds) = if args.quick { (0.5, 1) } else { (2.0, 3) };
    let rounds = args.rounds.unwrap_or(rounds) as usize;
    let signals = Signals::take()?;
    let program = env::current_exe().map_err(Stop::doing("cannot find this program's own file"))?;
    let place = Place::choose(args.dir.as_deref()).map_err(Stop::Failed)?;
    let environment = Environment::find(&place).map_err(Stop::Failed)?;
    // Not beside the databases: a socket's name has room for 107 bytes.
    let directory = tempfile::Builder::new().prefix("turnstile-bench-").tempdir();
    let directory = directory.map_err(Stop::doing("cannot make a temporary directory for the broker"))?;
    let mut broker = Broker::start(&program, directory.path(), &signals)?;
    let stage = Stage {
        program: &program,
        signals: &signals,
        directory: place.directory.path(),
        socket: &broker.socket.clone(),
        measured: args.seconds.unwrap_or(Duration::from_secs_f64(seconds)),
        busy_timeout_ms: args.busy_timeout,
    };
    let mut report = Report {
        environment,
        seconds: stage.measured.as_secs_f64(),
        warm_up_seconds: stage.warm_up().as_secs_f64(),
        rounds,
        quick: args.quick,
        only: args.only.clone(),
        processes: args.processes.clone(),
        busy_timeout_ms: args.busy_timeout,
        results: Vec::new(),
    };
    let printer = Printer::new(args.json.as_deref() == Some(Path::new("-")), cases.len() * rounds * 2);
    printer.print(&format!("{}\n{}", report.environment.line(), announcement(&report, cases.len())));
    printer.print(&table::header());
    for case in cases {
        let result = compare(&stage, case, rounds, &mut broker, &printer)?;
        printer.print(&table::line(&result));
        report.results.push(result);
    }
    printer.end();
    printer.print(&table::footer(&report));
    deliver(args, &report)?;
    Ok(report.is_good())
}

/// One case: plain, turnstile, turnstile, plain, and so on, so that neither side has the better half of a disk's or
/// a neighbour's mood.
fn compare(
    stage: &Stage,
    case: Case,
    rounds: usize,
    broker: &mut Broker,
    printer: &Printer,
) -> Result<Comparison, Stop> {
    let (mut plain, mut turnstile) = (Runs::default(), Runs::default());
    for round in 0..rounds {
        let turns = [Side::Plain, Side::Turnstile];
        for side in if round % 2 == 0 { turns } else { [turns[1], turns[0]] } {
            printer.doing(format!("{}, n = {}, {}", case.workload.name, case.processes, side.name()));
            let run = stage.run(case, side)?;
            printer.done();
            if let Some(fault) = broker.fault() {
                return Err(Stop::Failed(fault));
            }
            let runs = if side == Side::Plain { &mut plain } else { &mut turnstile };
            runs.0.push(run);
        }
    }
    let busy_timeout_ms = [Side::Plain, Side::Turnstile].map(|side| stage.busy_timeout_ms(case, side, 0));
    Ok(Comparison { case, plain, turnstile, busy_timeout_ms })
}

fn announcement(report: &Report, cases: usize) -> String {
    let Report { seconds, warm_up_seconds, rounds, .. } = report;
    // Making the files and checking them, and starting the workers, takes some 0.15 s more.
    let estimate = (cases * rounds * 2) as f64 * (seconds + warm_up_seconds + 0.15);
    let estimate =
        if estimate < 90.0 { format!("{estimate:.0} s") } else { format!("{:.0} minutes", estimate / 60.0) };
    format!("{rounds} x {seconds} s a side, about {estimate} in all\n")
}

fn deliver(args: &BenchArgs, report: &Report) -> Result<(), Stop> {
    let write = |file: &Path, text: String| {
        fs::write(file, text).map_err(Stop::doing(format!("cannot write {}", file.display())))
    };
    match args.json.as_deref() {
        Some(file) if file == Path::new("-") => {
            let _ = writeln!(io::stdout(), "{:#}", report.json());
        }
        Some(file) => write(file, format!("{:#}\n", report.json()))?,
        None => {}
    }
    args.svg.as_deref().map_or(Ok(()), |file| write(file, chart::svg(report)))
}

/// The table, and on a terminal a progress bar below it.
struct Printer {
    bar: ProgressBar,
    to_stderr: bool,
}

impl Printer {
    fn new(to_stderr: bool, runs: usize) -> Printer {
        // Draws on standard error, and nothing if that is no terminal.
        let bar = ProgressBar::new(runs as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left: {msg}");
        bar.set_style(style.expect("a template that indicatif knows").progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(500));
        Printer { bar, to_stderr }
    }

    fn print(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = if self.to_stderr {
                writeln!(io::stderr(), "{text}")
            } else {
                writeln!(io::stdout(), "{text}")
            };
        });
    }

    fn doing(&self, what: String) {
        self.bar.set_message(what);
    }

    fn done(&self) {
        self.bar.inc(1);
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
