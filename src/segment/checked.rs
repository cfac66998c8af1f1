//! Atomics that a model checker drives: the `loom` feature's, never in a build that maps a segment.
//!
//! Two checkers, because each has what the other lacks (docs/proof.md). Where a [`Watch`] is set, words are plain
//! and every access is announced to it: the explorer of `tests/model`, which sees interleavings of indivisible
//! accesses. Elsewhere they are loom's. Loom takes SeqCst loads and stores for acquire and release ones, with which
//! no Dekker-style protocol is right; but it has a read-modify-write read the newest value always. So here a load is
//! an addition of 0 and a store a swap: one total order of all accesses, which is what SeqCst says.

use std::cell::Cell;
use std::sync::atomic::Ordering::{self, AcqRel, Relaxed, SeqCst};

/// Is told of every access to a shared word that is not `Relaxed`.
pub trait Watch {
    /// An access follows.
    fn before(&self, address: usize);
    /// It found `old` and left `new`.
    fn after(&self, address: usize, old: u64, new: u64);
}

thread_local! {
    static WATCH: Cell<Option<&'static dyn Watch>> = const { Cell::new(None) };
}

/// Words made by this thread from now on are `watch`'s; with `None`, loom's.
pub fn set_watch(watch: Option<&'static dyn Watch>) {
    WATCH.set(watch);
}

macro_rules! checked {
    ($name:ident, $int:ty) => {
        #[derive(Debug)]
        pub struct $name(Word<std::sync::atomic::$name, loom::sync::atomic::$name>);

        impl Default for $name {
            fn default() -> $name {
                $name::new(0)
            }
        }

        impl $name {
            pub fn new(value: $int) -> $name {
                $name(match WATCH.get() {
                    Some(_) => Word::Watched(value.into()),
                    None => Word::Loom(loom::sync::atomic::$name::new(value)),
                })
            }

            pub fn load(&self, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| v),
                    Word::Loom(word) if order == Relaxed => word.load(Relaxed),
                    Word::Loom(word) => word.fetch_add(0, AcqRel),
                }
            }

            pub fn store(&self, value: $int, order: Ordering) {
                match &self.0 {
                    Word::Watched(_) => drop(self.watched(order, |_| value)),
                    Word::Loom(word) if order == Relaxed => word.store(value, Relaxed),
                    Word::Loom(word) => drop(word.swap(value, AcqRel)),
                }
            }

            pub fn swap(&self, value: $int, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |_| value),
                    Word::Loom(word) => word.swap(value, AcqRel),
                }
            }

            pub fn fetch_add(&self, value: $int, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| v.wrapping_add(value)),
                    Word::Loom(word) => word.fetch_add(value, AcqRel),
                }
            }

            pub fn fetch_or(&self, value: $int, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| v | value),
                    Word::Loom(word) => word.fetch_or(value, AcqRel),
                }
            }

            pub fn fetch_and(&self, value: $int, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| v & value),
                    Word::Loom(word) => word.fetch_and(value, AcqRel),
                }
            }

            pub fn fetch_max(&self, value: $int, order: Ordering) -> $int {
                match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| v.max(value)),
                    Word::Loom(word) => word.fetch_max(value, AcqRel),
                }
            }

            pub fn compare_exchange(
                &self,
                old: $int,
                new: $int,
                order: Ordering,
                _: Ordering,
            ) -> Result<$int, $int> {
                let found = match &self.0 {
                    Word::Watched(_) => self.watched(order, |v| if v == old { new } else { v }),
                    // A failed one must read the newest value too.
                    Word::Loom(word) => return word.compare_exchange(old, new, AcqRel, SeqCst),
                };
                if found == old { Ok(found) } else { Err(found) }
            }

            fn watched(&self, order: Ordering, next: impl FnOnce($int) -> $int) -> $int {
                let Word::Watched(word) = &self.0 else { return 0 };
                let address = std::ptr::from_ref(self) as usize;
                let watch = WATCH.get().filter(|_| order != Relaxed);
                if let Some(watch) = watch {
                    watch.before(address);
                }
                // One thread runs at a time.
                let old = word.load(Relaxed);
                let new = next(old);
                word.store(new, Relaxed);
                if let Some(watch) = watch {
                    watch.after(address, old.into(), new.into());
                }
                old
            }
        }
    };
}

#[derive(Debug)]
enum Word<S, L> {
    Watched(S),
    Loom(L),
}

checked!(AtomicU32, u32);
checked!(AtomicU64, u64);
