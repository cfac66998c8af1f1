//! The next broker, or the same one over a new socket: told who this process was and which seats it has.

use super::Lost;
use super::greeting;
use super::joining::lock;
use super::link::Link;
use super::session::{Current, Session};
use crate::planted::planted;
use crate::wire::message::{Claim, FromBroker, MOST_CLAIMS, SeatKey, ToBroker};
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

/// How long a broker that listens may take for each answer. Somebody waits meanwhile who might go on without.
const LIMIT: Duration = Duration::from_secs(2);

impl Session {
    /// Connects again. What the next broker does not know, and cannot be given, is not this process's any more.
    pub(super) fn reconnect(&self, current: &mut Current) -> Result<(), Lost> {
        if planted("sessions-end-with-the-broker") {
            return Err(Lost);
        }
        // Closed by the host, it proves us dead: the broker has cleared our seats.
        let liveness = self.liveness.get().ok_or(Lost)?;
        let welcome = greeting::greet(self.path(), &self.believed, liveness, LIMIT).map_err(|_| Lost)?;
        let link = Arc::new(Link::new(welcome.socket).map_err(|_| Lost)?);
        let before = current.tokens.clone();
        // From now on it may be known by this one, whatever we hear.
        current.tokens.push(welcome.token);
        let mut known = false;
        for token in before {
            let id = self.new_id();
            known |= resumed(&link, id, &ToBroker::Resume { id, token }, &[])?;
        }
        self.claim(&link, known)?;
        current.tokens = vec![welcome.token];
        current.link = link;
        current.broker_pid = welcome.broker_pid;
        Ok(())
    }

    fn claim(&self, link: &Link, known: bool) -> Result<(), Lost> {
        let mut had = lock(&self.had);
        let all: Vec<Claim> = had.seats.values().cloned().collect();
        let mut lost: Vec<SeatKey> = match known {
            true => self.say_claims(link, &all)?,
            false => had.seats.keys().copied().collect(),
        };
        // What broker and keeper have left to nobody but their members.
        let databases: BTreeSet<u32> = lost.iter().map(|s| s.database).collect();
        for number in databases {
            let Some((shared, home)) = had.segments.get(&number) else { continue };
            let Some(shared) = shared.upgrade() else { continue };
            let Some([control, wal_index, hold]) = shared.handed_back() else { continue };
            let id = self.new_id();
            let message =
                ToBroker::HandBack { id, database: number, nonce: shared.nonce(), home: home.clone() };
            let fds = [control.as_raw_fd(), wal_index.as_raw_fd(), hold.as_raw_fd()];
            if resumed(link, id, &message, &fds)? {
                let seats: Vec<Claim> = all
                    .iter()
                    .filter(|c| c.seat.database == number && lost.contains(&c.seat))
                    .cloned()
                    .collect();
                lost.retain(|s| s.database != number);
                lost.extend(self.say_claims(link, &seats)?);
            }
        }
        let id = self.new_id();
        claimed(link, id, &ToBroker::Claim { id, seats: Vec::new(), last: true })?;
        lost.iter().for_each(|seat| drop(had.seats.remove(seat)));
        had.segments.retain(|_, (shared, _)| shared.strong_count() > 0);
        Ok(())
    }

    /// Claims seats; returns those that are not ours.
    fn say_claims(&self, link: &Link, seats: &[Claim]) -> Result<Vec<SeatKey>, Lost> {
        let mut lost = Vec::new();
        for seats in seats.chunks(MOST_CLAIMS) {
            let id = self.new_id();
            lost.extend(claimed(link, id, &ToBroker::Claim { id, seats: seats.to_vec(), last: false })?);
        }
        Ok(lost)
    }
}

fn resumed(link: &Link, id: u64, message: &ToBroker, fds: &[i32]) -> Result<bool, Lost> {
    match link.ask(message, id, fds)?.0 {
        FromBroker::Resumed { known, .. } => Ok(known),
        _ => Err(link.lose()),
    }
}

fn claimed(link: &Link, id: u64, message: &ToBroker) -> Result<Vec<SeatKey>, Lost> {
    match link.ask(message, id, &[])?.0 {
        FromBroker::Claimed { lost, .. } => Ok(lost),
        _ => Err(link.lose()),
    }
}
