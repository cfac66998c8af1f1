//! The rules: who may hold which lock, who has the turn, who waits and who is told BUSY.
//!
//! Algorithms over the segment's words. No I/O, no SQLite, no clock and no system call but by [`park::Parking`]. Both
//! lanes run them: a member on the segment itself, the broker on behalf of those who cannot.
//!
//! * [`table`]: the locks themselves, SQLite's four file locks and eight wal-index slots; [`hints`] for it.
//! * [`turn`]: the right to be the database's one writer, and the line for it.
//! * [`rules`]: what a request means: at once, wait, or BUSY. [`seat`]: giving back; when a turn ends.
//! * [`rest`]: seats without a connection, which their processes keep for the next. [`last`]: the last close.
//! * [`commits`]: durable commits that share one sync. [`learned`]: what statements have shown of themselves.
//! * [`tries`]: that no loop over shared words is without end.
//! * [`queue`]: the socket lane's requests, and what a death leaves behind. [`unused`]: turns that nobody uses.
//! * [`reads`]: who has a read transaction open, for reports.
//! * [`takeover`]: what a broker's death leaves to the next. [`occupied`]: whether anybody who lives can be in.

pub mod commits;
pub mod hints;
pub mod last;
pub mod learned;
pub mod occupied;
pub mod park;
pub mod queue;
pub mod reads;
pub mod rest;
pub mod rules;
pub mod seat;
pub mod table;
pub mod takeover;
mod tries;
pub mod turn;
pub mod unused;

use serde::{Deserialize, Serialize};

/// A seat's number within one database: one SQLite connection's place.
pub type SeatId = u32;

/// SQLite's file lock levels with SQLite's own numbers (`SQLITE_LOCK_NONE` .. `SQLITE_LOCK_EXCLUSIVE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FileLevel {
    None = 0,
    Shared = 1,
    Reserved = 2,
    Pending = 3,
    Exclusive = 4,
}

impl FileLevel {
    /// From SQLite's number; anything out of range is `None` (the variant of the option).
    pub fn from_sqlite(level: i32) -> Option<FileLevel> {
        Some(match level {
            0 => FileLevel::None,
            1 => FileLevel::Shared,
            2 => FileLevel::Reserved,
            3 => FileLevel::Pending,
            4 => FileLevel::Exclusive,
            _ => return None,
        })
    }
}

/// The wal-index lock slots, in SQLite's order (wal.c: `WAL_WRITE_LOCK`, `WAL_CKPT_LOCK`, `WAL_RECOVER_LOCK`,
/// `WAL_READ_LOCK(0..5)`).
pub mod slot {
    pub const WRITE: u8 = 0;
    pub const CHECKPOINT: u8 = 1;
    pub const RECOVER: u8 = 2;
    pub const READ0: u8 = 3;
    pub const COUNT: u8 = 8;
    /// The five read slots as a mask.
    pub const READ_MASK: u8 = 0b1111_1000;
    /// The read slots of those who read the WAL, `WAL_READ_LOCK(1..5)`. Who has all of them exclusively begins the WAL
    /// anew (wal.c: `walRestartLog`, and a RESTART or TRUNCATE checkpoint).
    pub const WAL_READERS: u8 = 0b1111_0000;
}

/// Consecutive wal-index slots, as `xShmLock` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    first: u8,
    count: u8,
}

impl Slots {
    /// `None` when the range is empty or leaves the eight slots: input from a peer is checked here once.
    pub fn new(first: u8, count: u8) -> Option<Slots> {
        (count >= 1 && first < slot::COUNT && count <= slot::COUNT - first).then_some(Slots { first, count })
    }

    /// The range as a bit mask. A range that was decoded from a peer may be out of bounds: then `None`.
    pub fn mask(self) -> Option<u8> {
        Slots::new(self.first, self.count)?;
        Some((((1u16 << self.count) - 1) << self.first) as u8)
    }

    /// First slot and count, as `xShmLock` takes them.
    pub fn bounds(self) -> (i32, i32) {
        (i32::from(self.first), i32::from(self.count))
    }

    /// Exactly the WAL write lock.
    pub fn is_write(self) -> bool {
        self.first == slot::WRITE && self.count == 1
    }

    /// Exactly the checkpoint lock.
    pub fn is_checkpoint(self) -> bool {
        self.first == slot::CHECKPOINT && self.count == 1
    }

    /// With these exclusively the WAL is begun anew.
    pub fn begin_anew(self) -> bool {
        self.mask().is_some_and(|m| m & slot::WAL_READERS == slot::WAL_READERS)
    }

    /// Exactly the recovery lock.
    pub fn is_recover(self) -> bool {
        self.first == slot::RECOVER && self.count == 1
    }

    /// Exactly one read slot.
    pub fn is_one_read(self) -> bool {
        self.first >= slot::READ0 && self.count == 1
    }

    /// Which one that is; SQLite asks for one at a time.
    pub fn read(self) -> Option<reads::Read> {
        self.is_one_read().then(|| usize::from(self.first - slot::READ0))
    }
}

/// What a seat asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// `xLock`. `hot_journal`: this seat has just read a `-journal` under its SHARED lock, so an EXCLUSIVE
    /// straight from SHARED is a rollback of somebody's dead transaction.
    File { level: FileLevel, hot_journal: bool },
    /// `xShmLock(.., SHARED)`.
    ShmShared(Slots),
    /// `xShmLock(.., EXCLUSIVE)`. `blocking`: SQLite announced a wait (`SQLITE_FCNTL_LOCK_TIMEOUT`); for the
    /// checkpoint slot, the application asked for this checkpoint and waits for the broker's.
    ShmExclusive { slots: Slots, blocking: bool },
    /// Only the turn: guest mode, where the locks themselves are the unix VFS's.
    Turn,
}

/// A request and whether the turn is to be had before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    pub request: Request,
    /// The turn first: for a snapshot, because the statement that runs writes; for the checkpoint lock, so that the
    /// WAL stands still under it and can be begun anew.
    pub ahead: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The lock is held. `turn`: the seat also holds the turn. `probation`: it is the only seat admitted until
    /// it has seen whether a hot journal must be rolled back, and must report what it finds.
    Granted {
        turn: bool,
        probation: bool,
    },
    Busy,
}

/// An `xUnlock` or `xShmLock(UNLOCK)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Release {
    /// `xUnlock` to SHARED or NONE.
    ///
    /// `keep_turn`, here and below: SQLite gives this lock back only to ask for it again, so the turn stays. Its
    /// header changed while it waited, or its statement met a changed schema once more and is prepared anew.
    File {
        level: FileLevel,
        keep_turn: bool,
    },
    ShmShared {
        slots: Slots,
        keep_turn: bool,
    },
    ShmExclusive {
        slots: Slots,
        keep_turn: bool,
    },
    /// The turn itself (guest mode, or a statement that turned out not to write this file).
    Turn,
}
