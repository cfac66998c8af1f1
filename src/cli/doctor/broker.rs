//! The broker that a program of this user would find here, and what it says of the database.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::Value;
use turnstile::client::config::{Config, Fallback};
use turnstile::client::greeting::ConnectError;
use turnstile::client::member::status_report;
use turnstile::client::place;
use turnstile::client::session::Session;

use super::findings::Findings;
use super::holders::state_of;
use super::settings::Settings;

/// A holder of the turn for longer than this, with others behind it, is looked at.
const LONG_TURN_MS: u64 = 5000;

pub struct Broker {
    report: Value,
    /// It tells this user of everybody's databases.
    pub tells_all: bool,
}

impl Broker {
    /// What it says of a database that has members.
    pub fn database(&self, device: u64, inode: u64) -> Option<Value> {
        let databases = self.report["databases"].as_array()?;
        databases.iter().find(|d| d["device"] == device && d["inode"] == inode).cloned()
    }

    /// The broker's own processes.
    pub fn processes(&self) -> Vec<i32> {
        let broker = &self.report["broker"];
        ["pid", "checkpointer", "keeper"]
            .iter()
            .filter_map(|p| broker[p].as_i64())
            .map(|p| p as i32)
            .collect()
    }

    pub fn version(&self) -> &str {
        self.report["broker"]["version"].as_str().unwrap_or("unknown")
    }
}

pub fn look(settings: &Settings, findings: &mut Findings) -> Option<Broker> {
    let config = &settings.config;
    let candidates: Vec<PathBuf> = match &config.socket {
        Some(given) => vec![given.clone()],
        None => place::candidates().flatten().collect(),
    };
    let mut absent = String::new();
    for path in &candidates {
        let session = match Session::open(path, &config.believed) {
            Ok(session) => session,
            Err(e @ ConnectError::Absent(_)) => {
                absent = e.to_string();
                continue;
            }
            Err(e) => {
                unusable(&e, findings);
                return None;
            }
        };
        let report = status_report(&session).ok().and_then(|json| serde_json::from_slice(&json).ok());
        let Some(report) = report else {
            let what = format!("the broker on {} does not answer", path.display());
            findings.problem(
                "broker-silent",
                what,
                "is its process stopped? See its log, or replace it: \
                 turnstile serve --replace",
            );
            return None;
        };
        let uid = nix::unistd::geteuid();
        let own = fs::metadata(path).is_ok_and(|meta| meta.uid() == uid.as_raw());
        let broker = Broker { report, tells_all: uid.is_root() || own };
        let (pid, up) = (&broker.report["broker"]["pid"], &broker.report["broker"]["uptime_seconds"]);
        findings.ok("broker", format!("broker: pid {pid} on {}, up {up} s", path.display()));
        return Some(broker);
    }
    missing(config, &absent, findings);
    None
}

fn unusable(e: &ConnectError, findings: &mut Findings) {
    let advice = match e {
        ConnectError::Forbidden(..) => {
            "it is another user's: run one for everybody (as root, or with --everyone yes), or name your own in \
             TURNSTILE_SOCKET"
        }
        ConnectError::Untrusted(..) => {
            "programs refuse it: run it as root or as their user, or name its user in TURNSTILE_BROKER_UID"
        }
        ConnectError::Stranger(..) => {
            "extension, program and broker must be of one version: install it everywhere, then `turnstile serve \
             --replace`"
        }
        _ => "see the broker's log",
    };
    findings.problem("broker-unusable", format!("no use of the broker: {e}"), advice);
}

/// What a program does that finds none.
fn missing(config: &Config, absent: &str, findings: &mut Findings) {
    let program = config.program.as_ref().filter(|program| !program.is_file());
    if config.socket.is_some() {
        let advice = "TURNSTILE_SOCKET names it, so programs start none and fail: run `turnstile serve --socket` there \
             (in a container: is the socket's directory mounted?)";
        findings.problem("broker-absent", absent, advice);
    } else if config.fallback == Fallback::Refuse {
        findings.problem(
            "broker-absent",
            format!("{absent}, and TURNSTILE_FALLBACK=refuse"),
            "run `turnstile serve`",
        );
    } else if config.fallback == Fallback::Plain {
        let what = format!("{absent}: programs would go on as plain SQLite (TURNSTILE_FALLBACK=plain)");
        findings.warning("broker-absent", what, "run `turnstile serve`");
    } else if place::in_container() {
        let advice =
            "run `turnstile serve` on the host, mount the directory of its socket, and set TURNSTILE_SOCKET";
        findings.problem("broker-absent", format!("{absent}, and none is started in a container"), advice);
    } else if let Some(program) = program {
        let what = format!("{absent}, and TURNSTILE_BIN={} is no program", program.display());
        findings.problem("broker-absent", what, "correct it, or unset it");
    } else {
        findings.ok("broker-absent", "no broker runs: the first program that needs one starts it");
    }
}

/// What of the database's state needs somebody's attention.
pub fn judge(database: &Value, findings: &mut Findings) {
    if database["mode"] == "guest" {
        let reason = database["reason"].as_str().unwrap_or("plain clients hold the file");
        findings.warning(
            "mode-guest",
            format!("members run in guest mode: {reason}"),
            "correct, and slower: let everybody come by turnstile, and all close once",
        );
    }
    if let Some(reason) = database["checkpoints"]["reason"].as_str().filter(|_| database["mode"] == "gated") {
        findings.warning(
            "checkpoints",
            format!("checkpoints are left to the members: {reason}"),
            "it works as in plain SQLite; see the broker's log if you did not expect it",
        );
    }
    let turn = &database["turn"];
    let (pid, held) = (turn["pid"].as_i64().unwrap_or(0), turn["held_ms"].as_u64().unwrap_or(0));
    let waiting = database["line"].as_array().map_or(0, Vec::len);
    let who = format!("{} (pid {pid})", turn["program"].as_str().unwrap_or("?"));
    if pid > 0 && state_of(pid) == Some('T') {
        findings.problem(
            "turn-stopped",
            format!("{who} has the turn since {held} ms and is stopped; {waiting} wait for it"),
            format!("let it go on (kill -CONT {pid}) or end it: what it has not committed is rolled back"),
        );
    } else if held > LONG_TURN_MS && waiting > 0 {
        findings.warning(
            "turn-long",
            format!("{who} has the turn since {held} ms; {waiting} wait for it"),
            "a transaction that is open while something else is done: commit before that",
        );
    }
    if database["lines_stuck"].as_u64().unwrap_or(0) > 0 {
        findings.warning(
            "line-stuck",
            "the line for the turn has been found standing still",
            "a bug of turnstile's, mended at once by the broker: please report it with `turnstile status --json`",
        );
    }
}
