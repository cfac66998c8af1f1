//! A member in Rust, with its own SQLite linked in: plays a deck (README.md beside this file) and writes down what it
//! does.
//!
//!     chaos DECK LOG ID SEQ OFFSET

use rusqlite::types::Value;
use rusqlite::{Connection, LoadExtensionGuard};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, exit};
use std::time::Duration;

struct Member {
    database: String,
    initial: Vec<String>,
    entries: Vec<Vec<(u8, String)>>,
    log: File,
    worker: i64,
    seq: i64,
    read: i64,
    offset: f64,
    db: Option<Connection>,
    taken: Vec<File>,
}

fn told_to_end() -> bool {
    let mut input = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, on the stack.
    unsafe { libc::poll(&mut input, 1, 0) > 0 }
}

fn code(e: &rusqlite::Error) -> i32 {
    match e {
        rusqlite::Error::SqliteFailure(e, _) => e.extended_code,
        rusqlite::Error::SqlInputError { error, .. } => error.extended_code,
        _ => 1,
    }
}

/// SQLite's answer says that the transaction was not made: BUSY, LOCKED, FULL, SCHEMA.
fn certain(code: i32) -> bool {
    [5, 6, 13, 17].contains(&(code & 255))
}

impl Member {
    fn now(&self) -> f64 {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `t` is on the stack.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
        t.tv_sec as f64 + t.tv_nsec as f64 / 1e9 - self.offset
    }

    fn note(&self, text: &str) {
        let mut line: String = text.replace('\n', " ").chars().take(500).collect();
        line.push('\n');
        (&self.log).write_all(line.as_bytes()).expect("the log");
    }

    fn failed(&self, since: f64, entry: i64, step: i64, e: &rusqlite::Error) {
        self.note(&format!("e {since:.6} {:.6} {} {entry} {step} {} {e}", self.now(), self.seq, code(e)));
    }

    fn open_once(&self) -> rusqlite::Result<(Connection, String)> {
        let db = Connection::open(&self.database)?;
        db.set_prepared_statement_cache_capacity(200);
        db.busy_timeout(Duration::ZERO)?;
        if let Ok(extension) = std::env::var("TURNSTILE_EXTENSION") {
            // SAFETY: the extension under test; nothing else is loaded while the guard lives.
            unsafe {
                let _guard = LoadExtensionGuard::new(&db)?;
                db.load_extension(extension, None::<&str>)?;
            }
        }
        for sql in &self.initial {
            db.execute_batch(sql)?;
        }
        let status = db.query_row("PRAGMA turnstile_status", [], |row| row.get::<_, String>(0));
        let mode = match status {
            Ok(text) => serde_json::from_str::<serde_json::Value>(&text)
                .ok()
                .and_then(|v| v["mode"].as_str().map(str::to_owned))
                .unwrap_or_default(),
            Err(rusqlite::Error::QueryReturnedNoRows) => "none".to_owned(),
            Err(e) => return Err(e),
        };
        Ok((db, mode))
    }

    fn open(&mut self, entry: i64) -> bool {
        while !told_to_end() {
            let since = self.now();
            match self.open_once() {
                Ok((db, mode)) => {
                    self.db = Some(db);
                    self.note(&format!("o {since:.6} {:.6} {mode}", self.now()));
                    return true;
                }
                Err(e) => self.failed(since, entry, -1, &e),
            }
            self.taken.clear();
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    }

    fn close(&mut self) {
        if let Some(Err((_, e))) = self.db.take().map(Connection::close) {
            self.note(&format!("v {:.6} close: {e}", self.now()));
        }
    }

    fn run(&mut self, what: u8, sql: &str) -> rusqlite::Result<()> {
        let db = self.db.as_ref().expect("open");
        let mut statement = db.prepare_cached(sql)?;
        for (name, value) in [(":w", self.worker), (":s", self.seq), (":r", self.read)] {
            if let Some(at) = statement.parameter_index(name)? {
                statement.raw_bind_parameter(at, value)?;
            }
        }
        let columns = statement.column_count();
        let mut rows = statement.raw_query();
        let mut first = None;
        while let Some(row) = rows.next()? {
            if first.is_none() && columns > 0 {
                first = Some(row.get::<_, Value>(0)?);
            }
        }
        match (what, first) {
            (b'R', Some(Value::Integer(n))) => self.read = n,
            (b'E', Some(value)) if value != Value::Integer(0) => {
                self.note(&format!("v {:.6} {} seen {value:?}: {sql}", self.now(), self.seq));
            }
            _ => {}
        }
        Ok(())
    }

    /// The child of a fork in the middle of a transaction. It never returns.
    fn child(&mut self, manner: &str) -> ! {
        // SAFETY: the process has one thread; alarm(2) touches no memory.
        unsafe { libc::alarm(25) };
        self.seq = -self.seq;
        let inherited = self.db.take().expect("open");
        let _ = match manner {
            "rollback" => inherited.execute_batch("ROLLBACK"),
            "commit" => inherited.execute_batch("COMMIT"),
            "use" => inherited.execute_batch("SELECT count(*) FROM rows; DELETE FROM bulk; COMMIT"),
            _ => Ok(()),
        };
        if ["close", "own"].contains(&manner) {
            drop(inherited);
        } else {
            std::mem::forget(inherited);
        }
        if manner.starts_with("own") {
            let since = self.now();
            match self.open_once() {
                Err(e) => self.failed(since, -1, -1, &e),
                Ok((db, _)) => {
                    self.db = Some(db);
                    self.note(&format!("b {:.6} {} -1", self.now(), self.seq));
                    match self.run(b'C', "INSERT INTO rows VALUES(:w, :s, 0, 'child')") {
                        Ok(()) => self.note(&format!("a {:.6} {}", self.now(), self.seq)),
                        Err(e) => {
                            self.failed(since, -1, 0, &e);
                            let outcome = if code(&e) & 255 == 5 { 'n' } else { 'u' };
                            self.note(&format!("{outcome} {:.6} {} {}", self.now(), self.seq, code(&e)));
                        }
                    }
                    let mine = self.db.take();
                    if manner == "own-exit" {
                        std::mem::forget(mine);
                    }
                }
            }
        }
        // SAFETY: no handler of the parent's may run in the child.
        unsafe { libc::_exit(0) }
    }

    fn fork(&mut self, manner: &str) {
        // SAFETY: the process has one thread, so the child may use everything.
        unsafe {
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
            if libc::fork() == 0 {
                self.child(manner);
            }
        }
    }

    fn play(&mut self, entry: usize) {
        self.seq += 1;
        let mut failure = 0;
        let mut asked = false;
        for (step, (what, text)) in self.entries[entry].clone().iter().enumerate() {
            match what {
                b'P' => std::thread::sleep(Duration::from_millis(text.parse().unwrap_or(0))),
                b'O' => {
                    self.close();
                    if !self.open(entry as i64) {
                        return;
                    }
                }
                b'F' => self.fork(text),
                b'X' => {
                    self.note(&format!("x {:.6}", self.now()));
                    let arguments: Vec<String> = std::env::args().collect();
                    let _ = Command::new("/proc/self/exe")
                        .args(&arguments[1..4])
                        .args([self.seq.to_string(), (entry + 1).to_string()])
                        .exec();
                }
                b'D' => {
                    while let Ok(file) = File::open("/dev/null") {
                        self.taken.push(file);
                    }
                    let left = self.taken.len().saturating_sub(text.parse().unwrap_or(0));
                    self.taken.truncate(left);
                }
                b'd' => self.taken.clear(),
                _ => {
                    let since = self.now();
                    if *what == b'C' {
                        self.note(&format!("b {since:.6} {} {entry}", self.seq));
                        asked = true;
                    }
                    if let Err(e) = self.run(*what, text) {
                        failure = code(&e);
                        self.failed(since, entry as i64, step as i64, &e);
                        if *what == b'C' {
                            let outcome = if certain(failure) { 'n' } else { 'u' };
                            self.note(&format!("{outcome} {:.6} {} {failure}", self.now(), self.seq));
                        }
                        break;
                    }
                    if *what == b'C' {
                        self.note(&format!("a {:.6} {}", self.now(), self.seq));
                    }
                    if self.now() - since > 0.5 {
                        self.note(&format!("s {since:.6} {:.6} {} {entry} {step}", self.now(), self.seq));
                    }
                }
            }
        }
        self.taken.clear();
        if let Some(db) = self.db.as_ref().filter(|db| !db.is_autocommit()) {
            let _ = db.execute_batch("ROLLBACK");
        }
        if failure != 0 {
            if ![5, 13].contains(&(failure & 255)) {
                self.close();
                self.open(entry as i64);
            }
        } else if !asked {
            self.note(&format!("r {:.6} {} {entry}", self.now(), self.seq));
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [deck, log, worker, seq, offset] = &arguments[..] else { exit(2) };
    let few = libc::rlimit { rlim_cur: 128, rlim_max: 128 };
    // SAFETY: the limit is on the stack.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) };
    let mut member = Member {
        database: String::new(),
        initial: Vec::new(),
        entries: Vec::new(),
        log: OpenOptions::new().create(true).append(true).open(log).expect("the log"),
        worker: worker.parse().expect("ID"),
        seq: seq.parse().expect("SEQ"),
        read: 0,
        offset: std::env::var("CHAOS_CLOCK_OFFSET").ok().and_then(|o| o.parse().ok()).unwrap_or(0.0),
        db: None,
        taken: Vec::new(),
    };
    for line in std::fs::read_to_string(deck).expect("the deck").lines() {
        let (what, text) = (line.as_bytes()[0], line.get(2..).unwrap_or_default());
        match (what, member.entries.last_mut()) {
            (b'M', _) => member.database = text.to_owned(),
            (b'T', _) => member.entries.push(Vec::new()),
            (_, Some(entry)) => entry.push((what, text.to_owned())),
            (_, None) => member.initial.push(text.to_owned()),
        }
    }
    if member.open(-1) {
        let mut entry = offset.parse::<usize>().expect("OFFSET") % member.entries.len();
        while member.db.is_some() && !told_to_end() {
            member.play(entry);
            entry = (entry + 1) % member.entries.len();
        }
        member.close();
    }
    member.note(&format!("q {:.6}", member.now()));
}
