//! turnstile: every process and container on one Linux host writes the same SQLite database at once.
//!
//! What knows whom is in `docs/architecture.md`; a test holds the modules to it.

pub mod broker;
pub mod client;
pub mod closing;
pub mod lock;
pub mod planted;
pub mod posix;
pub mod segment;
pub mod vfs;
pub mod wire;
