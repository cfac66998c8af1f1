//! `turnstile backup DB FILE`: a consistent copy of a database that others write meanwhile, complete under its name or not
//! there at all.
//!
//! * [`source`]: the database, as a member reads it, and one snapshot of it. [`copy`]: its pages, one by one.
//!   [`pace`]: how fast, beside others. [`target`]: the file that is made, and what may not be replaced by it.
//! * [`verify`]: whether the copy is a sound database. [`progress`]: what is shown meanwhile.
//!
//! One thread works. The main thread waits for signals, and closes what must not be closed at the lowest priority.

mod copy;
mod pace;
mod progress;
mod source;
mod target;
mod verify;

use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rusqlite::{Connection, InterruptHandle};
use serde::Serialize;
use turnstile::planted::planted;

use super::processes::{Signals, Stop};
use progress::Progress;
use source::Source;
use target::Target;

/// A WAL that grew by more than this meanwhile is worth a word.
const MUCH_WAL: u64 = 64 << 20;

/// How long a signal waits for the copy to clean up, and how often what runs is interrupted meanwhile.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(50);

const AFTER_HELP: &str = "\
The copy is the database as it was at one moment, with every commit that had returned before. Others read and write
meanwhile; in WAL mode nobody waits for the copy. (With a rollback journal writers wait until it is made.)
FILE has its name when the copy is complete and on the disk. Until then, and whatever happens, there is no such file, or
the old one.

  turnstile backup app.db /backup/app.db
  turnstile backup --verify --force app.db /backup/app.db      checked, and in the place of the last one

Owner and permissions are the database's, as far as this user may give them, and never wider. To put a copy back:
docs/backup.md.

Exit status: 0 if FILE is complete and on the disk; 1 if there is no new FILE, and standard error says why; 2 for wrong
arguments; 3 if --verify found the copy damaged (no new FILE); 128 and the signal's number if a signal stopped it.";

/// Arguments of `turnstile backup`.
#[derive(clap::Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct BackupArgs {
    /// The database
    database: PathBuf,
    /// The copy to be made
    file: PathBuf,
    /// Replace FILE if it is there. A database that is in use is never replaced.
    #[arg(long)]
    force: bool,
    /// Check the copy (PRAGMA integrity_check) before it gets its name
    #[arg(long)]
    verify: bool,
    /// Do not spare others: copy as fast as the disk can, also while they commit
    #[arg(long)]
    fast: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Failed(String),
    /// Found by --verify.
    #[error("{0}")]
    Damaged(String),
    /// By a signal.
    #[error("stopped by {}: no copy was made", .0.as_str())]
    Stopped(Signal),
}

impl Failure {
    /// For `map_err`: what was being done, and what the system said.
    fn doing<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Failure {
        move |e| Failure::Failed(format!("{what}: {e}"))
    }

    fn status(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::Damaged(_) => 3,
            Failure::Stopped(signal) => 128 + *signal as u8,
        }
    }
}

impl From<Stop> for Failure {
    fn from(stop: Stop) -> Failure {
        match stop {
            Stop::Signal(signal) => Failure::Stopped(signal),
            Stop::Failed(why) => Failure::Failed(why),
        }
    }
}

/// What was done.
#[derive(Debug, Serialize)]
struct Done {
    database: PathBuf,
    file: PathBuf,
    pages: u32,
    page_size: u32,
    bytes: u64,
    seconds: f64,
    /// How turnstile served the reading: `gated`, `guest`, `plain`.
    mode: String,
    journal: String,
    /// By how many bytes the WAL's file grew meanwhile.
    wal_grew: u64,
    verified: bool,
}

pub fn run(args: BackupArgs) -> ExitCode {
    let began = Instant::now();
    match backup(&args, began) {
        Ok(done) => {
            tell(&done, args.json);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let _ = writeln!(io::stderr(), "turnstile backup: {failure}");
            ExitCode::from(failure.status())
        }
    }
}

fn tell(done: &Done, json: bool) {
    if done.wal_grew > MUCH_WAL {
        let _ = writeln!(
            io::stderr(),
            "turnstile backup: the WAL grew by {} MiB meanwhile: it is not begun anew while a copy is read. It shrinks \
             with PRAGMA wal_checkpoint(TRUNCATE), or is used again as it is",
            done.wal_grew >> 20
        );
    }
    let text = match json {
        true => serde_json::to_string_pretty(done).unwrap_or_default(),
        false => format!(
            "{}: {} pages of {} bytes in {:.1} s{}",
            done.file.display(),
            done.pages,
            done.page_size,
            done.seconds,
            if done.verified { ", verified" } else { "" }
        ),
    };
    let _ = writeln!(io::stdout(), "{text}");
}

/// What the working thread hands to the main one.
enum Event {
    /// A connection that a signal is to interrupt.
    Opened(InterruptHandle),
    /// A connection to be closed: the last one of a database checkpoints it, and others wait for that.
    Close(Connection),
}

/// The working thread's side of it.
struct Main {
    events: Sender<Event>,
    bell: PipeWriter,
    /// The signal that has come; 0: none.
    signal: Arc<AtomicI32>,
}

impl Main {
    fn tell(&mut self, event: Event) {
        let _ = self.events.send(event);
        let _ = self.bell.write_all(&[0]);
    }

    /// An error, once a signal has come.
    fn go_on(&self) -> Result<(), Failure> {
        match Signal::try_from(self.signal.load(Ordering::Relaxed)) {
            Ok(signal) => Err(Failure::Stopped(signal)),
            Err(_) => Ok(()),
        }
    }
}

fn backup(args: &BackupArgs, began: Instant) -> Result<Done, Failure> {
    let signals = Signals::take()?;
    source::keep_reasons();
    if !planted("backup-takes-its-turn") {
        // Whatever others want or have been learned to: this transaction only reads, and keeps no writer waiting.
        // SAFETY: there is no other thread yet.
        unsafe { std::env::set_var("TURNSTILE_BEGIN", "deferred") };
    }
    let (events, told) = channel();
    let (mut heard, bell) = io::pipe().map_err(Failure::doing("cannot make a pipe"))?;
    let signal = Arc::new(AtomicI32::new(0));
    let mut main = Main { events, bell, signal: Arc::clone(&signal) };
    let (database, file) = (args.database.clone(), args.file.clone());
    let how = How { force: args.force, verify: args.verify, fast: args.fast };
    let work = move || make(&mut main, &database, &file, how, began);
    let thread = thread::Builder::new().name("backup".into()).spawn(work);
    let thread = thread.map_err(Failure::doing("cannot start a thread"))?;

    let mut interrupts = Vec::new();
    let mut stopped: Option<(Signal, Instant)> = None;
    // The thread's end of the pipe is closed with it.
    while !heard_end(&mut heard, &told, &mut interrupts) {
        let until = Instant::now() + if stopped.is_some() { AGAIN } else { Duration::from_secs(3600) };
        if let Err(Stop::Signal(by)) = signals.wait(until, Some(heard.as_fd())) {
            signal.store(by as i32, Ordering::Relaxed);
            stopped.get_or_insert((by, Instant::now()));
        }
        if let Some((by, since)) = stopped {
            // What began to run after the last interrupt is to end, too.
            interrupts.iter().for_each(InterruptHandle::interrupt);
            if since.elapsed() > PATIENCE {
                return Err(Failure::Stopped(by));
            }
        }
    }
    let result =
        thread.join().unwrap_or_else(|_| Err(Failure::Failed("a bug: the copying thread panicked".into())));
    match (result, stopped) {
        // An interrupt is an error of SQLite's.
        (Err(_), Some((by, _))) => Err(Failure::Stopped(by)),
        (result, _) => result,
    }
}

/// Takes what the working thread has said; whether it has closed its end of the pipe.
fn heard_end(
    heard: &mut io::PipeReader,
    told: &Receiver<Event>,
    interrupts: &mut Vec<InterruptHandle>,
) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(heard.as_fd(), PollFlags::POLLIN)];
    let ended = match poll(&mut fds, PollTimeout::ZERO) {
        Ok(n) if n > 0 => matches!(heard.read(&mut [0; 16]), Ok(0)),
        _ => false,
    };
    while let Ok(event) = told.try_recv() {
        match event {
            Event::Opened(handle) => interrupts.push(handle),
            Event::Close(connection) => drop(connection),
        }
    }
    ended
}

#[derive(Clone, Copy)]
struct How {
    force: bool,
    verify: bool,
    fast: bool,
}

/// The working thread.
fn make(main: &mut Main, database: &Path, file: &Path, how: How, began: Instant) -> Result<Done, Failure> {
    let mut source = Source::open(database)?;
    main.tell(Event::Opened(source.interrupt_handle()));
    let made = make_from(main, &source, file, how);
    main.tell(Event::Close(source.take()));
    let (target, mut done) = made?;
    if how.verify {
        main.go_on()?;
        verify::verify(main, &target, file)?;
        done.verified = true;
    }
    main.go_on()?;
    target.publish(how.force)?;
    done.seconds = began.elapsed().as_secs_f64();
    Ok(done)
}

/// The copy, complete and on the disk, and without a name.
fn make_from(main: &Main, source: &Source, file: &Path, how: How) -> Result<(Target, Done), Failure> {
    let target = Target::make(file, source.path(), how.force)?;
    let snapshot = source.snapshot(&|| main.go_on())?;
    let (pages, page_size) = (snapshot.pages(), snapshot.page_size());
    let bytes = u64::from(pages) * u64::from(page_size);
    target.make_room(bytes)?;
    let wal_before = snapshot.wal_length();
    let pace = if how.fast { None } else { Some(pace::Pace::take()) };
    let progress = Progress::new(bytes, file);
    copy::copy(&snapshot, &target, pace, &progress, &|| main.go_on())?;
    progress.end();
    let done = Done {
        database: source.path().to_owned(),
        file: file.to_owned(),
        pages,
        page_size,
        bytes,
        seconds: 0.0,
        mode: source.mode(),
        journal: snapshot.journal().to_owned(),
        wal_grew: snapshot.wal_length().saturating_sub(wal_before),
        verified: false,
    };
    drop(snapshot);
    target.finish(bytes)?;
    Ok((target, done))
}
