//! The workloads, on plain SQLite and on turnstile.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::outcome::{LOCKED, Outcome, Tally, milliseconds};
use super::programs::{Missing, Programs};
use super::worker::BUSY_TIMEOUT;
use crate::cli::processes::{Finished, Group, Signals, Stop, cleaned};

const SHELLS: usize = 16;
const WRITERS: usize = 8;
/// How much longer than its work a process may take to start, and to end, before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);
const TABLE: &str = "CREATE TABLE IF NOT EXISTS rows(worker INTEGER, seq INTEGER)";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    Shells,
    Python,
    Linked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Plain,
    Turnstile,
}

impl Side {
    pub const BOTH: [Side; 2] = [Side::Plain, Side::Turnstile];

    pub fn name(self) -> &'static str {
        match self {
            Side::Plain => "plain",
            Side::Turnstile => "turnstile",
        }
    }
}

impl Workload {
    pub const ALL: [Workload; 3] = [Workload::Shells, Workload::Python, Workload::Linked];

    pub fn name(self) -> &'static str {
        match self {
            Workload::Shells => "shells",
            Workload::Python => "python",
            Workload::Linked => "linked",
        }
    }

    /// Its processes, in a few words.
    pub fn who(self) -> String {
        match self {
            Workload::Shells => format!("{SHELLS} sqlite3 shells"),
            Workload::Python => format!("{WRITERS} Python processes"),
            Workload::Linked => format!("{WRITERS} programs with SQLite linked in"),
        }
    }

    /// Its processes and what they do, in less than 100 columns.
    pub fn description(self, seconds: u64) -> String {
        let who = self.who();
        match self {
            Workload::Shells => {
                format!("{who} start at once on one new file: set WAL mode, create a table, insert a row")
            }
            Workload::Python => format!("{who} insert a row per commit for {seconds} s, no busy timeout"),
            Workload::Linked => {
                let timeout = BUSY_TIMEOUT.as_secs();
                format!("{who} insert a row per commit for {seconds} s, busy timeout {timeout} s")
            }
        }
    }

    /// Why it cannot be run here.
    pub fn missing(self, programs: &Programs) -> Option<&Missing> {
        match self {
            Workload::Shells => programs.shell.as_ref().err(),
            Workload::Python => programs.python.as_ref().err(),
            Workload::Linked => None,
        }
    }
}

/// Where workloads are run: a directory, and the broker that turnstile's side uses.
pub struct Stage<'a> {
    pub programs: &'a Programs,
    pub signals: &'a Signals,
    pub directory: &'a Path,
    pub socket: &'a Path,
    pub seconds: u64,
}

/// One run of one workload on one side: its database and its processes' files are in a directory of its own.
struct Run<'a> {
    stage: &'a Stage<'a>,
    workload: Workload,
    side: Side,
    directory: PathBuf,
    database: PathBuf,
}

impl Stage<'_> {
    pub fn run(&self, workload: Workload, side: Side) -> Result<Outcome, Stop> {
        let directory = self.directory.join(format!("{}-{}", workload.name(), side.name()));
        let database = directory.join("app.db");
        let run = Run { stage: self, workload, side, directory, database };
        let group = run.prepare().and_then(|()| Group::start(run.commands()?));
        let group = group.map_err(Stop::doing(format!("cannot start {}", workload.who())))?;
        let finished = group.run(self.signals, PATIENCE + Duration::from_secs(self.seconds))?;
        let mut outcome = Outcome::of(&run.results(&finished));
        let last = finished.endings.iter().flatten().map(|(_, at)| *at).max();
        outcome.seconds = last.map_or(0.0, |at| at.duration_since(finished.began).as_secs_f64());
        match rows(&run.database) {
            Ok(rows) => outcome.rows = Some(rows),
            Err(e) => outcome.problems.push(format!("the rows cannot be counted afterwards: {e}")),
        }
        Ok(outcome)
    }
}

impl Run<'_> {
    /// Makes the directory and, where the processes find a database there, that.
    fn prepare(&self) -> io::Result<()> {
        fs::create_dir(&self.directory)?;
        if self.workload != Workload::Shells {
            let made = Connection::open(&self.database)
                .and_then(|db| db.execute_batch(&format!("PRAGMA journal_mode=wal; {TABLE}")));
            made.map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn commands(&self) -> io::Result<Vec<Command>> {
        let count = if self.workload == Workload::Shells { SHELLS } else { WRITERS };
        (0..count).map(|number| self.command(number)).collect()
    }

    fn command(&self, number: usize) -> io::Result<Command> {
        let programs = self.stage.programs;
        let mut command = match (self.workload, &programs.shell, &programs.python) {
            (Workload::Shells, Ok(shell), _) => self.shell(&shell.path, number),
            (Workload::Python, _, Ok(python)) => self.python(&python.path, number)?,
            _ => self.linked(number),
        };
        if self.side == Side::Turnstile {
            command.env("TURNSTILE_SOCKET", self.stage.socket);
        }
        command.stderr(File::create(self.file(number, "err"))?);
        Ok(command)
    }

    /// `sh` waits for the common start, then becomes the shell. The shell stops at its first error.
    fn shell(&self, program: &Path, number: usize) -> Command {
        const WAIT: &str = r#"echo ready; read -r go; exec "$@" >"$0" 2>&1"#;
        let mut command = cleaned(Command::new("/bin/sh"));
        command.args(["-c", WAIT]).arg(self.file(number, "out")).arg(program);
        command.args(["-batch", "-bail", "-init", "/dev/null"]).arg(&self.database);
        if self.side == Side::Turnstile {
            command.arg(format!(".load {}", quoted(&self.stage.programs.library)));
        }
        command.arg(format!("PRAGMA journal_mode=wal; {TABLE}; INSERT INTO rows VALUES({number}, 0)"));
        command
    }

    fn python(&self, program: &Path, number: usize) -> io::Result<Command> {
        let script = self.stage.directory.join("worker.py");
        fs::write(&script, include_str!("worker.py"))?;
        let mut command = cleaned(Command::new(program));
        command.arg("-I").arg(script).arg(&self.database);
        command.args([number.to_string(), self.stage.seconds.to_string()]);
        match self.side {
            Side::Plain => command.arg(""),
            Side::Turnstile => command.arg(&self.stage.programs.library),
        };
        Ok(command)
    }

    fn linked(&self, number: usize) -> Command {
        let mut command = cleaned(Command::new(&self.stage.programs.turnstile));
        command.arg("demo-worker").arg(&self.database);
        command.args([number.to_string(), self.stage.seconds.to_string()]);
        if self.side == Side::Turnstile {
            command.arg("--turnstile");
        }
        command
    }

    fn file(&self, number: usize, kind: &str) -> PathBuf {
        self.directory.join(format!("{number}.{kind}"))
    }

    /// Each process's tally, or why it has none.
    fn results(&self, finished: &Finished) -> Vec<Result<Tally, String>> {
        let said: HashMap<usize, Tally> = finished
            .lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Tally>(line).ok())
            .map(|tally| (tally.number, tally))
            .collect();
        let of = |(number, ending): (usize, &Option<(ExitStatus, Instant)>)| {
            let Some((status, at)) = ending else { return Err("did not end, and was killed".to_owned()) };
            if self.workload == Workload::Shells {
                let output = fs::read(self.file(number, "out")).unwrap_or_default();
                let output = String::from_utf8_lossy(&output);
                return Ok(shell_tally(number, *status, &output, at.duration_since(finished.began)));
            }
            let tally = said.get(&number).cloned();
            let tally = tally.ok_or_else(|| format!("{status}: {}", last_line(&self.file(number, "err"))))?;
            Ok(self.checked(tally))
        };
        finished.endings.iter().enumerate().map(of).collect()
    }

    /// A process that turnstile did not serve proves nothing.
    fn checked(&self, mut tally: Tally) -> Tally {
        let mode = tally.mode.as_deref().unwrap_or("none");
        if self.side == Side::Turnstile && mode != "gated" && tally.error.is_none() {
            tally.error = Some(format!("it ended in mode '{mode}', not 'gated'"));
        }
        tally
    }
}

/// A shell's work is one attempt: one that failed has failed, whatever it had done before. Its wait is its life.
fn shell_tally(number: usize, status: ExitStatus, output: &str, life: Duration) -> Tally {
    let locked = output.contains(LOCKED);
    let committed = status.success() && !locked;
    let error = (!locked && !committed).then(|| {
        let last = output.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing");
        format!("{status}: {last}")
    });
    let ms = milliseconds(life);
    Tally {
        number,
        attempts: 1,
        committed: committed.into(),
        locked: locked.into(),
        worst_wait_ms: ms,
        worst_attempt_ms: ms,
        mode: None,
        error,
    }
}

/// A file name as an argument of a dot command (`resolve_backslashes`, shell.c).
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('\\', "\\\\").replace('"', "\\\""))
}

fn last_line(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing").to_owned()
}

/// The rows in a database, counted by plain SQLite: this process never registers the extension.
fn rows(database: &Path) -> rusqlite::Result<u64> {
    let db = Connection::open(database)?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    let count = |sql| db.query_row(sql, [], |row| row.get::<_, i64>(0)).map(|n| n as u64);
    if count("SELECT count(*) FROM sqlite_schema WHERE name = 'rows'")? == 0 {
        return Ok(0);
    }
    let check: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if check != "ok" {
        return Err(rusqlite::Error::ToSqlConversionFailure(format!("integrity_check: {check}").into()));
    }
    count("SELECT count(*) FROM rows")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn shell(code: i32, output: &str) -> Tally {
        shell_tally(0, ExitStatus::from_raw(code << 8), output, Duration::ZERO)
    }

    #[test]
    fn a_shell_that_saw_a_lock_has_failed_even_if_it_ended_well() {
        let tally = shell(0, "Error: database is locked\nwal\n");
        assert_eq!((tally.attempts, tally.committed, tally.locked, tally.error), (1, 0, 1, None));
    }

    #[test]
    fn another_failure_of_a_shell_is_told_in_its_own_words() {
        let tally = shell(1, "wal\nError: disk I/O error\n\n");
        assert_eq!((tally.committed, tally.locked), (0, 0));
        assert!(tally.error.unwrap().ends_with("disk I/O error"));
    }

    #[test]
    fn paths_with_quotes_reach_the_shell_whole() {
        assert_eq!(quoted(Path::new(r#"/a b/"c"\d"#)), r#""/a b/\"c\"\\d""#);
    }
}
