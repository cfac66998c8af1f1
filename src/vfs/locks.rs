//! `xLock`, `xUnlock`, `xCheckReservedLock`: the file locks, gated and in guest mode.

use super::anew;
use super::guest::{Before, end_turn, take_turn, turn_is_used};
use super::last_close::RealFile;
use super::main_file::MainFile;
use super::methods::real;
use super::wrapped::{Kind, Wrapped};
use crate::client::Lost;
use crate::lock::{Ask, FileLevel, Release, Request, Verdict};
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::ffi::c_int;
use std::time::Duration;

type File = *mut ffi::sqlite3_file;

/// Between two tries of a lock that only the kernel can grant (guest mode).
const GUEST_RETRY: Duration = Duration::from_millis(1);

pub fn lock(file: File, w: &mut Wrapped, level: FileLevel) -> c_int {
    if w.inherited() && !(level == FileLevel::Shared && anew::joins(file, w)) {
        return ffi::SQLITE_IOERR_LOCK;
    }
    let real = RealFile { file, methods: w.real };
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    if main.gated().is_some() {
        let closes = std::mem::take(&mut main.closing) && level == FileLevel::Exclusive;
        if closes && main.level == FileLevel::Shared && main.wal_open && main.ends_wal(real) {
            return ffi::SQLITE_BUSY;
        }
        return gated(main, level);
    }
    let guest = main.guest().is_some() && level > main.level;
    let before = Before::of(main);
    if guest && level == FileLevel::Shared && take_turn(main).is_err() {
        main.log_lost();
        return ffi::SQLITE_IOERR_LOCK;
    }
    let mut rc = real!(w, xLock, ffi::SQLITE_IOERR_LOCK, file, level as c_int);
    let Kind::Main(main) = &mut w.kind else { return rc };
    if guest && level == FileLevel::Shared && rc == ffi::SQLITE_BUSY {
        // Nothing is held yet: a plain writer's PENDING or EXCLUSIVE may be waited for.
        let wait = main.begin_wait();
        while rc == ffi::SQLITE_BUSY && !wait.is_over(main) {
            std::thread::sleep(GUEST_RETRY);
            rc = real!(w, xLock, ffi::SQLITE_IOERR_LOCK, file, level as c_int);
        }
        main.end_wait(rc == ffi::SQLITE_BUSY);
    }
    let Kind::Main(main) = &mut w.kind else { return rc };
    match rc {
        ffi::SQLITE_OK => {
            main.level = main.level.max(level);
            if guest && level >= FileLevel::Reserved {
                turn_is_used(main);
            }
        }
        ffi::SQLITE_BUSY if guest && level == FileLevel::Reserved => main.second_chance = true,
        _ => {}
    }
    if rc != ffi::SQLITE_OK && guest && level == FileLevel::Shared {
        before.give_back(main);
    }
    rc
}

pub(super) fn gated(main: &mut MainFile, level: FileLevel) -> c_int {
    if main.level >= level {
        return ffi::SQLITE_OK;
    }
    match try_gated(main, level) {
        Ok(rc) => rc,
        Err(Lost) => {
            main.log_lost();
            ffi::SQLITE_IOERR_LOCK
        }
    }
}

fn try_gated(main: &mut MainFile, level: FileLevel) -> Result<c_int, Lost> {
    if main.gated().is_none_or(|m| !m.is_whole()) {
        return Err(Lost);
    }
    let ahead = level == FileLevel::Shared && main.takes_turn_ahead();
    if level == FileLevel::Reserved {
        main.transaction_writes();
    }
    let request = Request::File { level, hot_journal: main.hot_journal };
    let verdict = main.ask(Ask { request, ahead }, || false)?.verdict;
    match verdict {
        Verdict::Granted { turn, probation } => {
            main.second_chance &= !ahead;
            main.turn = turn;
            match ahead && turn {
                true => main.note_ahead(),
                false => main.leave_note(),
            }
            if level == FileLevel::Shared {
                main.probation = probation;
                main.hot_journal = false;
            } else {
                main.progress();
                main.write_begins();
            }
            if level == FileLevel::Exclusive && main.level == FileLevel::Shared {
                main.exclusive_is_kept(true);
            }
            main.level = level;
            Ok(ffi::SQLITE_OK)
        }
        Verdict::Busy => {
            match level {
                FileLevel::Reserved => main.second_chance = true,
                // As unixLock: PENDING stays, so that the retry finds fewer readers.
                FileLevel::Exclusive if main.level == FileLevel::Reserved => main.level = FileLevel::Pending,
                _ => {}
            }
            Ok(ffi::SQLITE_BUSY)
        }
    }
}

pub fn unlock(file: File, w: &mut Wrapped, level: FileLevel) -> c_int {
    if w.inherited() {
        if let Kind::Main(main) = &mut w.kind {
            main.level = main.level.min(level); // what SQLite believes to have
        }
        return ffi::SQLITE_OK;
    }
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    if main.gated().is_none() {
        let rc = real!(w, xUnlock, ffi::SQLITE_IOERR_UNLOCK, file, level as c_int);
        let Kind::Main(main) = &mut w.kind else { return rc };
        if level == FileLevel::None || main.level >= FileLevel::Reserved {
            end_turn(main);
        }
        main.level = main.level.min(level);
        return rc;
    }
    if main.level <= level {
        return ffi::SQLITE_OK;
    }
    let was = std::mem::replace(&mut main.level, level);
    if main.keeps_exclusive {
        main.exclusive_is_kept(false);
    }
    if level == FileLevel::None {
        main.probation = false;
        main.hot_journal = false;
        main.transaction_ends();
        main.forget_note();
    }
    let keep_turn = main.keeps_turn_for_rerun(was < FileLevel::Exclusive);
    // A session that is gone has nothing left to give back, and the next lock says so.
    if let Some(member) = main.gated() {
        let _ = member.release(Release::File { level, keep_turn });
    }
    main.turn &= keep_turn;
    main.leave_note();
    ffi::SQLITE_OK
}

pub fn check_reserved(file: File, w: &mut Wrapped, out: &mut c_int) -> c_int {
    if w.inherited() {
        *out = 1; // somebody else's: the child must not roll back its parent's journal
        return ffi::SQLITE_OK;
    }
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    let Some(member) = main.gated() else {
        return real!(w, xCheckReservedLock, ffi::SQLITE_IOERR_CHECKRESERVEDLOCK, file, out);
    };
    if main.level >= FileLevel::Reserved {
        *out = 1;
        return ffi::SQLITE_OK;
    }
    match member.reserved_by_other() {
        Ok(reserved) => {
            // hasHotJournal saw a journal and asks whether its writer lives. If that has committed between the
            // two questions, the journal is gone, and saying so spares SQLite the EXCLUSIVE lock by which it
            // would find out (os_unix.c knows the race as ticket 3883): BUSY beside other readers.
            let gone = !reserved && !main.journal_exists();
            *out = c_int::from(reserved || gone);
            // Else it would take a plain client's journal for a dead member's.
            match main.believes() || planted("reserved-believed") {
                true => ffi::SQLITE_OK,
                false => ffi::SQLITE_IOERR_CHECKRESERVEDLOCK,
            }
        }
        Err(Lost) => ffi::SQLITE_IOERR_CHECKRESERVEDLOCK,
    }
}
