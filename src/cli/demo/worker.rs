//! `turnstile demo-worker`: one process of the demo that has its SQLite linked in, as many programs do. It does
//! what `worker.py` does, with the busy timeout of five seconds that such programs usually set.

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ffi};

use super::outcome::{LOCKED, Tally, milliseconds};

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
    tally.mode = if args.turnstile { Some(mode(&db)?) } else { None };
    Ok(tally)
}

fn open(path: &Path, turnstile: bool) -> Result<Connection, Box<dyn Error>> {
    if turnstile {
        register()?;
    }
    let db = Connection::open(path)?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    Ok(db)
}

/// Gives the extension to this program's SQLite, for every connection that it opens from now on.
fn register() -> Result<(), String> {
    type EntryPoint =
        unsafe extern "C" fn(*mut ffi::sqlite3, *mut *mut i8, *const ffi::sqlite3_api_routines) -> i32;
    // SAFETY: the two types differ in the name of a pointer alone; the function is there for this call.
    let rc = unsafe {
        let entry: EntryPoint = std::mem::transmute(turnstile::vfs::entry::turnstile_auto_init as *const ());
        ffi::sqlite3_auto_extension(Some(entry))
    };
    if rc == ffi::SQLITE_OK { Ok(()) } else { Err(format!("sqlite3_auto_extension failed ({rc})")) }
}

/// How turnstile serves this connection: `gated`, unless something is wrong.
fn mode(db: &Connection) -> Result<String, Box<dyn Error>> {
    let status: String = db.query_row("PRAGMA turnstile_status", [], |row| row.get(0))?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    Ok(status["mode"].as_str().unwrap_or("none").to_owned())
}
