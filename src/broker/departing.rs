//! The last close of a database: the member that makes it is answered when nobody has a descriptor of its files any more.
//!
//! Plain SQLite's last close leaves nothing open, so people unmount a filesystem or move a file right after it. The broker
//! closes its own descriptors at once; its checkpointer and its keeper say when they have closed theirs.

use super::server::Server;
use crate::planted::planted;
use crate::wire::message::{FromBroker, SeatKey};
use std::time::{Duration, Instant};

/// A keeper or checkpointer that does not say so by then (stopped, or out of processor time) is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(2);

/// A member that has left, and is not answered yet.
#[derive(Debug)]
pub(super) struct Departure {
    session: u64,
    request: u64,
    database: u32,
    since: Instant,
    waits_for: WaitsFor,
}

#[derive(Debug, PartialEq, Eq)]
enum WaitsFor {
    /// Its database is still there.
    Database,
    /// What the broker's children say of it: the keeper's answer with that number, the checkpointer's, a receiver's up to that
    /// mark.
    Children { keeper: Option<u64>, checkpointer: bool, receiver: Option<(u64, u64)> },
}

impl Departure {
    pub(super) fn is_of(&self, database: u32) -> bool {
        self.database == database
    }
}

const NOTHING: WaitsFor = WaitsFor::Children { keeper: None, checkpointer: false, receiver: None };

impl Server {
    /// A `Leave` message.
    pub(super) fn leave(&mut self, session: u64, request: u64, key: SeatKey) {
        let (database, since) = (key.database, Instant::now());
        self.departing.push(Departure { session, request, database, since, waits_for: WaitsFor::Database });
        self.remove_seat(key);
        let stays = self.databases.get(&database).is_some_and(|d| !d.seats.is_empty());
        if stays || planted("answered-at-once") {
            self.departs(database, None, false, None);
        }
        self.answer_departed();
    }

    /// The database is gone, or stays for others.
    pub(super) fn departs(
        &mut self,
        database: u32,
        keeper: Option<u64>,
        checkpointer: bool,
        receiver: Option<(u64, u64)>,
    ) {
        for d in self.departing.iter_mut().filter(|d| d.database == database) {
            d.waits_for = WaitsFor::Children { keeper, checkpointer, receiver };
        }
    }

    /// The keeper has done all that it was told up to this answer; `None`: it has ended.
    pub(super) fn keeper_answers(&mut self, number: Option<u64>) {
        for d in &mut self.departing {
            if let WaitsFor::Children { keeper, .. } = &mut d.waits_for {
                keeper.take_if(|k| number.is_none_or(|n| *k <= n));
            }
        }
        self.answer_departed();
    }

    /// The checkpointer has no descriptor of this database any more; `None`: it has ended.
    pub(super) fn checkpointer_forgot(&mut self, number: Option<u32>) {
        for d in self.departing.iter_mut().filter(|d| number.is_none_or(|n| d.database == n)) {
            if let WaitsFor::Children { checkpointer, .. } = &mut d.waits_for {
                *checkpointer = false;
            }
        }
        self.answer_departed();
    }

    /// One has closed something, or is not waited for any more.
    pub(super) fn receivers_have_closed(&mut self) {
        for d in &mut self.departing {
            if let WaitsFor::Children { receiver, .. } = &mut d.waits_for {
                receiver.take_if(|mark| self.receivers.has_closed(*mark));
            }
        }
        self.answer_departed();
    }

    fn answer_departed(&mut self) {
        for d in self.departing.extract_if(.., |d| d.waits_for == NOTHING).collect::<Vec<_>>() {
            self.send(d.session, &FromBroker::Left { id: d.request });
        }
    }

    /// Those who have waited for too long.
    pub(super) fn limit_departures(&mut self, now: Instant) {
        for d in self.departing.iter_mut().filter(|d| now.duration_since(d.since) >= PATIENCE) {
            tracing::warn!(
                database = d.database,
                "the file may still be open in the broker's children after its last close: {:?}",
                std::mem::replace(&mut d.waits_for, NOTHING)
            );
        }
        self.answer_departed();
    }
}
