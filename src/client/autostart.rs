//! A session with a broker, started if there is none: by one of however many processes that want it at once.

use super::JoinError;
use super::config::{self, Config, Fallback};
use super::greeting::ConnectError;
use super::place;
use super::session::Session;
use super::spawn;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a started broker may take to listen.
const START_LIMIT: Duration = Duration::from_secs(10);
const RELAUNCH: Duration = Duration::from_millis(500);
/// Exit of a started broker after its last member left.
const IDLE_EXIT: &str = "60s";

/// Connects to the configured broker, or to the first default one that is there, or starts one.
pub fn session(config: &Config) -> Result<Session, JoinError> {
    if let Some(path) = &config.socket {
        return Session::open(path, &config.believed).map_err(|e| {
            let hint = match e {
                ConnectError::Absent(_) => {
                    " (TURNSTILE_SOCKET names it, so none is started: `turnstile serve`)"
                }
                _ => "",
            };
            JoinError::NoBroker(format!("{e}{hint}"))
        });
    }
    let mut absent = None;
    let no_broker = |e: io::Error| JoinError::NoBroker(e.to_string());
    for path in place::candidates() {
        let path = path.map_err(no_broker)?;
        // A host's broker that is not for us does not keep us from our own.
        let last = geteuid().is_root() || path != Path::new(place::HOST_SOCKET);
        match Session::open(&path, &config.believed) {
            Ok(session) => return Ok(session),
            Err(e @ ConnectError::Absent(_)) => absent = Some(e),
            Err(e) if last => return Err(JoinError::NoBroker(e.to_string())),
            Err(e) => absent = Some(e),
        }
    }
    let absent = absent.map_or_else(|| "no broker".to_owned(), |e| e.to_string());
    if config.fallback != Fallback::Autostart {
        return Err(JoinError::NoBroker(format!("{absent}, and TURNSTILE_FALLBACK forbids starting one")));
    }
    if place::in_container() {
        return Err(JoinError::NoBroker(format!(
            "{absent}: in a container no broker is started, because other containers would not find it. Run \
             `turnstile serve` on the host, mount the directory of its socket, and set TURNSTILE_SOCKET"
        )));
    }
    start(&place::default_socket().map_err(no_broker)?, config)
}

/// Starts a broker on `path`, unless somebody else just has.
fn start(path: &Path, config: &Config) -> Result<Session, JoinError> {
    let program = program(config).ok_or_else(|| {
        JoinError::NoBroker(
            "no broker is running, and the `turnstile` program that could start one is neither in TURNSTILE_BIN, \
             nor beside the extension, nor on PATH"
                .into(),
        )
    })?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.exists() {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    let end = Instant::now() + START_LIMIT;
    let _lock = starters_lock(&dir.join("starting.lock"), end)?;
    let mut launched: Option<Instant> = None;
    loop {
        match Session::open(path, &config.believed) {
            Ok(session) => return Ok(session),
            Err(ConnectError::Absent(_)) => {}
            Err(e) => return Err(JoinError::NoBroker(e.to_string())),
        }
        if Instant::now() >= end {
            let what = format!("started {} but it does not listen on {}", program.display(), path.display());
            return Err(JoinError::NoBroker(what));
        }
        // Again after a while: the first may have met a broker that was just about to exit.
        if launched.is_none_or(|at| at.elapsed() >= RELAUNCH) {
            launch(&program, path)?;
            launched = Some(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// One starter at a time; the others find the broker once they get the lock.
fn starters_lock(path: &Path, end: Instant) -> io::Result<Flock<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, e)) if Instant::now() >= end => return Err(e.into()),
            Err((back, _)) => file = back,
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn launch(program: &Path, socket: &Path) -> io::Result<()> {
    let c = |bytes: &[u8]| CString::new(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let argv = [
        c(program.as_os_str().as_bytes())?,
        c(b"serve")?,
        c(b"--socket")?,
        c(socket.as_os_str().as_bytes())?,
        c(b"--idle-exit")?,
        c(IDLE_EXIT.as_bytes())?,
    ];
    // The host's environment, if it is its owner's, less what would bring the extension into the broker, or have it speak to the host's
    // service manager.
    let own = |name: &[u8]| {
        matches!(name, b"LD_PRELOAD" | b"NOTIFY_SOCKET" | b"LISTEN_FDS" | b"LISTEN_PID" | b"LISTEN_FDNAMES")
            || name.starts_with(b"TURNSTILE_RUN")
    };
    let environment = std::env::vars_os()
        .filter(|(k, _)| !config::has_anothers_rights() && !own(k.as_bytes()))
        .map(|(k, v)| c(&[k.as_bytes(), b"=", v.as_bytes()].concat()))
        .collect::<io::Result<Vec<_>>>()?;
    spawn::daemon(&argv, &environment)
}

/// `TURNSTILE_BIN`, beside the extension, on `PATH`.
fn program(config: &Config) -> Option<PathBuf> {
    let executable = |p: &PathBuf| {
        p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0) && p.is_absolute()
    };
    if let Some(given) = &config.program {
        return Some(given.clone()).filter(executable);
    }
    let beside = own_path().and_then(|p| Some(p.parent()?.join("turnstile")));
    let on_path = config::environment("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&on_path).map(|d| d.join("turnstile")).collect::<Vec<_>>();
    beside.into_iter().chain(on_path).find(executable)
}

/// The file that this code was loaded from.
pub fn own_path() -> Option<PathBuf> {
    // SAFETY: Dl_info is plain data for which all-zero is valid; dladdr fills it for an address of our own.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(own_path as *const () as *const _, &mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        let name = std::ffi::CStr::from_ptr(info.dli_fname);
        std::fs::canonicalize(std::ffi::OsStr::from_bytes(name.to_bytes())).ok()
    }
}
