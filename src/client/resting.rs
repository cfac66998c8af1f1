//! The seats that this process lets rest, and what must be the same for one to be used again.

use super::config::Config;
use super::fork::PerProcess;
use super::joining::lock;
use super::lane::FastLane;
use super::member::Member;
use crate::planted::planted;
use nix::sys::stat::{FileStat, fstat, lstat, stat};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Seats that rest for one database: more connections of one process are seldom closed and opened again at once.
const PER_DATABASE: usize = 4;
/// For all databases: each keeps a mapping of 1.1 MiB and two descriptors. Then the oldest goes.
const ALTOGETHER: usize = 16;

/// Device and inode.
type Identity = (u64, u64);

/// What a seat was taken with: that the broker would say the same to it again needs no asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    file: Identity,
    directory: Identity,
    name: Vec<u8>,
    /// Tells the SQLite libraries of one process apart.
    library: u64,
    socket: Option<PathBuf>,
    allow_unsafe: bool,
}

fn identity(st: FileStat) -> Identity {
    (st.st_dev, st.st_ino)
}

impl Home {
    /// Of a join that is being made: with this directory, whatever is at its path by now. `None`: its seat will not
    /// rest.
    pub fn new(
        config: &Config,
        library: u64,
        file: impl AsFd,
        directory: impl AsFd,
        name: &[u8],
    ) -> Option<Home> {
        Some(Home {
            file: identity(fstat(file).ok()?),
            directory: identity(fstat(directory).ok()?),
            name: name.to_vec(),
            library,
            socket: config.socket.clone(),
            allow_unsafe: config.allow_unsafe,
        })
        .filter(|_| !config.guest)
    }

    /// Of a file that SQLite has opened at `path`. Its name must be this very file's and no link, as for a join.
    fn at(config: &Config, library: u64, file: Identity, path: &Path) -> Option<Home> {
        let there = identity(lstat(path).ok()?);
        let directory = identity(stat(path.parent()?).ok()?);
        let name = path.file_name()?.as_bytes().to_vec();
        let (socket, allow_unsafe) = (config.socket.clone(), config.allow_unsafe);
        let home = Home { file, directory, name, library, socket, allow_unsafe };
        Some(home).filter(|_| there == file && !config.guest)
    }
}

/// The latest is the last.
static SEATS: PerProcess<Mutex<Vec<Member>>> = PerProcess::new();

/// Keeps a seat that rests. If there are too many, the oldest goes.
pub(super) fn keep(member: Member) {
    let mut seats = lock(SEATS.get());
    seats.push(member);
    let newest = seats.last().and_then(|m| m.home.clone());
    let same = |m: &Member| m.home == newest;
    let too_many = match seats.iter().filter(|m| same(m)).count() > PER_DATABASE {
        true => seats.iter().position(same),
        false => (seats.len() > ALTOGETHER).then_some(0),
    };
    let oldest = too_many.map(|at| seats.remove(at));
    drop(seats);
    if let Some(oldest) = oldest {
        oldest.let_go();
    }
}

/// The seats that rest in the same segment as `member`'s, or were had from the same session if that is lost.
pub(super) fn beside(member: &Member) -> Vec<Member> {
    let lost = member.connected.session.was_lost();
    take_all(|m| match (m.shared(), member.shared()) {
        (Some(a), Some(b)) if Arc::ptr_eq(a, b) => true,
        _ => lost && Arc::ptr_eq(&m.connected, &member.connected),
    })
}

fn take_all(which: impl Fn(&Member) -> bool) -> Vec<Member> {
    lock(SEATS.get()).extract_if(.., |m| which(m)).collect()
}

/// A seat that rested for the file that SQLite has open at `path`, in use again. The gate is still to be seen.
pub fn resume(config: &Config, library: u64, file: impl AsFd, path: &Path) -> Option<Member> {
    if lock(SEATS.get()).is_empty() {
        return None;
    }
    let file = identity(fstat(file).ok()?);
    let at_home = |m: &Member| m.home.as_ref().is_some_and(|h| h.file == file);
    if !lock(SEATS.get()).iter().any(at_home) {
        return None;
    }
    let home = Home::at(config, library, file, path);
    loop {
        let member = {
            let mut seats = lock(SEATS.get());
            let anywhere = |m: &Member| planted("home-is-the-file") && at_home(m);
            let same = |m: &Member| m.home.is_some() && m.home == home;
            let at = seats.iter().rposition(|m| same(m) || anywhere(m))?;
            seats.remove(at)
        };
        // No broker is needed to use it again, as long as its keeper sees to the gate.
        if member.connected.session.is_lost() && member.shared().is_none_or(|s| s.broker_is_gone()) {
            beside(&member).into_iter().for_each(Member::leave_at_rest);
            member.leave_at_rest();
        } else if !member.shared().is_some_and(|s| s.is_open()) {
            member.leave_at_rest();
        } else if let Some(member) = member.resume() {
            return Some(member);
        }
    }
}

impl Member {
    /// Its seat may rest when its connection is closed.
    pub fn rests_at(&mut self, home: Option<Home>) {
        self.home = home;
    }

    fn resume(mut self) -> Option<Member> {
        if self.with_seat(|_, seat| seat.table.resume(seat.id, self.count)) != Some(true) {
            self.forget();
            return None;
        }
        // What the last connection knew of itself is not the next one's.
        self.fast = self.shared.as_ref().and_then(|shared| FastLane::new(shared, self.joined.seat));
        self.connection.set(0);
        Some(self)
    }
}
