//! The one rule by which bytes are believed.
//!
//! A member believes what it reads because the gate keeps plain SQLite out: nobody but members changes the files. If the
//! gate is gone, a plain client may have copied its own pages into the database, or begun the WAL anew, under a snapshot
//! that a member still reads. The member must then get an I/O error, never those bytes.
//!
//! * **Read first, look afterwards.** The gate goes before a plain client can write. So if the gate still stands after a
//!   read, no byte of that read is a plain client's. Looked at before the read, it would say nothing.
//! * **Two signs.** The poison word costs a load, and is looked at after each read. Whoever opens the gate on purpose
//!   (a broker that stops, a keeper) sets it first. Somebody else who unlocks the gate does not set it: the broker
//!   notices that at its next tick only, and with no broker nobody does. So a member asks the kernel for the gate, too, but
//!   that is a system call, which costs as much as reading a page: once a tick of the coarse clock (1 to 10 ms).
//! * **A member that may only read** holds no gate up, and nobody poisons a segment that it has outlived: it asks the
//!   kernel after each read.
//!
//! Every way by which a byte, or a lock, gets to SQLite asks here, on both lanes. A page that SQLite refers to where it is
//! mapped cannot be looked after: no member's page is mapped (`xFetch`, `mmap`).

use super::Lost;
use super::member::{Member, Outcome};
use super::shared::Shared;
use crate::lock::Verdict;
use crate::planted::planted;
use crate::segment::futex;
use crate::segment::gate;
use crate::wire::message::Role;
use nix::sys::stat::fstat;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

/// What a process knows of the gate of one of its databases.
#[derive(Debug, Default)]
pub struct GateSeen {
    /// The coarse clock's time when it was last seen to stand.
    at: AtomicU64,
    /// It was seen to be gone. Another one may stand there later, of another group: this stays.
    gone: AtomicBool,
    /// Device and inode of the file that it was seen on first.
    on: OnceLock<(u64, u64)>,
}

impl GateSeen {
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(SeqCst)
    }

    /// Whether it stands, as far as the coarse clock tells. `each_time`: asks the kernel, however long ago it was asked.
    pub fn stands(&self, database: impl FnOnce() -> Option<RawFd>, each_time: bool) -> bool {
        let now = futex::coarse_millis();
        if !each_time && self.at.load(Relaxed) == now || planted("gate-left-to-the-broker") {
            return true;
        }
        self.look(database, now)
    }

    #[cold]
    fn look(&self, database: impl FnOnce() -> Option<RawFd>, now: u64) -> bool {
        let Some(fd) = database().filter(|fd| *fd >= 0) else { return false };
        // SAFETY: SQLite's own, which is in a call for the file; the host may have closed it, which is an error here.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let file = || fstat(fd).ok().map(|st| (st.st_dev, st.st_ino));
        if gate::stands(fd) {
            if self.on.get().is_none() {
                file().map(|file| self.on.set(file));
            }
            self.at.store(now, Relaxed);
            return true;
        }
        // Unless the host has closed it and opened something else on its number: that is this one connection's misfortune.
        if self.on.get().is_none() || file().as_ref() == self.on.get() {
            self.gone.store(true, SeqCst);
        }
        false
    }
}

impl Shared {
    /// Whether what has just been read of the database, or of a file beside it, may be given to SQLite; or, before a
    /// write, whether the files are still the members'. `database`: the descriptor that SQLite has of the database.
    #[inline]
    pub fn believes(&self, database: impl FnOnce() -> Option<RawFd>) -> bool {
        // In this order: who opens the gate has set the poison before.
        self.gate.stands(database, self.role() == Role::ReadOnly) && !self.poisoned()
    }
}

impl Member {
    /// See [`Shared::believes`]. A member that may only read asks for its session, too: the gate that it sees may be
    /// another group's by now, and who has left the group has no snapshot.
    #[inline]
    pub fn believes(&self, database: RawFd) -> bool {
        let Some(shared) = &self.shared else { return true };
        shared.believes(|| Some(database)) && (self.role() == Role::ReadWrite || self.is_whole())
    }

    /// The segment must not be used any more.
    pub(super) fn is_poisoned(&self) -> bool {
        self.shared.as_ref().is_some_and(|s| s.poisoned())
    }

    /// Who holds what it waits for may hold it for ever.
    pub(super) fn waits_in_vain(&self) -> bool {
        self.is_poisoned() && !planted("waits-on-after-poison")
    }

    /// A request that has waited, or travelled, is answered. Looked at after it, as the broker looks for locks after it
    /// has set the poison: it sees this one, or this sees that the segment is not to be used any more.
    pub(super) fn in_time(&self, outcome: Outcome) -> Result<Outcome, Lost> {
        match self.is_poisoned() {
            true => Err(Lost),
            false => Ok(outcome),
        }
    }

    /// The same, where SQLite asks again before it uses the lock.
    pub(super) fn in_time_or_busy(&self, outcome: Option<Outcome>) -> Verdict {
        outcome.and_then(|o| self.in_time(o).ok()).map_or(Verdict::Busy, |o| o.verdict)
    }
}
