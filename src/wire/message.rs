//! The messages. Numbers that name a request (`id`) are chosen by the session and repeated in the answer.

use super::keeper::{KeptHome, Token};
use crate::lock::takeover::Holds;
use crate::lock::{Ask, Release, SeatId, Verdict};
use serde::{Deserialize, Serialize};

/// First field of the first message: anything else on this socket is not turnstile.
pub const PROTOCOL_MAGIC: u32 = 0x7457_5253;
/// Changes with any change of a message.
pub const PROTOCOL_VERSION: u32 = 4;

/// The first message of a session; its encoding never changes, so that versions can tell each other apart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    pub magic: u32,
    pub version: u32,
}

/// Who the session is, for `status` and for errors. Said by the client, never trusted for a decision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Introduction {
    pub program: String,
    /// The client's pid as it sees itself.
    pub pid: i32,
    /// Container id from the cgroup path, where there is one.
    pub container: Option<String>,
}

/// A connection within its session: two seats of one connection never wait for each other.
pub type ConnectionKey = u64;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Join {
    /// Name of the file in the directory whose descriptor follows, if the client could open it.
    pub name: Option<Vec<u8>>,
    /// The third descriptor is the existing `-shm` file's.
    pub has_shm: bool,
    /// `TURNSTILE_MODE=guest`.
    pub guest: bool,
    /// `TURNSTILE_ALLOW_UNSAFE=1`.
    pub allow_unsafe: bool,
    /// `sqlite3_libversion()` of the client's library.
    pub sqlite_version: String,
    /// Tells the SQLite libraries of one process apart.
    pub library: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToBroker {
    /// Follows [`Hello`] with the liveness memfd.
    Introduce(Introduction),
    /// With the database's descriptor, its directory's (`O_PATH`) and, if `has_shm`, that of `-shm`.
    Join {
        id: u64,
        join: Join,
    },
    Lock {
        id: u64,
        seat: SeatKey,
        ask: Ask,
        /// The `sqlite3*` that asks: the same for all its attached databases.
        connection: ConnectionKey,
        /// The kernel's id of the asking thread: a thread never waits for itself.
        thread: i32,
    },
    /// Ends the wait of the seat's request, which is answered without waiting any more.
    Cancel {
        seat: SeatKey,
    },
    Unlock {
        seat: SeatKey,
        release: Release,
    },
    CheckReserved {
        id: u64,
        seat: SeatKey,
    },
    /// The seat admitted on probation found no hot journal.
    JournalClear {
        seat: SeatKey,
    },
    /// Guest mode: the turn is in use.
    TurnUsed {
        seat: SeatKey,
    },
    OpenWalIndex {
        id: u64,
        seat: SeatKey,
    },
    /// At least this many regions of the wal-index, please.
    GrowWalIndex {
        id: u64,
        seat: SeatKey,
        regions: u32,
    },
    CloseWalIndex {
        seat: SeatKey,
    },
    /// The seat is given up; if it was the process's last one, mappings and gate have been let go before.
    Leave {
        id: u64,
        seat: SeatKey,
    },
    Status {
        id: u64,
    },
    /// Something that the extension may not print in its host's output.
    Log {
        text: String,
    },
    /// The seat has been waiting in the segment for some milliseconds.
    Waiting {
        seat: SeatKey,
    },
    /// Something that a seat of the socket lane waits for has become free in the segment.
    Kick {
        database: u32,
    },
    /// Whom the seat waits for.
    AskBlocker {
        id: u64,
        seat: SeatKey,
    },
    /// A seat that rests under this count is not kept any more. It has no answer: it keeps nobody out. If it has been
    /// closed meanwhile it may be another's, and stays.
    LetGo {
        seat: SeatKey,
        count: u32,
    },
    /// The seat has opened the WAL, whose descriptor follows. Not answered.
    WalFile {
        seat: SeatKey,
    },
    /// The WAL is due for a checkpoint. Not answered.
    WalGrew {
        seat: SeatKey,
    },
    /// This process had the session of which this is the token, with a broker that is gone or on a socket that broke.
    Resume {
        id: u64,
        token: Token,
    },
    /// A database whose broker and keeper are gone, with control, wal-index and what holds the gate.
    HandBack {
        id: u64,
        database: u32,
        nonce: u64,
        home: KeptHome,
    },
    /// Seats that this process had. After the `last` those that it does not claim are nobody's.
    Claim {
        id: u64,
        seats: Vec<Claim>,
        last: bool,
    },
}

/// A seat that a process had before its session broke.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub seat: SeatKey,
    pub role: Role,
    pub library: u64,
    pub sqlite_version: String,
    /// As in [`Joined`]: the number may be another seat's by now.
    pub count: u32,
    /// On the socket lane: what it knows that it holds.
    pub holds: Option<Holds>,
}

/// As many as fit a packet.
pub const MOST_CLAIMS: usize = 128;

/// A seat as the wire names it: the database's number at this broker and the seat's in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SeatKey {
    pub database: u32,
    pub seat: SeatId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// The gate stands: locks and wal-index are the broker's.
    Gated,
    /// Plain clients hold the file: locks and `-shm` are the unix VFS's, turns are the broker's.
    Guest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    ReadWrite,
    ReadOnly,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Joined {
    pub seat: SeatKey,
    pub mode: Mode,
    pub role: Role,
    pub nonce: u64,
    /// Descriptors follow, in this order: control, wal-index, then (read-write only) what holds the gate. Absent when the
    /// session has them already, and in guest mode.
    pub segment: bool,
    /// How often the seat's number has been given out.
    pub count: u32,
}

/// Why a join was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Not a descriptor to join with.
    BadDescriptor,
    /// A place where turnstile cannot keep its promise.
    UnsafePlace,
    /// Another broker, or members whose broker is gone, hold the gate.
    OtherBroker,
    /// Seats, memory or descriptors ran out.
    Exhausted,
    /// The broker is stopping.
    Stopping,
}

/// Somebody who is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    pub pid: i32,
    pub program: String,
    pub container: Option<String>,
    /// Milliseconds since it got the turn, or since it joined if it holds a lock without the turn.
    pub held_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromBroker {
    /// The answer to [`Hello`] and [`Introduction`].
    Welcome {
        session: u64,
        broker_pid: i32,
        /// The client's pid as the broker sees it (another number in another pid namespace).
        your_pid: i32,
        /// What the session says to the next broker ([`ToBroker::Resume`]).
        token: Token,
    },
    Joined {
        id: u64,
        joined: Joined,
    },
    Refused {
        id: u64,
        why: Refusal,
        reason: String,
    },
    Lock {
        id: u64,
        verdict: Verdict,
        /// The wait ended in a cycle: a wait would never have ended.
        deadlock: bool,
        /// Whom a waiting request last waited for.
        blocker: Option<Blocker>,
    },
    Reserved {
        id: u64,
        by_other: bool,
    },
    WalIndex {
        id: u64,
        /// Regions that may be mapped; 0 with `ok` false.
        regions: u32,
        ok: bool,
    },
    Left {
        id: u64,
    },
    /// A piece of the status report's JSON.
    Status {
        id: u64,
        part: Vec<u8>,
        last: bool,
    },
    Blocker {
        id: u64,
        blocker: Option<Blocker>,
    },
    /// The answer to `Resume` and `HandBack`: whether the session, or the database, goes on.
    Resumed {
        id: u64,
        known: bool,
    },
    /// Seats that are not the session's.
    Claimed {
        id: u64,
        lost: Vec<SeatKey>,
    },
}

impl FromBroker {
    /// The request that this answers; 0 for [`FromBroker::Welcome`].
    pub fn id(&self) -> u64 {
        match self {
            FromBroker::Welcome { .. } => 0,
            FromBroker::Joined { id, .. }
            | FromBroker::Refused { id, .. }
            | FromBroker::Lock { id, .. }
            | FromBroker::Blocker { id, .. }
            | FromBroker::Reserved { id, .. }
            | FromBroker::WalIndex { id, .. }
            | FromBroker::Left { id }
            | FromBroker::Resumed { id, .. }
            | FromBroker::Claimed { id, .. }
            | FromBroker::Status { id, .. } => *id,
        }
    }
}

/// The broker's answer to [`Hello`] when it will not talk: encoded before anything else, never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HelloAnswer {
    pub magic: u32,
    pub version: u32,
    pub refused: Option<String>,
}
