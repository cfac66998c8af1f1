//! The process's side of turnstile: its session with the broker, its seats, waiting, fork.
//!
//! The host application owns its process: no thread is started here, nothing is printed, no signal or
//! environment touched, and every descriptor is checked before it is used or closed, because programs close
//! descriptors they do not know and the numbers come back as something else.
//!
//! * [`config`]: environment and URI parameters. [`place`]: which broker socket.
//! * [`session`]: this process and a broker, for all threads; [`link`]: one socket of it. [`greeting`] and `reconnect`: how
//!   they come about. [`autostart`] and [`spawn`]: starting a broker.
//! * [`claim`] and [`joining`]: taking a seat. [`leaving`] and [`resting`]: what becomes of it when its connection is closed.
//! * [`member`]: a seat and what it can ask for. [`shared`]: a database's segment as this process maps it. `belief`:
//!   whether what has been read may be given to SQLite.
//! * [`repair`]: after a failed sync. [`served`]: which of this process's SQLite libraries have the VFS.
//! * [`activity`]: this process's own connections. [`fork`]: what a forked child must not touch. [`host`]: descriptors that are not ours alone.
//! * [`companions`]: who may write the files beside a database, and whose they are.

pub mod activity;
pub mod autostart;
pub mod belief;
pub mod claim;
pub mod companions;
pub mod config;
pub mod fork;
pub mod greeting;
pub mod host;
pub mod joining;
pub mod lane;
mod leaving;
pub mod link;
pub mod member;
pub mod place;
mod reconnect;
pub mod repair;
pub mod resting;
pub mod served;
pub mod session;
pub mod shared;
pub mod spawn;

/// Why a database could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No broker can be talked to.
    #[error("{0}")]
    NoBroker(String),
    /// The broker said no.
    #[error("{reason}")]
    Refused { why: crate::wire::message::Refusal, reason: String },
    /// The session broke.
    #[error("the broker is gone")]
    Lost,
    /// Two worlds would write one file.
    #[error(
        "the broker's lock on it is not seen from here (an overlay's upper directory, another kernel, a second \
         mount): two worlds would write one file"
    )]
    Unseen,
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// The session is gone: the broker stopped or was killed, or the host closed our descriptors.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the session with the broker is lost")]
pub struct Lost;
