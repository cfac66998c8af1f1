//! How a broker is to serve.

use super::limits::Limits;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Options {
    pub socket: PathBuf,
    /// Any uid may connect.
    pub everyone: bool,
    /// Exit after this long without members.
    pub idle_exit: Option<Duration>,
    /// Take databases on filesystems that are refused otherwise, from anyone.
    pub allow_unsafe: bool,
    /// What one user may have here.
    pub limits: Limits,
    /// The program that checkpoints, run with `checkpointer` as its argument. `None`: members do it themselves.
    pub checkpointer: Option<PathBuf>,
    /// A database that is opened again within this time of its last close keeps its WAL's file at the next one; zero: none
    /// does.
    pub reuse_wal: Duration,
    /// The program that outlives the broker, run with `keeper` as its argument. `None`: nothing outlives it but members.
    pub keeper: Option<PathBuf>,
    /// The program that looks for members whose broker and keeper were killed, run with `finder` as its argument. `None`:
    /// they are waited for.
    pub finder: Option<PathBuf>,
    /// The program that receives what other users send with descriptors, run with `receiver` as its argument. `None`: such
    /// sessions are ended.
    pub receiver: Option<PathBuf>,
    /// Take over from the broker that serves the socket now.
    pub replace: bool,
    /// A socket that listens at `socket` already: the service manager's, which keeps it when this broker has ended.
    pub activated: Option<i32>,
    /// Written one byte and closed once the socket listens.
    pub ready: Option<i32>,
}
