//! The database that is copied: a member's connection, and a snapshot that is read page by page through SQLite's own
//! files, so that whatever a member checks after a read is checked here, too (the gate, what is durable).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rusqlite::{Connection, InterruptHandle, OpenFlags, ffi};
use turnstile::planted::planted;
use turnstile::segment::layout::REGION_SIZE;
use turnstile::segment::wal_index::{FRAME_HEADER, Header, WAL_HEADER, WalIndex};

use super::{Failure, verify};
use crate::cli::linked;

/// Of plain SQLite's waits, in guest mode or without a broker. Members wait as `TURNSTILE_WAIT` says.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a moment between two commits is looked for: it takes some microseconds.
const MOMENT: Duration = Duration::from_secs(10);

/// What turnstile has said last to SQLite's error log: the reason behind a result code.
static REASON: Mutex<Option<String>> = Mutex::new(None);

/// From now on SQLite's error log is listened to. To be called before SQLite is used.
pub fn keep_reasons() {
    unsafe extern "C" fn hear(_: *mut c_void, _: c_int, text: *const c_char) {
        // SAFETY: SQLite passes a string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        if let (Some(reason), Ok(mut last)) = (text.strip_prefix("turnstile: "), REASON.lock()) {
            *last = Some(reason.to_owned());
        }
    }
    let hear: unsafe extern "C" fn(*mut c_void, c_int, *const c_char) = hear;
    // SAFETY: as sqlite3.h says of this option: a function and its first argument. SQLite is not initialised yet.
    unsafe { ffi::sqlite3_config(ffi::SQLITE_CONFIG_LOG, hear, ptr::null_mut::<c_void>()) };
}

/// A connection, as any member has it.
pub struct Source {
    db: Option<Connection>,
    path: PathBuf,
}

impl Source {
    pub fn open(path: &Path) -> Result<Source, Failure> {
        let name = path.display();
        let is_uri = path.as_os_str().as_encoded_bytes().starts_with(b"file:");
        if !is_uri {
            let unopened = || Failure::doing(format!("{name} cannot be opened"));
            if !path.metadata().map_err(unopened())?.is_file() {
                return Err(Failure::Failed(format!("{name} is no file: a database is meant")));
            }
            // SQLite would not say why. (It has no lock on the file yet that closing it here could drop.)
            std::fs::File::open(path).map_err(unopened())?;
        }
        verify::register().map_err(Failure::doing("SQLite"))?;
        linked::register().map_err(Failure::Failed)?;
        // For writing where that is allowed: a hot journal or a WAL that a dead writer left has to be played back.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI;
        let db = Connection::open_with_flags(path, flags).map_err(|e| told(path, &e))?;
        db.busy_timeout(BUSY_TIMEOUT).map_err(|e| told(path, &e))?;
        db.pragma_update(None, "mmap_size", 0).map_err(|e| told(path, &e))?;
        let full = db.path().filter(|full| !full.is_empty()).map(PathBuf::from);
        let full = full.ok_or_else(|| Failure::Failed(format!("{name} is no file: a database is meant")))?;
        Ok(Source { db: Some(db), path: full })
    }

    fn db(&self) -> &Connection {
        self.db.as_ref().expect("a connection, until it is taken")
    }

    /// Its name, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn interrupt_handle(&self) -> InterruptHandle {
        self.db().get_interrupt_handle()
    }

    /// `gated`, `guest` or `plain`.
    pub fn mode(&self) -> String {
        linked::mode(self.db()).ok().flatten().unwrap_or_else(|| "plain".into())
    }

    /// The connection, for somebody else to close.
    pub fn take(&mut self) -> Connection {
        self.db.take().expect("a connection, until it is taken")
    }

    fn failure(&self, e: &rusqlite::Error) -> Failure {
        told(&self.path, e)
    }

    /// Begins a read transaction, and finds out which one.
    ///
    /// `go_on` says whether a signal has come.
    pub fn snapshot(&self, go_on: &dyn Fn() -> Result<(), Failure>) -> Result<Snapshot<'_>, Failure> {
        let failure = |e: rusqlite::Error| self.failure(&e);
        let db = self.db();
        // By a first read the journal mode is known, and of a WAL the index mapped.
        db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())).map_err(failure)?;
        let journal: String =
            db.pragma_query_value(None, "journal_mode", |row| row.get(0)).map_err(failure)?;
        let main = File::of(db, ffi::SQLITE_FCNTL_FILE_POINTER)?;
        let (wal, index) = match journal.as_str() {
            "wal" => (Some(File::of(db, ffi::SQLITE_FCNTL_JOURNAL_POINTER)?), Some(main.index()?)),
            _ => (None, None),
        };
        let began = Instant::now();
        loop {
            let before = index.and_then(|index| index.valid_header());
            if let (true, Some(index)) = (planted("backup-header-of-before"), index) {
                let salts = || index.valid_header().map(|header| header.salts());
                while salts() == before.map(|header| header.salts()) && began.elapsed() < MOMENT {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            db.execute_batch("BEGIN").map_err(failure)?;
            let read = || {
                db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
                let pages: u32 = db.pragma_query_value(None, "page_count", |row| row.get(0))?;
                let page_size: u32 = db.pragma_query_value(None, "page_size", |row| row.get(0))?;
                db.pragma_query_value(None, "journal_mode", |row| {
                    Ok((pages, page_size, row.get::<_, String>(0)?))
                })
            };
            let (pages, page_size, now) = read().map_err(failure)?;
            let Some(index) = index else {
                if now == journal {
                    return Ok(Snapshot { db, main, wal: None, pages, page_size, journal });
                }
                // Somebody has put it into WAL mode since the first look.
                return Err(Failure::Failed(format!(
                    "{}: its journal mode has just changed: try again",
                    self.path.display()
                )));
            };
            // How much is in the file is asked first: if it is less than the WAL has, the transaction needs the WAL, and
            // nobody begins it anew. A header that is the same before and behind is the transaction's.
            let (_, in_file) = index.progress();
            let behind = index.valid_header();
            if let (Some(header), Some(file)) =
                (before.filter(|_| before == behind || planted("backup-header-of-before")), wal)
            {
                let frames = if in_file >= header.frames() { None } else { Some(header) };
                if planted("backup-not-one-snapshot") {
                    db.execute_batch("COMMIT").map_err(failure)?;
                }
                let wal = Some(Wal { file, index, header, frames });
                return Ok(Snapshot { db, main, wal, pages, page_size, journal });
            }
            db.execute_batch("COMMIT").map_err(failure)?;
            go_on()?;
            if began.elapsed() > MOMENT {
                let what = "found no moment between two commits";
                return Err(Failure::Failed(format!("{}: {what}", self.path.display())));
            }
        }
    }
}

/// What SQLite says, with the reason that turnstile has given for it.
fn told(path: &Path, e: &rusqlite::Error) -> Failure {
    let name = path.display();
    let reason = REASON.lock().ok().and_then(|mut reason| reason.take());
    let code = e.sqlite_error_code();
    let what = match (reason, code) {
        (_, Some(rusqlite::ErrorCode::NotADatabase)) => format!(
            "{name} does not begin as a database of SQLite's does: it is encrypted, or something else. An encrypted one can \
             only be backed up by a program that has its key"
        ),
        (Some(reason), _) if e.to_string().contains(&reason) => format!("{name}: {reason}"),
        (Some(reason), _) => format!("{name}: {e}: {reason}"),
        (None, Some(rusqlite::ErrorCode::DatabaseBusy)) => {
            format!("{name}: {e}. `turnstile doctor {name}` says who has it")
        }
        (None, _) => format!("{name}: {e}"),
    };
    Failure::Failed(what)
}

/// A file that SQLite has open.
#[derive(Clone, Copy)]
pub struct File(*mut ffi::sqlite3_file);

impl File {
    fn of(db: &Connection, which: c_int) -> Result<File, Failure> {
        let mut file = ptr::null_mut::<ffi::sqlite3_file>();
        // SAFETY: with these operations the argument is the address of a pointer (sqlite3.h).
        let rc = unsafe {
            ffi::sqlite3_file_control(db.handle(), c"main".as_ptr(), which, (&raw mut file).cast())
        };
        // SAFETY: SQLite's own file, while the connection is open.
        let open =
            rc == ffi::SQLITE_OK && unsafe { file.as_ref() }.is_some_and(|file| !file.pMethods.is_null());
        if open {
            Ok(File(file))
        } else {
            Err(Failure::Failed(format!("SQLite does not show its file ({rc})")))
        }
    }

    fn methods(&self) -> &ffi::sqlite3_io_methods {
        // SAFETY: looked at in `of`; SQLite keeps it while the file is open.
        unsafe { &*(*self.0).pMethods }
    }

    /// Reads as SQLite does; whether the file had all of it. What it had not is zeros.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<bool, Failure> {
        let read = self.methods().xRead.expect("every file can be read");
        // SAFETY: a buffer of this many bytes.
        match unsafe { read(self.0, bytes.as_mut_ptr().cast(), bytes.len() as c_int, offset as i64) } {
            ffi::SQLITE_OK => Ok(true),
            ffi::SQLITE_IOERR_SHORT_READ => Ok(false),
            code => {
                let said = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
                let reason = REASON.lock().ok().and_then(|mut reason| reason.take());
                let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
                Err(Failure::Failed(format!("the database cannot be read on: {said}{reason}")))
            }
        }
    }

    fn length(&self) -> Option<u64> {
        let mut length = 0;
        // SAFETY: a place for the answer.
        let rc = unsafe { self.methods().xFileSize?(self.0, &mut length) };
        (rc == ffi::SQLITE_OK).then_some(length as u64)
    }

    /// The wal-index's first region, which SQLite has mapped.
    fn index(&self) -> Result<WalIndex, Failure> {
        let mut region = ptr::null_mut::<c_void>();
        let map = self.methods().xShmMap;
        // SAFETY: a place for the address; no region is made.
        let rc = map
            .map_or(ffi::SQLITE_IOERR, |map| unsafe { map(self.0, 0, REGION_SIZE as c_int, 0, &mut region) });
        if region.is_null() || !matches!(rc, ffi::SQLITE_OK | ffi::SQLITE_READONLY) {
            return Err(Failure::Failed(
                "this user may only read the database, and nobody who may write it has it open: its WAL has no index. Back it \
                 up as a user who may write it"
                    .into(),
            ));
        }
        // SAFETY: mapped until the connection is closed, and a region is aligned to a page.
        Ok(unsafe { WalIndex::new(region.cast()) })
    }
}

struct Wal {
    file: File,
    index: WalIndex,
    /// The index's header of the snapshot.
    header: Header,
    /// `None`: all that the snapshot has of the WAL was in the file when it began. Then it does not keep the WAL from being
    /// begun anew.
    frames: Option<Header>,
}

/// A read transaction, until it is dropped.
pub struct Snapshot<'a> {
    db: &'a Connection,
    main: File,
    wal: Option<Wal>,
    pages: u32,
    page_size: u32,
    journal: String,
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        let _ = self.db.execute_batch("COMMIT");
    }
}

impl Snapshot<'_> {
    pub fn pages(&self) -> u32 {
        self.pages
    }

    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    pub fn journal(&self) -> &str {
        &self.journal
    }

    /// The file's bytes as they are now. A page that is in [`Self::frames`] may be torn, or older, or newer than that frame (but
    /// never newer than the snapshot); every other page is the snapshot's.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<bool, Failure> {
        self.main.read(bytes, offset)
    }

    /// The frames that the snapshot has in the WAL.
    pub fn frames(&self) -> Option<Frames<'_>> {
        let wal = self.wal.as_ref()?;
        Some(Frames {
            file: wal.file,
            header: wal.frames?,
            page_size: self.page_size as usize,
            snapshot: PhantomData,
        })
    }

    pub fn wal_length(&self) -> u64 {
        self.wal.as_ref().and_then(|wal| wal.file.length()).unwrap_or(0)
    }

    /// Changes with every commit of others.
    pub fn commits(&self) -> Option<Header> {
        self.wal.as_ref().map(|wal| wal.index.valid_header().unwrap_or(wal.header))
    }
}

/// The WAL's frames up to the snapshot's end, which stay as they are while it lasts.
pub struct Frames<'a> {
    file: File,
    header: Header,
    page_size: usize,
    snapshot: PhantomData<&'a ()>,
}

impl Frames<'_> {
    pub fn count(&self) -> u32 {
        self.header.frames()
    }

    fn at(&self, frame: u32) -> u64 {
        WAL_HEADER + u64::from(frame - 1) * (FRAME_HEADER + self.page_size as u64)
    }

    /// The page that is in this frame; they count from 1.
    pub fn page_of(&self, frame: u32) -> Result<u32, Failure> {
        let mut bytes = [0; FRAME_HEADER as usize];
        let whole = self.file.read(&mut bytes, self.at(frame))?;
        // Its salts are its generation's. Others' would mean that the WAL has been begun anew under this snapshot.
        if !whole || bytes[8..16] != self.header.salts() && !planted("backup-header-of-before") {
            return Err(Failure::Failed("the WAL has changed under the copy".into()));
        }
        let [a, b, c, d, ..] = bytes;
        Ok(u32::from_be_bytes([a, b, c, d]))
    }

    /// The WAL is still the snapshot's.
    pub fn stand(&self) -> Result<(), Failure> {
        if self.count() > 0 { self.page_of(1).map(drop) } else { Ok(()) }
    }

    pub fn read(&self, frame: u32, page: &mut [u8]) -> Result<(), Failure> {
        match self.file.read(page, self.at(frame) + FRAME_HEADER)? {
            true => Ok(()),
            false => Err(Failure::Failed("the WAL is shorter than its index says".into())),
        }
    }
}
