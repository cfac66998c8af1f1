//! Clients that had a session before: with the last broker, or on a socket that broke.

use super::adopting::NOBODY;
use super::database::{Home, Identity, Seat, Segment, State};
use super::filesystem::mount_of;
use super::server::Server;
use super::session::Stage;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::hold;
use crate::segment::layout::{CLOSED, CONTROL_SIZE, STATE};
use crate::segment::memfd;
use crate::wire::keeper::{KeptHome, Token};
use crate::wire::message::{Claim, FromBroker, SeatKey};
use nix::sys::stat::fstat;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

impl Server {
    /// The session goes on: its seats are this one's, until it has said which of them it knows.
    pub(super) fn resume(&mut self, id: u64, request: u64, token: Token) {
        let known = self.sessions.get(&id).and_then(|own| {
            let same = |s: &&super::session::Session| {
                s.id != id
                    && matches!(s.stage, Stage::Open | Stage::Silent)
                    && (s.peer.uid, s.peer.pid) == (own.peer.uid, own.peer.pid)
                    && (s.token == token || s.is_found_as(own))
            };
            self.sessions.values().find(same).map(|s| s.id)
        });
        if let Some(before) = known {
            self.move_seats(before, id);
        }
        self.send(id, &FromBroker::Resumed { id: request, known: known.is_some() });
    }

    fn move_seats(&mut self, before: u64, id: u64) {
        let Some(mut old) = self.sessions.remove(&before) else { return };
        let seats = std::mem::take(&mut old.seats);
        // What it had under way is asked for again.
        self.forming.iter_mut().for_each(|f| f.forget_session(before));
        if let Some(new) = self.sessions.get_mut(&id) {
            new.proven.extend(seats.iter().map(|s| s.database));
            new.unclaimed.extend(&seats);
            new.seats.extend(&seats);
            self.keeping.session(new);
        }
        for key in seats {
            let Some(db) = self.databases.get_mut(&key.database) else { continue };
            let Some(seat) = db.seats.get_mut(&key.seat) else { continue };
            seat.session = id;
            self.keeping.seat(key, seat);
            if seat.request.take().is_some() {
                db.lane().give_up(key.seat);
            }
        }
        // It is in the table again for as long as it takes to be dropped as any other.
        if let Some(socket) = old.socket.take() {
            let _ = self.epoll.delete(&socket);
            self.close_socket(old.peer.uid, socket);
        }
        self.sessions.insert(before, old);
        self.drop_session(before);
    }

    /// Seats that the session says it has.
    pub(super) fn claim(&mut self, id: u64, request: u64, seats: Vec<Claim>, last: bool) {
        let lost = seats.into_iter().filter(|c| !self.is_claimed(id, c)).map(|c| c.seat).collect();
        if let Some(session) = self.sessions.get_mut(&id).filter(|_| last) {
            let proven = std::mem::take(&mut session.proven);
            let unclaimed = std::mem::take(&mut session.unclaimed);
            // Given up, or granted, and the other side has not heard of it.
            for key in unclaimed.into_iter().filter(|_| !planted("unclaimed-seats-stay")) {
                self.remove_seat(key);
            }
            self.let_go_if_unclaimed(proven);
        }
        self.send(id, &FromBroker::Claimed { id: request, lost });
    }

    fn is_claimed(&mut self, id: u64, claim: &Claim) -> bool {
        let key = claim.seat;
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let Some(db) = self.databases.get_mut(&key.database) else { return false };
        let Some(seat) = db.seats.get_mut(&key.seat) else { return false };
        let same = seat.count == claim.count;
        if seat.session == NOBODY && same && session.proven.contains(&key.database) {
            let version = super::session::printable(&claim.sqlite_version);
            *seat = Seat::of(id, claim.role, claim.library, version, claim.count);
            session.seats.insert(key);
            self.keeping.session(session);
            self.keeping.seat(key, seat);
        }
        if seat.session != id || !same {
            return false;
        }
        if seat.sqlite_version.is_empty() {
            // Found, and nothing was known of it but whose it is.
            let version = super::session::printable(&claim.sqlite_version);
            *seat = Seat::of(id, claim.role, claim.library, version, claim.count);
            self.keeping.seat(key, seat);
        }
        seat.socket_lane = claim.holds.is_some();
        session.unclaimed.remove(&key);
        let holds = claim.holds.filter(|_| !db.is_guest());
        if holds.is_some_and(|holds| !db.lane().settle_for(key.seat, holds)) {
            self.remove_seat(key);
            return false;
        }
        true
    }

    /// A member brings back a database of which broker and keeper are gone.
    pub(super) fn hand_back(
        &mut self,
        id: u64,
        request: u64,
        (number, nonce, home): (u32, u64, KeptHome),
        fds: Vec<OwnedFd>,
    ) {
        let taken = self.take_handed_back(id, number, nonce, home, fds);
        if let Err(e) = &taken {
            tracing::warn!(session = id, database = number, "cannot take back what a member has: {e}");
        }
        if let (true, Some(session)) = (taken.is_ok(), self.sessions.get_mut(&id)) {
            session.proven.insert(number);
            self.offer_adopted();
        }
        self.send(id, &FromBroker::Resumed { id: request, known: taken.is_ok() });
    }

    /// Nobody is about to claim seats of these databases any more, as far as this session is concerned.
    pub(super) fn let_go_if_unclaimed(&mut self, proven: BTreeSet<u32>) {
        for number in proven {
            self.drop_if_unused(number);
        }
    }

    fn take_handed_back(
        &mut self,
        id: u64,
        number: u32,
        nonce: u64,
        home: KeptHome,
        fds: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let mut fds = fds.into_iter();
        let (Some(control), Some(wal_index), Some(held)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(io::Error::other("not all of its descriptors arrived"));
        };
        let sent = fds.next();
        let home = Home { directory: Identity { device: home.device, inode: home.inode }, name: home.name };
        if let Some(db) = self.databases.get(&number) {
            // Another member of it was first: this one proves that it is one.
            let State::Gated { segment, .. } = &db.state else { return Err(io::ErrorKind::NotFound.into()) };
            if !memfd::is_own(&control, CONTROL_SIZE) {
                return Err(io::Error::other("not a segment of this version"));
            }
            let (ours, theirs) = (fstat(&segment.control_fd)?, fstat(&control)?);
            let same = (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
                && segment.nonce == nonce
                && is_writable(&control);
            return match same {
                true => Ok(()),
                false => Err(io::Error::other("its number is another database's")),
            };
        }
        // Another user's has been taken out of there already, by whoever received this.
        let gate = if self.is_foreign(id) { sent } else { hold::copy(&held) };
        let database = gate.ok_or_else(|| io::Error::other("it does not hold its gate"))?;
        let Some(session) = self.sessions.get(&id) else { return Err(io::ErrorKind::NotFound.into()) };
        let uid = session.peer.uid;
        // The filesystem first, as for a join. (Another user's was looked at by whoever received it.)
        if !self.is_foreign(id) && !self.options.allow_unsafe {
            match mount_of(&database, session.peer.pid, &[]) {
                Some(mount) if mount.is_local() => {}
                Some(mount) => return Err(io::Error::other(mount.reason())),
                None => return Err(io::Error::other("the broker cannot tell which filesystem it is on")),
            }
        }
        if !is_writable(&control) {
            return Err(io::Error::other("who hands it back may only read it"));
        }
        let segment = Segment::adopt(control, wal_index, nonce)?;
        if segment.control.poisoned() {
            return Err(io::Error::other("its segment is not to be used any more"));
        }
        self.take_group(number, segment, database, Some(home), uid, nonce)?;
        // The others may have nothing to say, or be dead.
        if let Some(next) = self.searching.next() {
            self.search(Instant::now(), next);
        }
        Ok(())
    }

    /// Seats that were given up while no broker was there to be told.
    pub(super) fn clear_what_left(&mut self) {
        let mut left = Vec::new();
        for (number, db) in self.databases.iter().filter(|(_, d)| !d.is_guest()) {
            let silent = |s: &Seat| self.sessions.get(&s.session).is_none_or(|s| s.stage == Stage::Silent);
            for (seat, _) in db.seats.iter().filter(|(_, s)| silent(s)) {
                let words = db.table().seat(*seat);
                if words.is_some_and(|w| w.state.load(SeqCst) & STATE == CLOSED) {
                    left.push(SeatKey { database: *number, seat: *seat });
                }
            }
        }
        left.into_iter().for_each(|key| self.remove_seat(key));
    }

    /// Of those that are left nobody has come back yet, and nobody can be proven dead: their gate is theirs. It stands
    /// as long as one of them lives, and opens by itself if none does.
    pub(super) fn abandon(&mut self, number: u32) {
        let Some(db) = self.databases.get(&number).filter(|_| !self.searching.looks_for(number)) else {
            return;
        };
        // Who has just handed it back says next which seats are its own.
        if self.sessions.values().any(|s| s.proven.contains(&number)) && !planted("abandoned-before-claimed")
        {
            return;
        }
        tracing::warn!(
            database = number,
            seats = db.seats.len(),
            "left to its members, none of which has come back"
        );
        self.end_checkpoints(number);
        if let Some(db) = self.take_database(number) {
            drop(self.close_database(db));
        }
        self.keeping.database_gone(number);
        self.departs(number, None, false, None);
    }

    /// SIGUSR2: the next broker goes on with what the keeper has.
    pub(super) fn hand_over(&mut self) {
        tracing::info!("handing over");
        self.start_keeper();
        self.tell_keeper_again(Instant::now(), true);
        self.keeping.listener(&self.listener);
        if !self.databases.is_empty() && !self.keeping.flush_within(std::time::Duration::from_secs(2)) {
            tracing::error!(
                "there is no keeper: members go on alone, and come back to the next broker by themselves"
            );
        }
        self.handing_over = true;
    }
}

pub(super) fn is_writable(fd: &OwnedFd) -> bool {
    let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL);
    let path = nix::fcntl::OFlag::O_PATH.bits();
    flags.is_ok_and(|bits| bits & libc::O_ACCMODE == libc::O_RDWR && bits & path == 0)
}
