//! What each operation is, in SQL: the same for both sides.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, Statement, params};

use super::files::ITEMS;
use super::meter::measure;
use super::task::{DATABASE, OTHER, Tally, Task, Window, now};
use super::workloads::{Operation, Synchronous, Workload};

const SELECT: &str = "SELECT text FROM items WHERE id = ?1";
const INSERT: &str = "INSERT INTO rows VALUES(?1, ?2)";

type Worked = Result<Tally, Box<dyn Error>>;
/// Looks at the connection, and returns when all processes are ready.
pub type Ready<'a> = &'a mut dyn FnMut(&Connection) -> Result<Window, Box<dyn Error>>;

/// One process's work.
pub struct Work<'a> {
    pub task: &'a Task,
    pub workload: &'static Workload,
    pub directory: &'a Path,
}

impl Work<'_> {
    /// Opens the database, prepares, and works.
    pub fn perform(&self, operation: Operation, ready: Ready) -> Worked {
        let db = self.open()?;
        if self.task.number == 0 {
            // A WAL with something in it, as a database in use has: with an empty one a reader asks for the size
            // of the file each time (pagerPagecount, pager.c), which takes as long as all the rest.
            db.pragma_update(None, "user_version", 1)?;
        }
        match operation {
            Operation::Select { others } => self.select(&db, others, ready),
            Operation::Insert => self.insert(&db, 0, ready),
            Operation::InsertAndPause { ms } => self.insert(&db, ms, ready),
            Operation::Immediate => self.immediate(&db, ready),
            Operation::ReadWrite => self.read_write(&db, ready),
            Operation::Open { same_process } => self.open_and_close(db, same_process, ready),
            Operation::OpenInsert => self.open_and_insert(db, ready),
            Operation::Attach => self.attach(&db, ready),
            Operation::Fill => self.fill(&db, ready),
            Operation::Hold { connections } => self.hold(&db, connections, ready),
        }
    }

    /// A connection that is set up. Until the work begins it may wait: the first one to open recovers the WAL's
    /// index, and the others would fail.
    pub fn open(&self) -> rusqlite::Result<Connection> {
        let db = Connection::open(self.path(0))?;
        db.busy_timeout(Duration::from_secs(30))?;
        db.pragma_update(None, "synchronous", self.synchronous())?;
        Ok(db)
    }

    /// What the busy timeout is while it works, by sqlite3_busy_timeout() as most drivers set it.
    pub fn limit_waits(&self, db: &Connection) -> rusqlite::Result<()> {
        db.busy_timeout(Duration::from_millis(self.task.busy_timeout_ms.into()))
    }

    /// The database that this process has as main, or the other one.
    fn path(&self, other: usize) -> PathBuf {
        let swapped = if self.workload.operation == Operation::Attach { self.task.number % 2 } else { 0 };
        self.directory.join(if swapped == other { DATABASE } else { OTHER })
    }

    fn synchronous(&self) -> &'static str {
        match self.workload.synchronous {
            Synchronous::Normal => "NORMAL",
            Synchronous::Full => "FULL",
        }
    }

    fn worker(&self) -> i64 {
        self.task.number as i64
    }

    fn select(&self, db: &Connection, others: usize, ready: Ready) -> Worked {
        let others = (0..others).map(|n| db.prepare(&format!("SELECT text FROM items WHERE id = ?1 + {n}")));
        let _cached = others.collect::<Result<Vec<_>, _>>()?;
        let mut select = db.prepare(SELECT)?;
        let mut ids = Ids::new(self.task.number);
        let window = ready(db)?;
        Ok(measure(window, Operation::Select { others: 0 }.sampling(), |_| read(&mut select, ids.next())))
    }

    fn insert(&self, db: &Connection, pause_ms: u64, ready: Ready) -> Worked {
        let mut insert = db.prepare(INSERT)?;
        let window = ready(db)?;
        Ok(measure(window, 1, |seq| {
            insert.execute((self.worker(), seq as i64))?;
            if pause_ms > 0 {
                std::thread::sleep(Duration::from_millis(pause_ms));
            }
            Ok(())
        }))
    }

    fn immediate(&self, db: &Connection, ready: Ready) -> Worked {
        let mut transaction = Transaction::new(db, "BEGIN IMMEDIATE")?;
        let mut insert = db.prepare(INSERT)?;
        let window = ready(db)?;
        Ok(measure(window, 1, |seq| {
            transaction.run(|| insert.execute((self.worker(), seq as i64)).map(drop))
        }))
    }

    fn read_write(&self, db: &Connection, ready: Ready) -> Worked {
        let mut transaction = Transaction::new(db, "BEGIN")?;
        let mut select = db.prepare("SELECT value FROM counter WHERE id = 1")?;
        let mut update = db.prepare("UPDATE counter SET value = ?1 WHERE id = 1")?;
        let window = ready(db)?;
        Ok(measure(window, 1, |_| {
            transaction.run(|| {
                let value = select.query_row([], |row| row.get::<_, i64>(0))?;
                update.execute([value + 1]).map(drop)
            })
        }))
    }

    fn open_and_close(&self, db: Connection, same_process: bool, ready: Ready) -> Worked {
        let mut ids = Ids::new(self.task.number);
        read(&mut db.prepare(SELECT)?, ids.next())?;
        let window = ready(&db)?;
        let mut db = Some(db);
        if !same_process && let Some(db) = db.take() {
            close(db)?;
        }
        Ok(measure(window, 1, |_| {
            let db = Connection::open(self.path(0))?;
            self.limit_waits(&db)?;
            read(&mut db.prepare(SELECT)?, ids.next())?;
            close(db)
        }))
    }

    fn open_and_insert(&self, db: Connection, ready: Ready) -> Worked {
        let window = ready(&db)?;
        close(db)?;
        Ok(measure(window, 1, |seq| {
            let db = Connection::open(self.path(0))?; // FULL is what SQLite does unasked
            self.limit_waits(&db)?;
            db.prepare(INSERT)?.execute((self.worker(), seq as i64))?;
            close(db)
        }))
    }

    fn attach(&self, db: &Connection, ready: Ready) -> Worked {
        let other = self.path(1);
        db.execute("ATTACH ?1 AS b", [other.to_str().ok_or("the directory's name is not UTF-8")?])?;
        db.pragma_update(Some("b"), "synchronous", self.synchronous())?;
        let mut copy = db.prepare("INSERT INTO b.rows SELECT ?1, ?2 FROM main.items WHERE id = ?3")?;
        let mut ids = Ids::new(self.task.number);
        let window = ready(db)?;
        Ok(measure(window, 1, |seq| copy.execute((self.worker(), seq as i64, ids.next())).map(drop)))
    }

    fn fill(&self, db: &Connection, ready: Ready) -> Worked {
        db.execute_batch("CREATE TEMP TABLE fill(n INTEGER, total INTEGER)")?;
        let mut clear = db.prepare("DELETE FROM temp.fill")?;
        let mut fill = db.prepare(
            "WITH RECURSIVE pass(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM pass WHERE n < ?1)
             INSERT INTO temp.fill SELECT n, (SELECT sum(length(text) + n) FROM main.items) FROM pass",
        )?;
        // How many passes over the table take that long; the first time fills the page cache.
        const PROBE: u64 = 20;
        fill.execute([PROBE as i64])?;
        let began = now();
        fill.execute([PROBE as i64])?;
        let passes = PROBE * u64::from(self.task.fill_ms) * 1_000_000 / (now() - began).max(1);
        let window = ready(db)?;
        Ok(measure(window, 1, |_| {
            clear.execute([])?;
            fill.execute(params![passes.max(1) as i64]).map(drop)
        }))
    }

    fn hold(&self, db: &Connection, connections: usize, ready: Ready) -> Worked {
        let mut ids = Ids::new(self.task.number);
        read(&mut db.prepare(SELECT)?, ids.next())?;
        let mut idle = Vec::new();
        for _ in 1..connections {
            let db = self.open()?;
            read(&mut db.prepare(SELECT)?, ids.next())?;
            idle.push(db);
        }
        let window = ready(db)?;
        std::thread::sleep(Duration::from_nanos(window.end.saturating_sub(now())));
        Ok(Tally::default())
    }
}

/// BEGIN, something, COMMIT; ROLLBACK if any of it failed.
struct Transaction<'c> {
    db: &'c Connection,
    begin: Statement<'c>,
    commit: Statement<'c>,
    rollback: Statement<'c>,
}

impl<'c> Transaction<'c> {
    fn new(db: &'c Connection, begin: &str) -> rusqlite::Result<Self> {
        let (begin, commit, rollback) = (db.prepare(begin)?, db.prepare("COMMIT")?, db.prepare("ROLLBACK")?);
        Ok(Transaction { db, begin, commit, rollback })
    }

    fn run(&mut self, work: impl FnOnce() -> rusqlite::Result<()>) -> rusqlite::Result<()> {
        self.begin.execute([])?;
        let done = work().and_then(|()| self.commit.execute([]).map(drop));
        if done.is_err() && !self.db.is_autocommit() {
            self.rollback.execute([])?;
        }
        done
    }
}

fn read(select: &mut Statement, id: i64) -> rusqlite::Result<()> {
    select.query_row([id], |row| row.get_ref(0).map(drop))
}

fn close(db: Connection) -> rusqlite::Result<()> {
    db.close().map_err(|(_, e)| e)
}

/// Rowids in no order, the same ones at every run (Marsaglia's xorshift).
struct Ids(u64);

impl Ids {
    fn new(worker: usize) -> Ids {
        Ids(0x9E37_79B9_7F4A_7C15 ^ (worker as u64 + 1))
    }

    fn next(&mut self) -> i64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % ITEMS as u64) as i64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_there_and_differ() {
        let mut ids = Ids::new(3);
        let seen: std::collections::HashSet<i64> = (0..1000).map(|_| ids.next()).collect();
        assert!(seen.len() > 900 && seen.iter().all(|id| (1..=ITEMS).contains(id)), "{}", seen.len());
    }
}
