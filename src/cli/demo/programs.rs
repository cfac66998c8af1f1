//! What the demo finds here: the extension, a `sqlite3` shell, a Python that can load extensions.

use std::env;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::cli::extension;
use crate::cli::processes::{Process, Signals, Stop, cleaned};
use crate::cli::run::inspect;

/// A program that is found answers in a moment; one that does not is not waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What can be run.
pub struct Programs {
    /// This program.
    pub turnstile: PathBuf,
    /// The extension, `libturnstile.so`.
    pub library: PathBuf,
    pub shell: Result<Found, Missing>,
    pub python: Result<Found, Missing>,
}

/// A program with a SQLite in it.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Found {
    pub path: PathBuf,
    /// Its SQLite's version.
    pub sqlite: String,
}

/// Why a program cannot be used, and what to do about it.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Missing {
    pub reason: String,
    pub remedy: &'static str,
}

const INSTALL_SHELL: &str =
    "apt install sqlite3 (Debian, Ubuntu), dnf install sqlite (Fedora), apk add sqlite (Alpine)";
const INSTALL_PYTHON: &str = "apt install python3 (Debian, Ubuntu), dnf install python3 (Fedora), apk add python3 \
                              (Alpine); a Python of your own must be configured with \
                              --enable-loadable-sqlite-extensions";

impl Programs {
    pub fn find(signals: &Signals) -> Result<Programs, Stop> {
        let turnstile = env::current_exe().map_err(Stop::doing("cannot find this program's own file"))?;
        let (shell, python) = (find_shell(signals)?, find_python(signals)?);
        // Both are of one system, and so of one C library.
        let found = shell.as_ref().or(python.as_ref()).ok();
        let libc = found.and_then(|found| inspect::libc_of(&found.path));
        let library = extension::find(libc).map_err(Stop::Failed)?;
        Ok(Programs { turnstile, library, shell, python })
    }
}

/// The `sqlite3` that a shell would start.
fn find_shell(signals: &Signals) -> Result<Result<Found, Missing>, Stop> {
    let missing = |reason| Ok(Err(Missing { reason, remedy: INSTALL_SHELL }));
    let Some(path) = on_path("sqlite3") else { return missing("there is no sqlite3 on PATH".to_owned()) };
    let sql = "SELECT sqlite_version() || ' ' || sqlite_compileoption_used('OMIT_LOAD_EXTENSION')";
    let answer = ask(signals, &path, &["-batch", "-init", "/dev/null", ":memory:", sql])?;
    match answer.trim().split_once(' ') {
        Some((version, "0")) => Ok(Ok(Found { path, sqlite: version.to_owned() })),
        Some(_) => missing(format!("{} was built without extension loading", path.display())),
        None => missing(format!("{} does not answer a query", path.display())),
    }
}

/// What [`PROBE`] says.
#[derive(Deserialize)]
struct Python {
    executable: PathBuf,
    sqlite: String,
    loads: bool,
}

/// Its own path (what `PATH` names may be a script that looks for it), and whether it can load extensions.
const PROBE: &str = "import json, sqlite3, sys; print(json.dumps({'executable': sys.executable, \
                     'sqlite': sqlite3.sqlite_version, \
                     'loads': hasattr(sqlite3.Connection, 'enable_load_extension')}))";

/// The first Python that can load extensions: what `PATH` names, or the distribution's.
fn find_python(signals: &Signals) -> Result<Result<Found, Missing>, Stop> {
    let mut reason = "there is no python3 on PATH".to_owned();
    for path in on_path("python3").into_iter().chain([PathBuf::from("/usr/bin/python3")]) {
        if !is_executable(&path) {
            continue;
        }
        match serde_json::from_str::<Python>(&ask(signals, &path, &["-I", "-c", PROBE])?) {
            Ok(python) if python.loads => {
                return Ok(Ok(Found { path: python.executable, sqlite: python.sqlite }));
            }
            Ok(python) => {
                reason =
                    format!("the sqlite3 module of {} cannot load extensions", python.executable.display());
            }
            Err(_) => reason = format!("{} has no usable sqlite3 module", path.display()),
        }
    }
    Ok(Err(Missing { reason, remedy: INSTALL_PYTHON }))
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// What a program prints, or nothing if it cannot be started, fails, or takes too long.
fn ask(signals: &Signals, program: &Path, arguments: &[&str]) -> Result<String, Stop> {
    let nothing = Ok(String::new());
    let Ok((mut answer, say)) = std::io::pipe() else { return nothing };
    // What the program leaves running may hold the pipe, and must not hold us.
    if fcntl(&answer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_err() {
        return nothing;
    }
    let mut command = cleaned(Command::new(program));
    command.args(arguments).stdin(Stdio::null()).stdout(say).stderr(Stdio::null());
    let Ok(mut process) = Process::start(&mut command, Signal::SIGKILL) else { return nothing };
    drop(command); // and with it our copy of the pipe's writing end
    let until = Instant::now() + ANSWER_LIMIT;
    while process.ended().is_none() {
        if Instant::now() >= until {
            return nothing;
        }
        signals.wait(until, None)?;
    }
    let mut text = vec![0; 4096];
    let length = match process.ended() {
        Some((status, _)) if status.success() => answer.read(&mut text).unwrap_or(0),
        _ => 0,
    };
    text.truncate(length);
    Ok(String::from_utf8_lossy(&text).into_owned())
}
