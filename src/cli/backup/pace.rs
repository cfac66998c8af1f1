//! How fast a copy is made beside others: behind them at the processor and at the disk, and with a rest after each piece
//! while they commit.

use std::time::{Duration, Instant};

use turnstile::segment::wal_index::Header;

use super::Failure;
use super::source::Snapshot;

/// Rest a piece, in times of what the piece took.
const REST: u32 = 3;

/// No rest is longer: a disk that hangs is no reason to sleep as long.
const LONGEST: Duration = Duration::from_millis(100);

/// `IOPRIO_WHO_PROCESS`, and `IOPRIO_CLASS_IDLE` shifted to its place (ioprio_set(2)).
const WHO_PROCESS: libc::c_int = 1;
const IDLE: libc::c_int = 3 << 13;

/// This thread comes last.
pub struct Pace;

impl Pace {
    /// Makes this thread the last at the processor and at the disk, for the rest of its life. What cannot be had is done
    /// without.
    pub fn take() -> Pace {
        // SAFETY: both change nothing but the calling thread's own priority; 0 is this thread (setpriority(2), BUGS).
        unsafe {
            libc::setpriority(libc::PRIO_PROCESS, 0, 19);
            libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, IDLE);
        }
        Pace
    }

    pub fn beside<'a>(self, snapshot: &'a Snapshot<'a>) -> Paced<'a> {
        Paced { snapshot, seen: snapshot.commits(), since: Instant::now() }
    }
}

pub struct Paced<'a> {
    snapshot: &'a Snapshot<'a>,
    /// Of the last piece's end.
    seen: Option<Header>,
    since: Instant,
}

impl Paced<'_> {
    /// A piece is done. With a rollback journal nobody commits beside it, and who wants to waits for its end.
    pub fn rest(&mut self, go_on: &dyn Fn() -> Result<(), Failure>) -> Result<(), Failure> {
        let now = self.snapshot.commits();
        if now != self.seen {
            self.seen = now;
            go_on()?;
            std::thread::sleep((self.since.elapsed() * REST).min(LONGEST));
        }
        self.since = Instant::now();
        Ok(())
    }
}
