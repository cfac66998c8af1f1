//! Puts an image where the databases were, opens it with plain SQLite, which recovers it, and judges what is there.

use super::expected::{Closed, Expected};
use super::image::Image;
use rusqlite::{Connection, OpenFlags};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

/// Writes the image's files into `directory`, and removes all others.
pub fn put(image: &Image, directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !image.contains_key(&*entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    for (name, bytes) in image {
        fs::write(directory.join(name), bytes)?;
    }
    Ok(())
}

/// The image of a closed database without its WAL, which nobody must need; and nobody must read, if it has ended.
pub fn alone(mut image: Image, expected: &Expected, position: u64) -> Result<Image, String> {
    /// The WAL's magic number, but for its lowest bit (wal.c `WAL_MAGIC`).
    const MAGIC: [u8; 3] = [0x37, 0x7f, 0x06];
    if let Some(wal) = image.iter().find(|(name, _)| name.ends_with("-wal")).map(|(_, bytes)| bytes)
        && expected.closed_at(position) == Closed::Ended
        && wal.starts_with(&MAGIC)
    {
        return Err("a WAL that a recovery would read lies beside a closed database".into());
    }
    image.retain(|name, _| !name.ends_with("-wal"));
    Ok(image)
}

/// What is wrong with the image in `directory`, left by a power loss just before record `position`.
/// `Ok`: the counter that was found, if the databases were there.
pub fn judge(directory: &Path, expected: &Expected, position: u64) -> Result<Option<i64>, String> {
    let workload = &expected.workload;
    let mut found = BTreeSet::new();
    let mut ready = false;
    for (n, file) in workload.files.iter().enumerate() {
        let owed = expected.owed_at(position, n == 0);
        ready |= owed.is_some();
        let counter = one_database(&directory.join(file), expected, position, ready)
            .map_err(|e| format!("{file}: {e}"))?;
        let durable = workload.durable || expected.closed_at(position) != Closed::Open;
        if durable && counter < owed {
            return Err(format!(
                "{file}: {} was acknowledged or seen, but {} is there",
                owed.unwrap_or_default(),
                counter.unwrap_or_default()
            ));
        }
        found.insert(counter);
    }
    if workload.atomic && found.len() > 1 && ready {
        return Err(format!("a transaction is in one database and not in the other: {found:?}"));
    }
    Ok(found.first().copied().flatten())
}

/// The database's counter; `None` if it is not complete yet, which it must be if `ready`.
fn one_database(path: &Path, expected: &Expected, position: u64, ready: bool) -> Result<Option<i64>, String> {
    if !path.exists() {
        return if ready { Err("is not there".into()) } else { Ok(None) };
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(|e| format!("open: {e}"))?;
    let integrity: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .map_err(|e| format!("integrity_check: {e}"))?;
    if integrity != "ok" {
        return Err(format!("integrity_check: {}", integrity.replace('\n', "; ")));
    }
    let counter = match db.query_row("SELECT n FROM meta", [], |r| r.get::<_, i64>(0)) {
        Ok(counter) => counter,
        Err(e) if ready => return Err(format!("the counter: {e}")),
        Err(_) => return Ok(None),
    };
    rows(&db, expected, position, counter).map_err(|e| format!("counter {counter}: {e}"))?;
    fillers(&db, counter).map_err(|e| format!("counter {counter}: {e}"))?;
    db.close().map_err(|(_, e)| format!("close: {e}"))?;
    Ok(Some(counter))
}

/// The workers' rows: each worker's all of one transaction, and together as many transactions as were counted.
fn rows(db: &Connection, expected: &Expected, position: u64, counter: i64) -> Result<(), String> {
    let mut rows = db
        .prepare("SELECT worker, i, seq, pad FROM slot ORDER BY worker, i")
        .map_err(|e| format!("the rows: {e}"))?;
    let rows = rows
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?)))
        .map_err(|e| format!("the rows: {e}"))?;
    let (mut sum, mut last) = (0, None);
    for row in rows {
        let (worker, i, seq, text): (i64, i64, i64, String) = row.map_err(|e| format!("a row: {e}"))?;
        if text != pad(&format!("{worker}.{i}.{seq};"), (seq * 37 + i * 101 + worker * 13) % 700) {
            return Err(format!("row {worker}.{i} of transaction {seq} holds {text:.30}..."));
        }
        match last {
            Some((before, half)) if before == worker && half != seq => {
                return Err(format!("worker {worker}'s transaction {half} is half there (and {seq})"));
            }
            Some((before, _)) if before == worker => {}
            _ => {
                sum += seq;
                expected.fits(position, counter, worker, seq)?;
            }
        }
        last = Some((worker, seq));
    }
    if sum != counter {
        return Err(format!("{sum} transactions are there"));
    }
    Ok(())
}

/// The rows that every fifth transaction throws away and writes anew.
fn fillers(db: &Connection, counter: i64) -> Result<(), String> {
    let of = counter - counter % 5;
    let mut rows =
        db.prepare("SELECT n, pad FROM filler ORDER BY id").map_err(|e| format!("fillers: {e}"))?;
    let rows = rows.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).map_err(|e| format!("fillers: {e}"))?;
    let mut count = 0;
    for row in rows {
        let (n, text): (i64, String) = row.map_err(|e| format!("a filler: {e}"))?;
        if n != of || text != pad(&format!("f{n}.{count};"), 400) {
            return Err(format!("filler {count} is of transaction {n}, not {of}, and holds {text:.30}..."));
        }
        count += 1;
    }
    let right = if of == 0 { 0 } else { of / 5 % 8 * 3 };
    if count != right {
        return Err(format!("{count} fillers instead of {right}"));
    }
    Ok(())
}

/// `text` over and over, `length + 20` characters of it.
pub fn pad(text: &str, length: i64) -> String {
    text.chars().cycle().take(length as usize + 20).collect()
}
