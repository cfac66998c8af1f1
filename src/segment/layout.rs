//! The control memfd, byte for byte. The broker writes it and members map it read-only. Read-write members have a
//! descriptor that they could write through: the broker believes nothing that it reads there.

use std::mem::{offset_of, size_of};
use std::sync::atomic::AtomicU32;

/// Size of the control memfd in bytes: one page on every supported platform's smallest page size.
pub const CONTROL_SIZE: usize = 4096;
/// Size of the wal-index memfd in bytes. Sparse: 1 GiB of wal-index describes a WAL of 128 Mi frames, more than
/// any WAL that SQLite's own limits let grow in practice.
pub const WAL_INDEX_SIZE: usize = 1 << 30;
/// Size of a session's liveness memfd in bytes; its first byte is locked.
pub const LIVENESS_SIZE: usize = 4096;
/// Size of one wal-index region, `WALINDEX_PGSZ` in SQLite's wal.c.
pub const REGION_SIZE: usize = 32 * 1024;
/// Regions that fit the wal-index memfd.
pub const MAX_REGIONS: u32 = (WAL_INDEX_SIZE / REGION_SIZE) as u32;

pub const MAGIC: [u8; 8] = *b"trnstile";
/// Changes with any change of [`Control`].
pub const LAYOUT_VERSION: u32 = 1;

/// The control memfd's only page.
#[repr(C)]
pub struct Control {
    /// [`MAGIC`]. Written once, before any member sees the memfd.
    pub magic: [u8; 8],
    /// [`LAYOUT_VERSION`]. Written once.
    pub layout_version: u32,
    /// Non-zero: this segment must not be used any more (the gate is gone, or the broker stopped). Written by
    /// the broker once, from 0; read by members after each page read and before each write of database and WAL.
    /// A crash leaves 0:
    /// then the gate still stands, because every member holds it.
    pub poisoned: AtomicU32,
    /// Random; repeated in the broker's reply to Join. Both sides see the same memory or the join is refused.
    pub nonce: u64,
    /// Wal-index regions handed out so far. Written by the broker after the region's pages were allocated, so a
    /// member that reads n may touch n regions. Never shrinks.
    pub regions: AtomicU32,
    pub reserved: [u32; 1],
}

const _: () = {
    assert!(offset_of!(Control, magic) == 0);
    assert!(offset_of!(Control, layout_version) == 8);
    assert!(offset_of!(Control, poisoned) == 12);
    assert!(offset_of!(Control, nonce) == 16);
    assert!(offset_of!(Control, regions) == 24);
    assert!(size_of::<Control>() == 32 && size_of::<Control>() <= CONTROL_SIZE);
};
