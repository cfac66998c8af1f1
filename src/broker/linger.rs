//! Databases that nobody has open and that stay with the broker for a moment: the gate, the segment, the WAL.
//!
//! For short-lived processes the last close and the next open are most of what they do. So when a database that has just
//! been closed is opened again within the time that it may linger, its next last close only copies the WAL back
//! (`vfs/last_close.rs`), its seats may rest although none is in use, and the rest is done here, by the checkpointer, when
//! nobody has come for that long: the file is synced, the WAL emptied, the gate opened.
//!
//! A database that is closed once does not linger: who looks into it with a plain client then need not wait. Who does so
//! while it lingers is noticed when it opens the file (inotify(7)), and so is a file that is put in its place: the WAL is
//! found by name, and must not be there then.

use super::database::{Database, Identity, State};
use super::server::Server;
use crate::planted::planted;
use crate::segment::atomic::SeqCst;
use crate::segment::{futex, gate};
use crate::wire::message::SeatKey;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::stat::fstat;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// An open of a database that lingers is a member's if that has joined, or come and gone, within this time.
const MEMBER_COMES: Duration = Duration::from_millis(3);
/// A file that is open elsewhere for so long, whenever no seat is in use, is open in a plain client, which waits for a
/// moment when nobody is in, beside members that come and go all the time.
const STRANGER_WAITS: Duration = Duration::from_secs(1);
/// How long the database does not linger then.
const STRANGER_HAS: Duration = Duration::from_millis(500);
/// How often the checkpointer is asked to end it.
const TRIES: u32 = 3;
/// So many databases that have been closed are remembered.
const REMEMBERED: usize = 4096;

/// Epoll keys.
pub(super) const MOVES: u64 = u64::MAX;
pub(super) const OPENS: u64 = u64::MAX - 1;

/// What the broker knows of databases that linger, and of those that have been closed.
#[derive(Debug)]
pub struct Lingering {
    /// How long; zero: none does.
    time: Duration,
    closed: BTreeMap<Identity, Closed>,
    /// Tells of files that are renamed, replaced or removed, and of those that are opened, once.
    watches: Option<(Inotify, Inotify)>,
}

/// When a database was closed, and from when on it may linger again.
#[derive(Clone, Copy, Debug)]
struct Closed {
    at: Instant,
    not_before: Instant,
}

/// One database's.
#[derive(Debug, Default)]
pub struct Linger {
    /// It may; decided when it was opened.
    may: bool,
    /// Until when it does, if it does.
    until: Option<Instant>,
    /// The checkpointer has been asked to end it; it has answered.
    settling: bool,
    settled: bool,
    /// Tries to end it in vain.
    tries: u32,
    moves: Option<WatchDescriptor>,
    opens: Option<WatchDescriptor>,
    /// Since when somebody has had the file open whenever no seat was in use.
    stranger: Option<Instant>,
    pub stranger_waits: bool,
    /// Looked at then.
    opened: Option<(Instant, Cause)>,
}

/// Why a database may have to end lingering before its time.
#[derive(Clone, Copy, Debug)]
enum Cause {
    /// Somebody has opened the file; a member, if this is not when the last seat came to rest any more.
    Opened(u64),
    /// Whoever it was.
    Certain,
}

impl Lingering {
    pub fn new(time: Duration, epoll: &Epoll) -> Lingering {
        let watches = || -> nix::Result<(Inotify, Inotify)> {
            let init = || Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
            let (moves, opens) = (init()?, init()?);
            epoll.add(&moves, EpollEvent::new(EpollFlags::EPOLLIN, MOVES))?;
            epoll.add(&opens, EpollEvent::new(EpollFlags::EPOLLIN, OPENS))?;
            Ok((moves, opens))
        };
        let watches = if time.is_zero() {
            None
        } else {
            watches()
                .map_err(|e| {
                    tracing::warn!("no inotify ({e}): databases do not linger after their last close");
                })
                .ok()
        };
        Lingering { time, closed: BTreeMap::new(), watches }
    }

    /// A database has been closed. `stranger`: a plain client waits for it.
    pub fn closed(&mut self, identity: Identity, stranger: bool) {
        let now = Instant::now();
        if self.watches.is_none() {
            return;
        }
        if self.closed.len() >= REMEMBERED {
            self.closed.retain(|_, c| now.duration_since(c.at) < self.time);
        }
        let before = self.closed.get(&identity).map_or(now, |c| c.not_before);
        let not_before = if stranger { now + STRANGER_HAS } else { before };
        if self.closed.len() < REMEMBERED {
            self.closed.insert(identity, Closed { at: now, not_before });
        }
    }

    /// It is opened again, and soon.
    fn comes_back(&mut self, identity: Identity) -> bool {
        let Some(closed) = self.closed.get(&identity).copied() else { return false };
        if closed.not_before > Instant::now() {
            return false;
        }
        self.closed.remove(&identity);
        self.watches.is_some() && closed.at.elapsed() < self.time
    }
}

impl Database {
    /// Nobody has it open, and it stays for a while.
    pub fn lingers(&self) -> bool {
        self.linger.until.is_some() && self.nobody_has_it()
    }

    /// Its members have been told by another broker whether it may.
    pub(super) fn linger_as_before(&mut self) {
        self.linger.may = self.checkpoint_words().is_some_and(|w| w.may_linger.load(SeqCst) != 0);
    }

    fn nobody_has_it(&self) -> bool {
        self.seats.keys().all(|s| self.rests(*s))
    }

    /// All of its WAL is in the file.
    pub(super) fn is_complete(&self) -> bool {
        match (&self.state, self.checkpoint_words()) {
            (State::Gated { segment, .. }, Some(words)) => {
                self.table().is_complete(words, segment.wal_index())
            }
            _ => false,
        }
    }

    /// Somebody else has written to the file since its last close. Asked when all of its WAL is in it.
    pub(super) fn is_changed(&self) -> bool {
        let (State::Gated { gate, .. }, Some(words)) = (&self.state, self.checkpoint_words()) else {
            return false;
        };
        fstat(gate.database()).is_ok_and(|st| !words.is_as_left(&st))
    }
}

impl Server {
    /// A database has been opened.
    pub(super) fn offer_linger(&mut self, number: u32) {
        let Some(db) = self.databases.get_mut(&number) else { return };
        if self.lingering.comes_back(db.identity)
            && let Some(words) = db.checkpoint_words().filter(|w| w.duty.load(SeqCst) != 0)
        {
            words.may_linger.store(1, SeqCst);
            db.linger.may = true;
        }
    }

    /// Nobody has it open: whether it stays for a while.
    pub(super) fn stays(&mut self, number: u32) -> bool {
        let stopping = self.stopping.is_some();
        let Some(db) = self.databases.get_mut(&number) else { return false };
        if db.linger.settling {
            return true;
        }
        if db.lingers() {
            return true;
        }
        db.linger.until = None;
        let Some(words) = db.checkpoint_words().filter(|_| db.linger.may) else { return false };
        // One that comes back and rests again after this look says so again.
        let all_rest = db.table().all_rest(&words.told, db.seats.keys().copied()) && db.nobody_has_it();
        let served = db.checkpoints.has_wal() && words.duty.load(SeqCst) != 0;
        if db.linger.settled || !all_rest || !served || !db.is_complete() {
            return false;
        }
        words.told.store(1, SeqCst);
        let time = if stopping { Duration::ZERO } else { self.lingering.time };
        db.linger.until = Some(Instant::now() + time);
        tracing::debug!(database = number, "lingers");
        self.watch_file(number)
    }

    /// False: it cannot be watched.
    fn watch_file(&mut self, number: u32) -> bool {
        let (Some((moves, opens)), Some(db)) = (&self.lingering.watches, self.databases.get_mut(&number))
        else {
            return false;
        };
        let State::Gated { gate, .. } = &db.state else { return false };
        // By the descriptor: the name may lead elsewhere by now.
        let path = format!("/proc/self/fd/{}", gate.database().as_raw_fd());
        if db.linger.moves.is_none() {
            let changes = AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_MOVE_SELF;
            match moves.add_watch(path.as_str(), changes) {
                Ok(watch) => db.linger.moves = Some(watch),
                Err(e) => {
                    tracing::debug!(database = number, "cannot be watched ({e}): does not linger");
                    db.linger.may = false;
                    db.linger.until = None;
                    if let Some(words) = db.checkpoint_words() {
                        words.may_linger.store(0, SeqCst);
                    }
                    return false;
                }
            }
        }
        let opened = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ONESHOT;
        db.linger.opens = opens.add_watch(path.as_str(), opened).ok();
        // Whoever opened it before it was watched for.
        let now = Instant::now();
        if gate::is_open_elsewhere(gate.database()) != Some(true) {
            db.linger.stranger = None;
        } else if !db.nobody_has_it() {
            // A member's that has come at this very moment, perhaps.
        } else if now.duration_since(*db.linger.stranger.get_or_insert(now)) >= STRANGER_WAITS {
            // Its members close it as SQLite does, for a while: the gate is open whenever nobody is in.
            db.linger.stranger_waits = true;
            db.linger.may = false;
            if let Some(words) = db.checkpoint_words() {
                words.may_linger.store(0, SeqCst);
            }
            db.linger.opened = Some((now, Cause::Certain));
        } else {
            let rested = db.checkpoint_words().map_or(0, |w| w.rested_at.load(SeqCst));
            db.linger.opened = Some((now + MEMBER_COMES, Cause::Opened(rested)));
        }
        true
    }

    /// The database has been dropped.
    pub(super) fn unwatch(&mut self, linger: &Linger) {
        if let Some((moves, opens)) = &self.lingering.watches {
            // One that has spoken once is gone already.
            let _ = linger.moves.map(|watch| moves.rm_watch(watch));
            let _ = linger.opens.map(|watch| opens.rm_watch(watch));
        }
    }

    /// A file that is watched was renamed, replaced, removed, or opened.
    pub(super) fn file_event(&mut self, key: u64) {
        let Some((moves, opens)) = &self.lingering.watches else { return };
        let which = if key == MOVES { moves } else { opens };
        let now = Instant::now();
        while let Ok(events) = which.read_events() {
            for event in events {
                let of = |d: &&mut Database| {
                    let watch = if key == MOVES { d.linger.moves } else { d.linger.opens };
                    watch == Some(event.wd) && d.linger.until.is_some()
                };
                let Some(db) = self.databases.values_mut().find(of) else { continue };
                if key == OPENS && !event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    let rested = db.checkpoint_words().map_or(0, |w| w.rested_at.load(SeqCst));
                    db.linger.opened = Some((now + MEMBER_COMES, Cause::Opened(rested)));
                } else if key == MOVES && !planted("replaced-file-lingers") {
                    db.linger.until = Some(now);
                    db.linger.opened = Some((now, Cause::Certain));
                }
            }
        }
    }

    /// When something of this is due.
    pub(super) fn next_linger(&self) -> Option<Instant> {
        let lingers = self.databases.values().filter(|d| !d.linger.settling).map(|d| &d.linger);
        lingers.filter_map(|l| [l.until, l.opened.map(|(at, _)| at)].into_iter().flatten().min()).min()
    }

    /// Ends what has lingered for long enough, or is in somebody's way.
    pub(super) fn end_lingers(&mut self, now: Instant) {
        let due = |d: &Database| {
            let l = &d.linger;
            !l.settling && (l.until.is_some_and(|t| t <= now) || l.opened.is_some_and(|(t, _)| t <= now))
        };
        let numbers: Vec<u32> = self.databases.iter().filter(|(_, d)| due(d)).map(|(n, _)| *n).collect();
        for number in numbers {
            self.end_linger(number, now);
        }
    }

    fn end_linger(&mut self, number: u32, now: Instant) {
        let time = if self.stopping.is_some() { Duration::ZERO } else { self.lingering.time };
        let Some(db) = self.databases.get_mut(&number) else { return };
        let opened = db.linger.opened.take_if(|(at, _)| *at <= now);
        let Some(words) = db.checkpoint_words() else { return };
        let rested = words.rested_at.load(SeqCst);
        if !db.table().all_rest(&words.told, db.seats.keys().copied()) || !db.nobody_has_it() {
            db.linger.until = None;
            return;
        }
        let rested_for = Duration::from_micros(futex::micros().saturating_sub(rested));
        let wanted = match opened {
            Some((_, Cause::Certain)) => true,
            Some((_, Cause::Opened(before))) => before == rested,
            None => time <= rested_for || db.seats.is_empty(),
        };
        if !wanted {
            words.told.store(1, SeqCst);
            if opened.is_none() {
                db.linger.until = Some(now + time.saturating_sub(rested_for));
            }
            self.watch_file(number);
            return;
        }
        for seat in db.close_all_resting() {
            self.clear_seat(SeatKey { database: number, seat });
        }
        let Some(db) = self.databases.get_mut(&number) else { return };
        db.linger.until = None;
        if db.seats.is_empty() {
            db.linger.settling = true;
            self.settle(number);
        }
    }

    /// The checkpointer has done it, or could not: somebody was in its way, or it died.
    pub(super) fn settled(&mut self, number: u32, done: bool) {
        if let Some(db) = self.databases.get_mut(&number)
            && std::mem::take(&mut db.linger.settling)
        {
            db.linger.tries = if done { 0 } else { db.linger.tries + 1 };
            // Who has come meanwhile makes it linger another time.
            db.linger.settled = db.seats.is_empty() && (done || db.linger.tries >= TRIES);
            if db.linger.settled && !done {
                tracing::warn!(database = number, "closed without emptying its WAL, which is complete");
            }
        }
    }

    /// The broker stops.
    pub(super) fn end_all_lingers(&mut self) {
        let now = Instant::now();
        for db in self.databases.values_mut().filter(|d| d.linger.until.is_some()) {
            db.linger.opened = Some((now, Cause::Certain));
        }
    }

    /// A file is joined under a name that another file had, which lingers: its WAL, which is found by that name, goes first.
    pub(super) fn name_is_taken(&mut self, home: &super::database::Home, identity: Identity) -> bool {
        let other = |d: &Database| {
            d.identity != identity && d.home.as_ref() == Some(home) && (d.lingers() || d.linger.settling)
        };
        let Some(number) = self.databases.iter().find(|(_, d)| other(d)).map(|(n, _)| *n) else {
            return false;
        };
        if let Some(db) = self.databases.get_mut(&number).filter(|d| !d.linger.settling) {
            let now = Instant::now();
            db.linger.opened = Some((now, Cause::Certain));
            self.end_linger(number, now);
        }
        true
    }
}
