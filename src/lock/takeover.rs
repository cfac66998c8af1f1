//! What a broker does first with words that another one has looked after, which may have ended between any two of its
//! steps.

use super::queue::Lane;
use super::seat::wake_sleepers;
use super::{FileLevel, Release, SeatId, Slots, slot};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{CHECKPOINTER, NOTIFIED, RUNNING, STATE};
use serde::{Deserialize, Serialize};

/// The locks of a seat of the socket lane as its connection knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    pub file: FileLevel,
    /// Wal-index slots, a bit each.
    pub shared: u8,
    pub exclusive: u8,
}

impl Default for Holds {
    fn default() -> Holds {
        Holds { file: FileLevel::None, shared: 0, exclusive: 0 }
    }
}

impl Holds {
    /// A lock has been granted.
    pub fn takes(&mut self, request: super::Request) {
        use super::Request;
        match request {
            Request::File { level, .. } => self.file = self.file.max(level),
            Request::ShmShared(slots) => self.shared |= slots.mask().unwrap_or(0),
            Request::ShmExclusive { slots, .. } => self.exclusive |= slots.mask().unwrap_or(0),
            Request::Turn => {}
        }
    }

    /// A lock is given back.
    pub fn gives(&mut self, release: Release) {
        match release {
            Release::File { level, .. } => self.file = self.file.min(level),
            Release::ShmShared { slots, .. } => self.shared &= !slots.mask().unwrap_or(0),
            Release::ShmExclusive { slots, .. } => self.exclusive &= !slots.mask().unwrap_or(0),
            Release::Turn => {}
        }
    }
}

impl Lane<'_> {
    /// Finishes what the last broker had begun: seats that it was clearing are cleared, requests that it was asked to
    /// wait for wait no more (who made them asks again), and nobody sleeps whom it was about to wake.
    pub fn take_over(&mut self) {
        let table = self.table;
        for id in 1..CHECKPOINTER {
            let Some(words) = table.seat(id) else { break };
            if !table.members.has(id) && words.state.load(SeqCst) & STATE != 0 {
                self.remove(id);
            } else if words.brokered.load(SeqCst) != 0 && !planted("old-requests-wait") {
                table.sleepers.clear(id);
                self.turn().give_up(id);
                for word in [&words.park, &words.waiting, &words.ended, &words.brokered] {
                    word.store(0, SeqCst);
                }
            }
        }
        const _: () = assert!(RUNNING == 0);
        table.words.sleepy.0.store(1, SeqCst);
        wake_sleepers(table, self.parking);
        let marked = |s: &SeatId| table.seat(*s).is_some_and(|w| w.park.load(SeqCst) == NOTIFIED);
        table.members.iter().filter(marked).for_each(|s| self.parking.wake(table, s));
        self.turn().kick();
    }

    /// Lets go of what the seat has and does not know of: the answer to its request, or what it gave back, was lost with
    /// the last broker. False: it believes to have what it has not.
    pub fn settle_for(&mut self, id: SeatId, holds: Holds) -> bool {
        let table = self.table;
        let owned = table.owned_slots(id);
        let writes = table.file_write_held(id);
        let level = match (table.file_shared(id), writes) {
            (_, true) => FileLevel::Exclusive,
            (true, false) => FileLevel::Shared,
            (false, false) => FileLevel::None,
        };
        let shared = table.slots_shared(id);
        if holds.file > level || holds.shared & !shared != 0 || holds.exclusive & !owned != 0 {
            return false;
        }
        if planted("lost-answers-kept") {
            return true;
        }
        for one in 0..slot::COUNT {
            let Some(slots) = Slots::new(one, 1) else { continue };
            let bit = 1 << one;
            if owned & !holds.exclusive & bit != 0 {
                self.release(id, Release::ShmExclusive { slots, keep_turn: false });
            }
            if shared & !holds.shared & bit != 0 {
                self.release(id, Release::ShmShared { slots, keep_turn: false });
            }
        }
        // RESERVED and what is above it go together: a seat that knows of RESERVED asks again for the rest.
        if holds.file <= FileLevel::Shared && level > holds.file {
            self.release(id, Release::File { level: holds.file, keep_turn: false });
        }
        if holds == Holds::default() {
            self.release(id, Release::Turn);
        }
        true
    }
}
