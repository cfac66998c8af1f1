//! The status report: databases, modes, members, who has the turn and for how long, the line.

use super::database::{Database, State};
use super::server::Server;
use crate::wire::MAX_PACKET;
use crate::wire::message::{FromBroker, Role};
use serde::Serialize;
use std::time::{Instant, UNIX_EPOCH};

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
}

#[derive(Serialize)]
struct DatabaseReport {
    name: Option<String>,
    device: u64,
    inode: u64,
    mode: &'static str,
    reason: Option<String>,
    members: Vec<MemberReport>,
    turn: Option<TurnReport>,
    line: Vec<WaitReport>,
    turns_revoked: u64,
    deadlocks: u64,
}

#[derive(Serialize)]
struct MemberReport {
    seat: u32,
    pid: i32,
    program: String,
    uid: u32,
    container: Option<String>,
    role: &'static str,
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
        let visible = |d: &&Database| {
            all || d.seats.values().any(|s| self.sessions.get(&s.session).is_some_and(|s| s.peer.uid == uid))
        };
        let report = Report {
            broker: BrokerReport {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION"),
                socket: self.options.socket.display().to_string(),
                uptime_seconds: self.started.elapsed().as_secs(),
                sessions: self.sessions.len(),
            },
            databases: self.databases.values().filter(visible).map(|d| self.describe(d)).collect(),
        };
        let json = serde_json::to_vec(&report).unwrap_or_default();
        let mut parts = json.chunks(MAX_PACKET / 2).peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            self.send(session, &FromBroker::Status { id: request, part: part.to_vec(), last });
        }
    }

    fn describe(&self, db: &Database) -> DatabaseReport {
        let who = |seat: u32| {
            let session = db.seats.get(&seat).and_then(|s| self.sessions.get(&s.session));
            session.map(|s| (s.pid(), s.who.program.clone())).unwrap_or_default()
        };
        let (mode, reason) = match &db.state {
            State::Gated { .. } => ("gated", None),
            State::Guest { reason } => ("guest", Some(reason.clone())),
        };
        let now = Instant::now();
        DatabaseReport {
            name: db.home.as_ref().map(|h| h.display()),
            device: db.identity.device,
            inode: db.identity.inode,
            mode,
            reason,
            members: db.seats.iter().map(|(n, s)| self.member(*n, s)).collect(),
            turn: db.locks.turn().holder().map(|h| {
                let (pid, program) = who(h.seat);
                TurnReport {
                    seat: h.seat,
                    pid,
                    program,
                    held_ms: now.duration_since(h.since).as_millis() as u64,
                }
            }),
            line: db
                .locks
                .waiting()
                .map(|(seat, ask, since)| {
                    let (pid, program) = who(seat);
                    let waited_ms = now.duration_since(since).as_millis() as u64;
                    WaitReport { seat, pid, program, waits_for: ask.describe().into(), waited_ms }
                })
                .collect(),
            turns_revoked: db.locks.turns_revoked,
            deadlocks: db.deadlocks,
        }
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
            sqlite: s.sqlite_version.clone(),
            since: s.since.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }
}
