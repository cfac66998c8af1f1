//! The `-shm` file, which is the segment's wal-index: its locks, its mappings, its end.
//!
//! os_unix.c: slot i is byte 120+i, and byte 128 the dead-man switch, by which a first opener knows that it is the first
//! and truncates the file. Here that is found out, and done, when SQLite looks at that byte; it is told of another one,
//! and truncates nothing.

use super::database::{Database, Seat};
use super::table::{self, Kind};
use super::turn::{self, Missing};
use super::{companions, locks, wal};
use crate::client::lane::thread_id;
use crate::client::served::object_of;
use crate::lock::{Ask, FileLevel, Release, Request, Slots, Verdict, slot};
use crate::planted::planted;
use crate::segment::layout::REGION_SIZE;
use crate::segment::wal_index::WalIndex;
use nix::errno::Errno;
use nix::sys::stat::fstat;
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `UNIX_SHM_BASE` and `UNIX_SHM_DMS`.
const BASE: i64 = 120;
const DEAD_MAN_SWITCH: i64 = 128;
/// How long a checkpoint waits for its turn, as in the VFS; then it goes on without.
const CHECKPOINT_PATIENCE: Duration = Duration::from_millis(10);

/// The database that such a name belongs to, if it is one that is open here.
fn database_of(path: &Path, suffix: &str, caller: usize) -> Option<Arc<Database>> {
    let base = path.as_os_str().as_bytes().strip_suffix(suffix.as_bytes())?;
    let base = Path::new(std::ffi::OsStr::from_bytes(base));
    table::database_at(object_of(caller), base).filter(|d| !d.is_plain())
}

/// `open` of a file with such a name, or of another companion, which is the kernel's. `None`: it is the kernel's.
pub fn open(path: &Path, caller: usize) -> Option<Result<RawFd, Errno>> {
    if let Err(e) = companions::prepare(path, caller) {
        return Some(Err(e));
    }
    let database = database_of(path, "-shm", caller)?;
    let fd = database.with(|seat| {
        locks::no_hot_journal(seat);
        seat.member.shared().and_then(|s| s.wal_index_copy().ok())
    })?;
    let Some(fd) = fd.map(IntoRawFd::into_raw_fd) else { return Some(Err(Errno::EMFILE)) };
    if !table::add(fd, Kind::Shm, &database) {
        // SAFETY: just made here.
        unsafe { libc::close(fd) };
        return Some(Err(Errno::EMFILE));
    }
    Some(Ok(fd))
}

/// A file has been opened: a `-wal`, a `-journal`, or once more a database that is known. Of several connections the unix
/// VFS asks for locks by the descriptor of one.
pub fn opened(fd: RawFd, path: &Path, caller: usize) {
    // SAFETY: the caller's, which has just opened it.
    let Ok(st) = fstat(unsafe { BorrowedFd::borrow_raw(fd) }) else { return };
    let identity = (st.st_dev, st.st_ino);
    companions::opened(path, caller);
    if table::is_database(identity) {
        if let Some(database) = table::database(object_of(caller), identity) {
            let kind = if database.is_plain() { Kind::Plain } else { Kind::Database };
            table::add(fd, kind, &database);
        }
    } else if let Some(database) = database_of(path, "-journal", caller) {
        table::add(fd, Kind::Journal, &database);
    } else if let Some(database) = database_of(path, "-wal", caller)
        && table::add(fd, Kind::Wal, &database)
    {
        database.with(|seat| seat.wal.opened(fd));
    }
}

/// The last use of a descriptor, before it is closed.
pub fn closes(database: &Database, kind: Kind, fd: RawFd) {
    database.with(|seat| match kind {
        Kind::Shm => {
            let (shared, exclusive) = (seat.shared.get(), seat.exclusive.get());
            let _ = release(seat, shared | exclusive);
            seat.index.set(None);
            if seat.wal_open.replace(false) {
                let _ = seat.member.close_wal_index();
            }
        }
        Kind::Wal => seat.wal.closed(fd),
        Kind::Database | Kind::Journal | Kind::Plain => {}
    });
}

/// What becomes of an `unlink`; as in `c/files.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Unlink {
    Kernels = 0,
    /// There is nothing more to do.
    Done = 1,
    Refused = 2,
}

/// `unlink` of `-shm`, by the last close of the WAL, under EXCLUSIVE: the next WAL must not be read through this index.
/// Of a `-journal` by a forked child: it is its parent's, whose transaction may be running; by a member whose gate is gone it
/// may be a plain client's.
pub fn unlink(path: &Path, caller: usize) -> Unlink {
    if let Some(base) = path.as_os_str().as_bytes().strip_suffix(b"-journal") {
        let base = Path::new(std::ffi::OsStr::from_bytes(base));
        return match table::database_at(object_of(caller), base) {
            Some(database) if !wal::believes(&database) && !planted("lane-journal-deleted-blindly") => {
                Unlink::Refused
            }
            None if table::is_inherited(base) && !planted("childs-files") => Unlink::Done,
            _ => Unlink::Kernels,
        };
    }
    let Some(database) = database_of(path, "-shm", caller) else { return Unlink::Kernels };
    let ends = database.with(|seat| match seat.index.get() {
        Some(index) if seat.level.get() == FileLevel::Exclusive => {
            index.invalidate();
            true
        }
        _ => false,
    });
    if ends == Some(true) { Unlink::Done } else { Unlink::Kernels }
}

/// SQLite is about to map a part: its pages must be there.
pub fn map(database: &Database, end: u64) -> bool {
    let regions = u32::try_from(end.div_ceil(REGION_SIZE as u64)).unwrap_or(u32::MAX);
    let grown = database.with(|seat| seat.member.shared().and_then(|s| s.grow(regions)));
    grown.flatten().is_some_and(|now| now >= regions)
}

/// `F_GETLK`.
pub fn look(database: &Database, lock: &mut libc::flock) -> Result<(), Errno> {
    let answer = database.with(|seat| match lock.l_start {
        DEAD_MAN_SWITCH if seat.wal_open.get() => Ok(libc::F_UNLCK),
        DEAD_MAN_SWITCH => open_index(seat).map(|()| libc::F_RDLCK),
        _ => {
            let mask = mask_of(lock).ok_or(Errno::EINVAL)?;
            let table = seat.member.shared().and_then(|s| s.table()).ok_or(Errno::EIO)?;
            let blocked = !table.slots_blocked_by(seat.member.seat().seat, mask).is_empty();
            Ok(if blocked { libc::F_WRLCK } else { libc::F_UNLCK })
        }
    });
    lock.l_type = answer.unwrap_or(Err(Errno::EIO))? as i16;
    Ok(())
}

fn open_index(seat: &Seat) -> Result<(), Errno> {
    if !seat.wal_open.get() {
        if !seat.member.is_whole() {
            return Err(Errno::EIO);
        }
        let words = seat.member.shared().and_then(|s| s.checkpoint());
        // Nobody else has it open: it is recovered from the WAL.
        let found_alone = |index: WalIndex| {
            words.inspect(|w| w.wal_is_opened(0, false));
            index.invalidate();
        };
        if !seat.member.open_wal_index(found_alone).map_err(|_| Errno::EIO)? {
            return Err(Errno::EIO);
        }
        seat.wal_open.set(true);
        seat.index.set(seat.member.shared().and_then(|s| s.wal_index()));
    }
    Ok(())
}

fn slots_of(lock: &libc::flock) -> Option<Slots> {
    let first = u8::try_from(lock.l_start - BASE).ok()?;
    Slots::new(first, u8::try_from(lock.l_len).ok()?)
}

fn mask_of(lock: &libc::flock) -> Option<u8> {
    slots_of(lock)?.mask()
}

/// `F_SETLK`.
pub fn lock(database: &Database, lock: &libc::flock) -> Result<(), Errno> {
    let kind = i32::from(lock.l_type);
    let done = database.with(|seat| match (kind, slots_of(lock)) {
        (libc::F_UNLCK, None) => Ok(()),
        (_, None) if lock.l_start == DEAD_MAN_SWITCH => open_index(seat),
        (_, None) => Err(Errno::EINVAL),
        (libc::F_UNLCK, Some(slots)) => release(seat, slots.mask().unwrap_or(0)),
        (libc::F_RDLCK, Some(slots)) => share(seat, database, slots),
        (_, Some(slots)) => take(seat, database, slots),
    });
    done.unwrap_or(Err(Errno::EIO))
}

fn share(seat: &Seat, database: &Database, slots: Slots) -> Result<(), Errno> {
    let begins = slots.is_one_read() && !seat.owns(slot::WRITE);
    if begins && !wal::may_take_snapshot(seat, database) {
        return Err(Errno::EAGAIN);
    }
    seat.ask(Ask { request: Request::ShmShared(slots), ahead: false }, database.key())?;
    seat.shared.set(seat.shared.get() | slots.mask().unwrap_or(0));
    if begins {
        seat.snapshot.set(seat.index.get().map(|i| i.header()));
        seat.wal.note_snapshot(seat);
    }
    Ok(())
}

fn take(seat: &Seat, database: &Database, slots: Slots) -> Result<(), Errno> {
    match () {
        () if slots.is_write() => take_write(seat, database, slots)?,
        () if slots.is_checkpoint() => take_checkpoint(seat, database, slots)?,
        () if beside_own_checkpoint(seat, slots) => return Err(Errno::EAGAIN),
        () => {
            let request = Request::ShmExclusive { slots, blocking: false };
            seat.ask(Ask { request, ahead: false }, database.key())?;
        }
    }
    seat.exclusive.set(seat.exclusive.get() | slots.mask().unwrap_or(0));
    Ok(())
}

fn take_write(seat: &Seat, database: &Database, slots: Slots) -> Result<(), Errno> {
    let reads = seat.reads();
    // Outside a read: a header that could not be read. Valid by now, wal.c looks again.
    let torn = !reads && !seat.owns(slot::CHECKPOINT);
    if torn && seat.index.get().is_some_and(|i| i.valid_header().is_some()) {
        return Err(Errno::EAGAIN);
    }
    let request = Request::ShmExclusive { slots, blocking: false };
    let verdict = seat.ask(Ask { request, ahead: false }, database.key());
    if reads {
        turn::note(database, verdict.is_err().then_some(Missing::Turn));
    }
    verdict?;
    if !wal::begins_to_write(seat) {
        let _ = seat.member.release(Release::ShmExclusive { slots, keep_turn: false });
        return Err(Errno::EAGAIN);
    }
    if let Some(shared) = seat.member.shared() {
        shared.write_begins();
    }
    seat.note_write(true);
    // SQLite compares the same, gives WRITE back, and comes again with a new snapshot.
    let stale = seat.snapshot.get().is_some() && seat.snapshot.get() != seat.index.get().map(|i| i.header());
    if reads && stale {
        turn::note(database, Some(Missing::Turn));
    }
    Ok(())
}

/// One connection of this process would begin the WAL anew while another one's checkpoint is under way. The rules keep
/// seats from that, and these two have one seat.
fn beside_own_checkpoint(seat: &Seat, slots: Slots) -> bool {
    slots.begin_anew()
        && seat.owns(slot::CHECKPOINT)
        && seat.checkpointer.get() != thread_id()
        && !planted("new-beginning-beside-checkpoint")
}

/// In a turn of its own if that is to be had soon, as the VFS does it, and for the same reason.
fn take_checkpoint(seat: &Seat, database: &Database, slots: Slots) -> Result<(), Errno> {
    if seat.exclusive.get() & slot::WAL_READERS == slot::WAL_READERS
        && !planted("checkpoint-beside-new-beginning")
    {
        return Err(Errno::EAGAIN); // another connection of this process begins the WAL anew
    }
    let request = Request::ShmExclusive { slots, blocking: false };
    let ahead = seat.shared.get() == 0 && seat.exclusive.get() == 0;
    if !seat.member.is_whole() {
        return Err(Errno::EIO);
    }
    let begun = Instant::now();
    let enough = || begun.elapsed() >= CHECKPOINT_PATIENCE;
    let outcome = seat.member.lock(Ask { request, ahead }, database.key(), enough).map_err(|_| Errno::EIO)?;
    match outcome.verdict {
        Verdict::Granted { .. } => {
            seat.checkpointer.set(thread_id());
            Ok(())
        }
        Verdict::Busy => Err(Errno::EAGAIN),
    }
}

/// Gives the slots of `mask` back, however they are held.
fn release(seat: &Seat, mask: u8) -> Result<(), Errno> {
    let (shared, exclusive) = (seat.shared.get() & mask, seat.exclusive.get() & mask);
    if exclusive & 1 << slot::WRITE != 0 {
        seat.note_write(false);
    }
    seat.shared.set(seat.shared.get() & !mask);
    seat.exclusive.set(seat.exclusive.get() & !mask);
    for one in (0..slot::COUNT).filter(|s| exclusive & 1 << s != 0) {
        let Some(slots) = Slots::new(one, 1) else { continue };
        let _ = seat.member.release(Release::ShmExclusive { slots, keep_turn: false });
    }
    for one in (0..slot::COUNT).filter(|s| shared & 1 << s != 0) {
        let Some(slots) = Slots::new(one, 1) else { continue };
        let keep_turn = turn::is_leased(seat);
        let _ = seat.member.release(Release::ShmShared { slots, keep_turn });
    }
    Ok(())
}
