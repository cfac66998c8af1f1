//! SQLite's requests, by short names.

use super::Bench;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};

impl Bench {
    pub fn ask(&self, seat: SeatId, request: Request, ahead: bool) -> Option<Verdict> {
        self.submit(seat, Ask { request, ahead })
    }

    pub fn file(&self, seat: SeatId, level: FileLevel) -> Option<Verdict> {
        self.ask(seat, Request::File { level, hot_journal: false }, false)
    }

    pub fn shared(&self, seat: SeatId) {
        assert!(granted(self.file(seat, FileLevel::Shared)));
    }

    /// SHARED, with the turn taken ahead.
    pub fn shared_ahead(&self, seat: SeatId) -> Option<Verdict> {
        self.ask(seat, Request::File { level: FileLevel::Shared, hot_journal: false }, true)
    }

    /// EXCLUSIVE of a seat that has seen a hot journal.
    pub fn hot_exclusive(&self, seat: SeatId) -> Option<Verdict> {
        self.ask(seat, Request::File { level: FileLevel::Exclusive, hot_journal: true }, false)
    }

    pub fn read(&self, seat: SeatId, ahead: bool) -> Option<Verdict> {
        self.ask(seat, Request::ShmShared(slots(slot::READ0 + 1)), ahead)
    }

    pub fn write(&self, seat: SeatId) -> Option<Verdict> {
        self.exclusive(seat, slots(slot::WRITE))
    }

    /// Wal-index slots exclusively.
    pub fn exclusive(&self, seat: SeatId, slots: Slots) -> Option<Verdict> {
        self.ask(seat, Request::ShmExclusive { slots, blocking: false }, false)
    }

    pub fn unlock(&self, seat: SeatId, level: FileLevel) {
        self.release(seat, Release::File { level, keep_turn: false });
    }

    pub fn unread(&self, seat: SeatId, retry_expected: bool) {
        let slots = slots(slot::READ0 + 1);
        self.release(seat, Release::ShmShared { slots, keep_turn: retry_expected });
    }

    pub fn unexclusive(&self, seat: SeatId, slots: Slots) {
        self.release(seat, Release::ShmExclusive { slots, keep_turn: false });
    }

    pub fn unwrite(&self, seat: SeatId) {
        self.unexclusive(seat, slots(slot::WRITE));
    }

    /// The seats have the wal-index open. Answers which of them found nobody else there.
    pub fn wal(&self, seats: &[SeatId]) -> Vec<SeatId> {
        let mut alone = Vec::new();
        for seat in seats {
            self.shared(*seat);
            assert!(self.with(*seat, |s| s.open_wal_index(|| alone.push(*seat))));
        }
        alone
    }
}

pub fn granted(verdict: Option<Verdict>) -> bool {
    matches!(verdict, Some(Verdict::Granted { .. }))
}

pub fn slots(one: u8) -> Slots {
    Slots::new(one, 1).unwrap()
}

/// The seats whose waits ended.
pub fn seats(ended: &[(SeatId, Verdict)]) -> Vec<SeatId> {
    ended.iter().map(|(seat, _)| *seat).collect()
}
