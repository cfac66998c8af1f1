//! Between a broker and the keeper, which holds what the next broker needs: the same packets as a session's.
//!
//! What is kept is said in one form both ways: as it changes to the keeper, and all of it to the broker that takes over.

use super::message::{Introduction, Role, SeatKey};
use crate::lock::SeatId;
use crate::segment::names::Place;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// First field of the keeper's greeting.
pub const KEEPER_MAGIC: u32 = 0x7457_4b50;
/// Changes with any change of what is kept.
pub const KEEPER_VERSION: u32 = 4;

/// What a keeper says to whoever connects; its encoding never changes, so that versions can tell each other apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    pub magic: u32,
    pub version: u32,
    /// The layout of the segments that it keeps.
    pub layout: u32,
    /// Its broker lives: nothing is given to another one.
    pub occupied: bool,
    /// The keeper's, as it sees itself.
    pub pid: i32,
}

/// A secret by which a session is known to the next broker.
pub type Token = [u8; 16];

/// A session that has seats; its pidfd and its liveness memfd follow.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptSession {
    pub session: u64,
    pub token: Token,
    pub uid: u32,
    pub pid: i32,
    pub who: Introduction,
}

/// A database. Gated: control, wal-index, the database and, with `shm`, that follow; what holds the gate comes next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptDatabase {
    pub database: u32,
    pub device: u64,
    pub inode: u64,
    /// Why it is in guest mode, if it is.
    pub guest: Option<String>,
    pub nonce: u64,
    pub shm: bool,
}

/// Where a database's `-wal` is found, once a member that may write has said so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptHome {
    pub device: u64,
    pub inode: u64,
    pub name: Vec<u8>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptSeat {
    pub database: u32,
    pub seat: SeatId,
    pub session: u64,
    pub role: Role,
    pub library: u64,
    pub sqlite_version: String,
    pub socket_lane: bool,
    /// How often the seat's number had been given out when it was taken: the segment's word tells whether this still is
    /// about the seat that has it now.
    pub count: u32,
}

/// Something that is kept, or not any more.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Kept {
    Session(KeptSession),
    SessionGone(u64),
    Database(KeptDatabase),
    /// What holds its gate: both ends follow, the members' first.
    Hold(u32),
    Home(u32, KeptHome),
    /// Its WAL as a member has sent it.
    Wal(u32),
    DatabaseGone(u32),
    Seat(KeptSeat),
    SeatGone(SeatKey),
    /// The broker hands over: the socket on which it listened follows, and whoever knocks waits for the next broker. `Place`:
    /// the file that the socket's path led to.
    Listener(Place),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    /// A listening socket follows: there the next broker will knock. The broker's own socket is at `broker`.
    Listen {
        broker: PathBuf,
    },
    Keep(Kept),
    /// All that is kept, please: the sender is the broker from now on.
    GiveBack,
    /// The broker's socket is the service manager's: it stays when keeper and broker have ended.
    LeaveSocket,
    /// Answered by [`FromKeeper::Done`] once all is done that was said before.
    Ask(u64),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromKeeper {
    Kept(Kept),
    /// That was all.
    All,
    Done(u64),
    /// Descriptors were sent for which it has no room: what they came with is not kept, and has to be told again.
    Lost,
}
