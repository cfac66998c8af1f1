//! `turnstile demo-worker`: one process of the demo that has its SQLite linked in, as many programs do. It does
//! what `worker.py` does, with the busy timeout of five seconds that such programs usually set.

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::outcome::{LOCKED, Tally, milliseconds};
use crate::cli::linked;

pub const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(clap::Args, Debug)]
pub struct WorkerArgs {
    path: PathBuf,
    number: usize,
    seconds: f64,
    /// Register the extension with this program's SQLite
    #[arg(long)]
    turnstile: bool,
}

pub fn run(args: WorkerArgs) -> ExitCode {
    let printed =
        work(&args).and_then(|tally| Ok(writeln!(io::stdout(), "{}", serde_json::to_string(&tally)?)?));
    if let Err(e) = &printed {
        let _ = writeln!(io::stderr(), "{e}");
    }
    if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn work(args: &WorkerArgs) -> Result<Tally, Box<dyn Error>> {
    let db = open(&args.path, args.turnstile)?;
    let mut insert = db.prepare("INSERT INTO rows VALUES(?1, ?2)")?;
    let mut tally = Tally { number: args.number, ..Tally::default() };
    writeln!(io::stdout(), "ready")?;
    io::stdin().read_to_end(&mut Vec::new())?; // ends for all processes at the same moment

    let mut now = Instant::now();
    let mut wanted = now;
    let end = now + Duration::from_secs_f64(args.seconds);
    while now < end && tally.error.is_none() {
        let began = now;
        let written = insert.execute((args.number as i64, tally.committed as i64));
        now = Instant::now();
        tally.worst_attempt_ms = tally.worst_attempt_ms.max(milliseconds(now - began));
        tally.worst_wait_ms = tally.worst_wait_ms.max(milliseconds(now - wanted));
        match written {
            Ok(_) => {
                tally.committed += 1;
                wanted = now;
            }
            Err(e) if e.to_string().contains(LOCKED) => tally.locked += 1,
            Err(e) => tally.error = Some(e.to_string()),
        }
        tally.attempts += 1;
    }
    drop(insert);
    tally.mode = linked::mode(&db)?;
    Ok(tally)
}

fn open(path: &Path, turnstile: bool) -> Result<Connection, Box<dyn Error>> {
    if turnstile {
        linked::register()?;
    }
    let db = Connection::open(path)?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    Ok(db)
}
