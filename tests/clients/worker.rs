//! A client in Rust: rusqlite with its own SQLite linked in. See README.md.

use rusqlite::{Connection, LoadExtensionGuard};
use serde_json::json;
use std::fs::OpenOptions;
use std::io::{Write, stdin};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

fn status(db: &Connection) -> Option<String> {
    db.query_row("PRAGMA turnstile_status", [], |row| row.get(0)).ok()
}

fn load(db: &Connection, extension: &str) -> rusqlite::Result<()> {
    // SAFETY: the extension under test; nothing else is loaded while the guard lives.
    unsafe {
        let _guard = LoadExtensionGuard::new(db)?;
        db.load_extension(extension, None::<&str>)
    }
}

/// Every other pair of rows is written in a transaction of its own, which is rolled back when it is dropped.
fn insert(db: &mut Connection, worker: &str, seq: i64) -> rusqlite::Result<()> {
    const ROW: &str = "INSERT INTO rows VALUES(?1, ?2)";
    if seq % 4 < 2 {
        db.execute(ROW, (worker, seq))?;
        return Ok(());
    }
    let transaction = db.transaction()?;
    transaction.execute(ROW, (worker, seq))?;
    transaction.commit()
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, worker, rows, record] = &arguments[..] else { return Err("worker DB ID ROWS RECORD".into()) };
    let seconds = std::env::var("WORKER_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60.0);
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let rows: i64 = rows.parse()?;
    let mut first = Connection::open(path)?;
    if let Ok(extension) = std::env::var("TURNSTILE_EXTENSION") {
        load(&first, &extension)?;
    }
    let mut second = Connection::open(path)?;
    let timeout = std::env::var("WORKER_TIMEOUT").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    for db in [&first, &second] {
        db.busy_timeout(Duration::from_millis(timeout))?; // rusqlite sets five seconds by itself
    }
    let states = [status(&first), status(&second)];
    println!("ready");
    stdin().read_line(&mut String::new())?;

    let (mut attempts, mut committed, mut busy) = (0, 0, 0);
    let mut log = OpenOptions::new().create(true).append(true).open(record)?;
    while committed < rows && Instant::now() < end {
        let db = if committed % 2 == 0 { &mut first } else { &mut second };
        attempts += 1;
        match insert(db, worker, committed) {
            Ok(()) => {
                log.write_all(format!("{worker} {committed}\n").as_bytes())?;
                committed += 1;
            }
            Err(e) if e.to_string().contains("locked") => busy += 1,
            Err(e) => return Err(e.into()),
        }
    }
    let seen: i64 = first.query_row("SELECT count(*) FROM rows WHERE worker = ?1", [worker], |r| r.get(0))?;
    drop((second, first));
    println!(
        "{}",
        json!({ "worker": worker, "attempts": attempts, "committed": committed, "busy": busy, "seen": seen,
                "client": "rusqlite", "sqlite": rusqlite::version(), "status": states })
    );
    Ok(())
}
