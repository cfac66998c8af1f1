//! What kind of program a command starts, and which SQLite it would use, told before it runs.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::libc::Libc;
use super::run::elf::Elf;
use super::run::inspect;
use super::run::reports::hides_sqlite;

/// How a program is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Glibc,
    Musl,
    /// No dynamic linker: nothing can be preloaded, and nothing loaded as an extension.
    Static,
    StaticGo,
}

impl Kind {
    pub fn of(elf: &Elf) -> Kind {
        match &elf.interpreter {
            None if elf.is_go() => Kind::StaticGo,
            None => Kind::Static,
            Some(_) => match Libc::of(elf) {
                Libc::Glibc => Kind::Glibc,
                Libc::Musl => Kind::Musl,
            },
        }
    }

    pub fn describe(self) -> &'static str {
        match self {
            Kind::Glibc => "dynamic, glibc",
            Kind::Musl => "dynamic, musl",
            Kind::Static => "static",
            Kind::StaticGo => "static, Go",
        }
    }
}

/// Where a program's SQLite comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Sqlite {
    /// This shared library, which the dynamic linker loads with it.
    Shared(PathBuf),
    /// It has one linked in that nobody else can call.
    LinkedIn,
    /// None is seen: there is none, or something loads it later.
    NotSeen,
}

/// What a command starts.
#[derive(Debug)]
pub struct Program {
    /// The program itself: for a script its interpreter.
    pub path: PathBuf,
    pub kind: Kind,
    pub sqlite: Sqlite,
}

impl Program {
    /// `None`: it cannot be read, or is no program.
    pub fn of(command: &Path) -> Option<Program> {
        let (path, file, elf) = inspect::started(command)?;
        let kind = Kind::of(&elf);
        let shared = || libraries(&path, &elf).into_iter().find(|l| is_libsqlite3(l));
        let sqlite = match kind {
            _ if hides_sqlite(&file).unwrap_or(false) => Sqlite::LinkedIn,
            Kind::Glibc | Kind::Musl => shared().map_or(Sqlite::NotSeen, Sqlite::Shared),
            Kind::Static | Kind::StaticGo => Sqlite::NotSeen,
        };
        Some(Program { path, kind, sqlite })
    }
}

fn is_libsqlite3(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libsqlite3.so"))
}

/// The libraries that the dynamic linker would load with the program, as `ldd` tells them. Only a dynamic linker of the
/// usual name is asked: a file can name any program as its own.
fn libraries(path: &Path, elf: &Elf) -> Vec<PathBuf> {
    let Some(linker) = elf
        .interpreter
        .as_ref()
        .filter(|linker| linker.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-")))
    else {
        return Vec::new();
    };
    let mut command = Command::new(linker);
    command.arg("--list").arg(path).env_remove("LD_PRELOAD");
    let listed = output_within(command, Duration::from_secs(5)).unwrap_or_default();
    // "	libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f...)"
    let line = |line: &str| {
        let found = line.split_once(" => ")?.1.rsplit_once(" (").map_or("", |(path, _)| path);
        found.starts_with('/').then(|| PathBuf::from(found))
    };
    listed.lines().filter_map(line).collect()
}

/// What a command prints, if it ends well within `limit`; else it is killed.
pub fn output_within(mut command: Command, limit: Duration) -> Option<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut output = child.stdout.take()?;
    let end = Instant::now() + limit;
    let mut text = Vec::new();
    let mut part = [0; 4096];
    let whole = loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => break false,
            _ => match output.read(&mut part) {
                Ok(0) => break true,
                Ok(n) => text.extend_from_slice(&part[..n]),
                Err(_) => break false,
            },
        }
        if text.len() > 1 << 20 {
            break false;
        }
    };
    if !whole {
        let _ = child.kill();
    }
    let ended_well = child.wait().is_ok_and(|status| status.success());
    (whole && ended_well).then(|| String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_dynamic_and_has_sqlite_linked_in() {
        let own = Program::of(&std::env::current_exe().unwrap()).unwrap();
        assert_eq!(own.sqlite, Sqlite::LinkedIn);
        assert!(matches!(own.kind, Kind::Glibc | Kind::Musl), "{own:?}");
    }

    #[test]
    fn a_script_is_its_interpreter() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\nexit\n").unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = Program::of(&script).unwrap();
        assert_eq!((program.path, program.sqlite), (PathBuf::from("/bin/sh"), Sqlite::NotSeen));
    }

    #[test]
    fn a_command_that_does_not_end_is_killed() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(
            output_within(shell("echo a; echo b"), Duration::from_secs(20)).as_deref(),
            Some("a\nb\n")
        );
        assert_eq!(output_within(shell("echo a; exit 1"), Duration::from_secs(20)), None);
        assert_eq!(output_within(shell("exec sleep 60"), Duration::from_millis(50)), None);
    }
}
