//! One database of one copy of SQLite in this process, and its seat.

use super::wal::Wal;
use crate::client::Lost;
use crate::client::companions;
use crate::client::member::Member;
use crate::client::shared::Shared;
use crate::lock::commits::Commits;
use crate::lock::{Ask, FileLevel, Verdict, slot};
use crate::segment::wal_index::{Header, WalIndex};
use nix::errno::Errno;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

/// In microseconds: a transaction that is longer makes a sync.
const SHORT_WRITE: u64 = 80;
/// So many of those make a streak, within this many microseconds.
const STREAK: u64 = 8;
const MOST_STREAK: u64 = 4_000;

#[derive(Debug)]
pub struct Database {
    /// Device and inode.
    pub identity: (u64, u64),
    /// Where the object begins that this copy of SQLite is in.
    pub library: usize,
    pub path: PathBuf,
    /// `None`: its locks are the kernel's.
    seat: Option<Seat>,
    /// What is believed is asked without the lock that the seat needs.
    shared: Option<Arc<Shared>>,
    exclusive: Mutex<()>,
    own: Weak<Database>,
}

// SAFETY: of what is not `Sync`, all is in `seat`, which is touched only by who has `exclusive`. Who waits in the line
// gives that back while it sleeps, and touches nothing then.
unsafe impl Sync for Database {}

/// What the connections of this copy of SQLite hold together.
#[derive(Debug)]
pub struct Seat {
    pub member: Member,
    pub level: Cell<FileLevel>,
    pub shared: Cell<u8>,
    pub exclusive: Cell<u8>,
    pub wal_open: Cell<bool>,
    pub index: Cell<Option<WalIndex>>,
    pub wal: Wal,
    /// A thread waits for the turn: one at a time.
    pub waits: Cell<bool>,
    /// Since when the turn is had for a retry that has not come yet.
    pub lease: Cell<Option<Instant>>,
    /// The index as it was when a read slot was last had.
    pub snapshot: Cell<Option<Header>>,
    pub probation: Cell<bool>,
    /// The thread that took CHECKPOINT last. A checkpoint is one call, so a thread tells its connection from the others.
    pub checkpointer: Cell<i32>,
    /// When WRITE was taken, and how long it is held of late, microseconds.
    pub wrote: Cell<(Option<Instant>, u64)>,
}

impl Database {
    pub fn new(library: usize, identity: (u64, u64), path: PathBuf, member: Option<Member>) -> Arc<Database> {
        let shared = member.as_ref().and_then(|m| m.shared().cloned());
        let seat = member.map(|member| Seat {
            member,
            level: Cell::new(FileLevel::None),
            shared: Cell::new(0),
            exclusive: Cell::new(0),
            wal_open: Cell::new(false),
            index: Cell::new(None),
            wal: Wal::default(),
            waits: Cell::new(false),
            lease: Cell::new(None),
            snapshot: Cell::new(None),
            probation: Cell::new(false),
            checkpointer: Cell::new(0),
            wrote: Cell::default(),
        });
        let exclusive = Mutex::new(());
        Arc::new_cyclic(|own| Database {
            identity,
            library,
            path,
            seat,
            shared,
            exclusive,
            own: Weak::clone(own),
        })
    }

    pub fn weak(&self) -> Weak<Database> {
        Weak::clone(&self.own)
    }

    pub fn is_plain(&self) -> bool {
        self.seat.is_none()
    }

    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.exclusive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The seat, for who has what [`Database::hold`] gives.
    pub fn seat<'a>(&'a self, _held: &'a MutexGuard<'_, ()>) -> Option<&'a Seat> {
        self.seat.as_ref()
    }

    pub fn shared(&self) -> Option<&Shared> {
        self.shared.as_deref()
    }

    /// Runs `body` as the seat, one thread at a time.
    pub fn with<T>(&self, body: impl FnOnce(&Seat) -> T) -> Option<T> {
        let held = self.hold();
        self.seat(&held).map(body)
    }

    /// Tells the seats of one process apart; see `SeatWords::connection`.
    pub fn key(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }

    pub fn companion(&self, suffix: &str) -> PathBuf {
        companions::beside(&self.path, suffix)
    }
}

impl Drop for Database {
    /// Its last descriptor has been closed.
    fn drop(&mut self) {
        self.shared = None; // it is unmapped before the member says that it left
        if let Some(seat) = self.seat.take() {
            seat.member.leave();
        }
    }
}

impl Seat {
    /// Asks without waiting, as the kernel does it: EAGAIN becomes BUSY in SQLite, EIO an I/O error.
    pub fn ask(&self, ask: Ask, key: u64) -> Result<Verdict, Errno> {
        if !self.member.is_whole() {
            return Err(Errno::EIO);
        }
        match self.member.try_lock(ask, key) {
            Ok(Some(Verdict::Busy)) => Err(Errno::EAGAIN),
            Ok(Some(granted)) => Ok(granted),
            // It would have to wait, or the segment is not to be used any more: the next one says so.
            Ok(None) => {
                self.member.refuse();
                Err(Errno::EAGAIN)
            }
            Err(Lost) => Err(Errno::EIO),
        }
    }

    pub fn commits(&self) -> Option<Commits<'_>> {
        self.member.shared().and_then(|s| s.commits())
    }

    /// WRITE has been taken, or is given back. A streak lasts for some transactions, however long they are.
    pub fn note_write(&self, begins: bool) {
        let (since, usual) = self.wrote.get();
        let took = since.map_or(usual, |s| s.elapsed().as_micros() as u64);
        self.wrote.set((begins.then(Instant::now), if begins { usual } else { (usual * 3 + took) / 4 }));
        if !begins {
            let usual = self.wrote.get().1;
            self.member.streaks_longer(if usual < SHORT_WRITE {
                0
            } else {
                (usual * STREAK).min(MOST_STREAK)
            });
        }
    }

    pub fn reads(&self) -> bool {
        self.shared.get() & slot::READ_MASK != 0
    }

    pub fn owns(&self, slot: u8) -> bool {
        self.exclusive.get() & 1 << slot != 0
    }
}
