//! Groups whose broker and keeper were killed: found in their members' processes by the finder, verified, and looked after
//! again. Nobody of them has said anything yet.

use super::adopting::NOBODY;
use super::database::{Database, Segment, State};
use super::filesystem::mount_of;
use super::origin;
use super::returning::is_writable;
use super::server::Server;
use super::session::{SILENT_LOOKS, Session, Stage};
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::gate::Gate;
use crate::segment::hold::{self, Hold};
use crate::wire::message::SeatKey;
use nix::sys::stat::fstat;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// What a search has found.
#[derive(Debug, Default)]
pub struct Findings {
    pub members: Vec<Member>,
    /// By nonce: found with this user; control, wal-index, what holds the gate.
    pub segments: Vec<(u64, u32, [OwnedFd; 3])>,
    /// Every process of this system was looked at: whoever is not among the members is dead.
    pub complete: bool,
}

/// A living process with segments.
#[derive(Debug)]
pub struct Member {
    pub pid: i32,
    pub uid: u32,
    pub program: String,
    pub pidfd: OwnedFd,
    pub liveness: OwnedFd,
}

/// Whose each seat turned out to be.
enum Holder {
    Living(usize),
    Dead,
    Unknown,
}

impl Server {
    pub(super) fn take_found(&mut self, findings: Findings) {
        for (nonce, uid, fds) in findings.segments {
            let known =
                |d: &Database| matches!(&d.state, State::Gated { segment, .. } if segment.nonce == nonce);
            if self.databases.values().any(known) {
                continue;
            }
            if let Err(e) = self.adopt_found(nonce, uid, fds) {
                tracing::warn!("a segment in a process of user {uid} is not taken over: {e}");
            }
        }
        let numbers: Vec<u32> = self.databases.keys().copied().collect();
        for number in numbers {
            self.seat_found(number, &findings.members, findings.complete);
        }
        self.silent_until = Some(Instant::now() + SILENT_LOOKS);
        self.clear_what_left();
        self.offer_adopted();
    }

    fn adopt_found(&mut self, nonce: u64, uid: u32, fds: [OwnedFd; 3]) -> io::Result<()> {
        let [control, wal_index, held] = fds;
        let database = hold::copy(&held).ok_or_else(|| io::Error::other("it does not hold its gate"))?;
        match mount_of(&database, 0, &[]) {
            Some(mount) if mount.is_local() || self.options.allow_unsafe => {}
            _ => {
                // Not touched, and not closed either.
                mem::forget(database);
                return Err(io::Error::other("the broker cannot tell that its filesystem is local"));
            }
        }
        let segment = Segment::adopt(control, wal_index, nonce)?;
        if segment.control.poisoned() {
            return Err(io::Error::other("it is not to be used any more"));
        }
        let said = segment.control.control().and_then(|c| origin::read(&c.origin));
        let (number, home) = said.ok_or_else(|| io::Error::other("it does not say whose it is"))?;
        if self.databases.contains_key(&number) {
            return Err(io::Error::other("its number is another database's"));
        }
        self.take_group(number, segment, database, Some(home), uid, nonce)
    }

    /// A group without a broker, if its gate stands and `database` carries it: the segment alone proves nothing.
    pub(super) fn take_group(
        &mut self,
        number: u32,
        segment: Segment,
        database: OwnedFd,
        home: Option<super::database::Home>,
        founder: u32,
        nonce: u64,
    ) -> io::Result<()> {
        let st = fstat(&database)?;
        let identity = super::database::Identity { device: st.st_dev, inode: st.st_ino };
        if self.number_of(identity).is_some() {
            return Err(io::Error::other("it is another group's by now"));
        }
        if !is_writable(&database) {
            return Err(io::Error::other("who has it may only read it"));
        }
        let hold = Hold::new(&database, nonce)?;
        let gate = Gate::adopt(database, None, hold);
        let gate = gate.ok_or_else(|| io::Error::other("its gate does not stand any more"))?;
        let mut db = Database::new(identity, founder, State::Gated { gate, segment: Box::new(segment) });
        db.home = home;
        let name = db.home.as_ref().map(|h| h.display()).unwrap_or_default();
        tracing::info!(database = number, ?identity, name, "nobody but its members had it: taken over");
        self.take_charge(number, db);
        self.start_keeper();
        if let Some(db) = self.databases.get(&number) {
            self.keeping.database(number, db);
        }
        Ok(())
    }

    /// Seats of members that have not come back: the living ones' are theirs, the dead ones' are cleared.
    fn seat_found(&mut self, number: u32, members: &[Member], complete: bool) {
        let Some(db) = self.databases.get(&number).filter(|d| !d.is_guest()) else { return };
        let lost = db.seats.iter().filter(|(_, s)| s.session == NOBODY).map(|(id, _)| *id);
        let holder = |seat| {
            let inode = db.table().seat(seat).map_or(0, |w| w.holder.load(SeqCst));
            let same = |m: &Member| fstat(&m.liveness).is_ok_and(|st| st.st_ino == inode);
            match members.iter().position(same) {
                Some(at) => Holder::Living(at),
                None if complete && inode != 0 && !planted("dead-seats-stay") => Holder::Dead,
                None => Holder::Unknown,
            }
        };
        let found: Vec<_> = lost.map(|seat| (SeatKey { database: number, seat }, holder(seat))).collect();
        // First: a group of which nobody has come back is let go with the first seat that is cleared.
        for (key, holder) in &found {
            if let Holder::Living(at) = holder {
                self.seat_of_member(*key, &members[*at]);
            }
        }
        for (key, _) in found.into_iter().filter(|(_, holder)| matches!(holder, Holder::Dead)) {
            tracing::info!(database = number, seat = key.seat, "cleared: nobody who lives has it");
            self.remove_seat(key);
        }
    }

    fn seat_of_member(&mut self, key: SeatKey, member: &Member) {
        let Some(inode) = fstat(&member.liveness).ok().map(|st| st.st_ino) else { return };
        let known = self.sessions.values().find(|s| s.lives_by() == Some(inode));
        let id = match known {
            // It has come back, and says by itself which seats it has.
            Some(s) if s.stage != Stage::Silent => return,
            Some(s) => s.id,
            None => {
                let (Ok(pidfd), Ok(liveness)) = (member.pidfd.try_clone(), member.liveness.try_clone())
                else {
                    return;
                };
                let id = self.next_session;
                let Ok(session) = Session::found(id, member, pidfd, liveness) else { return };
                self.next_session += 1;
                self.users.arrived(session.peer.uid);
                self.sessions.insert(id, session);
                self.watch_pidfd(id);
                id
            }
        };
        let (Some(session), Some(db)) = (self.sessions.get_mut(&id), self.databases.get_mut(&key.database))
        else {
            return;
        };
        let Some(seat) = db.seats.get_mut(&key.seat) else { return };
        seat.session = id;
        session.seats.insert(key);
        self.keeping.session(session);
        self.keeping.seat(key, seat);
    }
}
