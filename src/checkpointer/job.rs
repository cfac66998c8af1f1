//! One checkpoint: most of it beside the writers, its end in a turn of its own, so that the WAL can be begun anew.

use super::vfs;
use super::work::{Refused, Work};
use nix::sys::stat::fstat;
use rusqlite::ffi;
use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};
use std::os::fd::OwnedFd;
use std::ptr;
use std::time::{Duration, Instant};
use turnstile::planted::planted;
use turnstile::segment::atomic::SeqCst;
use turnstile::wire::checkpoint::Outcome;

/// A WAL of fewer frames is not worth a turn.
const RESET_AT: u32 = 3000;
/// So few frames are left for the turn, if they can be had.
const TAIL: u32 = 128;
/// How often the rest is copied beside the writers.
const ROUNDS: usize = 2;
/// A WAL of more frames has readers that always overlap: writers wait longer for them.
const LIMIT: u32 = 5000;
/// A WAL of so many frames has outrun its checkpoint: writers wait for its end.
const BRAKE: u32 = 2 * LIMIT;
/// How long readers are waited for in the turn, and past the limit from one try in vain to the next. Writers wait as
/// long.
const PATIENCE: [Duration; 5] = [
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(30),
];
/// How often an index is looked at that makes no sense.
const LOOKS: usize = 16;
/// Between two looks at readers.
const NAP: Duration = Duration::from_micros(50);

/// A database's checkpoints: SQLite's connection, kept between them.
pub struct Job<'a> {
    work: &'a Work,
    db: *mut ffi::sqlite3,
    /// How long readers have been waited for of late, an index in [`PATIENCE`]: one more after each try in vain past the
    /// limit, one less after one that was not.
    impatience: usize,
    /// After the last of them: the length of the WAL that is worth another one. A reader that stays for long must not
    /// cost every writer a wait again and again.
    not_before: u32,
    /// The oldest snapshot that was in the way of the last try. Still there at the next one, it is a reader that stays.
    in_the_way: Option<u32>,
    /// Frames of the WAL at the last try.
    last: u32,
    busy: Box<Waiting<'a>>,
}

/// What SQLite's busy handler is given.
struct Waiting<'a> {
    work: &'a Work,
    patience: Cell<Duration>,
}

/// SQLite's code.
type Code = c_int;

impl<'a> Job<'a> {
    pub fn new(work: &'a Work) -> Job<'a> {
        vfs::serve(work);
        let busy = Box::new(Waiting { work, patience: Cell::new(PATIENCE[0]) });
        work.words().brake.store(BRAKE, SeqCst);
        Job { work, db: ptr::null_mut(), impatience: 0, not_before: 0, in_the_way: None, last: 0, busy }
    }

    /// The WAL as a member has just opened it.
    pub fn take_wal(&mut self, wal: OwnedFd) {
        let inode = |fd: &OwnedFd| fstat(fd).ok().filter(|st| st.st_mode & libc::S_IFMT == libc::S_IFREG);
        let Some(new) = inode(&wal) else { return };
        if self.work.wal.borrow().as_ref().and_then(inode).is_none_or(|old| old.st_ino != new.st_ino) {
            self.close();
            self.work.wal.replace(Some(wal));
        }
    }

    pub fn checkpoint(&mut self) -> Outcome {
        if self.work.wal.borrow().is_none() || !self.work.begin() {
            return Outcome::Nothing;
        }
        // A member may be writing it just now: looked at again.
        let index = self.work.index();
        if !(0..LOOKS).any(|_| index.is_sane()) && !planted("any-index-read") {
            self.work.end();
            return Outcome::Nothing;
        }
        let copied = self.copy();
        self.work.end();
        // Unless readers stay in the way: no wait of a writer's would help.
        self.work.words().brake.store(if self.not_before == 0 { BRAKE } else { 0 }, SeqCst);
        let (frames, backfilled) = self.work.index().progress();
        if let Some(reason) = self.work.sync_failed.take() {
            return Outcome::SyncFailed(reason);
        }
        match (copied, self.work.refused.take()) {
            (_, Some(Refused::Reserved(bytes))) => Outcome::Unable(format!(
                "its pages have {bytes} reserved bytes, which may be a checksum or a cipher's"
            )),
            (_, Some(Refused::Short(reason))) => Outcome::Unable(reason),
            (_, Some(Refused::Stale)) => Outcome::Nothing,
            (Ok(()) | Err(ffi::SQLITE_INTERRUPT | ffi::SQLITE_BUSY | ffi::SQLITE_PROTOCOL), None) => {
                Outcome::Copied { frames, backfilled }
            }
            (Err(code), None) => {
                self.close();
                Outcome::Unable(format!("the broker's SQLite says: {}", describe(code)))
            }
        }
    }

    fn copy(&mut self) -> Result<(), Code> {
        let index = self.work.index();
        let behind = || {
            let (frames, backfilled) = index.progress();
            (frames, frames.saturating_sub(backfilled))
        };
        self.open()?;
        self.work.in_turn.set(false);
        self.run(ffi::SQLITE_CHECKPOINT_PASSIVE)?;
        if behind().0 < RESET_AT {
            return Ok(());
        }
        // What has been copied goes to the disk before anybody waits for it, and what has come meanwhile is copied, as
        // long as it becomes less.
        self.sync()?;
        let mut before = u32::MAX;
        for _ in 0..ROUNDS {
            let (frames, left) = behind();
            if left <= TAIL || left >= before || frames > LIMIT {
                break;
            }
            before = left;
            self.run(ffi::SQLITE_CHECKPOINT_PASSIVE)?;
        }
        let (frames, left) = behind();
        self.finish(frames, left)
    }

    fn sync(&self) -> Result<(), Code> {
        nix::unistd::fdatasync(&self.work.database).map_err(|e| {
            self.work.sync_failed.replace(Some(format!("it could not be synced ({e})")));
            ffi::SQLITE_IOERR_FSYNC
        })
    }

    /// The last frames, in a turn: nobody appends, and once the readers that still need the WAL are gone it is begun
    /// anew. They need not be kept out: as the WAL stands still, those that come meanwhile read its end, and, when all
    /// of it is in the database, do without it. So after two generations of them none is in the way.
    fn finish(&mut self, frames: u32, left: u32) -> Result<(), Code> {
        if frames < self.last {
            (self.not_before, self.in_the_way) = (0, None); // begun anew by a writer
        }
        self.last = frames;
        // Too early for another long wait; but nearly all of it is in the database: the reader that stayed is gone.
        let early = frames < self.not_before;
        if early && left > TAIL {
            return Ok(());
        }
        let step = if frames > LIMIT && !early { self.impatience.max(1) } else { 0 };
        let patience = if planted("readers-not-waited-for") { Duration::ZERO } else { PATIENCE[step] };
        self.busy.patience.set(patience);
        self.work.in_turn.set(true);
        // Not RESTART, which leaves the new beginning to the next writer: one that waits for its turn has chosen its
        // read slot, finds nothing changed, and appends. The file keeps its size ([`vfs`]): overwriting is cheaper.
        let done = self.run(match planted("wal-left-to-writers") {
            true => ffi::SQLITE_CHECKPOINT_RESTART,
            false => ffi::SQLITE_CHECKPOINT_TRUNCATE,
        });
        self.work.in_turn.set(false);
        if done.is_ok() {
            (self.impatience, self.not_before, self.in_the_way, self.last) =
                (step.saturating_sub(1), 0, None, 0);
            return done;
        }
        let in_the_way = self.work.oldest_snapshot();
        let stays = in_the_way.is_some() && in_the_way == self.in_the_way;
        self.in_the_way = in_the_way;
        if step + 1 < PATIENCE.len() {
            self.impatience += usize::from(frames > LIMIT && !early);
        } else {
            // Those that go and come may leave a gap at any time.
            self.not_before = if stays { frames + frames / 4 } else { 0 };
        }
        done
    }

    fn run(&self, mode: c_int) -> Result<(), Code> {
        // SAFETY: our own open connection.
        let code = unsafe {
            ffi::sqlite3_wal_checkpoint_v2(self.db, c"main".as_ptr(), mode, ptr::null_mut(), ptr::null_mut())
        };
        if code == ffi::SQLITE_OK { Ok(()) } else { Err(code & 0xff) }
    }

    /// Opens the connection, and by it the WAL, if it is not open.
    fn open(&mut self) -> Result<(), Code> {
        if !self.db.is_null() {
            return Ok(());
        }
        // Offset 20 of the database's header: bytes of each page that an extension uses.
        let mut reserved = [0u8];
        let read = nix::sys::uio::pread(&self.work.database, &mut reserved, 20);
        if read != Ok(1) || reserved[0] != 0 && !planted("reserved-bytes-copied") {
            self.work.refused.replace(Some(Refused::Reserved(reserved[0])));
            return Err(ffi::SQLITE_NOTADB);
        }
        let flags = ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_NOMUTEX;
        // SAFETY: the name is only a name; the VFS is registered; the busy handler's argument is boxed and lives as
        // long as the connection.
        let code = unsafe {
            let name = c"database";
            match ffi::sqlite3_open_v2(name.as_ptr(), &raw mut self.db, flags, vfs::NAME.as_ptr()) {
                ffi::SQLITE_OK => {
                    let argument = ptr::from_ref(&*self.busy).cast_mut().cast::<c_void>();
                    ffi::sqlite3_busy_handler(self.db, Some(wait), argument);
                    let read = c"PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=FULL; PRAGMA schema_version";
                    let out = ptr::null_mut();
                    ffi::sqlite3_exec(self.db, read.as_ptr(), None, ptr::null_mut(), out)
                }
                code => code,
            }
        };
        match code {
            ffi::SQLITE_OK => Ok(()),
            code => {
                self.close();
                Err(code & 0xff)
            }
        }
    }

    fn close(&mut self) {
        // SAFETY: our own connection, or null; nothing of it is in use.
        unsafe { ffi::sqlite3_close(std::mem::replace(&mut self.db, ptr::null_mut())) };
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.close();
    }
}

/// A reader is in the way.
unsafe extern "C" fn wait(argument: *mut c_void, _: c_int) -> c_int {
    // SAFETY: what `open` has given.
    let waiting = unsafe { &*argument.cast::<Waiting>() };
    let since = waiting.work.turn_since.get();
    let over = since.is_none_or(|since: Instant| since.elapsed() >= waiting.patience.get());
    if over || waiting.work.interrupted() {
        return 0;
    }
    std::thread::sleep(NAP);
    1
}

fn describe(code: Code) -> String {
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(ffi::sqlite3_errstr(code)) }.to_string_lossy().into_owned()
}
