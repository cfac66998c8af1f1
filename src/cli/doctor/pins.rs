//! Who keeps the WAL from being copied into the database, so that it grows: by name, not by "see elsewhere".

use std::collections::BTreeSet;

use serde_json::Value;

use turnstile::planted::planted;

use super::findings::Findings;
use super::holders::{processes, shm_readers, state_of};
use super::place::{Database, size_beside};

/// So many frames behind a snapshot are more than a checkpoint leaves by itself: from here on the broker's waits for readers.
const MANY_FRAMES: u64 = 5000;
/// A WAL above this is one that has not been begun anew for long: ten times what a checkpoint waits for.
const LARGE_WAL: u64 = 40 << 20;

pub fn look(file: &Database, known: Option<&Value>, findings: &mut Findings) {
    let wal = size_beside(&file.path, "-wal").unwrap_or(0);
    let known = known.filter(|_| !planted("pins-unnamed"));
    let reads = known.and_then(|known| known["reads"].as_array());
    let held_back = |read: &&Value| read["frames_held_back"].as_u64().unwrap_or(0);
    let pins: Vec<&Value> = reads.into_iter().flatten().filter(|r| held_back(r) >= MANY_FRAMES).collect();
    if let Some(known) = known.filter(|_| !pins.is_empty()) {
        return pinned(known, &pins, findings);
    }
    if wal <= LARGE_WAL {
        return;
    }
    let what = format!("the WAL has {} MiB", wal >> 20);
    let readers = shm_readers(&file.path);
    match reads {
        Some(_) => findings.warning(
            "wal-large",
            format!("{what}, and no member's read holds it back now"),
            "the next checkpoint lets it begin anew; PRAGMA wal_checkpoint(TRUNCATE) also cuts the file",
        ),
        None if !readers.is_empty() => findings.warning(
            "wal-pinned",
            format!("{what}: these read it, as guests or plain clients, since when cannot be seen: {}", processes(&readers)),
            "it cannot begin anew before they end their reads: let them commit, or finish their statements, or end them",
        ),
        None => findings.warning(
            "wal-large",
            format!("{what}. Who reads it cannot be seen: reads of guests and plain clients are the kernel's locks"),
            "it cannot begin anew while somebody keeps a snapshot: end long reads, then PRAGMA wal_checkpoint(TRUNCATE)",
        ),
    }
}

fn pinned(known: &Value, pins: &[&Value], findings: &mut Findings) {
    let frames = &known["wal"]["frames"];
    let pid = |read: &Value| read["pid"].as_i64().unwrap_or(0);
    for read in pins {
        let who = format!("{} (pid {})", read["program"].as_str().unwrap_or("?"), pid(read));
        let since = match read["open_seconds"].as_u64() {
            Some(seconds) => format!("since {seconds} s"),
            None => "since when it does not say".into(),
        };
        let held = &read["frames_held_back"];
        findings.warning(
            "wal-pinned",
            format!("the WAL grows: {who} has a read open, {since}, which holds back {held} of its {frames} frames"),
            match state_of(pid(read)) {
                Some('T') => format!("it is stopped: let it go on (kill -CONT {0}) or end it (kill -KILL {0})", pid(read)),
                _ => format!(
                    "let it end that read (commit or roll back; a cursor that was not read to its end is one, too), or \
                     end it: kill {}",
                    pid(read)
                ),
            },
        );
    }
    let ended: BTreeSet<i64> = pins.iter().map(|read| pid(read)).collect();
    if ended.contains(&0) {
        findings.ok(
            "wal-pinned-elsewhere",
            "pid 0: that program runs where this process cannot see it (a container)",
        );
    }
}
