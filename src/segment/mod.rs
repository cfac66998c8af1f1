//! The memory that all members of one database share: two sealed memfds.
//!
//! * **control**: [`layout::Control`], what the broker tells every member.
//! * **wal-index**: byte for byte what a `-shm` file would hold, from offset 0 (SQLite's wal.c owns its format).
//!
//! The [`gate`] is what makes it safe to use them. [`memfd`] makes and checks them, [`mapping`] maps them. Nothing here knows who uses it.

pub mod gate;
pub mod layout;
pub mod mapping;
pub mod memfd;
pub mod wal_index;
