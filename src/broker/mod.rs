//! The broker: one process a host that owns segments, gates, and every decision that needs authority.
//!
//! * [`listen`]: the socket. [`admitting`]: who gets in. [`limits`]: what one user may have. [`session`]: a client process.
//!   [`liveness`]: is it alive. [`ending`]: how it ends.
//! * [`join`]: judging descriptors. [`filesystem`]: where they are. [`foreign`]: those that must not be
//!   touched, [`receiving`]: nor received here. [`joining`]: to a seat. [`forming`]: gate or guest mode.
//! * [`database`]: one database's seats, locks and segment. [`requests`]: messages become lock requests.
//! * [`checkpoints`]: the checkpointer, a process of its own ([`child`]). [`blame`]: whose fault its death is. [`watchdog`]:
//!   it is not stopped for long.
//!   [`waits`]: waits that would never end. [`report`]: `status`, [`clocks`]: of members elsewhere.
//! * [`closed`]: databases that have just been closed, and [`departing`]: by whom. [`keeping`]: what the next broker will
//!   need. [`adopting`]:
//!   what the last one left. [`returning`]: clients that had a session before. [`searching`]: for what was left to nobody,
//!   [`found`]: and taken over. [`origin`]: what the segment says of its database.
//! * [`shares`]: the loop's time, by users. [`hearing`]: what has happened, in that order. [`settling`]: requests that are not
//!   answered yet. [`cycles`]: those that wait for each other.
//! * [`stop`]: the end. [`server`]: the loop that drives it all. [`options`]: how.
//!
//! One thread, no SQL. Everything that a client sent is checked before it is used.

mod admitting;
pub mod adopting;
mod blame;
pub mod checkpoints;
mod child;
mod clocks;
mod closed;
mod cycles;
pub mod database;
mod departing;
mod ending;
pub mod filesystem;
pub mod foreign;
mod forming;
mod found;
mod hearing;
pub mod join;
pub mod joining;
pub mod keeping;
pub mod limits;
pub mod listen;
pub mod liveness;
mod opening;
pub mod options;
mod origin;
mod outbox;
pub mod parking;
mod receiving;
pub mod report;
pub mod requests;
mod returning;
#[cfg(feature = "fuzzing")]
pub mod rig;
mod searching;
pub mod server;
pub mod session;
mod settling;
mod shares;
pub mod stop;
pub mod waits;
mod watchdog;

pub use limits::Limits;
pub use listen::{ListenError, listens_at};
pub use options::Options;
pub use server::{Phase, ServeError, raise_descriptor_limit, serve};
