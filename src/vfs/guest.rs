//! Guest mode: the locks are the unix VFS's own, and the turns are still the broker's.

use super::main_file::MainFile;
use super::methods::real;
use super::wrapped::{Kind, Wrapped};
use crate::client::Lost;
use crate::lock::{Ask, Release, Request, Slots, Verdict, slot};
use crate::planted::planted;
use libsqlite3_sys as ffi;
use std::ffi::c_int;

type File = *mut ffi::sqlite3_file;

/// Guest mode: what a connection had before a request. The turn that was taken for a request goes back if the unix VFS
/// refuses the lock, as [`Seat::request_refused`](crate::lock::seat::Seat::request_refused) has it.
pub struct Before {
    turn: bool,
    second_chance: bool,
}

impl Before {
    pub fn of(main: &MainFile) -> Before {
        Before { turn: main.turn, second_chance: main.second_chance }
    }

    pub fn give_back(&self, main: &mut MainFile) {
        if !self.turn && !planted("busy-keeps-turn") {
            main.second_chance |= self.second_chance;
            end_turn(main);
        }
    }
}

/// Guest mode: takes the turn before the snapshot, if what begins will write.
pub fn take_turn(main: &mut MainFile) -> Result<(), Lost> {
    if main.takes_turn_ahead() && !main.turn {
        let outcome = main.ask(Ask { request: Request::Turn, ahead: true }, || false)?;
        main.turn = matches!(outcome.verdict, Verdict::Granted { turn: true, .. });
        main.second_chance = false;
    }
    Ok(())
}

/// Guest mode: the write lock followed the turn.
pub fn turn_is_used(main: &mut MainFile) {
    if main.turn
        && let Some(member) = main.seat()
    {
        let _ = member.turn_is_used();
    }
    main.progress();
}

/// Guest mode: the transaction is over.
pub fn end_turn(main: &mut MainFile) {
    if std::mem::take(&mut main.turn)
        && let Some(member) = main.seat()
    {
        let _ = member.release(Release::Turn);
    }
}

/// Guest mode: the unix VFS's locks, with the turn around them.
pub fn lock(file: File, w: &mut Wrapped, slots: Slots, flags: c_int) -> c_int {
    let locking = flags & ffi::SQLITE_SHM_LOCK != 0;
    let shared = flags & ffi::SQLITE_SHM_SHARED != 0;
    let (first, count) = slots.bounds();
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    let guest = main.guest().is_some();
    let held = Before::of(main);
    let mut before = None;
    if guest && locking {
        let read_slot = first as u8;
        let begins = shared && slots.is_one_read();
        let checkpoint = !shared && slots.is_write() && !main.reads() && main.owns(slot::CHECKPOINT);
        if begins {
            main.retry_expected = false;
            before = main.snapshot_basis(read_slot);
        }
        let taken = match (begins, checkpoint) {
            (true, _) => take_turn(main),
            (_, true) => main.ask(Ask { request: Request::Turn, ahead: true }, || false).map(|o| {
                main.turn = matches!(o.verdict, Verdict::Granted { turn: true, .. });
            }),
            _ => Ok(()),
        };
        if taken.is_err() {
            main.log_lost();
            return ffi::SQLITE_IOERR_SHMLOCK;
        }
    }
    if guest && locking && begins_anew(main, slots, shared) {
        let rc = keep_checkpoints_out(file, w);
        if rc != ffi::SQLITE_OK {
            return rc;
        }
    }
    let rc = real!(w, xShmLock, ffi::SQLITE_IOERR_SHMLOCK, file, first, count, flags);
    if slots.begin_anew() && (rc != ffi::SQLITE_OK || !locking) {
        let_checkpoints_in(file, w);
    }
    let Kind::Main(main) = &mut w.kind else { return rc };
    if rc != ffi::SQLITE_OK || !guest {
        if rc == ffi::SQLITE_BUSY && slots.is_write() && main.reads() {
            main.second_chance = true;
        }
        if guest && locking {
            held.give_back(main);
        }
        return rc;
    }
    let mask = slots.mask().unwrap_or(0);
    if locking {
        main.note_held(slots, shared);
        if shared && slots.is_one_read() {
            main.retry_expected = main.turn && before != main.snapshot_basis(first as u8);
        } else if slots.is_write() && main.reads() {
            turn_is_used(main);
        }
        return rc;
    }
    let was_write = !shared && slots.is_write();
    let kept = std::mem::take(&mut main.retry_expected) && shared;
    match shared {
        true => main.shared_slots &= !mask,
        false => main.exclusive_slots &= !mask,
    }
    let transaction_ends = shared && !main.reads() && !main.owns(slot::WRITE) && !kept;
    if transaction_ends || (was_write && (main.reads() || main.owns(slot::CHECKPOINT))) {
        end_turn(main);
    }
    rc
}

/// A writer is about to begin the WAL anew (walRestartLog), and no checkpoint.
fn begins_anew(main: &MainFile, slots: Slots, shared: bool) -> bool {
    slots.begin_anew()
        && !shared
        && !main.owns(slot::CHECKPOINT)
        && !planted("new-beginning-beside-checkpoint")
}

/// Guest mode: the WAL is not begun anew beside a checkpoint, whoever's that is, nor does one begin meanwhile (as
/// `Seat::checkpoint_meets_new_beginning` has it). Only the kernel knows who has CHECKPOINT here, so the lock itself is
/// taken. A plain client that begins the WAL anew takes no heed of a guest's checkpoint.
fn keep_checkpoints_out(file: File, w: &mut Wrapped) -> c_int {
    let flags = ffi::SQLITE_SHM_LOCK | ffi::SQLITE_SHM_EXCLUSIVE;
    let rc = real!(w, xShmLock, ffi::SQLITE_IOERR_SHMLOCK, file, c_int::from(slot::CHECKPOINT), 1, flags);
    if let Kind::Main(main) = &mut w.kind {
        main.keeps_checkpoints_out = rc == ffi::SQLITE_OK;
    }
    rc
}

fn let_checkpoints_in(file: File, w: &mut Wrapped) {
    let Kind::Main(main) = &mut w.kind else { return };
    if std::mem::take(&mut main.keeps_checkpoints_out) {
        let flags = ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_EXCLUSIVE;
        real!(w, xShmLock, ffi::SQLITE_OK, file, c_int::from(slot::CHECKPOINT), 1, flags);
    }
}
