//! Who has the database open or locked: members by the broker's word, everybody else by `/proc`, as far as this user
//! may look.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::Value;
use turnstile::client::companions::beside;
use turnstile::segment::gate;
use turnstile::segment::statx::statx;

use super::broker::Broker;
use super::findings::Findings;
use super::place::Database;

/// How many processes are named; more help nobody.
const MOST_NAMED: usize = 8;

/// What processes have of the database.
#[derive(Debug, Default)]
struct Seen {
    /// Who has it open.
    open: BTreeSet<i32>,
    /// Who has a descriptor that carries a gate.
    gate: BTreeSet<i32>,
    /// Who has some database's segment mapped: members.
    segments: BTreeSet<i32>,
    /// Processes that this user may not look into.
    hidden: usize,
}

pub fn look(file: &Database, broker: Option<&Broker>, known: Option<&Value>, findings: &mut Findings) {
    let seen = scan(file);
    let locked = plain_locks(file);
    let members = known.map(members).unwrap_or_default();
    let brokers: BTreeSet<i32> = broker.map(Broker::processes).unwrap_or_default().into_iter().collect();
    if !members.is_empty() {
        findings.ok("members", format!("members: {}", named(members.values())));
    }
    if gate::stands(&file.file) && known.is_none() {
        orphan(&seen, broker, findings);
    } else {
        let plain = |pid: &&i32| !members.contains_key(pid) && !brokers.contains(pid);
        let others: BTreeSet<i32> = seen.open.union(&locked).filter(plain).copied().collect();
        if !others.is_empty() {
            plain_clients(&others, &locked, known, findings);
        } else if gate::plain_holder(&file.file).is_some() {
            findings.warning(
                "plain-unseen",
                "somebody holds an SQLite lock on it who cannot be seen from here (another container)",
                "run this on the host, as root",
            );
        } else if members.is_empty() {
            findings.ok("holders", "nobody has it open, as far as can be seen");
        }
    }
    if seen.hidden > 0 {
        let what = format!(
            "{} processes of other users could not be looked into: as root this tells more",
            seen.hidden
        );
        findings.ok("hidden", what);
    }
}

/// A gate that no broker answers for.
fn orphan(seen: &Seen, broker: Option<&Broker>, findings: &mut Findings) {
    let of = |role: Role, among: &BTreeSet<i32>| -> BTreeSet<i32> {
        among.iter().copied().filter(|pid| Role::of(*pid) == role).collect()
    };
    // Its first member has the description that carries the gate, too: it is SQLite's own.
    let (brokers, keepers) = (of(Role::Broker, &seen.gate), of(Role::Keeper, &seen.gate));
    let members: BTreeSet<i32> = of(Role::Other, &seen.segments).intersection(&seen.open).copied().collect();
    if !brokers.is_empty() {
        return findings.problem(
            "other-broker",
            format!("another broker has it: {}", processes(&brokers)),
            "one broker a database: let everybody find the same (TURNSTILE_SOCKET), and end the other",
        );
    }
    if broker.is_some_and(|broker| !broker.tells_all) {
        return findings.ok(
            "members-unseen",
            "other users' programs are members: the broker tells their user or root who",
        );
    }
    let held = match (members.is_empty(), keepers.is_empty()) {
        (false, _) => format!("members whose broker is gone hold it: {}", processes(&members)),
        (true, false) => format!("the keeper of a broker that is gone holds it: {}", processes(&keepers)),
        _ => {
            "somebody holds it for members, and cannot be seen from here (another container, or another user)"
                .into()
        }
    };
    findings.problem(
        "gate-orphaned",
        format!("it is shut to everybody else, and no broker answers for it: {held}"),
        "start the broker on the socket that it had before (`turnstile serve`), or end those programs",
    );
}

fn plain_clients(
    others: &BTreeSet<i32>,
    locked: &BTreeSet<i32>,
    known: Option<&Value>,
    findings: &mut Findings,
) {
    let who = processes(others);
    let lock = if others.is_disjoint(locked) { "open" } else { "open and locked" };
    match known.map(|known| &known["mode"]) {
        Some(mode) if mode == "gated" => findings.warning(
            "plain-shut-out",
            format!("not by turnstile, and shut out as long as members are in: {who}"),
            "start them by `turnstile run`, or load the extension; else they get \"database is locked\"",
        ),
        Some(_) => findings.warning(
            "plain-clients",
            format!("plain clients have it {lock} beside the members: {who}"),
            "start them by `turnstile run`, or load the extension",
        ),
        None => findings.warning(
            "plain-clients",
            format!("plain SQLite has it {lock}: {who}"),
            "members that come meanwhile run in guest mode, slower: start these by `turnstile run`, or load the \
             extension there",
        ),
    }
}

/// The members by the broker's report, with their SQLite.
fn members(known: &Value) -> BTreeMap<i32, String> {
    let mut found = BTreeMap::new();
    for member in ["members", "resting"].iter().flat_map(|key| known[key].as_array().into_iter().flatten()) {
        let pid = member["pid"].as_i64().unwrap_or(0) as i32;
        let text = |key: &str| member[key].as_str().unwrap_or("?").to_owned();
        found.insert(pid, format!("{} (pid {pid}, SQLite {})", text("program"), text("sqlite")));
    }
    found
}

pub fn processes(pids: &BTreeSet<i32>) -> String {
    named(pids.iter().map(|pid| format!("{} (pid {pid})", name_of(*pid))).collect::<Vec<_>>().iter())
}

fn named<'a>(who: impl ExactSizeIterator<Item = &'a String>) -> String {
    let more = who.len().saturating_sub(MOST_NAMED);
    let mut text = who.take(MOST_NAMED).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// What a process is to turnstile, by what it says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Broker,
    Keeper,
    Checkpointer,
    Other,
}

impl Role {
    fn of(pid: i32) -> Role {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let serves = command.split(|b| *b == 0).nth(1) == Some(b"serve");
        match name_of(pid).as_str() {
            "turnstile-keep" => Role::Keeper,
            "turnstile-ckpt" => Role::Checkpointer,
            _ if serves => Role::Broker,
            _ => Role::Other,
        }
    }
}

fn name_of(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.is_empty() { "?".into() } else { name.trim().to_owned() }
}

/// Looks through all processes but this one.
fn scan(file: &Database) -> Seen {
    let mut seen = Seen::default();
    let numbered = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(numbered) {
        if pid == std::process::id() as i32 {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            seen.hidden += usize::from(fs::metadata(format!("/proc/{pid}")).is_ok());
            continue;
        };
        for descriptor in descriptors.flatten() {
            // Its name first, which asks nobody.
            let path = descriptor.path();
            let target = fs::read_link(&path).unwrap_or_default();
            if target.to_string_lossy().starts_with("/memfd:turnstile-control") {
                seen.segments.insert(pid);
            }
            if target.file_name() != file.path.file_name() {
                continue;
            }
            if identity(&path) == Some((file.device, file.inode)) {
                seen.open.insert(pid);
                let number = descriptor.file_name();
                if carries_gate(pid, Path::new(&number)) {
                    seen.gate.insert(pid);
                }
            }
        }
        if seen.open.contains(&pid) && maps_segment(pid) {
            seen.segments.insert(pid);
        }
    }
    seen
}

/// Device and inode of what a descriptor of another process leads to, as far as the kernel knows them: no filesystem is
/// asked, because one of FUSE may never answer.
fn identity(descriptor: &Path) -> Option<(u64, u64)> {
    let path = CString::new(descriptor.as_os_str().as_bytes()).ok()?;
    let stx = statx(libc::AT_FDCWD, &path, libc::AT_STATX_DONT_SYNC, libc::STATX_INO)?;
    Some((libc::makedev(stx.stx_dev_major, stx.stx_dev_minor), stx.stx_ino))
}

/// `lock: 1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 1073741824 1073742335` (proc(5)): as `segment::gate` tells a gate.
fn carries_gate(pid: i32, number: &Path) -> bool {
    let info = fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(number)).unwrap_or_default();
    info.lines().any(is_gate)
}

fn is_gate(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, "OFDLCK", _, "WRITE", _, _, start, end] = words[..] else { return false };
    let covers = |n: &str, at: fn(u64, u64) -> bool, edge| n == "EOF" || n.parse().is_ok_and(|n| at(n, edge));
    line.starts_with("lock:")
        && covers(start, |n, edge| n <= edge, gate::FIRST_BYTE)
        && covers(end, |n, edge| n >= edge, gate::LAST_BYTE)
}

fn maps_segment(pid: i32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.contains("/memfd:turnstile-control")
}

/// Who reads through `-shm`, as a guest or a plain client: has one of the five read slots, by `/proc/locks`.
pub fn shm_readers(database: &Path) -> BTreeSet<i32> {
    let Ok(shm) = fs::metadata(beside(database, "-shm")) else { return BTreeSet::new() };
    let device = (libc::major(shm.dev()), libc::minor(shm.dev()));
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    let locks = table.lines().filter_map(posix_lock).filter(|l| (l.device, l.inode) == (device, shm.ino()));
    // `UNIX_SHM_BASE` and `WAL_READ_LOCK(0..5)`, os_unix.c and wal.c.
    locks.filter(|l| l.first <= 127 && l.last >= 123 && l.pid > 0).map(|l| l.pid).collect()
}

/// The third field of `/proc/PID/stat`: `T` is stopped.
pub fn state_of(pid: i64) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Who has a lock of SQLite's kind on the file, by `/proc/locks`.
fn plain_locks(file: &Database) -> BTreeSet<i32> {
    let device = (libc::major(file.device), libc::minor(file.device));
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    table
        .lines()
        .filter_map(posix_lock)
        .filter(|l| (l.device, l.inode) == (device, file.inode))
        .map(|l| l.pid)
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
struct PosixLock {
    pid: i32,
    device: (u32, u32),
    inode: u64,
    first: u64,
    last: u64,
}

/// `1: POSIX  ADVISORY  READ 4711 fe:00:1234 1073741826 1073742335`; of one that is waited for, `1: -> POSIX ...`.
fn posix_lock(line: &str) -> Option<PosixLock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if *words.get(1)? != "POSIX" {
        return None;
    }
    let mut place = words.get(5)?.split(':');
    let mut number = || u32::from_str_radix(place.next()?, 16).ok();
    let device = (number()?, number()?);
    let inode = place.next()?.parse().ok()?;
    let first = words.get(6)?.parse().ok()?;
    let last = words.get(7).filter(|last| **last != "EOF").map_or(Ok(u64::MAX), |last| last.parse()).ok()?;
    Some(PosixLock { pid: words.get(4)?.parse().ok()?, device, inode, first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_locks_is_read() {
        let line = "7: POSIX  ADVISORY  READ  4711 fe:10:1234 1073741826 1073742335";
        let (first, last) = (1073741826, 1073742335);
        let expected = PosixLock { pid: 4711, device: (0xfe, 0x10), inode: 1234, first, last };
        assert_eq!(posix_lock(line), Some(expected));
        for other in [
            "7: OFDLCK ADVISORY  WRITE -1 fe:00:1234 0 EOF",
            "7: -> POSIX  ADVISORY  READ  4711 fe:10:1234 1 2",
            "7: FLOCK  ADVISORY  WRITE 1 00:17:3 0 EOF",
            "",
        ] {
            assert_eq!(posix_lock(other), None, "{other}");
        }
    }

    #[test]
    fn only_a_write_lock_on_all_of_it_is_a_gate() {
        assert!(is_gate("lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 1073741824 1073742335"));
        for other in [
            "lock:\t1: OFDLCK  ADVISORY  READ  -1 fe:00:1234 1073741824 1073742335",
            "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 1073741826 1073742335",
            "lock:\t1: POSIX   ADVISORY  WRITE 12 fe:00:1234 1073741824 1073742335",
            "pos:\t0",
        ] {
            assert!(!is_gate(other), "{other}");
        }
    }
}
