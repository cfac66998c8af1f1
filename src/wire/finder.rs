//! Between a broker and its finder, which looks for what a broker and its keeper have left to nobody but their members.

use crate::segment::names::Place;
use serde::{Deserialize, Serialize};

/// What the finder is asked, once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Search {
    /// Where the broker serves: other brokers' members are not its.
    pub place: Place,
    /// Nonces of segments that it has.
    pub known: Vec<u64>,
    /// Users (uids) whose processes are not looked at.
    pub passed_over: Vec<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Found {
    /// A living process with segments of this place; its pidfd and its liveness memfd follow.
    Member { pid: i32, uid: u32, program: String },
    /// In a process of this user; control, wal-index and what holds the gate follow.
    Segment { nonce: u64, uid: u32 },
    /// A process of this user had something there that must not be touched.
    Strange { uid: u32 },
    /// That was all. `complete`: every process of this system has been looked at.
    All { complete: bool },
}
