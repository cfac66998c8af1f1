//! `turnstile run -- COMMAND`: starts an existing application with turnstile under its SQLite, unchanged.
//!
//! `libturnstile.so` is preloaded into the command and into whatever that starts; there it makes itself known to
//! each SQLite library before the first connection (`c/preload.c`). This side stays the parent:
//!
//! * [`inspect`]: can the command be preloaded into at all? Asked before it starts.
//! * [`child`]: signals, job control and exit status, as if the command had been started directly.
//! * [`reports`]: what the preloaded library says, and which SQLite it cannot reach. [`elf`]: reading such files.

pub mod child;
pub mod elf;
pub mod inspect;
pub mod reports;
pub mod search;

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use super::extension;
use super::libc::Libc;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use child::{Child, End, Signals, end_like};
use elf::Elf;
use inspect::Missing;
use reports::Reports;

/// `turnstile run` itself could not do its work; as `env(1)` and `timeout(1)` have it.
const EXIT_OWN: u8 = 125;
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

/// Run a command with turnstile under its SQLite.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
It works for programs whose SQLite is a shared library, for those that have SQLite linked in and use the system's C \
library, and for everything they start. A static program is told about: load the extension from such a program \
instead (see README).

  turnstile run -- python3 app.py
  turnstile run -- sh -c 'sqlite3 app.db < a.sql & sqlite3 app.db < b.sql & wait'

Exit status: the command's own; 125 if turnstile could not reach it, 126 if it cannot be executed, 127 if it was not \
found. PRAGMA turnstile_status tells whether a connection is brokered.")]
pub struct RunArgs {
    /// Start the command even if turnstile cannot reach it
    #[arg(long)]
    anyway: bool,
    /// Say which SQLite libraries were reached
    #[arg(short, long)]
    verbose: bool,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command. Its exit status is this program's; if a signal killed it, so does the same signal this
/// program. 127: not found, 126: not executable, 125: not started because turnstile cannot reach it, or because
/// turnstile itself is not in order.
pub fn run(args: RunArgs) -> ExitCode {
    match start_and_follow(&args) {
        Ok(end) => end_like(end),
        Err(Failure { status, message }) => {
            let _ = writeln!(io::stderr(), "turnstile: {message}");
            ExitCode::from(status)
        }
    }
}

/// Why the command was not started.
struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    fn own(message: impl Into<String>) -> Failure {
        Failure { status: EXIT_OWN, message: message.into() }
    }
}

fn start_and_follow(args: &RunArgs) -> Result<End, Failure> {
    let program = find_program(&args.command[0])?;
    let (library, library_elf) = find_library(&program)?;
    let obstacle = inspect::obstacle(&program, &library_elf);
    if let Some((object, obstacle)) = obstacle.as_ref().filter(|_| !args.anyway) {
        return Err(Failure::own(format!(
            "cannot reach SQLite in {}: {obstacle}.\nturnstile: {}\nturnstile: Not started; with --anyway it runs, \
             and opens its databases without turnstile.",
            object.display(),
            obstacle.remedy(),
        )));
    }
    let signals = Signals::take().map_err(|e| Failure::own(format!("cannot take signals: {e}")))?;
    let mut reports = Reports::listen(&library, args.verbose)
        .map_err(|e| Failure::own(format!("cannot make a socket for reports: {e}")))?;
    let argv: Vec<CString> = args.command.iter().map(|a| text(a)).collect();
    let child = Child::start(&program, &argv, &environment(&library, reports.address()), &signals)
        .map_err(|e| not_started(&args.command[0], e))?;
    let end = follow(&child, &signals, &mut reports);
    reports.finish();
    if !reports.heard() && obstacle.is_none() {
        reports.say(format_args!(
            "LD_PRELOAD had no effect in {}: nothing in it was reached, and databases that it opened were opened \
             without turnstile",
            program.display()
        ));
    }
    Ok(end)
}

/// Until the command ends: passes its signals on and takes reports in.
fn follow(child: &Child, signals: &Signals, reports: &mut Reports) -> End {
    loop {
        let mut fds = [
            PollFd::new(signals.fd.as_fd(), PollFlags::POLLIN),
            PollFd::new(reports.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = match reports.due() {
            None => PollTimeout::NONE,
            Some(due) => due.saturating_duration_since(Instant::now()).try_into().unwrap_or(PollTimeout::MAX),
        };
        let _ = poll(&mut fds, timeout);
        while let Ok(Some(info)) = signals.fd.read_signal() {
            child.pass_on(&info);
        }
        if let Some(end) = child.reap() {
            return end;
        }
        reports.receive();
        if reports.due().is_some_and(|due| due <= Instant::now()) {
            reports.work();
        }
    }
}

/// The extension for the program's C library, which the dynamic linker must be able to load.
fn find_library(program: &Path) -> Result<(PathBuf, Elf), Failure> {
    let libc = inspect::libc_of(program);
    let path = extension::find(libc).map_err(|why| match libc {
        Some(Libc::Musl) => Failure::own(format!("{} runs on musl, and there is {why}", program.display())),
        _ => Failure::own(why),
    })?;
    // The dynamic linker has no way to quote them (ld.so(8)).
    if path.as_os_str().as_bytes().iter().any(|b| matches!(b, b' ' | b':')) {
        return Err(Failure::own(format!(
            "{}: LD_PRELOAD takes no path with a space or colon",
            path.display()
        )));
    }
    match File::open(&path).and_then(|file| Elf::read(&file)) {
        Ok(Some(elf)) => Ok((path, elf)),
        Ok(None) => Err(Failure::own(format!("{} is no shared library", path.display()))),
        Err(e) => Err(Failure::own(format!("{}: {e}", path.display()))),
    }
}

fn find_program(command: &OsStr) -> Result<PathBuf, Failure> {
    inspect::find(command, std::env::var_os("PATH").as_deref()).map_err(|missing| match missing {
        Missing::NotFound => not_started(command, Errno::ENOENT),
        Missing::NotExecutable(e) => not_started(command, e),
    })
}

fn not_started(command: &OsStr, error: Errno) -> Failure {
    let status = if error == Errno::ENOENT { EXIT_NOT_FOUND } else { EXIT_NOT_EXECUTABLE };
    Failure { status, message: format!("{}: {}", command.display(), error.desc()) }
}

/// This program's environment, with the library in front of what is preloaded already.
fn environment(library: &Path, report_address: &str) -> Vec<CString> {
    let ours = ["LD_PRELOAD", "TURNSTILE_RUN", reports::ADDRESS_VARIABLE];
    let mut env: Vec<(OsString, OsString)> =
        std::env::vars_os().filter(|(name, _)| !ours.iter().any(|o| name == o)).collect();
    let preloaded = extension::preload_path(library);
    env.push((
        "LD_PRELOAD".into(),
        preload(preloaded.as_os_str(), std::env::var_os("LD_PRELOAD").as_deref()),
    ));
    env.push(("TURNSTILE_RUN".into(), "1".into()));
    env.push((reports::ADDRESS_VARIABLE.into(), report_address.into()));
    if std::env::var_os("TURNSTILE_BIN").is_none()
        && let Ok(exe) = std::env::current_exe()
    {
        env.push(("TURNSTILE_BIN".into(), exe.into()));
    }
    let entry = |(mut name, value): (OsString, OsString)| {
        name.push("=");
        name.push(value);
        text(&name)
    };
    env.into_iter().map(entry).collect()
}

/// `library`, then what `LD_PRELOAD` held, once each.
fn preload(library: &OsStr, present: Option<&OsStr>) -> OsString {
    let mut list = library.as_bytes().to_vec();
    let entries = present.unwrap_or_default().as_bytes().split(|b| matches!(b, b' ' | b':'));
    for entry in entries.filter(|e| !e.is_empty() && *e != library.as_bytes()) {
        list.push(b':');
        list.extend_from_slice(entry);
    }
    OsString::from_vec(list)
}

/// Arguments and environment come from the kernel, which ends them with NUL.
fn text(value: &OsStr) -> CString {
    CString::new(value.as_bytes()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        run: RunArgs,
    }

    #[test]
    fn the_command_keeps_its_own_options() {
        for line in [&["run", "--", "app", "--anyway", "-v"][..], &["run", "app", "--anyway", "-v"]] {
            let args = Program::try_parse_from(line).unwrap().run;
            assert_eq!(args.command, ["app", "--anyway", "-v"]);
            assert!(!args.anyway && !args.verbose);
        }
        let args = Program::try_parse_from(["run", "--anyway", "--", "app"]).unwrap().run;
        assert!(args.anyway && args.command == ["app"]);
        assert!(Program::try_parse_from(["run"]).is_err());
    }

    #[test]
    fn what_is_preloaded_already_stays_behind_the_library() {
        let list = |present: Option<&str>| preload(OsStr::new("/l/t.so"), present.map(OsStr::new));
        assert_eq!(list(None), "/l/t.so");
        assert_eq!(list(Some("")), "/l/t.so");
        assert_eq!(list(Some("/a.so /b.so")), "/l/t.so:/a.so:/b.so");
        assert_eq!(list(Some("/a.so:/l/t.so")), "/l/t.so:/a.so", "run within run");
    }

    #[test]
    fn exit_statuses_are_those_of_env() {
        assert_eq!(not_started(OsStr::new("app"), Errno::ENOENT).status, 127);
        assert_eq!(not_started(OsStr::new("app"), Errno::EACCES).status, 126);
    }
}
