//! `turnstile bench-worker`: one process of a benchmark. Both sides run this program with its own SQLite; on
//! turnstile's side the extension is registered with it first, and a worker that finds itself on the other side
//! than it was told refuses to measure.

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rusqlite::Connection;

use super::operations::Work;
use super::task::{self, Side, Tally, Task, Window, now};
use super::workloads;
use crate::cli::linked;

#[derive(clap::Args, Debug)]
pub struct WorkerArgs {
    /// The run's directory
    directory: PathBuf,
    /// A task, as JSON
    task: String,
}

pub fn run(args: WorkerArgs) -> ExitCode {
    let written = serde_json::from_str(&args.task).map_err(Into::into).and_then(|task: Task| {
        let tally = work(&task, &args)?;
        Ok::<_, Box<dyn Error>>(task::save(&task::result_file(&args.directory, task.number), &tally)?)
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(io::stderr(), "{e}");
            ExitCode::FAILURE
        }
    }
}

fn work(task: &Task, args: &WorkerArgs) -> Result<Tally, Box<dyn Error>> {
    let workload = workloads::named(&task.workload).ok_or("no such workload")?;
    let operation = match workload.beside {
        Some((_, operation)) if task.beside => operation,
        _ => workload.operation,
    };
    // A thousand connections have more descriptors than the usual limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    if task.side == Side::Turnstile {
        linked::register()?;
    }
    let work = Work { task, workload, directory: &args.directory };
    let tally = work.perform(operation, &mut |db| {
        confirm(db, task.side)?;
        work.limit_waits(db)?;
        writeln!(io::stdout(), "ready")?;
        io::stdin().read_to_end(&mut Vec::new())?; // ends for all processes at the same moment
        let window = Window::load(&args.directory)?;
        std::thread::sleep(Duration::from_nanos(window.start.saturating_sub(now())));
        Ok(window)
    })?;
    confirm(&work.open()?, task.side)?;
    Ok(tally)
}

/// Turnstile's side is gated, and plain SQLite knows nothing of turnstile: or the comparison means nothing.
fn confirm(db: &Connection, side: Side) -> Result<(), String> {
    let mode = linked::mode(db).map_err(|e| format!("turnstile_status: {e}"))?;
    match (side, mode.as_deref()) {
        (Side::Plain, None) | (Side::Turnstile, Some("gated")) => Ok(()),
        (Side::Plain, Some(mode)) => Err(format!("turnstile is in plain SQLite's way (mode '{mode}')")),
        (Side::Turnstile, mode) => Err(format!("not gated, but in mode '{}'", mode.unwrap_or("none"))),
    }
}
