//! Databases that have been closed a moment ago: one that is opened again so soon is a short-lived programs', and its next
//! last close is a cheap one (`vfs/last_close.rs`). Nothing of theirs is kept, but what is said here.

use super::database::Identity;
use super::server::Server;
use crate::segment::atomic::SeqCst;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// So many databases that have been closed are remembered.
const REMEMBERED: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Closed {
    at: Instant,
    /// The number of the mark with which its WAL ended; 0: it has none.
    ended: u64,
}

#[derive(Debug)]
pub struct RecentlyClosed {
    /// So soon after its last close is a database opened again that short-lived programs use; zero: none is.
    soon: Duration,
    closed: BTreeMap<Identity, Closed>,
}

impl RecentlyClosed {
    pub fn new(soon: Duration) -> RecentlyClosed {
        RecentlyClosed { soon, closed: BTreeMap::new() }
    }

    /// A database has been closed. `ended` is what its members say; a wrong number harms nobody but them.
    pub fn note(&mut self, identity: Identity, ended: u64) {
        let now = Instant::now();
        if self.closed.len() >= REMEMBERED {
            self.closed.retain(|_, c| now.duration_since(c.at) < self.soon);
        }
        if self.closed.len() < REMEMBERED && !self.soon.is_zero() {
            self.closed.insert(identity, Closed { at: now, ended });
        }
    }
}

impl Server {
    /// A database has been founded, which no member has seen yet.
    pub(super) fn recall(&mut self, number: u32) {
        let Some(db) = self.databases.get(&number) else { return };
        let Some(closed) = self.closed.closed.remove(&db.identity) else { return };
        if closed.at.elapsed() < self.closed.soon
            && let Some(words) = db.checkpoint_words()
        {
            words.ended.store(closed.ended, SeqCst);
            words.comes_back.store(1, SeqCst);
        }
    }
}
