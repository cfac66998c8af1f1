//! Between a broker and a receiver, which receives what another user's processes send with descriptors.

use serde::{Deserialize, Serialize};

/// One packet is to be received from this session's socket, which follows. `pid`: of its process, as the broker sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Receive {
    pub session: u64,
    pub pid: i32,
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
}
