//! A closed connection's seat: it rests, or is given up.

use super::Lost;
use super::joining::lock;
use super::link::Link;
use super::member::Member;
use super::resting;
use super::session::Had;
use crate::lock::rest::Rest;
use crate::lock::table::Table;
use crate::planted::planted;
use crate::segment::layout::CHECKPOINTER;
use crate::wire::message::ToBroker;
use std::sync::Arc;

impl Member {
    /// The connection is being closed. True: nobody else keeps the WAL open.
    pub fn closes_last(&self) -> bool {
        self.with_seat(|_, seat| seat.table.closes_last(seat.id)).unwrap_or(false)
    }

    /// Another seat holds SHARED; the checkpointer's counts for nobody.
    pub fn is_read_by_others(&self) -> bool {
        let others = |id, table: Table| table.other_readers(id).into_iter().any(|s| s != CHECKPOINTER);
        self.with_seat(|_, seat| others(seat.id, seat.table)).unwrap_or(false)
    }

    /// See [`crate::lock::table::Table::shuts_out_newcomers`].
    pub fn shuts_out_newcomers(&self) -> bool {
        self.with_seat(|_, seat| seat.table.shuts_out_newcomers(seat.id)).unwrap_or(false)
    }

    /// The connection is closed, its own descriptor too: once the gate is open, a plain connection of this very process
    /// may lock the file, and closing any descriptor of it would drop that lock.
    ///
    /// The seat rests while another one is in use, in whichever process: then the gate stands anyway.
    pub fn leave(self) {
        self.with_seat(|_, seat| seat.leave());
        if self.may_rest() {
            match self.with_seat(|_, seat| seat.table.rest(seat.id)) {
                Some(Rest::Rests(count)) => return resting::keep(Member { count, ..self }),
                Some(Rest::Closed) => {
                    resting::beside(&self).into_iter().for_each(Member::leave_at_rest);
                    return self.forget();
                }
                Some(Rest::Last) | None => {}
            }
        }
        // What this process lets rest there goes too: mappings, descriptors and session are to be let go. The broker reads
        // of it before it reads that this one leaves.
        let lost = self.connected.session.is_lost();
        for other in resting::beside(&self) {
            match lost {
                true => other.leave_at_rest(),
                false => other.let_go(),
            }
        }
        self.give_up();
    }

    fn may_rest(&self) -> bool {
        self.home.is_some() && self.fast.is_some() && self.shared().is_some_and(|s| s.may_rest())
    }

    /// A seat that rests is given up.
    pub(super) fn leave_at_rest(self) {
        match self.with_seat(|_, seat| seat.table.resume(seat.id, self.count)) {
            Some(true) => self.give_up(),
            _ => self.forget(),
        }
    }

    /// A seat that rests and goes on resting is not kept any more. No answer is waited for: it keeps nobody out.
    pub(super) fn let_go(mut self) {
        let connected = Arc::clone(&self.connected);
        let _segments = lock(&connected.segments);
        self.unmap();
        let gone = ToBroker::LetGo { seat: self.joined.seat, count: self.count };
        // Not told, the next broker sees that it is not claimed.
        if let Some(link) = self.unclaim() {
            let _ = link.send(&gone, &[]);
        }
    }

    /// The broker has closed the seat, and its number may be another's: nothing is said.
    pub(super) fn forget(mut self) {
        let connected = Arc::clone(&self.connected);
        let _segments = lock(&connected.segments);
        self.unclaim();
        self.unmap();
    }

    /// The seat is not this process's any more. Returns the link over which the broker knows it, if that stands.
    fn unclaim(&self) -> Option<Arc<Link>> {
        let (seat, count) = (self.joined.seat, self.joined.count);
        // Closed by the broker, its number may be another one's of this process; and the next broker may not have taken it
        // for this process's.
        let this = |had: &Had| had.seats.get(&seat).is_some_and(|c| c.count == count);
        let (was, link) = self.connected.session.give(|had| this(had) && had.seats.remove(&seat).is_some());
        link.filter(|_| was || planted("leaves-what-is-not-its-own"))
    }

    /// The last one that uses the segment unmaps it, and closes what it has of it.
    fn unmap(&mut self) {
        self.fast = None;
        self.shared = None;
    }

    /// What this process has of the database's descriptors is closed with its last seat, before that says that it leaves.
    fn give_up(mut self) {
        let connected = Arc::clone(&self.connected);
        let mut segments = lock(&connected.segments);
        // Tries the next broker, if this one is gone.
        let lost = connected.session.is_lost();
        let (seat, count) = (self.joined.seat, self.joined.count);
        if lost {
            self.leave_without_broker();
        } else if !connected.session.has(seat, count) {
            // The broker does not know whose it is, and clears what nobody uses.
            self.with_seat(|_, seat| seat.table.close_own(seat.id, count));
        }
        let late = self.shared.clone().filter(|_| planted("late-close-of-gate"));
        if self.shared().is_some_and(|s| s.keeps_descriptors()) {
            self.unmap();
        }
        if lost {
            self.unclaim();
            connected.forget();
        } else if self.say_leave().is_err() && connected.session.is_lost() {
            connected.forget();
            // It has ended with our message unread.
            self.leave_without_broker();
        }
        self.unmap();
        segments.retain(|_, shared| shared.strong_count() > 0);
        drop(late);
    }

    fn say_leave(&self) -> Result<(), Lost> {
        // Over another link the broker would not know the seat, or by now as somebody else's.
        let link = self.unclaim().ok_or(Lost)?;
        let id = self.connected.session.new_id();
        link.ask(&ToBroker::Leave { id, seat: self.joined.seat }, id, &[]).map(drop)
    }

    /// No broker is there to be told. Its keeper opens the gate, if nobody is left; is that gone too, nobody but the
    /// last one out closes what rests elsewhere, and holds the gate.
    fn leave_without_broker(&self) {
        let Some(shared) = self.shared() else { return };
        if !shared.broker_is_gone() {
            let used = self.with_seat(|_, seat| {
                seat.table.close(seat.id);
                seat.table.used_by_others(seat.id)
            });
            if used == Some(false) {
                shared.ring();
            }
            return;
        }
        let nobody_left = self.with_seat(|_, seat| seat.table.close_all(seat.id)).unwrap_or(false);
        if nobody_left && !planted("gate-left-to-the-resting") {
            let _ = shared.let_gate_go();
        }
    }
}
