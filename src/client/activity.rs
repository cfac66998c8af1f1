//! What this process knows of its own connections, so that none of them waits for another that only its own
//! thread could drive.
//!
//! The broker cannot tell a holder that computes from one that is idle: a transaction sends nothing between its
//! write lock and its commit. Here every call into the VFS is seen.

use super::fork::PerProcess;
use crate::lock::{Ask, FileLevel, Request};
use once_cell::sync::Lazy;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A holder that the waiter's own thread drove last, and that nobody has driven since, waits for the waiter to
/// return. Not at once: it may have been handed to another thread (goroutines, task pools).
const OWN_THREAD_PATIENCE: Duration = Duration::from_millis(60);
/// A holder of this process that nobody has driven for so long may be idle between two calls, with every thread
/// of its pool waiting for it.
const OWN_PROCESS_PATIENCE: Duration = Duration::from_secs(5);

static START: Lazy<Instant> = Lazy::new(Instant::now);
static OPEN: PerProcess<Mutex<Vec<Weak<Shared>>>> = PerProcess::new();

thread_local! {
    /// Its address tells threads apart without a system call.
    static THREAD: u8 = const { 0 };
}

fn this_thread() -> usize {
    THREAD.try_with(|t| std::ptr::from_ref(t) as usize).unwrap_or(0)
}

#[derive(Debug, Default)]
struct Shared {
    database: Option<u32>,
    /// Calls into the VFS that are running.
    calls: AtomicUsize,
    /// The thread of the last call.
    thread: AtomicUsize,
    /// When the last call ended, in milliseconds of [`START`].
    ended: AtomicU64,
    /// It has the turn or a write lock.
    writes: AtomicBool,
    /// It has a SHARED lock that keeps a writer from the file.
    reads: AtomicBool,
}

/// One connection's file.
#[derive(Debug)]
pub struct Activity(Arc<Shared>);

impl Activity {
    /// `database`: the broker's number of it; `None` for one that the broker does not know.
    pub fn new(database: Option<u32>) -> Activity {
        let shared = Arc::new(Shared { database, ..Shared::default() });
        let mut open = OPEN.get().lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|s| s.strong_count() > 0);
        open.push(Arc::downgrade(&shared));
        Activity(shared)
    }

    /// A call into the VFS begins.
    pub fn enter(&self) {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        self.0.thread.store(this_thread(), Ordering::Relaxed);
    }

    /// It ends.
    pub fn leave(&self) {
        self.0.ended.store(START.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn holds(&self, writes: bool, reads: bool) {
        self.0.writes.store(writes, Ordering::Relaxed);
        self.0.reads.store(reads, Ordering::Relaxed);
    }

    /// Whether a wait for `ask` that began at `since` may be one for a connection of this process that nobody
    /// drives.
    pub fn waits_for_itself(&self, ask: Ask, since: Instant) -> bool {
        if since.elapsed() < OWN_THREAD_PATIENCE {
            return false;
        }
        let for_readers = matches!(ask.request, Request::File { level: FileLevel::Exclusive, .. });
        let now = START.elapsed().as_millis() as u64;
        let open = OPEN.get().lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().filter_map(Weak::upgrade).any(|other| {
            let in_the_way = match for_readers {
                true => other.reads.load(Ordering::Relaxed),
                false => other.writes.load(Ordering::Relaxed),
            };
            let patience = match other.thread.load(Ordering::Relaxed) == this_thread() {
                true => OWN_THREAD_PATIENCE,
                false => OWN_PROCESS_PATIENCE,
            };
            let idle = Duration::from_millis(now.saturating_sub(other.ended.load(Ordering::Relaxed)));
            !Arc::ptr_eq(&other, &self.0)
                && other.database == self.0.database
                && in_the_way
                && other.calls.load(Ordering::Relaxed) == 0
                && idle >= patience
                && since.elapsed() >= patience
        })
    }
}
