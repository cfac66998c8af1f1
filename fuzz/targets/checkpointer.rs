//! The checkpointer, with a wal-index, a WAL, a database and a control page of which any byte may be anything.

#![no_main]

/// The program's own, but for its loop.
#[allow(dead_code)]
#[path = "../../src/checkpointer"]
mod checkpointer {
    pub mod job;
    pub mod vfs;
    pub mod work;
}

use arbitrary::Arbitrary;
use checkpointer::job::Job;
use checkpointer::work::{Broker, Work};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use turnstile::segment::layout::{CONTROL_SIZE, REGION_SIZE, WAL_INDEX_SIZE};
use turnstile::segment::mapping::ControlMap;
use turnstile::segment::memfd;
use turnstile_fuzz::places::{Place, Value};
use turnstile_fuzz::{directory, within};

const NONCE: u64 = 7;

/// What is changed before, or between, checkpoints.
#[derive(Arbitrary, Debug)]
enum Op {
    Control(Place, Value),
    /// A word of the index's head, which is then given its checksum.
    Head(u8, u32),
    Index(u16, Vec<u8>),
    Wal(u32, Vec<u8>),
    Database(u32, Vec<u8>),
    /// So many bytes of the WAL, or of the database, are left.
    CutWal(u32),
    CutDatabase(u32),
    SameWal,
    Checkpoint,
}

/// A database, its WAL and the first regions of its wal-index, as SQLite left them.
struct Files {
    database: Vec<u8>,
    wal: Vec<u8>,
    index: Vec<u8>,
}

fn made(rows: u32) -> Files {
    let directory = directory();
    let path = directory.path().join("a.db");
    let db = rusqlite::Connection::open(&path).expect("a database");
    db.execute_batch(
        "PRAGMA page_size=512; PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; CREATE TABLE t(a, b)",
    )
    .expect("made");
    for n in 0..rows {
        db.execute("INSERT INTO t VALUES(?, hex(randomblob(100)))", [n]).expect("a row");
    }
    let read = |suffix: &str| std::fs::read(directory.path().join(format!("a.db{suffix}"))).expect("a file");
    Files { database: read(""), wal: read("-wal"), index: read("-shm") }
}

/// A small WAL, and one that is worth a turn.
fn files(large: bool) -> &'static Files {
    static FILES: OnceLock<[Files; 2]> = OnceLock::new();
    &FILES.get_or_init(|| [made(30), made(1100)])[usize::from(large)]
}

/// A file with a name: a WAL without one is an old one.
fn file_of(name: &str, bytes: &[u8]) -> (File, OwnedFd) {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let path = DIRECTORY.get_or_init(directory).path().join(name);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).expect("a file");
    file.write_all_at(bytes, 0).expect("written");
    let fd = file.try_clone().expect("a copy").into();
    (file, fd)
}

/// The checksum of the index's first header, for both copies.
fn sum(index: &File) {
    let mut head = [0u8; 48];
    index.read_exact_at(&mut head, 0).expect("a head");
    let word = |i: usize| u32::from_ne_bytes(head[4 * i..4 * i + 4].try_into().expect("four bytes"));
    let (mut a, mut b) = (0u32, 0u32);
    for i in (0..10).step_by(2) {
        a = a.wrapping_add(word(i)).wrapping_add(b);
        b = b.wrapping_add(word(i + 1)).wrapping_add(a);
    }
    head[40..44].copy_from_slice(&a.to_ne_bytes());
    head[44..48].copy_from_slice(&b.to_ne_bytes());
    for at in [0, 48] {
        index.write_all_at(&head, at).expect("written");
    }
}

fuzz_target!(|input: (bool, Vec<Op>)| {
    let (large, ops) = input;
    let files = files(large);
    static REGISTERED: OnceLock<()> = OnceLock::new();
    REGISTERED.get_or_init(|| checkpointer::vfs::register().expect("registered"));
    let control = memfd::create(c"control", CONTROL_SIZE).expect("a memfd");
    let index_fd = memfd::create(c"index", WAL_INDEX_SIZE).expect("a memfd");
    let map = ControlMap::create(&control, NONCE).expect("mapped");
    let regions = files.index.len().div_ceil(REGION_SIZE) as u32;
    map.grow(&index_fd, regions).expect("grown");
    // Another member has the wal-index open.
    let table = turnstile::lock::table::Table::of(map.control().expect("our layout"));
    table.members.set(1);
    table.set_wal_open(1, true);
    table.words.file.0.probation.store(u32::MAX, turnstile::segment::atomic::SeqCst);
    let index = File::from(index_fd.try_clone().expect("a copy"));
    index.write_all_at(&files.index, 0).expect("written");
    let (database, database_fd) = file_of("a.db", &files.database);
    let (wal, wal_fd) = file_of("a.db-wal", &files.wal);
    let again = wal_fd.try_clone().expect("a copy");
    let scribbled = control.try_clone().expect("a copy");
    within(Duration::from_secs(5), "a checkpoint", || {
        let broker = Arc::new(Broker::new(File::open("/dev/null").expect("null").into()));
        let work = Work::new(1, NONCE, vec![control, index_fd, database_fd], &broker).expect("all is there");
        {
            let mut job = Job::new(&work);
            job.take_wal(wal_fd);
            for op in ops.iter().take(64) {
                match op {
                    Op::Control(place, value) => place.scribble(&scribbled, value.number()),
                    Op::Head(word, value) => {
                        let at = 4 * u64::from(word % 34);
                        index.write_all_at(&value.to_ne_bytes(), at).expect("written");
                        sum(&index);
                    }
                    Op::Index(at, bytes) => index.write_all_at(bytes, u64::from(*at)).expect("written"),
                    Op::Wal(at, bytes) => {
                        let at = u64::from(*at) % (files.wal.len() as u64 + 512);
                        wal.write_all_at(bytes, at).expect("written");
                    }
                    Op::Database(at, bytes) => {
                        let at = u64::from(*at) % (files.database.len() as u64 + 512);
                        database.write_all_at(bytes, at).expect("written");
                    }
                    Op::CutWal(length) => wal.set_len(u64::from(*length) % (1 << 20)).expect("cut"),
                    Op::CutDatabase(length) => database.set_len(u64::from(*length) % (1 << 20)).expect("cut"),
                    Op::SameWal => job.take_wal(again.try_clone().expect("a copy")),
                    Op::Checkpoint => drop(job.checkpoint()),
                }
            }
            job.checkpoint();
        }
    });
});
