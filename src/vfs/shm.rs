//! `xShmMap`, `xShmLock`, `xShmBarrier`, `xShmUnmap`: the wal-index and its eight lock slots.

use super::anew;
use super::guest;
use super::main_file::MainFile;
use super::methods::real;
use super::wrapped::{Kind, Wrapped};
use crate::client::Lost;
use crate::client::shared::OwnIndex;
use crate::lock::{Ask, FileLevel, Release, Request, Slots, Verdict, slot};
use crate::planted::planted;
use crate::segment::layout::REGION_SIZE;
use crate::segment::wal_index::WalIndex;
use crate::wire::message::Role;
use libsqlite3_sys as ffi;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

type File = *mut ffi::sqlite3_file;

/// How long a checkpoint waits for its turn; then it goes on without.
const CHECKPOINT_PATIENCE: Duration = Duration::from_millis(10);

pub fn map(
    file: File,
    w: &mut Wrapped,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: &mut *mut c_void,
) -> c_int {
    *out = ptr::null_mut();
    if w.inherited() {
        return ffi::SQLITE_IOERR_SHMMAP;
    }
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    if main.gated().is_none() {
        if region == 0
            && let Err(reason) = main.prepare_shm()
        {
            main.library.log(ffi::SQLITE_CANTOPEN, &reason);
            return ffi::SQLITE_CANTOPEN;
        }
        let rc = real!(w, xShmMap, ffi::SQLITE_IOERR_SHMMAP, file, region, size, extend, out);
        let Kind::Main(main) = &mut w.kind else { return rc };
        if !out.is_null() {
            main.remember_guest_region(*out as usize);
        }
        if region == 0 {
            main.share_shm();
        }
        if region == 0 && !out.is_null() {
            // SAFETY: the unix VFS keeps the first region mapped until xShmUnmap, which forgets it here.
            main.wal_index = Some(unsafe { WalIndex::new((*out).cast()) });
        }
        return rc;
    }
    let Ok(region) = u32::try_from(region) else { return ffi::SQLITE_IOERR_SHMMAP };
    if size as usize != REGION_SIZE {
        return ffi::SQLITE_IOERR_SHMMAP;
    }
    match map_gated(main, region, extend != 0) {
        Ok(Mapped::At(address)) => {
            *out = address;
            match main.gated().map(|m| m.role()) {
                Some(Role::ReadOnly) => ffi::SQLITE_READONLY,
                _ => ffi::SQLITE_OK,
            }
        }
        // wal.c then reads the WAL without a shared index.
        Ok(Mapped::NotYet) if main.gated().is_some_and(|m| m.role() == Role::ReadOnly) => {
            ffi::SQLITE_READONLY_CANTINIT
        }
        Ok(Mapped::NotYet) => ffi::SQLITE_OK,
        Ok(Mapped::NoMemory) => ffi::SQLITE_NOMEM,
        Ok(Mapped::Failed) => ffi::SQLITE_IOERR_SHMMAP,
        Err(Lost) => {
            main.log_lost();
            ffi::SQLITE_IOERR_SHMMAP
        }
    }
}

enum Mapped {
    At(*mut c_void),
    /// Not there, and not to be made.
    NotYet,
    NoMemory,
    Failed,
}

fn map_gated(main: &mut MainFile, region: u32, extend: bool) -> Result<Mapped, Lost> {
    let member = main.gated().filter(|m| m.is_whole()).ok_or(Lost)?;
    let shared = member.shared().ok_or(Lost)?;
    if !main.wal_open && !member.open_wal_index(|index| main.found_alone(index))? {
        return Ok(Mapped::Failed);
    }
    if region >= shared.regions() {
        // A read-only client cannot extend; neither can the unix VFS for it.
        if !extend || member.role() == Role::ReadOnly {
            main.wal_open = true;
            return Ok(Mapped::NotYet);
        }
        if member.grow_wal_index(region + 1)?.is_none_or(|regions| region >= regions) {
            main.wal_open = true;
            return Ok(Mapped::NoMemory);
        }
    }
    let shared = shared.clone();
    let address = match main.writable {
        true => shared.region(region),
        false => main.own_index.region(&shared, region),
    };
    main.wal_open = true;
    let Ok(address) = address else { return Ok(Mapped::Failed) };
    if region == 0 {
        // SAFETY: the first region stays mapped until this connection leaves.
        main.wal_index = Some(unsafe { WalIndex::new(address) });
    }
    // What the index leads to is looked after as it is read.
    if main.believes() { Ok(Mapped::At(address.cast())) } else { Err(Lost) }
}

pub fn lock(file: File, w: &mut Wrapped, first: c_int, count: c_int, flags: c_int) -> c_int {
    let locking = flags & ffi::SQLITE_SHM_LOCK != 0;
    let shared = flags & ffi::SQLITE_SHM_SHARED != 0;
    let slots = u8::try_from(first).ok().zip(u8::try_from(count).ok()).and_then(|(f, c)| Slots::new(f, c));
    let Some(slots) = slots else { return ffi::SQLITE_MISUSE };
    if w.inherited() {
        if !locking {
            anew::unlocked(w, slots);
            return ffi::SQLITE_OK;
        }
        if !anew::joins(file, w) {
            // Not BUSY: wal.c would ask a hundred times.
            return ffi::SQLITE_IOERR_SHMLOCK;
        }
    }
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    let result = match main.gated().is_some() {
        true if locking => acquire(main, slots, shared),
        true => release(main, slots, shared),
        false => return guest::lock(file, w, slots, flags),
    };
    match result {
        Ok(rc) => rc,
        Err(Lost) => {
            main.log_lost();
            if locking { ffi::SQLITE_IOERR_SHMLOCK } else { ffi::SQLITE_OK }
        }
    }
}

fn acquire(main: &mut MainFile, slots: Slots, shared: bool) -> Result<c_int, Lost> {
    if main.gated().is_none_or(|m| !m.is_whole()) {
        return Err(Lost);
    }
    match shared {
        true if slots.is_one_read() => acquire_read(main, slots),
        true => plain_request(main, Request::ShmShared(slots), slots),
        false if slots.is_write() => acquire_write(main, slots),
        false if slots.is_checkpoint() => acquire_checkpoint(main, slots),
        false => plain_request(main, Request::ShmExclusive { slots, blocking: false }, slots),
    }
}

/// A request that is answered at once.
fn plain_request(main: &mut MainFile, request: Request, slots: Slots) -> Result<c_int, Lost> {
    let verdict = main.ask(Ask { request, ahead: false }, || false)?.verdict;
    if verdict == Verdict::Busy {
        return Ok(ffi::SQLITE_BUSY);
    }
    main.note_held(slots, matches!(request, Request::ShmShared(_)));
    Ok(ffi::SQLITE_OK)
}

/// A checkpoint begins: in a turn of its own if that is to be had soon. While others append, it never comes to the
/// WAL's end, the WAL is never begun anew, and from then on every commit ends with a checkpoint that syncs.
fn acquire_checkpoint(main: &mut MainFile, slots: Slots) -> Result<c_int, Lost> {
    let blocking = main.asked_for_checkpoint();
    let request = Request::ShmExclusive { slots, blocking };
    let ahead = main.reads_nothing() && !planted("checkpoint-beside-writers");
    let begun = Instant::now();
    let mut verdict = main.ask(Ask { request, ahead }, || begun.elapsed() >= CHECKPOINT_PATIENCE)?.verdict;
    if verdict == Verdict::Busy && blocking {
        // The broker's, if it is that: it ends by itself, and later than a turn is waited for.
        verdict = main.ask(Ask { request, ahead: false }, || false)?.verdict;
    }
    let Verdict::Granted { turn, .. } = verdict else { return Ok(ffi::SQLITE_BUSY) };
    main.turn = turn;
    main.note_held(slots, false);
    Ok(ffi::SQLITE_OK)
}

/// A read transaction begins: the turn first if it will write, then the snapshot.
fn acquire_read(main: &mut MainFile, slots: Slots) -> Result<c_int, Lost> {
    main.retry_expected = false;
    if !main.owns(slot::WRITE) && !main.may_take_snapshot() {
        return Ok(ffi::SQLITE_IOERR_SHMLOCK);
    }
    // walRestartLog takes a read slot inside a commit: no transaction begins.
    let ahead = !main.owns(slot::WRITE) && main.takes_turn_ahead();
    if ahead && main.reads_nothing() {
        main.wait_for_checkpoint();
    }
    let read_slot = slots.mask().unwrap_or(0).trailing_zeros() as u8;
    let before = if ahead { main.snapshot_basis(read_slot) } else { None };
    let outcome = main.ask(Ask { request: Request::ShmShared(slots), ahead }, || false)?;
    let Verdict::Granted { turn, .. } = outcome.verdict else { return Ok(ffi::SQLITE_BUSY) };
    main.second_chance &= !ahead;
    main.turn = turn;
    if ahead && turn {
        main.note_ahead();
    }
    main.note_held(slots, true);
    // What SQLite compares has changed while we waited: it will drop this lock and ask again. That unlock is
    // not the end of the transaction.
    main.retry_expected = ahead && turn && before != main.snapshot_basis(read_slot);
    if !main.owns(slot::WRITE) {
        main.note_snapshot();
    }
    Ok(ffi::SQLITE_OK)
}

fn acquire_write(main: &mut MainFile, slots: Slots) -> Result<c_int, Lost> {
    let blocking = main.lock_timeout > 0;
    if main.reads() {
        main.transaction_writes();
    }
    let request = Request::ShmExclusive { slots, blocking };
    let ask = Ask { request, ahead: false };
    let ordinary = main.reads() || main.owns(slot::CHECKPOINT) || blocking;
    let verdict = match main.wal_index {
        // WRITE outside a read transaction: walIndexReadHdr found a header it could not read. Mostly it was
        // just being written, and valid again by now: BUSY makes wal.c look again. Else wait for whoever
        // recovers it, and look again after that.
        Some(index) if !ordinary && !planted("torn-header-queues") => {
            if index.valid_header().is_some() {
                return Ok(ffi::SQLITE_BUSY);
            }
            main.ask(ask, || index.valid_header().is_some())?.verdict
        }
        _ => main.ask(ask, || false)?.verdict,
    };
    match verdict {
        Verdict::Granted { turn, .. } => {
            main.turn = turn;
            main.leave_note();
            main.write_begins();
            main.commit = None;
            if ordinary {
                main.progress();
            }
            main.write_basis = main.wal_index.filter(|_| main.reruns()).map(|i| i.header());
            main.note_held(slots, false);
            Ok(ffi::SQLITE_OK)
        }
        Verdict::Busy => {
            main.second_chance |= main.reads();
            Ok(ffi::SQLITE_BUSY)
        }
    }
}

fn release(main: &mut MainFile, slots: Slots, shared: bool) -> Result<c_int, Lost> {
    let mask = slots.mask().unwrap_or(0);
    let ends = shared && slots.is_one_read() && !main.retry_expected && !main.owns(slot::WRITE);
    if slots.is_write()
        && !shared
        && let Some(member) = main.gated()
    {
        member.hurries(main.commit.is_some());
    }
    // As the rules have it (`Seat::release`): others of this thread must not take us for a writer that waits for them.
    let turn_ends;
    let release = match shared {
        true => {
            main.shared_slots &= !mask;
            let retry = std::mem::take(&mut main.retry_expected);
            if slots.is_one_read() {
                if !retry && !main.owns(slot::WRITE) {
                    main.transaction_ends();
                }
                main.forget_note();
                main.leave_note();
            }
            let keep_turn = slots.is_one_read() && (retry || main.keeps_turn_for_rerun(true));
            turn_ends = ends && !keep_turn;
            Release::ShmShared { slots, keep_turn }
        }
        false => {
            main.exclusive_slots &= !mask;
            let rerun = slots.is_write() && main.reads() && main.reruns();
            let keep_turn =
                rerun && main.keeps_turn_for_rerun(main.wal_index.map(|i| i.header()) == main.write_basis);
            // A checkpoint's came with its lock.
            let comes_last = if main.reads() { slots.is_write() } else { slots.is_checkpoint() };
            turn_ends = comes_last && !keep_turn;
            Release::ShmExclusive { slots, keep_turn }
        }
    };
    main.turn &= !turn_ends || planted("turn-noted-for-good");
    main.gated().ok_or(Lost)?.release(release)?;
    if ends {
        main.snapshot_ends();
    }
    if !shared && slots.is_write() {
        main.wal_has_grown();
    }
    Ok(ffi::SQLITE_OK)
}

pub fn barrier(file: File, w: &Wrapped) {
    fence(Ordering::SeqCst);
    let Kind::Main(main) = &w.kind else { return };
    if main.gated().is_none() && !w.inherited() {
        real!(w, xShmBarrier, (), file);
    }
}

pub fn unmap(file: File, w: &mut Wrapped, delete: c_int) -> c_int {
    if w.inherited() {
        return ffi::SQLITE_OK;
    }
    let Kind::Main(main) = &mut w.kind else { return ffi::SQLITE_MISUSE };
    if main.gated().is_none() {
        main.wal_index = None;
        main.forget_guest_regions();
        return real!(w, xShmUnmap, ffi::SQLITE_OK, file, delete);
    }
    let index = main.wal_index.take();
    main.shared_slots = 0;
    main.exclusive_slots = 0;
    if !std::mem::take(&mut main.wal_open) {
        return ffi::SQLITE_OK;
    }
    let Some(member) = main.gated() else { return ffi::SQLITE_OK };
    if delete != 0 && main.level == FileLevel::Exclusive && member.role() == Role::ReadWrite {
        // The WAL is about to be removed; the next one must not be read through this index.
        if let Some(index) = index {
            index.invalidate();
        }
    }
    let _ = member.close_wal_index();
    main.own_index = OwnIndex::default();
    ffi::SQLITE_OK
}
