//! What a thread of a model can do, and what the explorer knows of all of them.

use corosensei::Yielder;
use std::cell::{Cell, RefCell};
use turnstile::segment::checked::Watch;

pub const MOST_THREADS: usize = 6;

/// Why a thread has stopped.
#[derive(Clone, Copy)]
pub enum Stop {
    Access,
    /// Until [`wake`] of this number.
    Sleep(usize),
    /// Until [`post`] of this number.
    Signal(usize),
    Choice(u8),
}

#[derive(Clone, Copy, Default)]
pub struct WordUse {
    user: Option<usize>,
    several: bool,
    written: bool,
}

#[derive(Default)]
pub struct Engine {
    pub running: Cell<Option<usize>>,
    pub yielder: Cell<Option<*const Yielder<u8, Stop>>>,
    pub base: Cell<usize>,
    pub uses: RefCell<Vec<WordUse>>,
    /// A word has turned out to be shared.
    pub found: Cell<bool>,
    pub words: Cell<u64>,
    pub histories: Cell<[u64; MOST_THREADS]>,
    pub asleep: Cell<u64>,
    pub signals: Cell<u64>,
    pub log: RefCell<Vec<(usize, usize, u64, u64)>>,
}

thread_local! {
    pub static ENGINE: &'static Engine = Box::leak(Box::default());
}

pub fn mix(a: u64, b: u64) -> u64 {
    let x = (a.rotate_left(23) ^ b).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 29
}

impl Engine {
    /// A run begins, with its words at this address and of this size in bytes.
    pub fn begin(&self, (address, size): (usize, usize)) {
        self.running.set(None);
        self.base.set(address);
        self.uses.borrow_mut().resize(size / 4, WordUse::default());
        self.words.set(0);
        self.histories.set([0; MOST_THREADS]);
        self.asleep.set(0);
        self.signals.set(0);
        self.log.borrow_mut().clear();
    }

    /// What the future depends on, as a number.
    pub fn state(&self) -> u64 {
        let words = [self.words.get(), self.asleep.get(), self.signals.get()];
        words.into_iter().chain(self.histories.get()).fold(0, mix)
    }

    fn stop(&self, why: Stop) -> u8 {
        let Some(yielder) = self.yielder.get() else { return 0 };
        // SAFETY: it is the yielder of the coroutine that runs at this moment, on whose stack this call is.
        unsafe { &*yielder }.suspend(why)
    }

    pub fn learn(&self, what: u64) {
        if let Some(thread) = self.running.get() {
            let mut histories = self.histories.get();
            histories[thread] = mix(histories[thread], what);
            self.histories.set(histories);
        }
    }

    fn index(&self, address: usize) -> Option<usize> {
        address.checked_sub(self.base.get()).map(|o| o / 4).filter(|i| *i < self.uses.borrow().len())
    }
}

impl WordUse {
    pub fn is_shared(&self) -> bool {
        self.several && self.written
    }
}

impl Watch for Engine {
    fn before(&self, address: usize) {
        let shared = |i: usize| self.uses.borrow()[i].is_shared();
        if self.running.get().is_some() && self.index(address).is_some_and(shared) {
            self.stop(Stop::Access);
        }
    }

    fn after(&self, address: usize, old: u64, new: u64) {
        // Outside of all threads everything is the same in each run.
        let Some(thread) = self.running.get() else { return };
        let index = self.index(address).expect("a shared word outside the plan's memory");
        let place = index as u64;
        if old != new {
            self.words.set(self.words.get() ^ mix(place, old) ^ mix(place, new));
        }
        self.learn(mix(place, old));
        self.log.borrow_mut().push((thread, index, old, new));
        let word = &mut self.uses.borrow_mut()[index];
        let before = *word;
        word.several |= word.user.is_some_and(|u| u != thread);
        word.user.get_or_insert(thread);
        word.written |= old != new;
        if word.is_shared() && !before.is_shared() {
            self.found.set(true);
        }
    }
}

/// Where another thread may go on, even if no shared word is accessed.
pub fn step() {
    ENGINE.with(|e| e.stop(Stop::Access));
}

/// One of `0..n`, every one in some run.
pub fn choose(n: u8) -> u8 {
    ENGINE.with(|e| {
        let choice = e.stop(Stop::Choice(n));
        e.learn(choice.into());
        choice
    })
}

/// What the running thread has read so far, as a number.
pub fn read_so_far() -> u64 {
    ENGINE.with(|e| e.running.get().map_or(0, |t| e.histories.get()[t]))
}

/// From here on the running thread depends on nothing that it has read but `known`.
pub fn forget_all_but(known: u64) {
    ENGINE.with(|e| {
        if let Some(thread) = e.running.get() {
            let mut histories = e.histories.get();
            histories[thread] = known;
            e.histories.set(histories);
        }
    });
}

/// Sleeps until somebody wakes `id`. Nobody comes in between the access before this and the sleep.
pub fn sleep(id: usize) {
    ENGINE.with(|e| {
        e.asleep.set(e.asleep.get() | 1 << id);
        e.stop(Stop::Sleep(id));
    });
}

pub fn wake(id: usize) {
    ENGINE.with(|e| {
        e.stop(Stop::Access);
        e.asleep.set(e.asleep.get() & !(1 << id));
    });
}

/// A message for `id`. It is kept until it is waited for.
pub fn post(id: usize) {
    ENGINE.with(|e| {
        e.stop(Stop::Access);
        e.signals.set(e.signals.get() | 1 << id);
    });
}

pub fn wait_for_post(id: usize) {
    ENGINE.with(|e| {
        e.stop(Stop::Signal(id));
        e.signals.set(e.signals.get() & !(1 << id));
    });
}
