//! `fcntl` on a database: SQLite's lock bytes.
//!
//! os_unix.c, `unixLock` and `posixUnlock`: SHARED is a read lock on the PENDING byte, one on the SHARED range, and the
//! first given back; RESERVED its byte; EXCLUSIVE a write lock on PENDING (in between it is PENDING) and then on the SHARED
//! range. Down to SHARED: a read lock on that range, then both bytes given back; to nothing: the whole file. A call that
//! only leads to the next one is granted, and that one is the request.

use super::database::{Database, Seat};
use super::table::{self, Kind};
use super::turn::{self, Missing};
use super::{join, shm};
use crate::lock::{Ask, FileLevel, Release, Request, Verdict};
use crate::planted::planted;
use nix::errno::Errno;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// `PENDING_BYTE`; behind it RESERVED, and the SHARED range.
const PENDING: i64 = 0x4000_0000;
const RESERVED: i64 = PENDING + 1;
const SHARED: i64 = PENDING + 2;
const SHARED_SIZE: i64 = 510;
/// How long a last close waits for the broker's checkpointer, which ends when it sees that.
const CHECKPOINTER_PATIENCE: Duration = Duration::from_secs(2);

/// Between two tries where SQLite waits without end (`F_SETLKW`, in builds with blocking locks).
const AGAIN: Duration = Duration::from_millis(1);

/// A lock call. `None`: it is the kernel's.
pub fn call(fd: RawFd, command: i32, lock: &mut libc::flock, caller: usize) -> Option<Result<(), Errno>> {
    if i32::from(lock.l_whence) != libc::SEEK_SET {
        return None;
    }
    if command != libc::F_SETLKW {
        return once(fd, command, lock, caller);
    }
    loop {
        match once(fd, libc::F_SETLK, lock, caller)? {
            Err(Errno::EAGAIN) => std::thread::sleep(AGAIN),
            other => return Some(other),
        }
    }
}

fn once(fd: RawFd, command: i32, lock: &mut libc::flock, caller: usize) -> Option<Result<(), Errno>> {
    let known = match table::find(fd) {
        Some(known) => known,
        None if table::is_marked(fd) && table::was_inherited(fd) => return inherited(command, lock),
        None => match join::recognise(fd, caller) {
            Ok(known) => known?,
            Err(e) => return Some(Err(e)),
        },
    };
    let database = &known.database;
    match known.kind {
        Kind::Plain | Kind::Wal | Kind::Journal => None,
        Kind::Shm if command == libc::F_GETLK => Some(shm::look(database, lock)),
        Kind::Shm => Some(shm::lock(database, lock)),
        Kind::Database => database.with(|seat| on_file(seat, database, command, lock))?,
    }
}

/// In a forked child, whose connection is its parent's: nothing is granted, and a journal is somebody else's.
fn inherited(command: i32, lock: &mut libc::flock) -> Option<Result<(), Errno>> {
    let kind = i32::from(lock.l_type);
    match command {
        libc::F_GETLK => lock.l_type = libc::F_WRLCK as i16,
        _ if kind != libc::F_UNLCK => return Some(Err(Errno::EIO)),
        _ => {}
    }
    Some(Ok(()))
}

fn on_file(
    seat: &Seat,
    database: &Database,
    command: i32,
    lock: &mut libc::flock,
) -> Option<Result<(), Errno>> {
    let (kind, start, length) = (i32::from(lock.l_type), lock.l_start, lock.l_len);
    if command == libc::F_GETLK {
        if (start, length) != (RESERVED, 1) {
            return None;
        }
        let by_other = seat.member.reserved_by_other();
        if !super::wal::believes(database) && !planted("lane-reserved-believed") {
            return Some(Err(Errno::EIO));
        }
        lock.l_type = if matches!(by_other, Ok(false)) { libc::F_UNLCK } else { libc::F_WRLCK } as i16;
        return Some(by_other.map(drop).map_err(|_| Errno::EIO));
    }
    Some(match (kind, start, length) {
        (libc::F_RDLCK | libc::F_WRLCK, PENDING, 1) => Ok(()),
        (libc::F_RDLCK, SHARED, SHARED_SIZE) if seat.level.get() > FileLevel::None => Ok(()),
        (libc::F_RDLCK, SHARED, SHARED_SIZE) => raise(seat, database, FileLevel::Shared),
        (libc::F_WRLCK, RESERVED, 1) => raise(seat, database, FileLevel::Reserved),
        (libc::F_WRLCK, SHARED, SHARED_SIZE) => raise(seat, database, FileLevel::Exclusive),
        // The temporary one of SHARED.
        (libc::F_UNLCK, PENDING, 1) => Ok(()),
        (libc::F_UNLCK, PENDING, 2) => lower(seat, FileLevel::Shared),
        (libc::F_UNLCK, 0, 0) => lower(seat, FileLevel::None),
        _ => return None,
    })
}

fn raise(seat: &Seat, database: &Database, level: FileLevel) -> Result<(), Errno> {
    let ask = Ask { request: Request::File { level, hot_journal: false }, ahead: false };
    let mut verdict = seat.ask(ask, database.key());
    // PENDING is kept by who has RESERVED and retries. Who has not, waits here for the broker's checkpointer.
    if verdict == Err(Errno::EAGAIN) && level == FileLevel::Exclusive && seat.level.get() == FileLevel::Shared
    {
        let begun = Instant::now();
        let outcome = seat.member.lock(ask, database.key(), || begun.elapsed() >= CHECKPOINTER_PATIENCE);
        verdict = match outcome.map_err(|_| Errno::EIO)?.verdict {
            Verdict::Busy => Err(Errno::EAGAIN),
            granted => Ok(granted),
        };
    }
    let missing = match level {
        FileLevel::Shared => Missing::Shared,
        FileLevel::Exclusive => Missing::Exclusive,
        _ => Missing::Turn,
    };
    turn::note(database, verdict.is_err().then_some(missing));
    let Verdict::Granted { probation, .. } = verdict? else { return Err(Errno::EAGAIN) };
    if level == FileLevel::Shared {
        seat.probation.set(probation);
        if probation && !database.companion("-journal").exists() {
            no_hot_journal(seat);
        }
    } else if let Some(shared) = seat.member.shared() {
        shared.write_begins();
    }
    seat.level.set(level);
    Ok(())
}

/// SQLite has looked whether there is a hot journal, and goes on.
pub fn no_hot_journal(seat: &Seat) {
    if seat.probation.replace(false) {
        let _ = seat.member.journal_is_clear();
    }
}

fn lower(seat: &Seat, level: FileLevel) -> Result<(), Errno> {
    if seat.level.get() > level {
        seat.level.set(level);
        if level == FileLevel::None {
            seat.probation.set(false);
        }
        let keep_turn = turn::is_leased(seat);
        // A session that is gone has nothing left to give back, and the next lock says so.
        let _ = seat.member.release(Release::File { level, keep_turn });
    }
    Ok(())
}
