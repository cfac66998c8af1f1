//! What the preloaded library tells, and what follows from it: where SQLite was reached, and where a SQLite lies
//! that cannot be.
//!
//! The library sends datagrams to a socket in the abstract namespace (nothing to clean up, and a command that
//! changes its root directory or user still finds it). Each says `KIND PID EXE`, then lines:
//!
//! | kind | lines |
//! |---|---|
//! | `hello` | the objects that a process started with |
//! | `loaded` | the same at its end, when more had been loaded |
//! | `attached` | a SQLite library that knows turnstile now |
//! | `lane` | a database that is brokered through the C library, its SQLite being hidden |
//! | `apart` | an object that is about to be loaded into a namespace of its own, where interposers do not get |
//! | `unreached` | an object, and why its SQLite was not reached |
//!
//! The files named are read here and not in the command, so that its run costs nothing. A long-running command is
//! looked at through `/proc/PID/maps` too, for what it loaded after its start.

use std::collections::{HashSet, VecDeque};
use std::fmt::Display;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials, bind,
    recvmsg, setsockopt, socket, sockopt::PassCred,
};
use nix::unistd::geteuid;

use super::elf::Elf;
use super::inspect::open_regular;
use crate::cli::libc::Libc;

/// The environment variable that tells the library where to report.
pub const ADDRESS_VARIABLE: &str = "TURNSTILE_RUN_REPORT";

/// A process is looked at this long after its start, and again after this much more.
const LOOKS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(28)];

/// More different lines than this help nobody.
const MOST_LINES: usize = 64;

/// Found together in every SQLite of the last fifteen years; tools that only recognise database files have the
/// first alone.
const SQLITE_BYTES: [&[u8]; 2] = [b"malformed database schema (", b"SQLite format 3\0"];

const SQLITE_LIBRARY: &str = "libsqlite3.so";

struct Look {
    due: Instant,
    round: usize,
    pid: i32,
    exe: PathBuf,
}

/// The receiving end.
pub struct Reports {
    socket: OwnedFd,
    address: String,
    library: PathBuf,
    verbose: bool,
    heard: bool,
    queued: VecDeque<PathBuf>,
    names: HashSet<PathBuf>,
    files: HashSet<(u64, u64)>,
    said: HashSet<String>,
    looks: VecDeque<Look>,
}

impl Reports {
    pub fn listen(library: &Path, verbose: bool) -> nix::Result<Reports> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(&socket, PassCred, &true)?;
        let random = std::hash::RandomState::new().build_hasher().finish();
        let name = format!("turnstile-run-{}-{random:016x}", std::process::id());
        bind(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        // A `turnstile` that the command starts has a SQLite linked in, and no need to be reached. The library, by
        // whichever name and for either C library, has none.
        let beside = [Libc::Glibc, Libc::Musl].map(|libc| library.with_file_name(libc.library()));
        let own = [Path::new("/proc/self/exe"), library, &beside[0], &beside[1]];
        let own = own.into_iter().filter_map(|path| std::fs::metadata(path).ok());
        Ok(Reports {
            socket,
            address: format!("@{name}"),
            library: library.to_owned(),
            verbose,
            heard: false,
            queued: VecDeque::new(),
            names: HashSet::new(),
            files: own.map(|meta| (meta.dev(), meta.ino())).collect(),
            said: HashSet::new(),
            looks: VecDeque::new(),
        })
    }

    /// The value of [`ADDRESS_VARIABLE`].
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether any process with the library in it was heard of.
    pub fn heard(&self) -> bool {
        self.heard
    }

    /// When [`Reports::work`] has something to do; `None`: when a report comes.
    pub fn due(&self) -> Option<Instant> {
        if self.queued.is_empty() { self.looks.iter().map(|l| l.due).min() } else { Some(Instant::now()) }
    }

    /// Takes in what has arrived. The kernel queues few datagrams, so this comes before any reading of files.
    pub fn receive(&mut self) {
        let mut bytes = [0u8; 16 << 10];
        while let Some(length) = self.receive_one(&mut bytes) {
            self.take(&String::from_utf8_lossy(&bytes[..length]));
        }
    }

    /// The next datagram, those of other users left out: a report has files opened.
    fn receive_one(&self, bytes: &mut [u8]) -> Option<usize> {
        loop {
            let mut control = cmsg_space!(UnixCredentials);
            let mut parts = [IoSliceMut::new(bytes)];
            let fd = self.socket.as_raw_fd();
            let message =
                recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT).ok()?;
            let trusted = |uid| uid == 0 || uid == geteuid().as_raw();
            let ours = message.cmsgs().is_ok_and(|mut all| {
                all.any(|c| matches!(c, ControlMessageOwned::ScmCredentials(by) if trusted(by.uid())))
            });
            if ours {
                return Some(message.bytes);
            }
        }
    }

    fn take(&mut self, text: &str) {
        let mut lines = text.lines();
        let mut head = lines.next().unwrap_or_default().splitn(3, ' ');
        let (Some(kind), Some(Ok(pid)), Some(exe)) = (head.next(), head.next().map(str::parse), head.next())
        else {
            return;
        };
        match kind {
            "hello" | "loaded" => {
                if kind == "hello" {
                    self.heard = true;
                    self.looks.push_back(Look {
                        due: Instant::now() + LOOKS[0],
                        round: 0,
                        pid,
                        exe: exe.into(),
                    });
                }
                lines.chain([exe]).for_each(|path| self.queue(Path::new(path)));
            }
            "attached" if self.verbose => {
                lines.for_each(|path| self.say(format_args!("process {pid} ({exe}): its SQLite is {path}")));
            }
            "lane" if self.verbose => lines.for_each(|path| {
                self.say(format_args!("process {pid} ({exe}): {path} is brokered through the C library"));
            }),
            "apart" => lines.for_each(|name| self.judge_apart(name)),
            "unreached" => lines.for_each(|why| self.say(format_args!("not reached: {why}"))),
            _ => {}
        }
    }

    fn queue(&mut self, path: &Path) {
        if path.is_absolute() && path != self.library && self.names.insert(path.to_owned()) {
            self.queued.push_back(path.to_owned());
        }
    }

    /// Reads one of the files in question, or looks at the processes whose time has come.
    pub fn work(&mut self) {
        if let Some(path) = self.queued.pop_front() {
            self.judge(&path);
            return;
        }
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.looks).into_iter().partition(|l| l.due <= now);
        self.looks = later;
        let due: VecDeque<Look> = due;
        for look in due {
            // Otherwise it has ended, or is another program by now.
            if std::fs::read_link(format!("/proc/{}/exe", look.pid)).is_ok_and(|exe| exe == look.exe) {
                mapped_files(look.pid).iter().for_each(|path| self.queue(path));
                if let Some(more) = LOOKS.get(look.round + 1) {
                    self.looks.push_back(Look { due: now + *more, round: look.round + 1, ..look });
                }
            }
        }
    }

    /// Finishes what is queued, at the command's end.
    pub fn finish(&mut self) {
        self.receive();
        while let Some(path) = self.queued.pop_front() {
            self.judge(&path);
        }
    }

    fn judge(&mut self, path: &Path) {
        // What cannot be read (gone, in another mount namespace) is passed over.
        let Ok(file) = open_regular(path) else { return };
        let Ok(meta) = file.metadata() else { return };
        if self.files.insert((meta.dev(), meta.ino()))
            && hides_sqlite(&file).unwrap_or(false)
            && !asks_for_locks(&file).unwrap_or(false)
        {
            let library = self.library.display().to_string();
            self.say(format_args!(
                "{} has SQLite linked in, where it cannot be reached: databases that it opens are opened without \
                 turnstile. Load the extension there (load_extension('{library}')), or build it against the \
                 shared libsqlite3.",
                path.display()
            ));
        }
    }

    /// What dlmopen(3) loads, by its path or, where the dynamic linker is to find it, by its name.
    fn judge_apart(&mut self, name: &str) {
        let path = Path::new(name);
        let brings = |file: std::fs::File| brings_sqlite(&file).unwrap_or(false);
        if name.contains(SQLITE_LIBRARY) || (path.is_absolute() && open_regular(path).is_ok_and(brings)) {
            let library = self.library.display().to_string();
            self.say(format_args!(
                "{name} is loaded into a namespace of its own (dlmopen), where SQLite cannot be reached: databases that \
                 are opened there are opened without turnstile. Load the extension there (load_extension('{library}')), \
                 or use dlopen."
            ));
        }
    }

    /// One line on standard error, once.
    pub fn say(&mut self, message: impl Display) {
        // It may hold names that others chose: no control characters on a terminal.
        let line: String =
            message.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        if self.said.len() < MOST_LINES && self.said.insert(line.clone()) {
            let _ = writeln!(io::stderr(), "turnstile: {line}");
        }
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// It calls the C library's locks by the dynamic linker: what a SQLite in it asks of the C library is answered.
fn asks_for_locks(file: &std::fs::File) -> io::Result<bool> {
    Elf::read(file)?.map_or(Ok(false), |elf| elf.calls(file, &["fcntl", "fcntl64"]))
}

/// Whether the file has a SQLite of its own whose `sqlite3_open*` are called without the dynamic linker.
pub fn hides_sqlite(file: &std::fs::File) -> io::Result<bool> {
    let Some(elf) = Elf::read(file)? else { return Ok(false) };
    for bytes in SQLITE_BYTES {
        if !elf.holds(file, bytes)? {
            return Ok(false);
        }
    }
    let open = elf.open_symbols(file)?;
    // A shared library that offers them is called through them, by itself too unless it was linked `-Bsymbolic`;
    // an executable binds its own calls when it is linked.
    let shared = open.defined && elf.interpreter.is_none() && !elf.symbolic;
    Ok(!open.undefined && !shared)
}

/// Whether SQLite gets loaded with the file: in it, or as the library that it needs.
fn brings_sqlite(file: &std::fs::File) -> io::Result<bool> {
    let Some(elf) = Elf::read(file)? else { return Ok(false) };
    if elf.needed.iter().any(|name| name.starts_with(SQLITE_LIBRARY)) {
        return Ok(true);
    }
    Ok(elf.holds(file, SQLITE_BYTES[0])? && elf.holds(file, SQLITE_BYTES[1])?)
}

/// The files of which a process has code mapped.
fn mapped_files(pid: i32) -> Vec<PathBuf> {
    let Ok(maps) = std::fs::read(format!("/proc/{pid}/maps")) else { return Vec::new() };
    let line = |line: &[u8]| {
        let path = line.iter().position(|b| *b == b'/')?;
        let executable = line.split(|b| *b == b' ').nth(1).is_some_and(|mode| mode.get(2) == Some(&b'x'));
        executable.then(|| PathBuf::from(std::ffi::OsStr::from_bytes(&line[path..])))
    };
    maps.split(|b| *b == b'\n').filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn send(reports: &Reports, text: &str) {
        use std::os::linux::net::SocketAddrExt;
        let name = reports.address().strip_prefix('@').unwrap();
        let to = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        UnixDatagram::unbound().unwrap().send_to_addr(text.as_bytes(), &to).unwrap();
    }

    #[test]
    fn a_report_is_heard_and_its_objects_are_queued_once() {
        let mut reports = Reports::listen(Path::new("/lib/libturnstile.so"), false).unwrap();
        assert!(!reports.heard());
        send(&reports, "hello 7 /bin/app\n/lib/a.so\n/lib/libturnstile.so\nrelative.so");
        send(&reports, "loaded 7 /bin/app\n/lib/a.so\n/lib/b.so");
        reports.receive();
        assert!(reports.heard());
        assert_eq!(reports.queued, ["/lib/a.so", "/bin/app", "/lib/b.so"].map(PathBuf::from));
    }

    #[test]
    fn garbage_is_no_report() {
        let mut reports = Reports::listen(Path::new("/lib/libturnstile.so"), false).unwrap();
        for text in ["", "hello", "hello x /bin/app", "hello 7", "\n\n", "other 7 /bin/app\n/lib/a.so"] {
            send(&reports, text);
        }
        reports.receive();
        assert!(!reports.heard() && reports.queued.is_empty() && reports.said.is_empty());
    }

    #[test]
    fn a_message_is_said_once_and_without_control_characters() {
        let mut reports = Reports::listen(Path::new("/lib/libturnstile.so"), false).unwrap();
        for _ in 0..2 {
            send(&reports, "unreached 7 /bin/app\n/lib/a.so: \x1b[31mwhy");
            reports.receive();
        }
        assert_eq!(reports.said, HashSet::from(["not reached: /lib/a.so: ?[31mwhy".to_owned()]));
    }

    #[test]
    fn the_code_of_this_process_is_found_in_its_maps() {
        let exe = std::fs::canonicalize(std::env::current_exe().unwrap()).unwrap();
        assert!(mapped_files(std::process::id() as i32).contains(&exe));
    }
}
