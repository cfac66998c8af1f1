//! `turnstile finder`: the broker's child that looks for members whose broker and keeper were killed.
//!
//! It goes through `/proc/*/fd` for the memfds of segments and takes copies of them, and of what holds their gates, out of
//! the processes that have them (pidfd_getfd(2), which needs the right to trace them). Such a process may be anybody's and
//! change what it has at any time, so each descriptor is judged after it was taken, by what the kernel knows without
//! asking the file. Something else than was expected may be a file on a filesystem that never answers: it is not even
//! closed. This process may hang over it when it ends; its broker does not wait for that.
//!
//! * [`taken`]: taking and judging a descriptor.

mod taken;

use self::taken::{Process, Taken};
use nix::poll::PollFlags;
use nix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;
use turnstile::planted::planted;
use turnstile::segment::names::{Name, Part, is_liveness};
use turnstile::wire::finder::{Found, Search};
use turnstile::wire::socket;

const PATIENCE: Duration = Duration::from_secs(1);
/// Of a processor, for all processes of another user: nobody may fill its tables of descriptors to keep others from being
/// found.
const EACH_USER: Duration = Duration::from_millis(200);
/// `PROC_PID_INIT_INO`, linux/proc_ns.h: in this pid namespace every process is seen.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// There it is the system's first process, nobody's member; it may not let even root look.
const INIT: i32 = 1;

struct Finder {
    broker: OwnedFd,
    search: Search,
    /// What the broker has.
    segments: BTreeSet<u64>,
    /// Time that was spent on each user's processes.
    spent: BTreeMap<u32, Duration>,
    own: u32,
    complete: bool,
}

pub fn run() -> ExitCode {
    let _ = nix::sys::prctl::set_name(c"turnstile-find");
    match io::stdin().as_fd().try_clone_to_owned().and_then(find) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn find(broker: OwnedFd) -> io::Result<()> {
    socket::wait(&broker, PollFlags::POLLIN, PATIENCE)?;
    let search: Search = socket::receive(&broker)?.decode()?;
    let namespace = fs::read_link("/proc/self/ns/pid")?;
    let first = namespace.to_str() == Some(FIRST_PID_NAMESPACE);
    let complete = first && search.passed_over.is_empty() && everybody_is_shown()?;
    let own = nix::unistd::geteuid().as_raw();
    let segments = search.known.iter().copied().collect();
    let mut finder = Finder { broker, search, segments, spent: BTreeMap::new(), own, complete };
    finder.look_everywhere()?;
    let complete = finder.complete;
    finder.say(&Found::All { complete }, &[])
}

/// `/proc` shows the processes of all users: it is mounted without `hidepid` (proc(5)), or this one may trace all.
fn everybody_is_shown() -> io::Result<bool> {
    let mounts = fs::read("/proc/self/mountinfo")?;
    let status = fs::read("/proc/self/status")?;
    let (mounts, status) = (String::from_utf8_lossy(&mounts), String::from_utf8_lossy(&status));
    Ok(!hides_processes(&mounts) || traces_all(&status) || planted("hidden-is-dead"))
}

/// The last one that is mounted there is the one that is seen.
fn hides_processes(mountinfo: &str) -> bool {
    let at = |line: &&str| line.split(' ').nth(4) == Some("/proc");
    let options = mountinfo.lines().rfind(at).and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
    let hides = |option: &str| option.strip_prefix("hidepid=").is_some_and(|how| !matches!(how, "0" | "off"));
    options.split(',').any(hides)
}

fn traces_all(status: &str) -> bool {
    /// linux/capability.h
    const CAP_SYS_PTRACE: u32 = 19;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits & 1 << CAP_SYS_PTRACE != 0)
}

/// What a process's table of descriptors says that it has.
#[derive(Default)]
struct Table {
    segments: Vec<(i32, Name)>,
    liveness: Vec<i32>,
    sockets: Vec<i32>,
}

/// That this process has had: how busy the machine is does not count.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The process has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

impl Finder {
    fn say(&self, found: &Found, fds: &[&OwnedFd]) -> io::Result<()> {
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        socket::send_within(&self.broker, &socket::encode(found)?, &raw, PATIENCE)
    }

    fn look_everywhere(&mut self) -> io::Result<()> {
        let own = [std::process::id() as i32, nix::unistd::getppid().as_raw()];
        let entries = fs::read_dir("/proc")?.collect::<io::Result<Vec<_>>>()?;
        let numbers = entries.iter().filter_map(|e| e.file_name().to_str()?.parse().ok());
        for pid in numbers.filter(|pid| !own.contains(pid)) {
            let begun = processor_time();
            let who = match taken::who(pid) {
                Ok(who) => who,
                Err(e) => {
                    self.complete &= is_gone(&e);
                    continue;
                }
            };
            if who.ended && !who.headless {
                // Nobody has waited for it: it has nothing any more, and lets nobody look.
                continue;
            }
            let uid = who.uid;
            let spent = self.spent.get(&uid).copied().unwrap_or_default();
            if self.limited(uid, spent) || self.search.passed_over.contains(&uid) {
                self.complete = false;
                continue;
            }
            let shown = who.headless.then(|| taken::living_thread(pid)).transpose();
            let place =
                shown.map(|tid| tid.map_or(format!("/proc/{pid}"), |tid| format!("/proc/{pid}/task/{tid}")));
            match place.and_then(|place| self.table_of(pid, uid, &place)) {
                // It lives by its liveness memfd, whatever its host has closed.
                Ok(table) if table.segments.is_empty() && table.liveness.is_empty() => {}
                // A member, perhaps, whose descriptors cannot be taken by the number of its first thread.
                Ok(_) if who.headless => self.complete = false,
                Ok(table) => self.take_from(pid, uid, who.program, &table)?,
                Err(e) => self.complete &= pid == INIT || is_gone(&e),
            }
            *self.spent.entry(uid).or_default() += processor_time().saturating_sub(begun);
        }
        Ok(())
    }

    fn limited(&self, uid: u32, spent: Duration) -> bool {
        uid != self.own && uid != 0 && spent > EACH_USER
    }

    fn table_of(&mut self, pid: i32, uid: u32, place: &str) -> io::Result<Table> {
        let mut table = Table::default();
        let begun = processor_time();
        for entry in fs::read_dir(format!("{place}/fd"))? {
            let entry = entry?;
            if self.limited(uid, processor_time().saturating_sub(begun)) {
                self.complete = false;
                break;
            }
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            // Closed again since.
            let (number, link) = match (number, fs::read_link(entry.path())) {
                (Some(number), Ok(link)) => (number, link),
                (_, link) => {
                    self.complete &= pid == INIT || link.is_err_and(|e| is_gone(&e));
                    continue;
                }
            };
            let Some(link) = link.to_str() else { continue };
            if let Some(name) = Name::of_link(link).filter(|n| n.place == self.search.place) {
                table.segments.push((number, name));
            } else if is_liveness(link) {
                table.liveness.push(number);
            } else if link.starts_with("socket:") {
                table.sockets.push(number);
            }
        }
        Ok(table)
    }

    fn take_from(&mut self, pid: i32, uid: u32, program: String, table: &Table) -> io::Result<()> {
        let Some(process) = Process::open(pid) else {
            self.complete = false;
            return Ok(());
        };
        for number in &table.liveness {
            match process.take(*number) {
                Taken::Memfd(memfd) if process.lives_by(&memfd) => {
                    let program = program.clone();
                    self.say(&Found::Member { pid, uid, program }, &[process.pidfd(), &memfd])?;
                }
                // A parent's, of which this is a child.
                Taken::Memfd(_) => {}
                Taken::Refused => self.complete = false,
                other => return self.give_up(uid, other),
            }
        }
        let mut holds: Option<BTreeMap<u64, OwnedFd>> = None;
        for (number, name) in table.segments.iter().filter(|(_, name)| name.part == Part::Control) {
            let index = table.segments.iter().find(|(_, n)| Name { part: Part::WalIndex, ..*name } == *n);
            let Some((index, _)) = index.filter(|_| !self.segments.contains(&name.nonce)) else { continue };
            if holds.is_none() {
                holds = Some(self.holds_of(&process, uid, table)?);
            }
            let Some(hold) = holds.as_ref().and_then(|h| h.get(&name.nonce)) else { continue };
            let (control, index) = (process.take(*number), process.take(*index));
            match (control, index) {
                (Taken::Memfd(control), Taken::Memfd(index)) => {
                    // It may have closed them meanwhile, and have others on those numbers.
                    let same = |fd: &OwnedFd, part| taken::is_ours(fd, Name { part, ..*name });
                    if same(&control, Part::Control) && same(&index, Part::WalIndex) {
                        self.say(&Found::Segment { nonce: name.nonce, uid }, &[&control, &index, hold])?;
                        self.segments.insert(name.nonce);
                    }
                }
                (Taken::Refused, _) | (_, Taken::Refused) => self.complete = false,
                (Taken::Memfd(_), other) | (other, _) => return self.give_up(uid, other),
            }
        }
        Ok(())
    }

    /// What holds gates in this process, by their segments' nonces.
    fn holds_of(&mut self, process: &Process, uid: u32, table: &Table) -> io::Result<BTreeMap<u64, OwnedFd>> {
        let mut holds = BTreeMap::new();
        for number in &table.sockets {
            match process.take(*number) {
                Taken::Hold(nonce, socket) => drop(holds.insert(nonce, socket)),
                Taken::Socket => {}
                Taken::Refused => self.complete = false,
                other => {
                    self.give_up(uid, other)?;
                    break;
                }
            }
        }
        Ok(holds)
    }

    /// Whatever it is, nobody expected it there.
    fn give_up(&mut self, uid: u32, taken: Taken) -> io::Result<()> {
        self.complete = false;
        match taken {
            Taken::Strange => self.say(&Found::Strange { uid }, &[]),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_processes_are_not_taken_for_ended_ones() {
        let root = "1 0 254:0 / / rw - ext4 /dev/vda rw\n";
        let proc = |options: &str| format!("{root}20 1 0:5 / /proc rw,nosuid - proc proc {options}\n");
        for (options, hides) in [
            ("rw", false),
            ("rw,hidepid=off", false),
            ("rw,hidepid=0", false),
            ("rw,gid=4,hidepid=invisible", true),
        ] {
            assert_eq!(hides_processes(&proc(options)), hides, "{options}");
        }
        assert!(hides_processes(&(proc("rw") + &proc("rw,hidepid=2"))));
        assert!(traces_all("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!traces_all("CapEff:\t0000000000000000\n") && !traces_all("CapEff:\t000001fffff7ffff\n"));
    }
}
