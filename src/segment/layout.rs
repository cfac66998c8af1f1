//! The control memfd, byte for byte: [`Control`]. The broker makes it; every read-write member maps it writable
//! and takes its locks and turns there. Read-only members map it read-only and use the socket lane.
//!
//! What a member can write, another member that may write the same database must be able to stand, and nobody
//! else sees it. The broker believes nothing that it reads here: every number is checked before it is used.

use super::atomic::{AtomicU32, AtomicU64};

/// Size of the control memfd in bytes.
pub const CONTROL_SIZE: usize = 8192 + MAX_SEATS * 128;
/// Size of the wal-index memfd in bytes. Sparse: 1 GiB of wal-index describes a WAL of 128 Mi frames, more than
/// any WAL that SQLite's own limits let grow in practice.
pub const WAL_INDEX_SIZE: usize = 1 << 30;
/// Size of a session's liveness memfd in bytes; its first byte is locked.
pub const LIVENESS_SIZE: usize = 4096;
/// Size of one wal-index region, `WALINDEX_PGSZ` in SQLite's wal.c.
pub const REGION_SIZE: usize = 32 * 1024;
/// Regions that fit the wal-index memfd.
pub const MAX_REGIONS: u32 = (WAL_INDEX_SIZE / REGION_SIZE) as u32;
/// Seats of one database. Seat numbers are 1 to this; 0 is nobody.
#[cfg(not(feature = "loom"))]
pub const MAX_SEATS: usize = 1024;
/// As few as fill a word: a model makes them anew for every run.
#[cfg(feature = "loom")]
pub const MAX_SEATS: usize = 64;
/// The seat of the broker's checkpointer, which no connection gets.
pub const CHECKPOINTER: u32 = MAX_SEATS as u32;
/// Of [`SeatWords::reads_since`]: the five read slots and SHARED.
pub const READS: usize = 6;
/// Words of a bitmap with a bit a seat.
pub const BITMAP_WORDS: usize = MAX_SEATS / 64;
/// Entries of [`Control::learned`].
pub const LEARNED: usize = 256;
/// Commits that may be published and not yet durable; one that finds so many before it syncs by itself.
#[cfg(not(feature = "loom"))]
pub const COMMITS: usize = 128;
#[cfg(feature = "loom")]
pub const COMMITS: usize = 8;
/// Words of a file's name: `NAME_MAX` is 255 bytes.
pub const NAME_WORDS: usize = 32;
/// Failed syncs that are remembered, for those who wait for one of their commits.
pub const FAILURES: usize = 16;

pub const MAGIC: [u8; 8] = *b"trnstile";
/// Changes with any change of what lies behind [`Header`].
pub const LAYOUT_VERSION: u32 = 7;

/// The beginning of the control memfd: the same in every layout version, so that a client of another version can
/// still use the socket lane with it.
#[repr(C, align(64))]
pub struct Header {
    /// [`MAGIC`]. Written once, before any member sees the memfd.
    pub magic: [u8; 8],
    /// [`LAYOUT_VERSION`]. Written once.
    pub layout_version: u32,
    /// Non-zero: this segment must not be used any more (the gate is gone, or the broker stopped). Written by
    /// the broker once, from 0; read by members after each page read and before each write of database and WAL.
    /// A crash leaves 0: then the gate still stands, because every member holds it.
    pub poisoned: AtomicU32,
    /// Random; repeated in the broker's reply to Join. Both sides see the same memory or the join is refused.
    pub nonce: u64,
    /// Wal-index regions handed out so far. Raised (never lowered) by whoever has just allocated their pages, so
    /// a member that reads n may touch n regions. A crash before the raise leaves pages allocated and unused.
    pub regions: AtomicU32,
    pub reserved: [u32; 9],
}

/// A value alone on its cache line.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Line<T>(pub T);

/// Owners of WRITE, CHECKPOINT and RECOVER: seat numbers, 0 for none. A seat takes a word by compare-and-swap from
/// 0 and stores 0 to give it back. A crash leaves the dead seat's number; the broker swaps it for 0.
pub type WriterSlots = [AtomicU32; 3];
/// Owners of the five read slots, likewise. Apart from the writers': readers look at these.
pub type ReaderSlots = [AtomicU32; 5];

/// The file locks' owners, likewise, and what goes with them.
#[repr(C)]
#[derive(Debug, Default)]
pub struct FileWords {
    pub reserved: AtomicU32,
    pub pending: AtomicU32,
    pub exclusive: AtomicU32,
    /// [`PROBATION_OPEN`], [`PROBATION_OVER`], or the one seat admitted to SHARED. Open at first, and again when
    /// the broker clears a seat that died over a rollback journal.
    pub probation: AtomicU32,
    /// The seat that is opening the wal-index and finding out whether it is alone. Owner word as above.
    pub opening: AtomicU32,
    /// The seat that is lowering hints: one at a time. Owner word as above.
    pub lowering: AtomicU32,
}

/// Nobody has looked for a hot journal yet. Zero: what a fresh page says.
pub const PROBATION_OPEN: u32 = 0;
/// There is no hot journal.
pub const PROBATION_OVER: u32 = u32::MAX;

/// The words of the database's locks and of its turn.
#[repr(C)]
#[derive(Debug, Default)]
pub struct LockWords {
    /// Who has the turn; see `lock::turn` for its bits. Changed by compare-and-swap only, every change with a new
    /// generation. A crash leaves it with the dead seat; the broker frees it.
    pub turn: Line<AtomicU64>,
    /// The last ticket drawn. Only ever incremented; a crash wastes a number.
    pub tickets: Line<AtomicU64>,
    pub writers: Line<WriterSlots>,
    pub readers: Line<ReaderSlots>,
    pub file: Line<FileWords>,
    /// Non-zero: a seat of [`Bitmaps::sleepers`] may be asleep. Set by sleepers, cleared by whoever wakes them all. A
    /// crash between the two leaves them asleep: the broker wakes them when it clears a seat.
    pub sleepy: Line<AtomicU32>,
    /// Statistics, for `status`: lines found standing still by the supervisor (a bug if it is ever not 0), and
    /// seats at the head of the line that did not come for their turn.
    pub counters: Line<[AtomicU32; 2]>,
}

/// Bitmaps with a bit a seat (seat n is bit n-1).
#[repr(C)]
#[derive(Debug, Default)]
pub struct Bitmaps {
    /// Seats that are taken. Written by the broker.
    pub members: [AtomicU64; BITMAP_WORDS],
    /// Seats that stand in the line for the turn. Each sets and clears its own bit; the broker a dead one's.
    pub line: [AtomicU64; BITMAP_WORDS],
    /// Seats that sleep for something else than the turn. Likewise.
    pub sleepers: [AtomicU64; BITMAP_WORDS],
    /// Seats that may hold a wal-index slot shared, two bits a seat; see `lock::hints`. Written by all members. A
    /// crash leaves a seat that is looked at in vain.
    pub slot_hints: [AtomicU64; 2 * BITMAP_WORDS],
    /// The same for SHARED and the open wal-index.
    pub file_hints: [AtomicU64; 2 * BITMAP_WORDS],
}

/// What the holder of WRITE says of the commits that wait for a sync. A crash leaves a number that was issued and
/// never published: a sync in vain.
#[repr(C)]
#[derive(Debug, Default)]
pub struct IssuedWords {
    /// The newest commit's number; 0: none yet. Stored after its frames are written and its entry of
    /// [`CommitWords::places`], and before it is published in the wal-index.
    pub newest: AtomicU64,
    /// The WAL's salts as they were at that commit; 0: commits may have been made that are not counted here.
    pub salts: AtomicU64,
    /// Counts how often the WAL was begun anew.
    pub generation: AtomicU64,
    /// When the newest number was drawn, microseconds of `CLOCK_MONOTONIC`. A hint.
    pub at: AtomicU64,
}

/// What those who sync say. All but `durable` and `failures` are hints: wrong ones cost a sync or a wait.
#[repr(C)]
#[derive(Debug, Default)]
pub struct SyncedWords {
    /// Every commit up to this number is on the disk. Raised after a sync, to the number that was the newest before
    /// it. The highest bit: a sync has failed, and the number stays as it is until that is repaired.
    pub durable: AtomicU64,
    /// The number that the sync in progress covers; 0: none. A crash leaves it: it is overtaken.
    pub leading: AtomicU64,
    /// When that began, microseconds.
    pub since: AtomicU64,
    /// When the last one ended, likewise.
    pub ended: AtomicU64,
    /// Microseconds that a sync takes of late.
    pub usual: AtomicU64,
    /// Commits that the next sync may expect to find waiting.
    pub expected: AtomicU64,
    /// How many failures have been repaired. Incremented by who has WRITE and CHECKPOINT.
    pub failures: AtomicU32,
}

/// Where those sleep who wait for a sync.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RoundWords {
    /// The futex: incremented at the end of every sync.
    pub round: AtomicU32,
    /// Non-zero: somebody may sleep. Set by sleepers, cleared by whoever wakes them all. A crash between the two
    /// leaves them asleep until their own limit.
    pub asleep: AtomicU32,
}

/// Commits that share a sync; see `lock::commits`.
#[repr(C)]
#[derive(Debug)]
pub struct CommitWords {
    pub issued: Line<IssuedWords>,
    pub synced: Line<SyncedWords>,
    pub rounds: Line<RoundWords>,
    /// Where the WAL ended before and after each of the last [`COMMITS`] commits, by number modulo that; see
    /// `lock::commits::Place`. Written by the holder of WRITE.
    pub places: [[AtomicU64; 2]; COMMITS],
    /// The first and the last number of those that failed, of the last [`FAILURES`] failures, by their count modulo
    /// that. Written by who repairs.
    pub failed: [[AtomicU64; 2]; FAILURES],
}

impl Default for CommitWords {
    fn default() -> CommitWords {
        CommitWords {
            issued: Line::default(),
            synced: Line::default(),
            rounds: Line::default(),
            places: std::array::from_fn(|_| Default::default()),
            failed: Default::default(),
        }
    }
}

/// What one seat says of itself. Written by the seat alone, except where it says otherwise; when the seat is dead,
/// by the broker, which zeroes all of it. A crash leaves what was there.
#[repr(C, align(128))]
#[derive(Debug, Default)]
pub struct SeatWords {
    /// Wal-index slots held shared, a bit each.
    pub slots: AtomicU32,
    /// [`FILE_SHARED`], [`WAL_OPEN`] and [`CLOSING`].
    pub file: AtomicU32,
    /// Counts lock calls: the supervisor sees by it that a holder moves on.
    pub calls: AtomicU32,
    /// Kernel's id of the thread that last took the turn or began to wait.
    pub thread: AtomicU32,
    /// When the seat last took the turn, `CLOCK_MONOTONIC_COARSE` in milliseconds.
    pub turn_since: AtomicU64,
    /// Tells connections of one process apart: two seats of one connection never wait for each other.
    pub connection: AtomicU64,
    /// What the seat's turn is for: 0, a statement; [`FOR_TRANSACTION`] or [`FOR_GUESS`], the whole transaction, so
    /// that a write lock may follow much later.
    pub turn_for: AtomicU32,
    /// In use, [`RESTING`] or [`CLOSED`] (`lock::rest`), above that how often the seat's number has been given out
    /// again. The seat lets it rest and takes it back; the broker closes what rests, and counts. A crash leaves it.
    pub state: AtomicU32,
    /// Since when each read slot, and behind them SHARED, is held, in 128 ms of `CLOCK_MONOTONIC_COARSE`; 0: not known. Stored before the lock is, and left when it is given back. Nothing but `status` depends on it.
    pub reads_since: [AtomicU32; READS],
    /// Place in the line, 0 when not in it. The broker may replace it by a later one when the seat, being first,
    /// does not come for its turn.
    pub ticket: AtomicU64,
    /// The futex that the seat sleeps on: [`RUNNING`], [`PARKED`], [`NAPPING`], [`ARRIVED`] (by the seat),
    /// [`NOTIFIED`] (by its waker).
    pub park: AtomicU32,
    /// The broker waits on behalf of this seat (socket lane): it is woken by a message. Written by the broker.
    pub brokered: AtomicU32,
    /// What it waits for: a code of `lock::Ask`, 0 for nothing.
    pub waiting: AtomicU32,
    /// Set by the broker: the wait closes a cycle and ends.
    pub ended: AtomicU32,
    /// When the wait began, `CLOCK_MONOTONIC_COARSE` in milliseconds.
    pub since: AtomicU64,
    /// The inode of its session's liveness memfd. Written by the broker before it hands the seat out: a broker to which
    /// nothing was left finds by it whose the seat is.
    pub holder: AtomicU64,
    pub reserved2: [u64; 3],
}

/// What a broker to which nothing was left has to know of the database. Written by the broker before the first member
/// sees it, and never again.
#[repr(C)]
#[derive(Debug, Default)]
pub struct OriginWords {
    /// The number by which members know the database.
    pub number: AtomicU64,
    /// Where `-wal` is found: the directory's device and inode, and the file's name.
    pub device: AtomicU64,
    pub inode: AtomicU64,
    /// Bytes of the name.
    pub length: AtomicU64,
    pub name: [AtomicU64; NAME_WORDS],
}

/// What members and the broker's checkpointer tell each other.
#[repr(C)]
#[derive(Debug, Default)]
pub struct CheckpointWords {
    /// Non-zero: the broker checkpoints this database. Written by the broker; set to 0 by a member that finds the
    /// broker gone. A crash of the checkpointer leaves it: the broker starts another one or clears it.
    pub duty: AtomicU32,
    /// Non-zero: the broker has been told that the WAL has grown and has not answered yet. Set by the member that
    /// tells, cleared by the broker when the checkpoint is over; a futex. A member that dies between the two leaves it
    /// set: the others tell again as the WAL grows on.
    pub asked: AtomicU32,
    /// Inode of the WAL, 0 if it is not known. Written by the first to open the wal-index: as long as anybody has that open,
    /// somebody has the file open, so the number is no other file's meanwhile.
    pub wal_inode: AtomicU64,
    /// With so many frames in the WAL and `asked` set, writers wait before they begin; 0: they never do. Written by the
    /// checkpointer. A crash leaves it: the broker clears it, and nobody waits long.
    pub brake: AtomicU32,
    /// Non-zero: the database has been opened soon after its last close, so the next last close ends the WAL and leaves
    /// its blocks (`vfs/last_close.rs`). Written by the broker before the first member sees it.
    pub comes_back: AtomicU32,
    /// Non-zero: the WAL's header on the disk is the mark with this number (`segment/ended.rs`). Written by the broker when
    /// it makes the segment, as the last segment's last close left it; set to 0 by whoever finds another header there, and by
    /// who relies on it; written by the last close once its mark is synced. A crash leaves what is true.
    pub ended: AtomicU64,
    /// Non-zero: the WAL of `wal_inode` is in its directory on the disk. Set by who has synced that, cleared before
    /// `wal_inode` changes.
    pub wal_linked: AtomicU32,
    /// Non-zero: the broker has been sent the descriptor of the WAL of `wal_inode`. Set by the member that sends it, cleared
    /// with `wal_linked`, and by a broker that has not got it. A crash between setting and sending leaves a WAL that only its
    /// members checkpoint until the index is opened anew.
    pub wal_sent: AtomicU32,
}

/// [`SeatWords::turn_for`]: a transaction that was said to write.
pub const FOR_TRANSACTION: u32 = 1;
/// [`SeatWords::turn_for`]: a transaction like others that wrote.
pub const FOR_GUESS: u32 = 2;

/// [`SeatWords::state`]: its connection is closed, its process keeps it for the next one.
pub const RESTING: u32 = 1;
/// [`SeatWords::state`]: given up, and not yet given out again.
pub const CLOSED: u32 = 2;
/// [`SeatWords::state`]: the bits that say which; the count is above them.
pub const STATE: u32 = 3;

/// [`SeatWords::file`]: SHARED is held.
pub const FILE_SHARED: u32 = 1;
/// [`SeatWords::file`]: the wal-index is open.
pub const WAL_OPEN: u32 = 2;
/// [`SeatWords::file`]: its connection is being closed and commits nothing more.
pub const CLOSING: u32 = 4;

/// [`SeatWords::park`]: awake; it looks again before it sleeps.
pub const RUNNING: u32 = 0;
/// Asleep until it is woken.
pub const PARKED: u32 = 1;
/// Woken, and on its way.
pub const NOTIFIED: u32 = 2;
/// First in the line and asleep for the rest of the holder's streak: it wakes by itself, or for an offer.
pub const NAPPING: u32 = 3;
/// Awake, and looking for its turn.
pub const ARRIVED: u32 = 4;

/// The control memfd.
#[repr(C)]
pub struct Control {
    pub header: Header,
    pub locks: LockWords,
    pub bitmaps: Bitmaps,
    pub reserved: [u8; 512],
    pub checkpoint: Line<CheckpointWords>,
    /// What statements have shown of themselves; see `lock::learned`. Any value is harmless. Written by members.
    pub learned: [AtomicU64; LEARNED],
    pub commits: CommitWords,
    pub origin: OriginWords,
    pub reserved2: [u8; 1376],
    pub seats: [SeatWords; MAX_SEATS],
}
