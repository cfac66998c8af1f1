//! What this process knows of its own connections, so that none of them waits for another that only its own
//! thread could drive.
//!
//! The broker cannot tell a holder that computes from one that is idle: a transaction sends nothing between its
//! write lock and its commit. Here every call into the VFS is seen.

use super::fork::PerProcess;
use crate::lock::{Ask, FileLevel, Request};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A holder that the waiter's own thread drove last, and that nobody has driven since, waits for the waiter to
/// return. Not at once: it may have been handed to another thread (goroutines, task pools).
const OWN_THREAD_PATIENCE: Duration = Duration::from_millis(60);
/// A holder of this process that nobody has driven for so long may be idle between two calls, with every thread
/// of its pool waiting for it.
const OWN_PROCESS_PATIENCE: Duration = Duration::from_secs(5);

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
    /// Calls into the VFS that are running. One thread at a time drives a connection, so this and the next are
    /// changed without read-modify-write.
    running: AtomicUsize,
    /// Calls that have begun.
    calls: AtomicU64,
    /// The thread of the last call.
    thread: AtomicUsize,
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
        self.0.running.store(self.0.running.load(Relaxed) + 1, Relaxed);
        self.0.calls.store(self.0.calls.load(Relaxed) + 1, Relaxed);
        self.0.thread.store(this_thread(), Relaxed);
    }

    /// It ends.
    pub fn leave(&self) {
        self.0.running.store(self.0.running.load(Relaxed).saturating_sub(1), Relaxed);
    }

    pub fn holds(&self, writes: bool, reads: bool) {
        self.0.writes.store(writes, Relaxed);
        self.0.reads.store(reads, Relaxed);
    }

    /// Whether a wait for `ask` may be one for a connection of this process that nobody drives. Asked every few
    /// milliseconds of that wait; `seen` is kept between.
    pub fn waits_for_itself(&self, ask: Ask, seen: &mut Idle) -> bool {
        let for_readers = matches!(ask.request, Request::File { level: FileLevel::Exclusive, .. });
        let now = Instant::now();
        let open = OPEN.get().lock().unwrap_or_else(PoisonError::into_inner);
        let others = open.iter().filter_map(Weak::upgrade);
        let in_the_way = others.filter(|other| {
            let holds = if for_readers { &other.reads } else { &other.writes };
            !Arc::ptr_eq(other, &self.0) && other.database == self.0.database && holds.load(Relaxed)
        });
        let mut idle = Idle::default();
        let mut hopeless = false;
        for other in in_the_way {
            if other.running.load(Relaxed) != 0 {
                continue;
            }
            let (who, calls) = (Arc::as_ptr(&other) as usize, other.calls.load(Relaxed));
            let known = seen.0.iter().find(|(w, c, _)| *w == who && *c == calls);
            let begun = known.map_or(now, |(_, _, begun)| *begun);
            idle.0.push((who, calls, begun));
            let patience = match other.thread.load(Relaxed) == this_thread() {
                true => OWN_THREAD_PATIENCE,
                false => OWN_PROCESS_PATIENCE,
            };
            hopeless |= now.duration_since(begun) >= patience;
        }
        *seen = idle;
        hopeless
    }
}

/// Connections of this process that nobody drives, with their count of calls, and since when it is known.
#[derive(Debug, Default)]
pub struct Idle(Vec<(usize, u64, Instant)>);
