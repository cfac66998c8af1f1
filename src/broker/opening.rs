//! Opening the wal-index for seats of the socket lane. Another seat may just be finding out whether it is alone: the
//! broker looks again in its next rounds instead of waiting, for what says so is a word that any member can write.

use super::database::State;
use super::server::Server;
use crate::planted::planted;
use crate::wire::message::{FromBroker, SeatKey};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// A seat that opens the wal-index needs some microseconds, and is cleared away if it dies.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks.
pub const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A request that another seat's stands in the way of.
pub struct Opening {
    session: u64,
    request: u64,
    key: SeatKey,
    since: Instant,
}

impl Server {
    pub(super) fn open_wal_index(&mut self, session: u64, request: u64, key: SeatKey) -> Result<(), String> {
        if self.opening.iter().any(|o| o.key == key) {
            return Err("two requests of one seat at once".into());
        }
        let new = Opening { session, request, key, since: Instant::now() };
        let again = self.try_opening(new);
        self.opening.extend(again);
        Ok(())
    }

    /// Looks again at those that had to wait.
    pub(super) fn open_waiting(&mut self) {
        if self.opening.is_empty() || self.last_opening.elapsed() < LOOK_AGAIN {
            return;
        }
        self.last_opening = Instant::now();
        for opening in std::mem::take(&mut self.opening) {
            let uid = self.uid_of(opening.session);
            if !self.shares.has_more(uid) {
                self.opening.push(opening);
                continue;
            }
            let begun = Instant::now();
            if self.own(opening.session, opening.key).is_ok() {
                let again = self.try_opening(opening);
                self.opening.extend(again);
            }
            self.shares.charge(uid, begun.elapsed());
        }
    }

    fn try_opening(&mut self, opening: Opening) -> Option<Opening> {
        let Opening { session, request: id, key, since } = opening;
        let mut answer = FromBroker::WalIndex { id, regions: 0, ok: false };
        if let Some(db) = self.databases.get_mut(&key.database)
            && let State::Gated { segment, .. } = &db.state
        {
            let regions = segment.regions();
            let index = segment.wal_index();
            let alone = Cell::new(false);
            let found_alone = || {
                alone.set(true);
                if !planted("stale-wal-index") {
                    index.invalidate()
                }
            };
            let opened = db.lane().with(key.seat, |seat| seat.open_wal_index(found_alone));
            if let (true, Some(words)) = (alone.get(), db.checkpoint_words()) {
                words.wal_is_opened(0, false);
            }
            if !opened && planted("opening-waited-for") {
                std::thread::sleep(PATIENCE);
            } else if !opened && since.elapsed() < PATIENCE {
                return Some(opening);
            }
            answer = FromBroker::WalIndex { id, regions, ok: opened };
        }
        self.send(session, &answer);
        None
    }
}
