//! The broker: one process a host that owns segments, gates, and every decision that needs authority.
//!
//! * [`listen`]: the socket. [`session`]: a client process. [`liveness`]: is it alive.
//! * [`join`]: judging descriptors. [`filesystem`]: where they are. [`joining`]: gate or guest mode.
//! * [`database`]: one database's seats, locks and segment. [`requests`]: messages become lock requests.
//! * [`checkpoints`]: the checkpointer, a process of its own. [`waits`]: waits that would never end. [`report`]: `status`. [`stop`]: the end. [`server`]: the loop that drives it
//!   all.
//!
//! One thread, no SQL. Everything that a client sent is checked before it is used.

pub mod checkpoints;
pub mod database;
pub mod filesystem;
pub mod join;
pub mod joining;
pub mod linger;
mod listen;
pub mod liveness;
mod outbox;
pub mod parking;
pub mod report;
pub mod requests;
pub mod server;
pub mod session;
pub mod stop;
pub mod waits;

pub use listen::ListenError;
pub use server::{Options, ServeError, serve};
