//! The status report: databases, modes, members, who has the turn and for how long, the line.

use super::database::{Database, State};
use super::limits::Limits;
use super::server::Server;
use super::session::Session;
use crate::lock::seat::WaitsFor;
use crate::segment::atomic::SeqCst;
use crate::segment::futex;
use crate::segment::layout::CHECKPOINTER;
use crate::wire::MAX_PACKET;
use crate::wire::message::{FromBroker, Role};
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::UNIX_EPOCH;

#[derive(Serialize)]
struct Report {
    broker: BrokerReport,
    databases: Vec<DatabaseReport>,
}

#[derive(Serialize)]
struct BrokerReport {
    pid: u32,
    version: &'static str,
    socket: String,
    uptime_seconds: u64,
    sessions: usize,
    /// What one user may have.
    limits: Limits,
    /// Who has what of it: the asker, or, for the broker's user and root, everybody.
    users: Vec<UserReport>,
    /// The process that checkpoints, once there is something to checkpoint.
    checkpointer: Option<u32>,
    /// The process that keeps what the next broker would need, once there is something to keep.
    keeper: Option<i32>,
    /// How often the waiting requests of a database were looked at again: as often as something happens in one, and not the
    /// more the more databases there are.
    settled: u64,
}

#[derive(Serialize)]
struct UserReport {
    uid: u32,
    sessions: usize,
    /// That it was the first to open.
    databases: usize,
    descriptors: usize,
    /// Processes that what it has sent keeps from ending.
    stuck: usize,
}

#[derive(Serialize)]
struct DatabaseReport {
    name: Option<String>,
    device: u64,
    inode: u64,
    mode: &'static str,
    reason: Option<String>,
    members: Vec<MemberReport>,
    /// Seats without a connection, which their processes keep for the next one. They keep nobody out.
    resting: Vec<MemberReport>,
    turn: Option<TurnReport>,
    line: Vec<WaitReport>,
    /// What the WAL has, as its index says; `None`: in guest mode, where the index is not the broker's to look at.
    wal: Option<WalReport>,
    /// Open read transactions of members, those first that hold most of the WAL back. `None`: in guest mode, where they are
    /// the kernel's locks. Those of plain clients are never among them.
    reads: Option<Vec<ReadReport>>,
    checkpoints: CheckpointReport,
    turns_revoked: u64,
    deadlocks: u64,
    /// How often the line for the turn was found standing still: never, if turnstile has no bug.
    lines_stuck: u32,
    /// How often the first in the line did not come for its turn and was put behind the others.
    passed_over: u32,
}

#[derive(Serialize)]
struct CheckpointReport {
    /// "broker", or "members" where the broker cannot.
    by: &'static str,
    reason: Option<String>,
    /// Checkpoints of the broker's that have copied something.
    done: u64,
    running: bool,
}

#[derive(Serialize)]
struct MemberReport {
    seat: u32,
    pid: i32,
    program: String,
    uid: u32,
    container: Option<String>,
    role: &'static str,
    /// How its lock requests travel: "fast" or "socket".
    lane: &'static str,
    sqlite: String,
    /// Seconds since 1970.
    since: u64,
}

#[derive(Serialize)]
struct TurnReport {
    seat: u32,
    pid: i32,
    program: String,
    held_ms: u64,
}

#[derive(Serialize)]
struct WalReport {
    frames: u32,
    /// How many of them are in the database.
    copied: u32,
}

#[derive(Serialize)]
struct ReadReport {
    seat: u32,
    pid: i32,
    program: String,
    /// Since when, as the member says; `None`: it has not said.
    open_seconds: Option<u64>,
    /// Frames behind its snapshot, which no checkpoint copies before it ends.
    frames_held_back: u32,
}

#[derive(Serialize)]
struct WaitReport {
    seat: u32,
    pid: i32,
    program: String,
    waits_for: String,
    waited_ms: u64,
}

impl Server {
    /// Sends the report. A client sees the databases that it is a member of, those of its own uid, and, as the
    /// broker's user or root, all.
    pub(super) fn report(&mut self, session: u64, request: u64) {
        let Some(asker) = self.sessions.get(&session) else { return };
        let uid = asker.peer.uid;
        let all = uid == 0 || uid == nix::unistd::geteuid().as_raw();
        // Its own are found by its sessions: others' databases are not looked through for them.
        let own = self.sessions.values().filter(|s| !all && s.peer.uid == uid);
        let own: BTreeSet<u32> = own.flat_map(|s| s.seats.iter().map(|key| key.database)).collect();
        let numbers: Vec<u32> =
            if all { self.databases.keys().copied().collect() } else { Vec::from_iter(own) };
        let visible = numbers.iter().filter_map(|number| self.databases.get(number));
        let users: BTreeSet<u32> = self.users.uids().chain(self.receivers.stuck_users()).collect();
        let report = Report {
            broker: BrokerReport {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION"),
                socket: self.options.socket.display().to_string(),
                uptime_seconds: self.started.elapsed().as_secs(),
                sessions: self.sessions.len(),
                limits: self.options.limits,
                users: users.into_iter().filter(|u| all || *u == uid).map(|u| self.user(u)).collect(),
                checkpointer: self.checkpointer.pid(),
                keeper: self.keeping.pid(),
                settled: self.settled,
            },
            databases: visible.map(|d| self.describe(d)).collect(),
        };
        let json = serde_json::to_vec(&report).unwrap_or_default();
        let mut parts = json.chunks(MAX_PACKET / 2).peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            self.send(session, &FromBroker::Status { id: request, part: part.to_vec(), last });
        }
    }

    fn user(&self, uid: u32) -> UserReport {
        UserReport {
            uid,
            sessions: self.users.sessions(uid),
            databases: self.users.databases(uid),
            descriptors: self.users.under_way(uid),
            stuck: self.receivers.stuck(uid) + self.receivers.is_parked(uid) as usize,
        }
    }

    fn describe(&self, db: &Database) -> DatabaseReport {
        let who = |seat: u32| {
            if seat == CHECKPOINTER {
                return (self.checkpointer.pid().unwrap_or(0) as i32, "turnstile checkpointer".to_owned());
            }
            let session = db.seats.get(&seat).and_then(|s| self.sessions.get(&s.session));
            session.map(|s| (s.pid(), s.who.program.clone())).unwrap_or_default()
        };
        let (mode, reason) = match &db.state {
            State::Gated { .. } => ("gated", None),
            State::Guest { reason, .. } => ("guest", Some(reason.clone())),
        };
        let holder =
            db.turn().load().holder().filter(|seat| *seat == CHECKPOINTER || db.seats.contains_key(seat));
        let mut waiting: Vec<(u64, u32, WaitsFor)> = db
            .seats
            .keys()
            .filter_map(|seat| {
                let words = db.table().seat(*seat)?;
                Some((words.since.load(SeqCst), *seat, WaitsFor::from_code(words.waiting.load(SeqCst))?))
            })
            .collect();
        waiting.sort_unstable_by_key(|(since, seat, _)| (*since, *seat));
        let counters = &db.table().words.counters.0;
        let (resting, used): (Vec<_>, Vec<_>) = db.seats.iter().partition(|(n, _)| db.rests(**n));
        let reports = |seats: Vec<(&u32, &super::database::Seat)>| {
            seats.into_iter().map(|(n, s)| self.member(*n, s)).collect()
        };
        let (members, resting) = (reports(used), reports(resting));
        DatabaseReport {
            name: db.home.as_ref().map(|h| h.display()),
            device: db.identity.device,
            inode: db.identity.inode,
            mode,
            reason,
            members,
            resting,
            turn: holder.map(|seat| {
                let (pid, program) = who(seat);
                TurnReport { seat, pid, program, held_ms: db.turn_held_ms(seat) }
            }),
            line: waiting
                .into_iter()
                .map(|(since, seat, what)| {
                    let (pid, program) = who(seat);
                    let waited_ms = futex::coarse_millis().saturating_sub(since);
                    WaitReport { seat, pid, program, waits_for: what.describe().into(), waited_ms }
                })
                .collect(),
            wal: db.wal_progress().map(|(frames, copied)| WalReport { frames, copied }),
            reads: self.reads(db, &who),
            checkpoints: CheckpointReport {
                by: if db.checkpoints_by_members().is_none() { "broker" } else { "members" },
                reason: db.checkpoints_by_members().map(str::to_owned),
                done: db.checkpoints.done,
                running: db.checkpoints.is_running(),
            },
            turns_revoked: db.turns_revoked,
            deadlocks: db.deadlocks,
            lines_stuck: counters[0].load(SeqCst),
            passed_over: counters[1].load(SeqCst),
        }
    }

    fn reads(&self, db: &Database, who: &dyn Fn(u32) -> (i32, String)) -> Option<Vec<ReadReport>> {
        let now = futex::coarse_millis();
        db.wal_progress()?;
        let of_seat = |seat: u32| {
            let (pid, program) = who(seat);
            // On the socket lane the broker says it on behalf of the seat, by its own clock.
            let fast = db.seats.get(&seat).filter(|s| !s.socket_lane);
            let open = db.table().open_reads(seat, || {
                let ahead = fast.and_then(|s| self.sessions.get(&s.session)).map_or(0, Session::clock_ahead);
                now.saturating_add_signed(ahead)
            });
            open.into_iter().map(move |open| ReadReport {
                seat,
                pid,
                program: program.clone(),
                open_seconds: open.open_ms.map(|ms| ms / 1000),
                frames_held_back: db.frames_held_back(open.read),
            })
        };
        let mut reads: Vec<ReadReport> = db.seats.keys().flat_map(|seat| of_seat(*seat)).collect();
        let by_age = |r: &ReadReport| std::cmp::Reverse((r.frames_held_back, r.open_seconds));
        reads.sort_by_key(by_age);
        Some(reads)
    }

    fn member(&self, seat: u32, s: &super::database::Seat) -> MemberReport {
        let session = self.sessions.get(&s.session);
        MemberReport {
            seat,
            pid: session.map_or(0, |s| s.pid()),
            program: session.map(|s| s.who.program.clone()).unwrap_or_default(),
            uid: session.map_or(0, |s| s.peer.uid),
            container: session.and_then(|s| s.who.container.clone()),
            role: match s.role {
                Role::ReadWrite => "read-write",
                Role::ReadOnly => "read-only",
            },
            lane: if s.socket_lane { "socket" } else { "fast" },
            sqlite: s.sqlite_version.clone(),
            since: s.since.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }
}
