//! The messages between a session and its broker, and how they and their descriptors travel.
//!
//! `SOCK_SEQPACKET`: one packet is one message, postcard-encoded; descriptors ride along by `SCM_RIGHTS`.

pub mod checkpoint;
pub mod finder;
pub mod keeper;
pub mod message;
pub mod receiver;
pub mod socket;

/// Largest packet in bytes, either way.
pub const MAX_PACKET: usize = 16 * 1024;
/// Most descriptors in one packet, either way.
pub const MAX_FDS: usize = 4;
