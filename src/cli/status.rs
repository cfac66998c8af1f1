//! `turnstile status`: databases, modes, members, who has the turn and for how long, the line.

use serde_json::Value;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use turnstile::client::config::Config;
use turnstile::client::greeting::ConnectError;
use turnstile::client::member::status_report;
use turnstile::client::place;
use turnstile::client::session::Session;

#[derive(clap::Args, Debug)]
pub struct StatusArgs {
    /// Print the report as JSON, as the broker gives it.
    #[arg(long)]
    json: bool,
    /// The broker's socket. Default: $TURNSTILE_SOCKET, else the broker that a program of this user would find.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

pub fn run(args: StatusArgs) -> ExitCode {
    match report(&args) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("turnstile status: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn report(args: &StatusArgs) -> Result<String, String> {
    let mut config = Config::from_environment().map_err(|e| e.to_string())?;
    config.socket = args.socket.clone().or(config.socket);
    let session = connect(&config)?;
    let json = status_report(&session).map_err(|e| e.to_string())?;
    let report: Value = serde_json::from_slice(&json).map_err(|e| format!("the broker's answer: {e}"))?;
    Ok(match args.json {
        true => serde_json::to_string_pretty(&report).unwrap_or_default(),
        false => render(&report),
    })
}

fn connect(config: &Config) -> Result<Session, String> {
    let candidates = match &config.socket {
        Some(given) => vec![given.clone()],
        None => place::candidates().flatten().collect(),
    };
    let mut errors = Vec::new();
    for path in candidates {
        match Session::open(&path, &config.believed) {
            Ok(session) => return Ok(session),
            Err(e @ ConnectError::Absent(_)) => {
                errors
                    .push(format!("{e} (nobody uses turnstile there now; brokers are started when needed)"));
            }
            Err(e) => errors.push(e.to_string()),
        }
    }
    Err(errors.join("; "))
}

/// The report for people.
fn render(report: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or("?").to_owned();
    let broker = &report["broker"];
    let mut out = format!(
        "broker pid {}, version {}, {}, up {} s",
        broker["pid"],
        text(&broker["version"]),
        text(&broker["socket"]),
        broker["uptime_seconds"]
    );
    let limits = &broker["limits"];
    let _ = write!(
        out,
        "\na user may have {} sessions, {} databases, {} descriptors under way",
        limits["sessions"], limits["databases"], limits["descriptors"]
    );
    for user in broker["users"].as_array().into_iter().flatten() {
        let (uid, sessions, databases) = (&user["uid"], &user["sessions"], &user["databases"]);
        let _ = write!(out, "\n  user {uid}: {sessions} sessions, {databases} databases");
    }
    let databases = report["databases"].as_array().cloned().unwrap_or_default();
    if databases.is_empty() {
        out.push_str("\nno databases are open");
    }
    for db in &databases {
        let name = db["name"].as_str().unwrap_or("(name unknown)");
        let _ = write!(
            out,
            "\n\n{name}  (device {}, inode {})  {}",
            db["device"],
            db["inode"],
            text(&db["mode"])
        );
        if let Some(reason) = db["reason"].as_str() {
            let _ = write!(out, ": {reason}");
        }
        let _ = match &db["turn"] {
            Value::Null => write!(out, "\n  turn: free"),
            t => write!(
                out,
                "\n  turn: seat {}, {} (pid {}), for {} ms",
                t["seat"],
                text(&t["program"]),
                t["pid"],
                t["held_ms"]
            ),
        };
        if let Some(reason) = db["checkpoints"]["reason"].as_str().filter(|_| db["mode"] == "gated") {
            let _ = write!(out, "\n  checkpoints: by the members ({reason})");
        }
        for (place, w) in db["line"].as_array().into_iter().flatten().enumerate() {
            let _ = write!(
                out,
                "\n  {}. in line: seat {}, {} (pid {}), waits for {} since {} ms",
                place + 1,
                w["seat"],
                text(&w["program"]),
                w["pid"],
                text(&w["waits_for"]),
                w["waited_ms"]
            );
        }
        reads(db, &mut out);
        let _ = write!(
            out,
            "\n  {:>5} {:>8} {:<18} {:>6} {:<10} {:<9} since",
            "seat", "pid", "program", "uid", "role", "SQLite"
        );
        for m in db["members"].as_array().into_iter().flatten() {
            let _ = write!(
                out,
                "\n  {:>5} {:>8} {:<18} {:>6} {:<10} {:<9} {}",
                m["seat"].to_string(),
                m["pid"].to_string(),
                text(&m["program"]),
                m["uid"].to_string(),
                text(&m["role"]),
                text(&m["sqlite"]),
                ago(m["since"].as_u64().unwrap_or(0))
            );
            if let Some(container) = m["container"].as_str() {
                let _ = write!(out, "  container {container}");
            }
        }
        for m in db["resting"].as_array().into_iter().flatten() {
            let _ = write!(
                out,
                "\n  {:>5} {:>8} {:<18} closed, kept for its next connection",
                m["seat"].to_string(),
                m["pid"].to_string(),
                text(&m["program"])
            );
        }
    }
    out
}

/// Who keeps the WAL from being copied and begun anew.
fn reads(db: &Value, out: &mut String) {
    let Some(reads) = db["reads"].as_array() else {
        return out.push_str("\n  read transactions: not seen (guest mode: the kernel has their locks)");
    };
    let (frames, copied) = (&db["wal"]["frames"], &db["wal"]["copied"]);
    if frames.as_u64() != Some(0) {
        let _ = write!(out, "\n  WAL: {frames} frames, {copied} of them copied into the database");
    }
    for read in reads {
        let since = match read["open_seconds"].as_u64() {
            Some(seconds) => format!("since {seconds} s"),
            None => "since when is not known".into(),
        };
        let _ = write!(
            out,
            "\n  reads: seat {}, {} (pid {}), {since}, holds back {} frames",
            read["seat"],
            read["program"].as_str().unwrap_or("?"),
            read["pid"],
            read["frames_held_back"]
        );
    }
}

/// Seconds since 1970 as a time ago.
fn ago(since: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match now.saturating_sub(since) {
        s if s < 120 => format!("{s} s ago"),
        s if s < 7200 => format!("{} min ago", s / 60),
        s => format!("{} h ago", s / 3600),
    }
}
