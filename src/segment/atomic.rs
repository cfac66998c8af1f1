//! The atomics of the shared words: the standard library's, or those of a model checker.

#[cfg(feature = "loom")]
pub use super::checked::{AtomicU32, AtomicU64};
#[cfg(not(feature = "loom"))]
pub use std::sync::atomic::{AtomicU32, AtomicU64};

/// For what only its owner and a report read.
pub use std::sync::atomic::Ordering::Relaxed;
/// The one ordering of the lock words. Every protocol in `lock` is of the kind "store mine, then look at theirs"
/// (Dekker): both sides must not miss each other, which nothing below sequential consistency promises. On x86-64
/// its price is that of the read-modify-write that the store needs anyway.
pub use std::sync::atomic::Ordering::SeqCst;
