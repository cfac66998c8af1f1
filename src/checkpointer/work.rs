//! One database as the checkpointer has it: the descriptors that members passed, the segment, and a seat in it.

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::stat::fstat;
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use turnstile::client::belief::GateSeen;
use turnstile::client::lane;
use turnstile::client::shared::Futexes;
use turnstile::lock::commits::Commits;
use turnstile::lock::park::Parking;
use turnstile::lock::seat::{Own, Seat};
use turnstile::lock::table::Table;
use turnstile::lock::{Ask, FileLevel, Release, Request, SeatId, Slots, Verdict, slot};
use turnstile::planted::planted;
use turnstile::segment::atomic::SeqCst;
use turnstile::segment::futex;
use turnstile::segment::layout::{
    CHECKPOINTER, CheckpointWords, Control, MAX_REGIONS, REGION_SIZE, SeatWords, WAL_INDEX_SIZE,
};
use turnstile::segment::mapping::ControlMap;
use turnstile::segment::supervision::{self, Held, Office};
use turnstile::segment::wal_index::WalIndex;
use turnstile::wire::checkpoint::FromCheckpointer;
use turnstile::wire::socket;

/// How often a WAL is looked at that is begun anew meanwhile.
const LOOKS: usize = 64;
/// How long a checkpoint waits for its turn; then it goes on without.
const TURN_PATIENCE: Duration = Duration::from_millis(10);

/// The broker's end of our socket.
#[derive(Debug)]
pub struct Broker {
    socket: OwnedFd,
    gone: AtomicBool,
}

impl Broker {
    pub fn new(socket: OwnedFd) -> Broker {
        Broker { socket, gone: AtomicBool::new(false) }
    }

    pub fn is_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub fn send(&self, message: &FromCheckpointer) {
        if let Ok(bytes) = socket::encode(message) {
            // A broker that does not read this is ending.
            let _ = socket::send_within(&self.socket, &bytes, &[], Duration::from_secs(10));
        }
    }
}

impl AsFd for Broker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Parking for Broker {
    fn park(&self, seat: &SeatWords, state: u32, limit: Duration) {
        futex::wait(&seat.park, state, limit);
    }

    fn wake(&self, table: Table<'_>, seat: SeatId) {
        match table.seat(seat) {
            Some(words) if words.brokered.load(SeqCst) == 0 => futex::wake(&words.park),
            Some(_) => self.send(&FromCheckpointer::Kick),
            None => {}
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

/// Why a WAL is not to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not the one that the index describes, or not any more.
    Stale,
    Short(String),
    /// Its pages have so many bytes that are not SQLite's.
    Reserved(u8),
}

pub struct Work {
    pub number: u32,
    pub broker: Arc<Broker>,
    pub database: OwnedFd,
    pub wal: RefCell<Option<OwnedFd>>,
    control: ControlMap,
    /// A plain client's pages are not copied over, nor its frames copied.
    gate: GateSeen,
    _office: Held,
    wal_index: MmapRaw,
    wal_index_fd: OwnedFd,
    own: Own,
    /// The checkpoint lock is asked for in a turn of its own.
    pub in_turn: Cell<bool>,
    /// Since when that turn has been had.
    pub turn_since: Cell<Option<Instant>>,
    pub refused: RefCell<Option<Refused>>,
    pub sync_failed: RefCell<Option<String>>,
}

impl Work {
    /// `fds`: control, wal-index and database.
    pub fn new(number: u32, nonce: u64, fds: Vec<OwnedFd>, broker: &Arc<Broker>) -> io::Result<Work> {
        let Ok([control, wal_index_fd, database]) = <[OwnedFd; 3]>::try_from(fds) else {
            return Err(io::Error::other("not all of its descriptors arrived: too many open files"));
        };
        // Not beside one that an older broker has left, which may still copy.
        let office = supervision::take(&control, Office::Checkpointer)?
            .ok_or_else(|| io::Error::other("another checkpointer is at work on it"))?;
        let control = ControlMap::open(&control, nonce, true)?;
        // All of it: only what has been handed out is touched.
        let wal_index = MmapOptions::new().len(WAL_INDEX_SIZE).map_raw(&wal_index_fd)?;
        Ok(Work {
            number,
            broker: Arc::clone(broker),
            database,
            wal: RefCell::default(),
            control,
            gate: GateSeen::default(),
            _office: office,
            wal_index,
            wal_index_fd,
            own: Own::default(),
            in_turn: Cell::default(),
            turn_since: Cell::default(),
            refused: RefCell::default(),
            sync_failed: RefCell::default(),
        })
    }

    fn control(&self) -> &Control {
        match self.control.control() {
            Some(control) => control,
            None => unreachable!("the broker is the same program"),
        }
    }

    pub fn table(&self) -> Table<'_> {
        Table::of(self.control())
    }

    pub fn words(&self) -> &CheckpointWords {
        &self.control().checkpoint.0
    }

    /// The commits that wait for a sync of the WAL.
    pub fn commits(&self) -> Commits<'_> {
        Commits { words: &self.control().commits, rounds: &Futexes }
    }

    pub fn index(&self) -> WalIndex {
        // SAFETY: mapped as long as self, which the value does not outlive; page-aligned.
        unsafe { WalIndex::new(self.wal_index.as_mut_ptr()) }
    }

    /// The address of a region; it stays as long as self.
    pub fn region(&self, region: u32, extend: bool) -> io::Result<Option<*mut u8>> {
        if region >= self.control.regions() {
            if !extend || region >= MAX_REGIONS {
                return Ok(None);
            }
            self.control.grow(&self.wal_index_fd, region + 1)?;
        }
        let offset = (region as usize).checked_mul(REGION_SIZE).filter(|o| *o < WAL_INDEX_SIZE);
        // SAFETY: inside the mapping.
        Ok(offset.map(|o| unsafe { self.wal_index.as_mut_ptr().add(o) }))
    }

    fn with<T>(&self, body: impl FnOnce(&Seat) -> T) -> T {
        let table = self.table();
        let thread = nix::unistd::gettid().as_raw() as u32;
        let connection = u64::MAX;
        body(&Seat { table, id: CHECKPOINTER, own: &self.own, parking: &*self.broker, thread, connection })
    }

    /// Somebody wants the file for itself, or nothing here may be used any more: the checkpoint ends.
    pub fn interrupted(&self) -> bool {
        let table = self.table();
        let wanted = table.pending().or(table.exclusive()).is_some_and(|seat| seat != CHECKPOINTER);
        wanted && !planted("checkpoint-goes-on")
            || self.control.poisoned()
            || !self.gate.stands(|| Some(self.database.as_raw_fd()), false)
            || self.broker.gone.load(Ordering::Acquire)
    }

    /// SHARED and the wal-index, like any connection: without SHARED a last close could remove the WAL under this
    /// checkpoint, and old frames be copied over new ones. False: not now.
    pub fn begin(&self) -> bool {
        if self.control.poisoned() {
            return false;
        }
        let shared =
            Ask { request: Request::File { level: FileLevel::Shared, hot_journal: false }, ahead: false };
        let granted = self.with(|seat| match seat.attempt_once(shared) {
            Verdict::Granted { probation, .. } => !probation,
            Verdict::Busy => false,
        });
        let mut alone = false;
        let opened = granted
            && (0..1000).any(|_| {
                // Nobody's truth then, and the first to read recovers it; there is nothing to do here.
                self.with(|seat| {
                    seat.open_wal_index(|| {
                        alone = true;
                        self.words().wal_is_opened(0, false);
                        self.index().invalidate();
                    })
                }) || {
                    std::thread::yield_now();
                    false
                }
            });
        if !opened || alone {
            self.end();
        }
        opened && !alone
    }

    pub fn end(&self) {
        self.with(|seat| {
            seat.close_wal_index();
            seat.leave();
        });
        self.turn_since.set(None);
    }

    /// The oldest snapshot that keeps the WAL from beginning anew: its last frame, 0 for a reader of the database alone, which
    /// is in the way as long as frames are to be copied.
    pub fn oldest_snapshot(&self) -> Option<u32> {
        let (table, index) = (self.table(), self.index());
        let (frames, backfilled) = index.progress();
        let first = u8::from(frames == backfilled);
        let read = |i: &u8| !table.slots_blocked_by(CHECKPOINTER, 1 << (slot::READ0 + i)).is_empty();
        (first..slot::COUNT - slot::READ0).filter(read).map(|i| index.read_mark(i.into())).min()
    }

    /// `xShmLock(LOCK)`.
    pub fn lock(&self, slots: Slots, shared: bool) -> bool {
        if self.control.poisoned() {
            return false;
        }
        let granted = |verdict| matches!(verdict, Verdict::Granted { .. });
        if shared {
            let ask = Ask { request: Request::ShmShared(slots), ahead: false };
            return self.with(|seat| granted(seat.attempt_once(ask)));
        }
        let request = Request::ShmExclusive { slots, blocking: false };
        let ask = Ask { request, ahead: false };
        if slots.is_checkpoint() {
            return self.lock_checkpoint(request);
        }
        self.with(|seat| {
            // To write the index, outside a checkpoint, is to recover it: the members' business.
            let checkpoints = seat.table.slot_owner(slot::CHECKPOINT) == Some(CHECKPOINTER);
            let recovers = slots.mask().is_some_and(|m| m & 0b111 != 0) && !checkpoints;
            !recovers && granted(seat.attempt_once(ask))
        })
    }

    fn lock_checkpoint(&self, request: Request) -> bool {
        let begun = Instant::now();
        let ask = Ask { request, ahead: self.in_turn.get() };
        let give_up = || begun.elapsed() >= TURN_PATIENCE || self.interrupted();
        let verdict = self.with(|seat| lane::wait(seat, ask, give_up, || {}).verdict);
        let Verdict::Granted { turn, .. } = verdict else { return false };
        self.turn_since.set(turn.then(Instant::now));
        if let Err(refused) = self.verify() {
            self.refused.replace(Some(refused));
            if let Some(slots) = Slots::new(slot::CHECKPOINT, 1) {
                self.unlock(slots, false);
            }
            return false;
        }
        true
    }

    /// `xShmLock(UNLOCK)`.
    pub fn unlock(&self, slots: Slots, shared: bool) {
        self.with(|seat| {
            seat.release(match shared {
                true => Release::ShmShared { slots, keep_turn: false },
                false => Release::ShmExclusive { slots, keep_turn: false },
            });
        });
    }

    /// The WAL is the one that the index describes, and has all the frames that the index says it has. Asked with
    /// the checkpoint lock held: nobody truncates it then.
    pub fn verify(&self) -> Result<(), Refused> {
        let wal = self.wal.borrow();
        let wal = wal.as_ref().ok_or(Refused::Stale)?;
        for _ in 0..LOOKS {
            let header = self.index().valid_header().ok_or(Refused::Stale)?;
            if header.frames() == 0 {
                return Ok(()); // nothing will be copied
            }
            let st = fstat(wal).map_err(|_| Refused::Stale)?;
            let mut salt = [0u8; 8];
            let read = nix::sys::uio::pread(wal, &mut salt, 16).unwrap_or(0);
            // A writer may have begun the WAL anew between the two.
            if self.index().valid_header().is_none_or(|now| now.salts() != header.salts()) {
                continue;
            }
            let needed = header.length();
            let stale = st.st_nlink == 0 || (read == salt.len() && salt != header.salts());
            if stale && !planted("stale-wal-copied") {
                return Err(Refused::Stale);
            }
            if (st.st_size as u64) < needed && !planted("short-wal-copied") {
                return Err(Refused::Short(format!(
                    "its WAL has {} bytes, and {} frames need {needed}",
                    st.st_size,
                    header.frames()
                )));
            }
            return Ok(());
        }
        Err(Refused::Stale)
    }
}
