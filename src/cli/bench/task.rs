//! What a worker is told and what it answers: JSON between two processes of this program.
//!
//! A run's files are in one directory: the databases, the time [`Window`], and each worker's [`Tally`] under its
//! number. The answer is a file because a histogram is longer than what a shared pipe passes on in one piece.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    Plain,
    Turnstile,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::Plain => "plain",
            Side::Turnstile => "turnstile",
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// A name in the table of workloads.
    pub workload: String,
    pub side: Side,
    /// Among all processes of the run, from 0; the measured ones come first.
    pub number: usize,
    /// Does what the workload has beside it, unmeasured.
    pub beside: bool,
    pub busy_timeout_ms: u32,
    /// How long one statement of `temp-fill` should take.
    pub fill_ms: u32,
}

/// The database of most workloads.
pub const DATABASE: &str = "app.db";
/// The other one of `mirrored-attach`.
pub const OTHER: &str = "other.db";

pub fn result_file(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("{number}.json"))
}

/// When the processes of a run work, in ns of CLOCK_MONOTONIC, which all processes share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// From here on they work.
    pub start: u64,
    /// What ends after this moment is measured; before is the warm-up.
    pub begin: u64,
    /// Nothing is begun after this.
    pub end: u64,
}

impl Window {
    const FILE: &'static str = "window.json";

    pub fn save(&self, directory: &Path) -> io::Result<()> {
        save(&directory.join(Self::FILE), self)
    }

    pub fn load(directory: &Path) -> io::Result<Window> {
        load(&directory.join(Self::FILE))
    }
}

/// What one worker did. All but `acknowledged` and `sums` count from the window's beginning.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Writes that were acknowledged from the very start, warm-up included: what the database must hold.
    pub acknowledged: u64,
    /// Operations that succeeded inside the window.
    pub operations: u64,
    /// Tries that failed with `SQLITE_BUSY`.
    pub busy: u64,
    /// Tries that failed otherwise.
    pub errors: u64,
    pub first_error: Option<String>,
    /// Times of measured tries that succeeded: a value in ns and how often it was seen.
    pub latency: Vec<(u64, u64)>,
    pub slowest_ns: u64,
    /// The longest time from an operation's first try to its success, or to the end if none came.
    pub worst_wait_ns: u64,
}

pub fn save<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    fs::write(path, serde_json::to_vec(value)?)
}

pub fn load<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// ns of CLOCK_MONOTONIC: a call into the vdso, no system call.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has CLOCK_MONOTONIC");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
