//! Requests that have been read and are not answered: those that are to be looked at, and those that wait in a database in
//! which something has happened.

use super::server::Server;
use super::session::Stage;
use crate::planted::planted;
use crate::wire::message::{SeatKey, ToBroker};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A lock request or a cancellation that has been read.
pub struct Asked {
    pub session: u64,
    pub seat: SeatKey,
    pub message: ToBroker,
    pub since: Instant,
}

/// How long a request waits for messages of others who have a seat in the same database and could not be served. A lock may
/// be given back in one of them.
const BEHIND: Duration = Duration::from_millis(20);

impl Server {
    /// Lock requests and cancellations, in the order in which they were read, as far as their users have time left.
    pub(super) fn answer_requests(&mut self) {
        let (mut later, mut put_off) = (Vec::new(), BTreeSet::new());
        for asked in std::mem::take(&mut self.requests) {
            let Asked { session: id, seat, .. } = asked;
            if self.sessions.get(&id).is_none_or(|s| s.stage != Stage::Open) {
                continue;
            }
            let uid = self.uid_of(id);
            if put_off.contains(&id) || !self.shares.has_more(uid) || self.is_behind(&asked) {
                put_off.insert(id);
                later.push(asked);
                continue;
            }
            let begun = Instant::now();
            // What has been given back may be wanted by somebody who came before.
            match planted("settles-all") {
                true => self.settle_all(),
                false => self.settle(seat.database),
            }
            if let Err(reason) = self.message(id, asked.message) {
                self.end_session(id, &reason);
            }
            self.shares.charge(uid, begun.elapsed());
        }
        (self.requests, self.put_off) = (later, put_off);
    }

    /// Somebody else in this database has said something that could not be read in this round.
    fn is_behind(&self, asked: &Asked) -> bool {
        if self.passed_over.is_empty() || asked.since.elapsed() >= BEHIND {
            return false;
        }
        let seats = self.databases.get(&asked.seat.database).map(|db| &db.seats);
        seats.is_some_and(|seats| {
            let mut others = seats.values().map(|s| s.session).filter(|s| *s != asked.session);
            others.any(|other| self.passed_over.contains(&other))
        })
    }

    /// Answers every waiting request of a database that can be answered now.
    pub(super) fn settle(&mut self, number: u32) {
        self.touched.remove(&number);
        let Some(db) = self.databases.get_mut(&number) else { return };
        self.settled += 1;
        let mut answers = Vec::new();
        for (seat, verdict) in db.lane().settle() {
            let Some(seat) = db.seats.get_mut(&seat) else { continue };
            if let Some(request) = seat.request.take() {
                answers.push((seat.session, request, verdict));
            }
        }
        for (session, request, verdict) in answers {
            self.answer(session, request, verdict, false, None);
        }
    }

    /// Those in which something has happened. (Answering changes nothing in a database.)
    pub(super) fn settle_touched(&mut self) {
        for number in std::mem::take(&mut self.touched) {
            self.settle(number);
        }
    }

    fn settle_all(&mut self) {
        let all: Vec<u32> = self.databases.keys().copied().collect();
        all.into_iter().for_each(|number| self.settle(number));
    }
}
