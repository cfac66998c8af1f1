//! The broker's thread: the socket lane's seats, and the death of all.

use super::{Answer, PATIENCE, World};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;
use turnstile::lock::park::Parking;
use turnstile::lock::queue::{Lane, Queue};
use turnstile::lock::table::Table;
use turnstile::lock::{Ask, Release, SeatId, Verdict};
use turnstile::segment::futex;
use turnstile::segment::layout::SeatWords;

pub enum ToBroker {
    Submit { id: SeatId, ask: Ask, answer: Sender<Answer> },
    GiveUp { id: SeatId },
    Release { id: SeatId, release: Release },
    JournalIsClear { id: SeatId },
    Gone { id: SeatId, done: Sender<()> },
    Kick,
}

/// As the broker wakes.
#[derive(Debug)]
pub struct Own;

impl Parking for Own {
    fn park(&self, _: &SeatWords, _: u32, _: Duration) {}

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        if let Some(words) = table.seat(seat).filter(|w| w.brokered.load(SeqCst) == 0) {
            futex::wake(&words.park);
        }
    }

    fn micros(&self) -> u64 {
        futex::micros()
    }

    fn coarse_millis(&self) -> u64 {
        futex::coarse_millis()
    }

    fn streaks(&self) -> bool {
        false
    }
}

/// Requests that wait: where the answer goes, and what is known of it.
type Waiting = BTreeMap<SeatId, (Sender<Answer>, Answer)>;

/// Serves until nobody is left who could send anything.
pub fn serve(world: &World, messages: &Receiver<ToBroker>) {
    let mut queue = Queue::default();
    let mut lane = Lane { queue: &mut queue, table: world.table(), parking: &Own };
    let mut waiting = Waiting::new();
    loop {
        let mut overslept = false;
        match messages.recv_timeout(PATIENCE) {
            Ok(message) => one(world, &mut lane, &mut waiting, message),
            Err(RecvTimeoutError::Timeout) => overslept = true,
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Ok(message) = messages.try_recv() {
            one(world, &mut lane, &mut waiting, message);
        }
        let ended = settle(&mut lane, &mut waiting);
        if overslept && ended > 0 && messages.recv_timeout(PATIENCE / 10).is_err() {
            world.lost_wakes.fetch_add(1, SeqCst);
        }
    }
}

fn settle(lane: &mut Lane, waiting: &mut Waiting) -> usize {
    let ended = lane.settle();
    for (id, verdict) in &ended {
        if let Some((answer, known)) = waiting.remove(id) {
            let _ = answer.send(Answer { verdict: *verdict, ..known });
        }
    }
    ended.len()
}

fn one(world: &World, lane: &mut Lane, waiting: &mut Waiting, message: ToBroker) {
    match message {
        ToBroker::Submit { id, ask, answer } => {
            // What has been given back may be wanted by somebody who came before.
            settle(lane, waiting);
            let known = Answer { verdict: Verdict::Busy, ticket: 0, came: 0, decided: 0 };
            match lane.submit(id, ask, (id.into(), id)) {
                Some(verdict) => drop(answer.send(Answer { verdict, ..known })),
                None => {
                    let ticket = lane.table.seat(id).unwrap().ticket.load(SeqCst);
                    let came = world.record.len();
                    waiting.insert(id, (answer, Answer { ticket, came, ..known }));
                }
            }
        }
        ToBroker::GiveUp { id } => {
            let Some(verdict) = lane.give_up(id) else { return }; // it was answered before
            if let Some((answer, known)) = waiting.remove(&id) {
                let _ = answer.send(Answer { verdict, ticket: 0, ..known });
            }
        }
        ToBroker::Release { id, release } => lane.release(id, release),
        ToBroker::JournalIsClear { id } => lane.with(id, |seat| seat.journal_is_clear()),
        ToBroker::Gone { id, done } => {
            waiting.remove(&id);
            lane.remove(id);
            let _ = done.send(());
        }
        ToBroker::Kick => {}
    }
}
