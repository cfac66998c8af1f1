//! What statements have shown of themselves, shared by all members of a database: which reading statement begins a
//! transaction that writes later, and which writing statement does not write this file.
//!
//! A small table of hints in the segment, by a hash of the statement's text. An entry that another overwrites, or
//! that a crash or a scribbler leaves wrong, costs time and never more: a turn taken in vain, or one not taken ahead.

use crate::segment::atomic::{AtomicU64, Relaxed};

/// What there is to know about a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lesson {
    /// An explicit transaction that begins with it writes later.
    WritesLater = 1,
    /// It writes, but not this file.
    WritesElsewhere = 2,
}

/// A transaction is taken for one that writes until so many in a row have not.
const TRUST: u64 = 8;
/// The lower bits of an entry count; the upper ones tell its statement.
const COUNT: u64 = 0xff;
/// Instead of a count: see [`Learned::refute`].
const REFUTED: u64 = 0xff;

/// The table of one database.
#[derive(Clone, Copy, Debug)]
pub struct Learned<'a>(pub &'a [AtomicU64]);

impl<'a> Learned<'a> {
    fn at(&self, text: u64, lesson: Lesson) -> (Option<&'a AtomicU64>, u64) {
        let key = text.wrapping_add(lesson as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | (COUNT + 1);
        let entry = self.0.get((key >> 40) as usize % self.0.len().max(1));
        (entry, key & !COUNT)
    }

    pub fn knows(&self, text: u64, lesson: Lesson) -> bool {
        let (entry, key) = self.at(text, lesson);
        entry.is_some_and(|e| {
            let known = e.load(Relaxed);
            known & !COUNT == key && matches!(known & COUNT, 1..=TRUST)
        })
    }

    pub fn learn(&self, text: u64, lesson: Lesson) {
        let (Some(entry), key) = self.at(text, lesson) else { return };
        let known = entry.load(Relaxed);
        if known != key | TRUST && known != key | REFUTED {
            entry.store(key | TRUST, Relaxed);
        }
    }

    /// It was not like that this time.
    pub fn doubt(&self, text: u64, lesson: Lesson) {
        let (Some(entry), key) = self.at(text, lesson) else { return };
        let known = entry.load(Relaxed);
        if known & !COUNT == key && known & COUNT <= TRUST {
            entry.store(key | (known & COUNT).saturating_sub(1), Relaxed);
        }
    }

    /// It is not like that, or not always: not to be learned again.
    pub fn refute(&self, text: u64, lesson: Lesson) {
        let (Some(entry), key) = self.at(text, lesson) else { return };
        if entry.load(Relaxed) & !COUNT == key {
            entry.store(key | REFUTED, Relaxed);
        }
    }
}

/// A hash of a statement's text; never 0.
pub fn hash(text: &[u8]) -> u64 {
    let mut h = text.len() as u64 ^ 0x51_7c_c1_b7_27_22_0a_95;
    let mut chunks = text.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes(chunk.try_into().unwrap_or_default());
        h = (h.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    for byte in chunks.remainder() {
        h = (h.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    h | 1
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn what_is_learned_is_forgotten_after_a_run_of_doubts() {
        let words: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
        let learned = Learned(&words);
        let text = hash(b"SELECT n FROM counter WHERE id = ?");
        assert!(!learned.knows(text, Lesson::WritesLater));
        learned.learn(text, Lesson::WritesLater);
        assert!(learned.knows(text, Lesson::WritesLater));
        assert!(!learned.knows(text, Lesson::WritesElsewhere));
        for _ in 1..TRUST {
            learned.doubt(text, Lesson::WritesLater);
            assert!(learned.knows(text, Lesson::WritesLater));
        }
        learned.learn(text, Lesson::WritesLater); // it wrote again: trusted anew
        for _ in 0..TRUST {
            learned.doubt(text, Lesson::WritesLater);
        }
        assert!(!learned.knows(text, Lesson::WritesLater));
        learned.learn(text, Lesson::WritesElsewhere);
        assert!(learned.knows(text, Lesson::WritesElsewhere));
        learned.refute(text, Lesson::WritesElsewhere);
        learned.learn(text, Lesson::WritesElsewhere);
        assert!(!learned.knows(text, Lesson::WritesElsewhere));
    }

    #[test]
    fn any_table_is_harmless() {
        let learned = Learned(&[]);
        learned.learn(7, Lesson::WritesLater);
        assert!(!learned.knows(7, Lesson::WritesLater));
        let words = [AtomicU64::new(u64::MAX)];
        Learned(&words).doubt(7, Lesson::WritesLater);
        assert!(!Learned(&words).knows(7, Lesson::WritesLater));
    }
}
