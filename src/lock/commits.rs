//! Durable commits that share one sync.
//!
//! A commit has its frames written, is given a number while its seat holds WRITE, is published, and only then waits,
//! without any lock, until a sync that began after its number was issued has ended well. Whoever finds that nobody
//! syncs *leads*: it notes the newest number, syncs once, and that makes every commit up to the number durable.
//!
//! **Leading is a hint, not a lock.** A leader may die or be stopped between any two steps: who waits for a sync that
//! takes twice as long as they usually do leads another. Readers lead too, or one that waits for a commit whose
//! writer died before it could would wait for ever. Two syncs at once do no harm.
//!
//! **A group fills itself.** One that syncs at once makes two groups alternate, each with half of the commits. So the
//! first to come waits for as many as came last time, at most about as long as a sync takes; the one that makes the
//! number full leads, because it is awake.
//!
//! **A failed sync** stops the number of what is durable ([`Commits::fail`]), in the same word: from then on no later sync,
//! not even one that succeeds (the kernel tells of an error once, and takes the pages for written), makes any further
//! commit durable, so that all who wait get one answer. Whoever gets WRITE and CHECKPOINT then cuts the WAL back
//! ([`Commits::cut_at`]) and says which numbers have failed ([`Commits::repaired`]); only after that is anybody told.

use super::park::Rounds;
use super::tries::tries;
use crate::planted::planted;
use crate::segment::atomic::{AtomicU64, SeqCst};
use crate::segment::layout::{COMMITS, CommitWords, FAILURES, IssuedWords, SyncedWords};

/// A commit's place in the order; 0 is before the first.
pub type Number = u64;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    pub number: Number,
    /// Failures that had been repaired before the number was known.
    failures: u32,
}

impl Awaited {
    /// Of a segment that does not tell.
    pub fn unknown() -> Awaited {
        Awaited { number: Number::MAX, failures: 0 }
    }
}

/// [`SyncedWords::durable`]: a sync has failed.
const FAILED: u64 = 1 << 63;
/// How long a sync is taken for until one was measured, in microseconds.
const FIRST_GUESS_MICROS: u64 = 200;
/// A sync that takes twice as long as usual, and this many microseconds, is overtaken: its leader may be gone.
const OVERDUE_MICROS: u64 = 1000;
/// So many commits are two groups: one is synced while the other one is written.
const TWO_GROUPS: u64 = 16;
/// Longest wait for a group to fill, in microseconds.
const PATIENCE_MICROS: u64 = 5000;

/// A length of the WAL in bytes, with the number of its generation (how often it was begun anew), so that lengths of
/// different generations are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub generation: u64,
    pub length: u64,
}

impl Place {
    /// Lengths are multiples of eight (a header of 32 bytes, frames of 24 and a page).
    const LENGTH_BITS: u32 = 40;

    fn to_word(self) -> u64 {
        (self.generation << Place::LENGTH_BITS) | ((self.length / 8) & ((1 << Place::LENGTH_BITS) - 1))
    }

    fn from_word(word: u64) -> Place {
        Place { generation: word >> Place::LENGTH_BITS, length: (word & ((1 << Place::LENGTH_BITS) - 1)) * 8 }
    }
}

/// The commits of one database.
#[derive(Clone, Copy)]
pub struct Commits<'a> {
    pub words: &'a CommitWords,
    pub rounds: &'a dyn Rounds,
}

/// A sync that is about to begin, or is being made.
#[derive(Clone, Copy, Debug)]
pub struct Sync {
    /// The newest number before it began.
    covers: Number,
    /// What was durable then.
    before: Number,
    began: u64,
}

/// What a waiter finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Durable,
    Failed,
    /// Sync, if [`SyncedWords::leading`] is still this.
    Lead(u64),
    /// Sleep until the round ends, for so many microseconds at most.
    Sleep(u64),
}

impl<'a> Commits<'a> {
    fn issued(&self) -> &'a IssuedWords {
        &self.words.issued.0
    }

    fn synced(&self) -> &'a SyncedWords {
        &self.words.synced.0
    }

    /// The newest commit's number. Read after a snapshot was taken, it is no less than that of any commit in it.
    pub fn newest(&self) -> Number {
        self.issued().newest.load(SeqCst)
    }

    pub fn durable(&self) -> Number {
        self.synced().durable.load(SeqCst) & !FAILED
    }

    pub fn has_failed(&self) -> bool {
        self.synced().durable.load(SeqCst) & FAILED != 0
    }

    /// Failures that have been repaired.
    pub fn failures(&self) -> u32 {
        self.synced().failures.load(SeqCst)
    }

    /// The newest commit.
    pub fn latest(&self) -> Awaited {
        // In this order: a failure in between is one of others.
        let failures = self.failures();
        Awaited { failures, number: self.newest() }
    }

    /// The newest commit if it is not durable yet.
    pub fn pending(&self) -> Option<Awaited> {
        let latest = self.latest();
        (self.durable() < latest.number).then_some(latest)
    }

    /// It is one of those that failed and are no more.
    pub fn is_lost(&self, awaited: Awaited) -> bool {
        let failures = self.failures();
        let since = failures.wrapping_sub(awaited.failures);
        let among = |failure: u32| {
            let [first, last] = self.failed(failure).each_ref().map(|w| w.load(SeqCst));
            (first..=last).contains(&awaited.number)
        };
        since as usize > FAILURES || (0..since).any(|i| among(awaited.failures.wrapping_add(i)))
    }

    fn failed(&self, failure: u32) -> &'a [AtomicU64; 2] {
        &self.words.failed[failure as usize % FAILURES]
    }

    /// The WAL's salts when the last commit was counted; 0: not known.
    pub fn salts(&self) -> u64 {
        self.issued().salts.load(SeqCst)
    }

    pub fn generation(&self) -> u64 {
        self.issued().generation.load(SeqCst)
    }

    /// Everything in a WAL with these salts, up to this length, is on the disk.
    pub fn cover(&self, salts: u64, length: u64) -> bool {
        let newest = self.newest();
        let end = Place::from_word(self.place(newest)[1].load(SeqCst));
        let counted = newest != 0 && self.salts() == salts && self.durable() == newest;
        counted && end == Place { generation: self.generation(), length }
    }

    /// What lies in front of this place in the WAL, as it is now, is on the disk.
    pub fn has_synced_to(&self, length: u64) -> bool {
        let durable = self.durable();
        let end = Place::from_word(self.place(durable)[1].load(SeqCst));
        let whole = durable != 0 && self.newest() - durable.min(self.newest()) < COMMITS as u64 - 1;
        whole && end.generation == self.generation() && length <= end.length
    }

    /// A commit is being made that is not counted here. To be called under WRITE.
    pub fn lose_count(&self) {
        self.issued().salts.store(0, SeqCst);
    }

    /// The WAL has been begun anew, or not been known until now. To be called under WRITE.
    pub fn begin_generation(&self, salts: u64) -> u64 {
        let generation = self.generation() + 1;
        self.issued().generation.store(generation, SeqCst);
        self.issued().salts.store(salts, SeqCst);
        generation
    }

    /// A number for a commit whose frames are written and which is not yet published. To be called under WRITE.
    /// `None`: too many wait already, or a sync has failed.
    pub fn issue(&self, from: Place, to: Place) -> Option<Awaited> {
        let Awaited { failures, number: newest } = self.latest();
        if self.has_failed() || newest - self.durable().min(newest) >= COMMITS as u64 - 1 {
            return None;
        }
        let number = newest + 1;
        let place = self.place(number);
        place[0].store(from.to_word(), SeqCst);
        place[1].store(to.to_word(), SeqCst);
        self.issued().at.store(self.rounds.micros(), SeqCst);
        self.issued().newest.store(number, SeqCst);
        Some(Awaited { number, failures })
    }

    /// The same for a commit, or a header, that a sync has just made durable.
    pub fn issue_durable(&self, from: Place, to: Place) -> bool {
        self.issue(from, to).is_some_and(|awaited| self.raise(awaited.number))
    }

    fn place(&self, number: Number) -> &'a [AtomicU64; 2] {
        &self.words.places[(number % COMMITS as u64) as usize]
    }

    /// To be called before a sync of the WAL begins.
    pub fn begin(&self) -> Sync {
        let before = self.durable();
        Sync { covers: self.newest(), before, began: self.rounds.micros() }
    }

    /// The sync has ended well. False: another one had failed before, and nothing more becomes durable.
    pub fn end(&self, sync: Sync) -> bool {
        let synced = self.synced();
        let ok = self.raise(sync.covers);
        // Who waits now has come while this one ran; who was in it will come again.
        let group = sync.covers.saturating_sub(sync.before) + self.newest().saturating_sub(sync.covers);
        synced.expected.store(group.clamp(1, COMMITS as u64 / 2), SeqCst);
        let now = self.rounds.micros();
        let took = now.saturating_sub(sync.began).max(1);
        let usual = match synced.usual.load(SeqCst) {
            0 => took,
            usual => (usual.min(1 << 32) * 7 + took) / 8,
        };
        synced.usual.store(usual, SeqCst);
        synced.ended.store(now, SeqCst);
        let _ = synced.leading.compare_exchange(sync.covers, 0, SeqCst, SeqCst);
        self.end_round();
        ok
    }

    /// Makes every commit up to `number` durable.
    fn raise(&self, number: Number) -> bool {
        let durable = &self.synced().durable;
        let mut now = durable.load(SeqCst);
        for _ in tries() {
            if now & FAILED != 0 {
                return now & !FAILED >= number;
            }
            if now >= number {
                return true;
            }
            match durable.compare_exchange(now, number, SeqCst, SeqCst) {
                Ok(_) => return true,
                Err(other) => now = other,
            }
        }
        false
    }

    /// A sync of the WAL has failed: what is not durable by now never will be, unless it is written again.
    pub fn fail(&self, sync: Sync) {
        if !planted("failed-sync-tried-again") {
            self.synced().durable.fetch_or(FAILED, SeqCst);
        }
        let _ = self.synced().leading.compare_exchange(sync.covers, 0, SeqCst, SeqCst);
        self.end_round();
    }

    fn end_round(&self) {
        let rounds = &self.words.rounds.0;
        rounds.round.fetch_add(1, SeqCst);
        if rounds.asleep.swap(0, SeqCst) != 0 && !planted("round-ends-quietly") {
            self.rounds.wake_all(&rounds.round);
        }
    }

    /// Waits until the commit is durable, and syncs if nobody else does. False: a sync has failed.
    pub fn wait(&self, awaited: Awaited, mut sync: impl FnMut() -> bool) -> bool {
        let since = self.rounds.micros();
        let rounds = &self.words.rounds.0;
        loop {
            // Before the look: a round that ends after it is not slept through.
            let round = rounds.round.load(SeqCst);
            match self.look(awaited, since) {
                Look::Durable => return true,
                Look::Failed => return false,
                Look::Lead(instead) => {
                    let Some(leading) = self.lead(instead) else { continue };
                    if !sync() {
                        self.fail(leading);
                    } else {
                        self.end(leading);
                    }
                }
                Look::Sleep(micros) => {
                    rounds.asleep.store(1, SeqCst);
                    self.rounds.sleep(&rounds.round, round, micros);
                }
            }
        }
    }

    fn look(&self, awaited: Awaited, since: u64) -> Look {
        let synced = self.synced();
        let durable = synced.durable.load(SeqCst);
        if durable & !FAILED >= awaited.number {
            // After a repair those that failed are behind it as well.
            return if self.is_lost(awaited) { Look::Failed } else { Look::Durable };
        }
        if durable & FAILED != 0 {
            return Look::Failed;
        }
        let now = self.rounds.micros();
        let usual = match synced.usual.load(SeqCst) {
            0 => FIRST_GUESS_MICROS,
            usual => usual,
        };
        let leading = synced.leading.load(SeqCst);
        if leading != 0 {
            let due = synced.since.load(SeqCst).saturating_add(usual.saturating_mul(2) + OVERDUE_MICROS);
            return if now >= due && !planted("leader-waited-for") {
                Look::Lead(leading)
            } else {
                Look::Sleep(due.saturating_sub(now).min(usual * 2 + OVERDUE_MICROS))
            };
        }
        let waiting = self.newest().saturating_sub(durable);
        // As long as others come. A time that is ahead of ours is nobody's.
        let latest = synced.ended.load(SeqCst).max(self.issued().at.load(SeqCst));
        let from = if latest <= now { since.max(latest) } else { since };
        let until = from + usual.min(PATIENCE_MICROS);
        let expected = synced.expected.load(SeqCst);
        let enough = if expected >= TWO_GROUPS { expected / 2 } else { expected };
        if waiting >= enough || now >= until {
            return Look::Lead(0);
        }
        // The first to wait looks after the others; if it is gone, they wait as for a leader that is.
        let first = awaited.number == durable + 1;
        Look::Sleep(if first { until - now } else { usual * 2 + OVERDUE_MICROS })
    }

    /// Leads a sync instead of `instead`, unless somebody else has just begun to.
    fn lead(&self, instead: u64) -> Option<Sync> {
        let synced = self.synced();
        let sync = self.begin();
        synced.since.store(sync.began, SeqCst);
        synced.leading.compare_exchange(instead, sync.covers, SeqCst, SeqCst).is_ok().then_some(sync)
    }

    /// After a failure: the length to which the WAL is to be cut, so that no commit that failed is in it. `None`: not
    /// known. To be called under WRITE and CHECKPOINT, when nobody makes commits any more.
    pub fn cut_at(&self) -> Option<u64> {
        let (durable, newest) = (self.durable(), self.newest());
        if self.salts() == 0 || durable == 0 || newest - durable.min(newest) >= COMMITS as u64 {
            return None;
        }
        let at = |number, i: usize| Place::from_word(self.place(number)[i].load(SeqCst));
        let generation = at(newest, 0).generation;
        // A commit that was never published (its writer died) may reach further than the ones that came after it.
        let starts = (durable + 1..=newest).map(|number| at(number, 0));
        let places = starts.chain([at(durable, 1)]).filter(|p| p.generation == generation);
        places.map(|p| p.length).min()
    }

    /// The WAL has been cut back: what failed is lost, what comes is counted anew. To be called where `cut_at` was.
    pub fn repaired(&self) {
        let (durable, newest) = (self.durable(), self.newest());
        self.lose_count();
        let failures = self.failures();
        let failed = self.failed(failures);
        failed[0].store(durable + 1, SeqCst);
        failed[1].store(newest, SeqCst);
        if !planted("failure-forgotten") {
            self.synced().failures.store(failures.wrapping_add(1), SeqCst);
        }
        self.synced().durable.store(newest, SeqCst);
        self.end_round();
    }
}
