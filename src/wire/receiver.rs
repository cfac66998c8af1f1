//! Between a broker, or a keeper, and a receiver: it receives what another user's processes send with descriptors, and closes
//! what may be slow to close.

use super::message::{Refusal, Role};
use crate::wire::keeper::KeptHome;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToReceiver {
    /// One packet is to be received from this session's socket, which follows. `pid`: of its process, as the broker sees it.
    Receive { session: u64, pid: i32 },
    /// What follows is to be closed.
    Close,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromReceiver {
    Received(Received),
    /// The answer to each `Close`.
    Closed,
}

/// The packet; of its descriptors those follow that may be touched.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Received {
    pub session: u64,
    pub bytes: Vec<u8>,
    pub fds_lost: bool,
    pub too_much: bool,
    /// How many may not, and why.
    pub strange: Option<(u32, String)>,
    /// Of a join: what it is, or why it is refused. The database's descriptor follows and, with `shm`, that of `-shm`.
    pub judged: Option<Result<Judged, (Refusal, String)>>,
}

/// A join whose descriptors passed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judged {
    pub device: u64,
    pub inode: u64,
    pub role: Role,
    pub home: KeptHome,
    pub shm: bool,
    pub shm_unseen: bool,
}
