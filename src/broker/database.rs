//! One database: its identity, its mode, its seats, its locks, its segment.

use super::adopting::NOBODY;
use super::checkpoints::Checkpoints;
use super::parking::Own;
use super::waits::Watch;
use crate::lock::SeatId;
use crate::lock::occupied::{Fate, Holder, Occupied};
use crate::lock::queue::{Lane, Queue};
use crate::lock::reads::{self, Read};
use crate::lock::table::Table;
use crate::lock::turn::Turn;
use crate::segment::gate::Gate;
use crate::segment::layout::{CHECKPOINTER, CONTROL_SIZE, CheckpointWords, REGION_SIZE, WAL_INDEX_SIZE};
use crate::segment::mapping::ControlMap;
use crate::segment::memfd;
use crate::segment::names::{Name, Part, Place};
use crate::segment::supervision::{self, Held, Office};
use crate::segment::wal_index::WalIndex;
use crate::wire::message::Role;
use memmap2::{MmapOptions, MmapRaw};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Instant, SystemTime};

/// What makes two paths the same database: never a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
}

/// Where `-wal` and `-journal` are found: all read-write members must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    pub directory: Identity,
    /// Bytes: a file's name need not be UTF-8.
    pub name: Vec<u8>,
}

impl Home {
    pub fn display(&self) -> String {
        super::session::printable_name(&self.name)
    }
}

/// One SQLite connection's place.
#[derive(Debug)]
pub struct Seat {
    pub session: u64,
    pub role: Role,
    pub sqlite_version: String,
    /// Tells the SQLite libraries of one process apart.
    pub library: u64,
    pub since: SystemTime,
    /// It sends its lock requests.
    pub socket_lane: bool,
    /// Its last message.
    pub heard: Instant,
    /// The request that waits for an answer.
    pub request: Option<u64>,
    /// How often its number had been given out when it was taken.
    pub count: u32,
}

/// The two memfds of a gated database and the broker's own mappings of them.
#[derive(Debug)]
pub struct Segment {
    pub control_fd: OwnedFd,
    pub wal_index_fd: OwnedFd,
    pub control: ControlMap,
    pub nonce: u64,
    region0: MmapRaw,
    /// As long as this broker lives no other one looks after it.
    _supervised: Held,
}

impl Segment {
    /// `place`: of the broker that makes it.
    pub fn create(nonce: u64, place: Place) -> io::Result<Segment> {
        let named = |part| Name { part, nonce, place }.to_c();
        let control_fd = memfd::create(&named(Part::Control), CONTROL_SIZE)?;
        let wal_index_fd = memfd::create(&named(Part::WalIndex), WAL_INDEX_SIZE)?;
        let control = ControlMap::create(&control_fd, nonce)?;
        Segment::supervised(control_fd, wal_index_fd, control, nonce)
    }

    /// One that another broker has made. Fails if it is not what it should be, or that broker still looks after it.
    pub fn adopt(control_fd: OwnedFd, wal_index_fd: OwnedFd, nonce: u64) -> io::Result<Segment> {
        let own = memfd::is_own(&control_fd, CONTROL_SIZE) && memfd::is_own(&wal_index_fd, WAL_INDEX_SIZE);
        if !own {
            return Err(io::Error::other("not a segment of this version"));
        }
        let control = ControlMap::open(&control_fd, nonce, true)?;
        if control.control().is_none() {
            return Err(io::Error::other("laid out by another version"));
        }
        Segment::supervised(control_fd, wal_index_fd, control, nonce)
    }

    fn supervised(
        control_fd: OwnedFd,
        wal_index_fd: OwnedFd,
        control: ControlMap,
        nonce: u64,
    ) -> io::Result<Segment> {
        // A member may have punched holes into them: what is touched here must not need memory that is not there.
        memfd::allocate(&control_fd, 0, CONTROL_SIZE)?;
        memfd::allocate(&wal_index_fd, 0, REGION_SIZE)?;
        let region0 = MmapOptions::new().len(REGION_SIZE).map_raw(&wal_index_fd)?;
        let _supervised = supervision::take(&control_fd, Office::Broker)?
            .ok_or_else(|| io::Error::other("another broker looks after it"))?;
        Ok(Segment { control_fd, wal_index_fd, control, nonce, region0, _supervised })
    }

    /// See [`ControlMap::grow`].
    pub fn grow(&self, wanted: u32) -> io::Result<u32> {
        self.control.grow(&self.wal_index_fd, wanted)
    }

    pub fn regions(&self) -> u32 {
        self.control.regions()
    }

    pub fn wal_index(&self) -> WalIndex {
        // SAFETY: region0 is mapped, page-aligned and lives as long as self, which nobody outlives with the value.
        unsafe { WalIndex::new(self.region0.as_mut_ptr()) }
    }
}

#[derive(Debug)]
pub enum State {
    Gated {
        gate: Gate,
        segment: Box<Segment>,
    },
    /// Only turns are taken here, in the broker's own memory; the locks are the unix VFS's.
    Guest {
        reason: String,
        turns: ControlMap,
    },
}

#[derive(Debug)]
pub struct Database {
    pub identity: Identity,
    /// The user whose member was the first.
    pub founder: u32,
    pub home: Option<Home>,
    pub state: State,
    /// The socket lane.
    pub queue: Queue,
    pub seats: BTreeMap<SeatId, Seat>,
    pub watch: Watch,
    pub checkpoints: Checkpoints,
    /// Waits that were ended because they closed a cycle, for `status`.
    pub deadlocks: u64,
    /// Turns taken back because their seat did not use them, likewise.
    pub turns_revoked: u64,
}

fn table(state: &State) -> Table<'_> {
    let map = match state {
        State::Gated { segment, .. } => &segment.control,
        State::Guest { turns, .. } => turns,
    };
    match map.control() {
        Some(control) => Table::of(control),
        None => unreachable!("the broker maps its own layout"),
    }
}

impl Database {
    pub fn new(identity: Identity, founder: u32, state: State) -> Database {
        Database {
            identity,
            founder,
            home: None,
            state,
            queue: Queue::default(),
            seats: BTreeMap::new(),
            watch: Watch::default(),
            checkpoints: Checkpoints::default(),
            deadlocks: 0,
            turns_revoked: 0,
        }
    }

    pub fn table(&self) -> Table<'_> {
        table(&self.state)
    }

    pub fn turn(&self) -> Turn<'_> {
        Turn { table: self.table(), parking: &Own }
    }

    pub fn lane(&mut self) -> Lane<'_> {
        Lane { queue: &mut self.queue, table: table(&self.state), parking: &Own }
    }

    /// What is said of checkpoints in the segment; `None` in guest mode.
    pub fn checkpoint_words(&self) -> Option<&CheckpointWords> {
        match &self.state {
            State::Gated { segment, .. } => segment.control.control().map(|c| &c.checkpoint.0),
            State::Guest { .. } => None,
        }
    }

    /// Frames of the WAL, and how many of them are in the database, as its index says: members write that. `None` in guest
    /// mode.
    pub fn wal_progress(&self) -> Option<(u32, u32)> {
        match &self.state {
            State::Gated { segment, .. } => {
                let (frames, copied) = segment.wal_index().progress();
                Some((frames, copied.min(frames)))
            }
            State::Guest { .. } => None,
        }
    }

    /// How many of the WAL's frames no checkpoint copies as long as this read lock is held (wal.c, `walCheckpoint`): those
    /// behind its mark; of a reader that does without the WAL, all that are not in the database yet.
    pub fn frames_held_back(&self, read: Read) -> u32 {
        let (State::Gated { segment, .. }, Some((frames, copied))) = (&self.state, self.wal_progress())
        else {
            return 0;
        };
        match read {
            reads::SHARED => 0,
            0 => frames - copied,
            mark => frames.saturating_sub(segment.wal_index().read_mark(mark)),
        }
    }

    pub fn is_guest(&self) -> bool {
        matches!(self.state, State::Guest { .. })
    }

    /// The smallest free seat number.
    pub fn free_seat(&self) -> Option<SeatId> {
        let taken = self.seats.keys().copied();
        let free = taken.zip(1..).find(|(taken, expected)| taken != expected).map(|(_, free)| free);
        let seat = free.unwrap_or(self.seats.len() as SeatId + 1);
        (seat < CHECKPOINTER).then_some(seat)
    }

    /// The seat's connection is closed, its process keeps it for the next one.
    pub fn rests(&self, seat: SeatId) -> bool {
        self.table().rests(seat) && self.seats.get(&seat).is_some_and(|s| s.role == Role::ReadWrite)
    }

    /// Who is in. A seat of a session that is proven dead is taken back at once, so whoever has one is not; and as a broker
    /// takes all of the segment's members over, no seat is unknown to it but by its holder.
    pub fn occupied(&self) -> Occupied {
        let holder = |seat| match self.seats.get(&seat) {
            Some(seat) => Holder {
                fate: if seat.session == NOBODY { Fate::Unknown } else { Fate::Lives },
                writes: seat.role == Role::ReadWrite,
            },
            None => Holder::UNKNOWN,
        };
        self.table().occupied(self.seats.keys().copied(), holder)
    }

    /// If no seat is in use, closes those that rest. One that is taken in use again meanwhile stays.
    pub fn close_all_resting(&self) -> Vec<SeatId> {
        match self.seats.keys().all(|s| self.rests(*s)) {
            true => self.seats.keys().copied().filter(|s| self.table().close_resting(*s)).collect(),
            false => Vec::new(),
        }
    }

    /// Closes a seat that rests, if there is one: its number is wanted.
    pub fn close_one_resting(&self) -> Option<SeatId> {
        self.seats.keys().copied().find(|s| self.rests(*s) && self.table().close_resting(*s))
    }

    /// The session has the segment's descriptors for this role already.
    pub fn has_session(&self, session: u64, role: Role) -> bool {
        self.seats.values().any(|s| s.session == session && s.role == role)
    }

    /// No transaction is open: nothing but the SHARED lock that a WAL connection keeps for life.
    pub fn is_quiet(&self) -> bool {
        let t = self.table();
        let writers = [t.reserved(), t.pending(), t.exclusive()].iter().any(Option::is_some);
        let holds = self.seats.keys().any(|s| {
            t.slots_shared(*s) != 0 || t.owned_slots(*s) != 0 || (t.file_shared(*s) && !t.wal_open(*s))
        });
        !writers && !holds && !self.checkpoints.is_running()
    }
}
