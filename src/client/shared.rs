//! A database's segment as this process maps it: one for all its connections to that database.

use super::belief::GateSeen;
use super::fork;
use super::host::{HostFd, LowDescriptors};
use crate::lock::commits::Commits;
use crate::lock::learned::Learned;
use crate::lock::park::Rounds;
use crate::lock::table::Table;
use crate::planted::planted;
use crate::segment::atomic::AtomicU32;
use crate::segment::futex;
use crate::segment::gate;
use crate::segment::hold;
use crate::segment::layout::{CheckpointWords, REGION_SIZE, WAL_INDEX_SIZE};
use crate::segment::mapping::ControlMap;
use crate::segment::memfd;
use crate::segment::wal_index::{WalIndex, page_number_at};
use crate::wire::message::Role;
use memmap2::{MmapOptions, MmapRaw};
use nix::poll::PollTimeout;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Regions are mapped in chunks: a region is smaller than a page on some machines.
const REGIONS_PER_CHUNK: u32 = 32;
const CHUNK_SIZE: usize = REGIONS_PER_CHUNK as usize * REGION_SIZE;
/// How long the keeper may take to open a gate, in milliseconds; a broker that has just come back takes a tick.
const KEEPER_WITHIN: u16 = 200;

/// Waiting for a sync, by futexes.
pub struct Futexes;

impl Rounds for Futexes {
    fn sleep(&self, round: &AtomicU32, seen: u32, micros: u64) {
        futex::wait(round, seen, Duration::from_micros(micros));
    }

    fn wake_all(&self, round: &AtomicU32) {
        futex::wake_all(round);
    }

    fn micros(&self) -> u64 {
        futex::micros()
    }
}

#[derive(Debug)]
pub struct Shared {
    control: ControlMap,
    /// For the next broker, if nobody else has it any more.
    control_fd: HostFd,
    wal_index_fd: HostFd,
    nonce: u64,
    /// Kept so that the kernel keeps the gate as long as this process has the segment mapped.
    hold: Option<HostFd>,
    role: Role,
    pub(super) gate: GateSeen,
    chunks: Mutex<BTreeMap<u32, MmapRaw>>,
    /// Read-write descriptors opened for read-only connections; closing one drops the process's POSIX locks on
    /// the file, so they live as long as the gate.
    own_descriptors: Mutex<Vec<HostFd>>,
    epoch: u64,
    /// Write transactions begun by this process; see [`Shared::still_ours`].
    begun: AtomicU64,
}

impl Shared {
    /// Maps what the broker sent: control, wal-index and, read-write, the gate. Checks what it can.
    pub fn open(fds: Vec<OwnedFd>, nonce: u64, role: Role) -> io::Result<Shared> {
        let mut fds = fds.into_iter();
        let (Some(control), Some(wal_index)) = (fds.next(), fds.next()) else {
            return Err(io::Error::other("the segment's descriptors did not arrive: too many open files"));
        };
        let hold = fds.next();
        if hold.is_some() != (role == Role::ReadWrite) {
            return Err(io::Error::other(
                "not all of the segment's descriptors arrived: too many open files",
            ));
        }
        if !memfd::is_sealed(&control) || !memfd::is_sealed_to(&wal_index, WAL_INDEX_SIZE) {
            return Err(io::Error::other("the broker's segment is not sealed"));
        }
        let control_fd = control;
        let control = ControlMap::open(&control_fd, nonce, role == Role::ReadWrite)?;
        let (address, length) = control.extent();
        fork::remember_mapping(address, length);
        let mut own = Vec::new();
        if let Some(gate) = hold.as_ref().filter(|_| planted("late-close-of-gate")).and_then(hold::copy) {
            own.push(HostFd::new(gate)?);
        }
        Ok(Shared {
            control,
            control_fd: HostFd::new(control_fd)?,
            wal_index_fd: HostFd::new(wal_index)?,
            nonce,
            hold: hold.map(HostFd::new).transpose()?,
            role,
            gate: GateSeen::default(),
            chunks: Mutex::default(),
            own_descriptors: Mutex::new(own),
            epoch: fork::epoch(),
            begun: AtomicU64::new(1),
        })
    }

    /// The segment must not be used any more.
    pub fn poisoned(&self) -> bool {
        self.control.poisoned() || self.gate.is_gone()
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// Neither poisoned nor about to be.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.control.is_open() && !self.gate.is_gone()
    }

    /// The broker is stopping: no new transactions.
    pub fn stopping(&self) -> bool {
        self.control.stopping()
    }

    /// The locks, where this process may take them itself: not with a read-only mapping, nor with a layout of
    /// another version.
    #[inline]
    pub fn table(&self) -> Option<Table<'_>> {
        match self.role {
            Role::ReadWrite => self.control.control().map(Table::of),
            Role::ReadOnly => None,
        }
    }

    /// What is said of checkpoints, where this process may say it.
    #[inline]
    pub fn checkpoint(&self) -> Option<&CheckpointWords> {
        match self.role {
            Role::ReadWrite => self.control.control().map(|c| &c.checkpoint.0),
            Role::ReadOnly => None,
        }
    }

    /// What statements have shown of themselves on this database.
    pub fn learned(&self) -> Option<Learned<'_>> {
        match self.role {
            Role::ReadWrite => self.control.control().map(|c| Learned(&c.learned)),
            Role::ReadOnly => None,
        }
    }

    /// The commits that wait for a sync, where this process can read them.
    #[inline]
    pub fn commits(&self) -> Option<Commits<'_>> {
        self.control.control().map(|c| Commits { words: &c.commits, rounds: &Futexes })
    }

    /// At least `wanted` regions; `None`: there is no memory for them.
    pub fn grow(&self, wanted: u32) -> Option<u32> {
        if wanted <= self.regions() {
            return Some(self.regions());
        }
        self.control.grow(self.wal_index_fd.get()?, wanted).ok()
    }

    /// A write transaction begins.
    pub fn write_begins(&self) {
        self.begun.store(self.begun.load(Relaxed) + 1, Relaxed);
    }

    /// Whether the host has left our descriptors alone: looked at once a write transaction, before its first write.
    /// One that has closed what it did not know may have opened something else on the numbers that SQLite writes
    /// to. `checked`: the caller's memory of it.
    pub fn still_ours(&self, checked: &mut u64) -> bool {
        let begun = self.begun.load(Relaxed);
        if *checked != begun {
            let ours = self.hold.as_ref().is_none_or(|hold| hold.get().is_some());
            if !ours {
                return false;
            }
            *checked = begun;
        }
        true
    }

    /// Regions that may be mapped.
    pub fn regions(&self) -> u32 {
        self.control.regions()
    }

    /// The address of a wal-index region that has been handed out. It stays until the last connection leaves.
    pub fn region(&self, region: u32) -> io::Result<*mut u8> {
        let chunk = region / REGIONS_PER_CHUNK;
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        if let std::collections::btree_map::Entry::Vacant(entry) = chunks.entry(chunk) {
            let map = self.map(chunk)?;
            fork::remember_mapping(map.as_ptr() as usize, map.len());
            entry.insert(map);
        }
        let map = &chunks[&chunk];
        let offset = (region % REGIONS_PER_CHUNK) as usize * REGION_SIZE;
        // SAFETY: the offset is inside the chunk.
        Ok(unsafe { map.as_mut_ptr().add(offset) })
    }

    fn map(&self, chunk: u32) -> io::Result<MmapRaw> {
        let fd = self.wal_index_fd.get().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let mut options = MmapOptions::new();
        options.offset(u64::from(chunk) * CHUNK_SIZE as u64).len(CHUNK_SIZE);
        match self.role {
            Role::ReadWrite => options.map_raw(fd.as_raw_fd()),
            Role::ReadOnly => options.map_raw_read_only(fd.as_raw_fd()),
        }
    }

    /// Another descriptor of the wal-index, for SQLite to take for its `-shm` file.
    pub fn wal_index_copy(&self) -> io::Result<OwnedFd> {
        let _low = LowDescriptors::occupy()?;
        let fd = self.wal_index_fd.get().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        fd.try_clone_to_owned()
    }

    /// The wal-index's head.
    pub fn wal_index(&self) -> Option<WalIndex> {
        // SAFETY: the first region stays mapped as long as self, whom the value does not outlive.
        self.region(0).ok().map(|region| unsafe { WalIndex::new(region) })
    }

    /// The page that a frame of the WAL holds, as the wal-index says.
    pub fn page_of(&self, frame: u32) -> Option<u32> {
        let (region, word) = page_number_at(frame);
        let address = self.region(region).ok().filter(|_| region < self.regions())?;
        // SAFETY: a word of a mapped region, which others write at any time.
        let word = unsafe { &*address.cast::<std::sync::atomic::AtomicU32>().add(word) };
        Some(word.load(Relaxed))
    }

    /// Keeps a descriptor of the database until the gate is given up.
    pub fn keep(&self, fd: HostFd) {
        self.own_descriptors.lock().unwrap_or_else(PoisonError::into_inner).push(fd);
    }

    /// There are descriptors that must be closed before the gate opens.
    pub fn keeps_descriptors(&self) -> bool {
        !self.own_descriptors.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub(super) fn nonce(&self) -> u64 {
        self.nonce
    }

    /// Control, wal-index and what holds the gate, for a broker that has none of them.
    pub(super) fn handed_back(&self) -> Option<[BorrowedFd<'_>; 3]> {
        let hold = self.hold.as_ref().and_then(HostFd::get)?;
        Some([self.control_fd.get()?, self.wal_index_fd.get()?, hold]).filter(|_| self.is_open())
    }

    /// A seat may rest in it: nothing here has to be let go before the gate opens, and there is a broker, or its keeper,
    /// that opens it. (Not asked by the session, which may be lost while the broker lives.)
    pub fn may_rest(&self) -> bool {
        let hold = self.hold.as_ref().and_then(HostFd::get);
        self.is_open() && !self.keeps_descriptors() && hold.is_some_and(|hold| !hold::broker_is_gone(hold))
    }

    /// The broker has ended, and its keeper too. False also where the host has closed what would tell.
    pub fn broker_is_gone(&self) -> bool {
        self.hold.as_ref().and_then(HostFd::get).is_some_and(hold::broker_is_gone)
    }

    /// No broker is there to be told that nobody is left: its keeper opens the gate. Closed means closed: it is waited for.
    pub fn ring(&self) {
        if let Some(hold) = self.hold.as_ref().and_then(HostFd::get) {
            hold::ring(hold);
            hold::is_let_go_within(hold, PollTimeout::from(KEEPER_WITHIN));
        }
    }

    /// In place of a broker that is gone, and its keeper: nobody but seats that rest is left, and those have been closed; the
    /// processes that they belong to still hold the gate. It opens, as it would have at the last close; over a checkpoint of
    /// the dead broker's checkpointer it does not, because that has the gate's description until it ends.
    pub fn let_gate_go(&self) -> io::Result<()> {
        self.control.poison();
        let _low = LowDescriptors::occupy()?;
        if let Some(gate) = self.hold.as_ref().and_then(HostFd::get).and_then(hold::take_out) {
            // As in `drop`. It stands until this very descriptor is closed, so nobody has locked the file before.
            match gate::is_held_by(&gate) {
                true => drop(gate),
                false => std::mem::forget(gate),
            }
        }
        Ok(())
    }
}

/// A connection's own mapping of the wal-index: one that only reads, and may have to join anew in a forked child. SQLite
/// keeps the addresses, so what a child joins is mapped in their place; and a connection is to notice that by itself.
#[derive(Debug, Default)]
pub struct OwnIndex {
    chunks: BTreeMap<u32, MmapRaw>,
}

impl OwnIndex {
    /// As [`Shared::region`].
    pub fn region(&mut self, shared: &Shared, region: u32) -> io::Result<*mut u8> {
        let chunk = region / REGIONS_PER_CHUNK;
        if let std::collections::btree_map::Entry::Vacant(entry) = self.chunks.entry(chunk) {
            let map = entry.insert(shared.map(chunk)?);
            remember(chunk, map);
        }
        let offset = (region % REGIONS_PER_CHUNK) as usize * REGION_SIZE;
        // SAFETY: the offset is inside the chunk.
        Ok(unsafe { self.chunks[&chunk].as_mut_ptr().add(offset) })
    }

    /// The first region, if it is mapped.
    pub fn head(&self) -> Option<*mut u8> {
        self.chunks.get(&0).map(MmapRaw::as_mut_ptr)
    }

    /// In a forked child: has `shared` in the place of what its parent had. False: some of it is still the private copy.
    pub fn move_to(&self, shared: &Shared) -> bool {
        let Some(fd) = shared.wal_index_fd.get() else { return false };
        let writable = shared.role == Role::ReadWrite;
        self.chunks.iter().all(|(chunk, map)| {
            let offset = u64::from(*chunk) * CHUNK_SIZE as u64;
            // First, so that a child of the child's never shares it.
            remember(*chunk, map);
            // SAFETY: the mapping is this value's, and others only have pointers into it, as into any shared memory.
            unsafe { fork::map_over(map.as_ptr() as usize, map.len(), fd, offset, writable) }
        })
    }
}

fn remember(chunk: u32, map: &MmapRaw) {
    match chunk {
        0 => fork::remember_index(map.as_ptr() as usize, map.len()),
        _ => fork::remember_mapping(map.as_ptr() as usize, map.len()),
    }
}

impl Drop for OwnIndex {
    fn drop(&mut self) {
        self.chunks.values().for_each(|map| fork::forget_mapping(map.as_ptr() as usize));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.epoch == fork::epoch() {
            fork::forget_mapping(self.control.extent().0);
        }
        let chunks = std::mem::take(self.chunks.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (_, map) in chunks {
            if self.epoch == fork::epoch() {
                fork::forget_mapping(map.as_ptr() as usize);
            }
            drop(map);
        }
        // Closing any descriptor of the database drops this process's POSIX locks on it. While a gate stands nobody has
        // any; if somebody has opened it under us (a broker that stopped), a plain or guest connection of this
        // process may, and the descriptors stay open.
        for fd in std::mem::take(self.own_descriptors.get_mut().unwrap_or_else(PoisonError::into_inner)) {
            match fd.get().is_some_and(gate::stands) || planted("late-close-of-gate") {
                true => drop(fd),
                false => std::mem::forget(fd),
            }
        }
    }
}
