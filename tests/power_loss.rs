//! The model behind the check of power losses (tests/power/check): a checker that calls too much certain, or that
//! does not see what is wrong with an image, would find every program right.

#![allow(dead_code, reason = "the modules are the checker's, which uses the rest")]

#[path = "power/check/disk.rs"]
mod disk;
#[path = "power/check/expected.rs"]
mod expected;
#[path = "power/check/image.rs"]
mod image;
#[path = "power/check/judge.rs"]
mod judge;
#[path = "power/check/log.rs"]
mod log;

use disk::Disk;
use expected::Expected;
use image::{Chance, Image};
use log::{Event, Record};
use rusqlite::{Connection, params};
use std::collections::BTreeSet;
use std::path::Path;

const FILE: u32 = 1;

struct Events(Vec<Event<'static>>);

impl Record for Events {
    fn count(&self) -> u64 {
        self.0.len() as u64
    }

    fn event(&self, number: u64) -> Result<Event<'_>, String> {
        Ok(self.0[number as usize])
    }
}

/// A file named "f" whose creation is certain, and then `events`, the first of which is record 3.
fn played(events: &[Event<'static>]) -> Disk {
    let first = [Event::Create { file: FILE, name: "f" }, Event::SyncDir, Event::End { begin: 1, result: 0 }];
    let mut disk = Disk::default();
    for (number, event) in first.iter().chain(events).enumerate() {
        disk.play(number as u64, *event).unwrap();
    }
    disk
}

fn write(offset: u64, data: &'static [u8]) -> Event<'static> {
    Event::Write { file: FILE, offset, data }
}

fn end(begin: u64, result: i32) -> Event<'static> {
    Event::End { begin, result }
}

/// What a power loss may leave of "f", of many tries.
fn outcomes(disk: &Disk) -> BTreeSet<Option<Vec<u8>>> {
    (0..2_000).map(|seed| image::make(disk, &mut Chance::new(&[seed])).remove("f")).collect()
}

fn only(bytes: &[u8]) -> BTreeSet<Option<Vec<u8>>> {
    BTreeSet::from([Some(bytes.to_vec())])
}

#[test]
fn a_write_is_certain_after_a_sync_that_began_after_it() {
    let sync = Event::Sync { file: FILE };
    let synced = [write(0, b"new"), end(3, 3), sync, end(5, 0)];
    assert_eq!(outcomes(&played(&synced)), only(b"new"));
    let running = [write(0, b"new"), end(3, 3), sync];
    assert!(outcomes(&played(&running)).contains(&Some(vec![])));
    let beside = [write(0, b"new"), sync, end(3, 3), end(4, 0)];
    assert!(outcomes(&played(&beside)).contains(&Some(vec![])));
}

#[test]
fn what_a_failed_sync_has_lost_no_later_one_saves() {
    let sync = Event::Sync { file: FILE };
    let failed = [write(0, b"new"), end(3, 3), sync, end(5, -5), sync, end(7, 0)];
    assert!(outcomes(&played(&failed)).contains(&Some(vec![])));
    let again = [&failed[..4], &[write(0, b"new"), end(7, 3), sync, end(9, 0)]].concat();
    assert_eq!(outcomes(&played(&again)), only(b"new"));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let events =
        [write(0, b"new"), end(3, -28), write(0, b"abc"), end(5, 2), Event::Sync { file: FILE }, end(7, 0)];
    assert_eq!(outcomes(&played(&events)), only(b"ab"));
}

#[test]
fn a_sector_is_old_or_new() {
    const OLD: &[u8] = &[1; 1600];
    const NEW: &[u8] = &[2; 1000];
    let events =
        [write(0, OLD), end(3, 1600), Event::Sync { file: FILE }, end(5, 0), write(500, NEW), end(7, 1000)];
    let found = outcomes(&played(&events));
    assert_eq!(found.len(), 8, "each of the three sectors that it touches by itself");
    for bytes in found.into_iter().flatten() {
        for part in [0..500, 500..512, 512..1024, 1024..1500, 1500..1600] {
            let part = &bytes[part];
            assert!(part.iter().all(|b| *b == part[0]), "a torn sector");
        }
        assert!(bytes[..500].iter().chain(&bytes[1500..]).all(|b| *b == 1), "bytes that nobody wrote");
    }
}

#[test]
fn a_later_write_is_not_undone_by_an_earlier_one() {
    // The first sync fails, so the old write stays uncertain for ever; the new one is synced.
    let sync = Event::Sync { file: FILE };
    let events =
        [write(0, b"oooo"), end(3, 4), sync, end(5, -5), write(1, b"nn"), end(7, 2), sync, end(9, 0)];
    for bytes in outcomes(&played(&events)).into_iter().flatten() {
        assert_eq!(bytes[1..3], *b"nn");
    }
}

#[test]
fn sizes_change_with_their_sync() {
    let sync = Event::Sync { file: FILE };
    let cut =
        [write(0, b"abcd"), end(3, 4), sync, end(5, 0), Event::Truncate { file: FILE, size: 1 }, end(7, 0)];
    let both = BTreeSet::from([Some(b"abcd".to_vec()), Some(b"a".to_vec())]);
    assert_eq!(outcomes(&played(&cut)), both);
    assert_eq!(outcomes(&played(&[&cut[..], &[sync, end(9, 0)]].concat())), only(b"a"));
}

#[test]
fn names_are_certain_after_a_sync_of_the_directory() {
    let unlink = Event::Unlink { name: "f" };
    let both = BTreeSet::from([None, Some(vec![])]);
    assert_eq!(outcomes(&played(&[unlink])), both);
    assert_eq!(outcomes(&played(&[unlink, Event::SyncDir])), both);
    assert_eq!(outcomes(&played(&[unlink, Event::SyncDir, end(4, 0)])), BTreeSet::from([None]));
    // A file made anew under the name: the old one, none, or the new one.
    let again = [write(0, b"old"), end(3, 3), Event::Sync { file: FILE }, end(5, 0), unlink];
    let again = [&again[..], &[Event::Create { file: 2, name: "f" }]].concat();
    assert_eq!(outcomes(&played(&again)), BTreeSet::from([None, Some(vec![]), Some(b"old".to_vec())]));
}

#[test]
fn an_image_is_its_seed() {
    let disk = played(&[write(0, &[7; 4000]), end(3, 4000)]);
    let image = |seed| image::make(&disk, &mut Chance::new(&[seed, 5, 6]));
    assert!((0..50).all(|seed| image(seed) == image(seed)));
}

// --- the judgement of an image --------------------------------------------------------------------------------

/// Two workers: worker 0 was acknowledged its transaction 1 as the first of all, worker 1 its 1 as the second; a
/// reader has seen a third.
const NOTES: &[&str] = &["workload w durable atomic app.db", "ready", "ack 0 1 1", "ack 1 1 2", "saw 3"];

fn expected(notes: &[&'static str]) -> Expected {
    Expected::of(&Events(notes.iter().map(|text| Event::Note(text)).collect())).unwrap()
}

/// A database after three transactions, as workloads.py leaves it.
fn database(directory: &Path) -> Connection {
    let db = Connection::open(directory.join("app.db")).unwrap();
    db.execute_batch(
        "CREATE TABLE meta(id INTEGER PRIMARY KEY, n INTEGER);
         CREATE TABLE slot(worker INTEGER, i INTEGER, seq INTEGER, pad TEXT, PRIMARY KEY(worker, i));
         CREATE TABLE filler(id INTEGER PRIMARY KEY, n INTEGER, pad TEXT);
         INSERT INTO meta VALUES(1, 3);",
    )
    .unwrap();
    for (worker, seq) in [(0, 2), (1, 1)] {
        for i in 0..3 {
            set(&db, worker, i, seq);
        }
    }
    db
}

fn set(db: &Connection, worker: i64, i: i64, seq: i64) {
    let text = judge::pad(&format!("{worker}.{i}.{seq};"), (seq * 37 + i * 101 + worker * 13) % 700);
    db.execute("REPLACE INTO slot VALUES(?, ?, ?, ?)", params![worker, i, seq, text]).unwrap();
}

/// The verdict on a database that `change` has spoilt, after all notes.
fn verdict(notes: &[&'static str], change: impl Fn(&Connection)) -> Result<Option<i64>, String> {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path());
    change(&db);
    drop(db);
    judge::judge(directory.path(), &expected(notes), notes.len() as u64)
}

#[track_caller]
fn refused(change: impl Fn(&Connection), why: &str) {
    let verdict = verdict(NOTES, change);
    assert!(verdict.as_ref().is_err_and(|e| e.contains(why)), "{verdict:?} instead of {why:?}");
}

#[test]
fn a_right_image_passes() {
    assert_eq!(verdict(NOTES, |_| {}), Ok(Some(3)));
}

#[test]
fn a_lost_transaction_is_noticed() {
    let lose_third = |db: &Connection| {
        (0..3).for_each(|i| set(db, 0, i, 1));
        db.execute("UPDATE meta SET n = 2", []).unwrap();
    };
    refused(lose_third, "3 was acknowledged or seen, but 2 is there");
    // Nobody has seen it, or nothing is promised: then it may be gone.
    assert_eq!(verdict(&NOTES[..4], lose_third), Ok(Some(2)));
    let normal = [&["workload w prefix atomic app.db"], &NOTES[1..]].concat();
    assert_eq!(verdict(&normal, lose_third), Ok(Some(2)));
}

#[test]
fn a_gap_in_the_order_is_noticed() {
    // Worker 1's acknowledged transaction is missing, though a later one of worker 0 is there.
    refused(
        |db| (0..3).for_each(|i| (set(db, 0, i, 3), set(db, 1, i, 0)).0),
        "transaction 1 of worker 1, which came before, is missing",
    );
}

#[test]
fn half_a_transaction_is_noticed() {
    refused(|db| set(db, 0, 1, 1), "half there");
    refused(|db| drop(db.execute("UPDATE meta SET n = 4", [])), "3 transactions are there");
    refused(|db| drop(db.execute("UPDATE slot SET pad = 'x' WHERE worker = 1 AND i = 2", [])), "holds");
    refused(|db| drop(db.execute("INSERT INTO filler VALUES(1, 5, 'x')", [])), "filler 0");
}

#[test]
fn a_missing_or_broken_database_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let judged = |position| judge::judge(directory.path(), &expected(NOTES), position);
    assert_eq!(judged(1), Ok(None), "nothing is owed yet");
    assert!(judged(2).is_err_and(|e| e.contains("is not there")));
    let path = directory.path().join("app.db");
    drop(database(directory.path()));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096..4200].fill(0x5a);
    judge::put(&Image::from([("app.db".to_owned(), bytes)]), directory.path()).unwrap();
    assert!(judged(5).is_err_and(|e| e.contains("integrity_check")));
}

#[test]
fn a_transaction_in_one_file_alone_is_noticed() {
    let notes = ["workload w durable atomic app.db other.db", "ready", "ack 0 1 1"];
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path());
    drop(db);
    std::fs::copy(directory.path().join("app.db"), directory.path().join("other.db")).unwrap();
    let verdict = || judge::judge(directory.path(), &expected(&notes), 3);
    assert_eq!(verdict(), Ok(Some(3)));
    let other = Connection::open(directory.path().join("other.db")).unwrap();
    (0..3).for_each(|i| set(&other, 0, i, 1));
    other.execute("UPDATE meta SET n = 2", []).unwrap();
    drop(other);
    assert!(verdict().is_err_and(|e| e.contains("in one database and not in the other")));
}
