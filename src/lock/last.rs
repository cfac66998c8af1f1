//! The last close: who is the last one to have the WAL open.
//!
//! Closed means complete: when the last connection is closed, whoever copies the database file has all that was committed.
//! Of two that close at once neither must leave that to the other. So whoever closes says so *first* ([`CLOSING`]), when
//! it commits nothing more, and looks *then*: who finds that all others that have the WAL open are closing too copies,
//! and that is at least the one that said so last, after every commit of the others.

use super::SeatId;
use super::table::Table;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{CHECKPOINTER, CLOSING, WAL_OPEN};

impl Table<'_> {
    /// The seat's connection is being closed. True: nobody else keeps the WAL open.
    pub fn closes_last(self, seat: SeatId) -> bool {
        let seen = planted("closing-looks-first").then(|| self.wal_stays_open(seat));
        self.set_file(seat, CLOSING, true);
        !seen.unwrap_or_else(|| self.wal_stays_open(seat))
    }

    /// It closes last: newcomers wait until it has given back its file locks, as behind the EXCLUSIVE of SQLite's last
    /// close. Else they came in beside it, and `PRAGMA journal_mode=delete` would find them not alone. False: somebody
    /// else has shut the file.
    pub fn shuts_out_newcomers(self, seat: SeatId) -> bool {
        let pending = &self.words.file.0.pending;
        !planted("newcomers-beside-last-close") && pending.compare_exchange(0, seat, SeqCst, SeqCst).is_ok()
    }

    /// It has closed the wal-index.
    pub fn closed(self, seat: SeatId) {
        self.set_file(seat, WAL_OPEN | CLOSING, false);
    }

    fn wal_stays_open(self, seat: SeatId) -> bool {
        let stays = |s| self.seat(s).is_some_and(|w| w.file.load(SeqCst) & (WAL_OPEN | CLOSING) == WAL_OPEN);
        self.file_hinted().filter(|s| *s != seat && *s != CHECKPOINTER).any(stays)
    }
}
