//! The databases of a run: made before it and compared with what was acknowledged after it, both by plain SQLite.
//! The process that does this never registers the extension.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use turnstile::planted::planted;

use super::task::{DATABASE, OTHER, Tally};
use super::workloads::{Journal, Operation, Workload};

/// Rows to read: 1.2 MB, which stays in every connection's page cache.
pub const ITEMS: i64 = 10_000;

/// While turnstile's members leave, and while the broker finds out about those that were killed.
const PATIENCE: Duration = Duration::from_secs(10);

fn names(workload: &Workload) -> &'static [&'static str] {
    if workload.operation == Operation::Attach { &[DATABASE, OTHER] } else { &[DATABASE] }
}

/// Makes them in the workload's journal mode, with nothing left in a WAL.
pub fn make(workload: &Workload, directory: &Path) -> rusqlite::Result<()> {
    let journal = match workload.journal {
        Journal::Wal => "WAL",
        Journal::Delete => "DELETE",
    };
    for name in names(workload) {
        let db = Connection::open(directory.join(name))?;
        db.execute_batch(&format!(
            "PRAGMA journal_mode = {journal};
             BEGIN;
             CREATE TABLE items(id INTEGER PRIMARY KEY, text TEXT NOT NULL);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ITEMS})
             INSERT INTO items SELECT i, printf('%0100d', i) FROM n;
             CREATE TABLE rows(worker INTEGER NOT NULL, seq INTEGER NOT NULL);
             CREATE TABLE counter(id INTEGER PRIMARY KEY, value INTEGER NOT NULL);
             INSERT INTO counter VALUES(1, 0);
             COMMIT;"
        ))?;
        db.close().map_err(|(_, e)| e)?;
    }
    Ok(())
}

/// What was found afterwards.
#[derive(Debug, Default)]
pub struct Found {
    /// Rows, or the counter's value. `None`: the workload writes nothing, or it could not be read.
    pub written: Option<u64>,
    /// In what it is not what was acknowledged.
    pub faults: Vec<String>,
}

/// Compares the databases with what the measured processes say was acknowledged, in the order of their numbers.
pub fn check(workload: &Workload, directory: &Path, tallies: &[Tally]) -> Found {
    let acknowledged: Vec<u64> = tallies.iter().map(|t| t.acknowledged).collect();
    let mut rows = HashMap::new();
    let mut counter = 0;
    let mut faults = Vec::new();
    for name in names(workload) {
        let read = open(&directory.join(name)).and_then(|db| {
            if planted("bench-row-lost") {
                db.execute_batch("DELETE FROM rows WHERE rowid = 1; UPDATE counter SET value = value - 1")?;
            }
            add_rows(&db, &mut rows)?;
            counter = db.query_row("SELECT value FROM counter", [], |row| row.get::<_, i64>(0))? as u64;
            db.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))
        });
        match read.as_deref() {
            Ok("ok") => {}
            Ok(damage) => faults.push(format!("{name}: integrity_check: {damage}")),
            Err(e) => faults.push(format!("{name} cannot be read afterwards: {e}")),
        }
    }
    let writes = workload.operation.writes() || workload.beside.is_some_and(|(_, o)| o.writes());
    if !faults.is_empty() || !writes {
        return Found { written: None, faults };
    }
    if workload.operation == Operation::ReadWrite {
        let sum: u64 = acknowledged.iter().sum();
        if counter != sum {
            faults.push(format!("the counter is {counter}, and {sum} increments were acknowledged"));
        }
        return Found { written: Some(counter), faults };
    }
    let written = rows.values().map(|r| r.count).sum();
    for (number, acknowledged) in acknowledged.iter().enumerate() {
        let rows = rows.remove(&(number as i64)).unwrap_or_default();
        faults.extend(rows.fault(*acknowledged).map(|fault| format!("process {number}: {fault}")));
    }
    faults.extend(rows.keys().map(|stranger| format!("rows of a process {stranger} that there was not")));
    Found { written: Some(written), faults }
}

/// The rows of one process. It numbers what it writes from 0, and a number is used again until it is acknowledged.
#[derive(Debug, Default, Clone, Copy)]
struct Rows {
    count: u64,
    distinct: u64,
    /// One more than the highest number.
    end: u64,
}

impl Rows {
    fn fault(self, acknowledged: u64) -> Option<String> {
        let Rows { count, distinct, end } = self;
        let lost = acknowledged.saturating_sub(distinct);
        let (twice, extra) = (count - distinct, end.saturating_sub(acknowledged));
        (lost + twice + extra > 0 || count != acknowledged).then(|| {
            format!(
                "{acknowledged} rows were acknowledged and {count} are there: {lost} lost, {twice} there twice, \
                 {extra} that nobody acknowledged"
            )
        })
    }
}

fn add_rows(db: &Connection, rows: &mut HashMap<i64, Rows>) -> rusqlite::Result<()> {
    let sql = "SELECT worker, count(*), count(DISTINCT seq), max(seq) + 1 FROM rows GROUP BY worker";
    let mut statement = db.prepare(sql)?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let number = |column| row.get::<_, i64>(column).map(|n| n as u64);
        let sum = rows.entry(row.get(0)?).or_default();
        sum.count += number(1)?;
        sum.distinct += number(2)?;
        sum.end = sum.end.max(number(3)?);
    }
    Ok(())
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(PATIENCE)?;
    Ok(db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::workloads::named;

    fn tallies(acknowledged: &[u64]) -> Vec<Tally> {
        acknowledged.iter().map(|n| Tally { acknowledged: *n, ..Tally::default() }).collect()
    }

    fn faults(name: &str, sql: &str, acknowledged: &[u64]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let workload = named(name).unwrap();
        make(workload, directory.path()).unwrap();
        open(&directory.path().join(DATABASE)).unwrap().execute_batch(sql).unwrap();
        check(workload, directory.path(), &tallies(acknowledged)).faults
    }

    #[test]
    fn what_is_there_and_was_acknowledged_is_no_fault() {
        let sql = "INSERT INTO rows VALUES(0, 0), (1, 0), (0, 1)";
        for name in ["insert-full", "insert-delete-full", "mirrored-attach"] {
            assert_eq!(faults(name, sql, &[2, 1]), [""; 0]);
        }
        assert_eq!(faults("read-write", "UPDATE counter SET value = 3", &[1, 2]), [""; 0]);
        assert_eq!(faults("select", "SELECT 1", &[10, 10]), [""; 0]);
    }

    #[test]
    fn every_difference_is_one() {
        let lost = faults("insert-full", "INSERT INTO rows VALUES(0, 1)", &[2]);
        assert!(lost[0].contains("1 lost, 0 there twice, 0 that"), "{lost:?}");
        let all_lost = faults("insert-full", "SELECT 1", &[2]);
        assert!(all_lost[0].contains("2 lost"), "{all_lost:?}");
        let twice = faults("insert-full", "INSERT INTO rows VALUES(0, 0), (0, 0)", &[1]);
        assert!(twice[0].contains("0 lost, 1 there twice"), "{twice:?}");
        let extra = faults("insert-full", "INSERT INTO rows VALUES(0, 0), (0, 1)", &[1]);
        assert!(extra[0].contains("1 that nobody acknowledged"), "{extra:?}");
        assert_eq!(faults("insert-full", "INSERT INTO rows VALUES(7, 0)", &[0]).len(), 1);
        assert_eq!(faults("read-write", "UPDATE counter SET value = 4", &[1, 2]).len(), 1);
    }
}
