//! The memory that all members of one database share: two sealed memfds.
//!
//! * **control**: [`layout::Control`], the words of its locks and its turn, specified byte for byte.
//! * **wal-index**: byte for byte what a `-shm` file would hold, from offset 0 (SQLite's wal.c owns its format).
//!
//! The [`gate`] is what makes it safe to use them; members keep it standing by its [`hold`]. [`memfd`] makes and checks
//! them, [`mapping`] maps them, [`supervision`] says who looks after them. Nothing here knows who uses it.

pub mod atomic;
#[cfg(feature = "loom")]
pub mod checked;
pub mod ended;
pub mod futex;
pub mod gate;
pub mod hold;
pub mod layout;
pub mod liveness;
pub mod mapping;
pub mod memfd;
pub mod names;
#[cfg(not(feature = "loom"))]
mod offsets;
pub mod statx;
pub mod supervision;
pub mod wal_index;
