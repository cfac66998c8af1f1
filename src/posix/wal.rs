//! What the durable commits of others need: members that load the extension publish a commit before its sync, which
//! several share (`lock::commits`). SQLite that is linked in syncs its own, under WRITE. So:
//!
//! * who takes WRITE waits until nothing is pending, and what follows is not counted: a sync that fails later cuts the
//!   WAL back to what is published, not to what was counted;
//! * no frame is read that is not on the disk, and so none is copied by a checkpoint.

use super::database::{Database, Seat};
use super::locks;
use super::table::{self, Kind};
use crate::client::repair::Finder;
use crate::lock::commits::Awaited;
use crate::planted::planted;
use nix::errno::Errno;
use nix::unistd::fdatasync;
use std::cell::Cell;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

/// How long others' sync is waited for where the WAL's descriptor is not known, so that none can be made here.
const SYNC_PATIENCE: Duration = Duration::from_secs(1);

/// The WAL as a seat knows it.
#[derive(Debug)]
pub struct Wal {
    fd: Cell<RawFd>,
    /// The newest commit that may be in the snapshot.
    snapshot: Cell<Option<Awaited>>,
}

impl Default for Wal {
    fn default() -> Wal {
        Wal { fd: Cell::new(-1), snapshot: Cell::new(None) }
    }
}

impl Wal {
    pub fn opened(&self, fd: RawFd) {
        self.fd.set(fd);
    }

    pub fn closed(&self, fd: RawFd) {
        if self.fd.get() == fd {
            self.fd.set(-1);
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: SQLite's own, which `closed` takes away before it is closed.
        (self.fd.get() >= 0).then(|| unsafe { BorrowedFd::borrow_raw(self.fd.get()) })
    }

    pub fn note_snapshot(&self, seat: &Seat) {
        self.snapshot.set(seat.commits().map(|c| c.latest()));
    }
}

/// False: a sync has failed, and its commits cannot be taken back now.
pub fn may_take_snapshot(seat: &Seat, database: &Database) -> bool {
    !seat.commits().is_some_and(|c| c.has_failed()) || repair(seat, database)
}

/// Frames may follow those that are there.
fn may_append(seat: &Seat) -> bool {
    !seat.commits().is_some_and(|c| c.has_failed())
}

fn repair(seat: &Seat, database: &Database) -> bool {
    let Some(wal) = seat.wal.descriptor() else { return false };
    let cut = |length| cut_to(wal, length).map_err(|e| e as i32);
    let (member, owned, index) = (&seat.member, seat.exclusive.get(), seat.index.get());
    // The application's SQLite has no log for us; the broker is told.
    Finder { member, owned, index, path: &database.path.to_string_lossy(), cut: &cut, log: &|_| {} }.repair()
}

/// WRITE has been taken. False: what is pending does not become durable.
pub fn begins_to_write(seat: &Seat) -> bool {
    let settled = settle_all(seat);
    if let Some(commits) = seat.commits().filter(|_| settled && !planted("lane-commits-uncounted")) {
        commits.lose_count();
    }
    settled
}

/// Every commit that is published is on the disk.
fn settle_all(seat: &Seat) -> bool {
    let Some(commits) = seat.commits() else { return false };
    if commits.has_failed() {
        return false;
    }
    commits.pending().is_none_or(|awaited| settle(seat, awaited))
}

/// By the kernel itself: the C library's `ftruncate` is ours here, and asks for the seat that we hold.
fn cut_to(wal: BorrowedFd, length: u64) -> nix::Result<()> {
    // SAFETY: a call by numbers, on a descriptor that is borrowed for it.
    let done = unsafe { libc::syscall(libc::SYS_ftruncate, wal.as_raw_fd(), length) };
    Errno::result(done).map(drop)
}

fn settle(seat: &Seat, awaited: Awaited) -> bool {
    let Some(commits) = seat.commits() else { return false };
    if let Some(wal) = seat.wal.descriptor() {
        return commits.wait(awaited, || fdatasync(wal).is_ok());
    }
    let begun = Instant::now();
    while commits.durable() < awaited.number {
        if commits.has_failed() || begun.elapsed() >= SYNC_PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    !commits.is_lost(awaited)
}

/// What has just been read of the database or a file beside it may be given to SQLite; or, before a write, they are still
/// the members'.
pub fn believes(database: &Database) -> bool {
    database.shared().is_none_or(|s| s.believes(|| table::descriptor_of(database)))
}

/// A read has been made: whether SQLite gets it.
pub fn is_believed(fd: RawFd) -> bool {
    table::find(fd).is_none_or(|known| match known.kind {
        Kind::Database => believes(&known.database) || planted("lane-page-believed"),
        Kind::Wal => believes(&known.database) || planted("lane-frame-believed"),
        Kind::Journal => believes(&known.database) || planted("lane-journal-believed"),
        Kind::Shm | Kind::Plain => true,
    })
}

/// A read that ends at `end` (not known: anywhere) is about to be made, or a write.
pub fn may_go_on(fd: RawFd, end: Option<u64>, writes: bool) -> bool {
    let Some(known) = table::find(fd) else {
        // Inherited over a fork: nothing of the parent's is changed.
        return !writes || !table::was_inherited(fd) || planted("childs-files");
    };
    if writes && !believes(&known.database) {
        return false;
    }
    let done = known.database.with(|seat| {
        match known.kind {
            Kind::Database if !writes => locks::no_hot_journal(seat),
            Kind::Wal if writes => return may_append(seat),
            Kind::Wal => return is_durable(seat, end),
            _ => {}
        }
        true
    });
    done.unwrap_or(true)
}

fn is_durable(seat: &Seat, end: Option<u64>) -> bool {
    let Some(commits) = seat.commits() else { return true };
    if seat.wal.snapshot.get().is_some_and(|s| commits.is_lost(s)) {
        return false;
    }
    match commits.pending() {
        _ if planted("lane-reads-before-sync") => true,
        Some(awaited) if !end.is_some_and(|end| commits.has_synced_to(end)) => settle(seat, awaited),
        _ => true,
    }
}
