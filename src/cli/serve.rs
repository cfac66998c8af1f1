//! `turnstile serve`: the broker.

use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use turnstile::broker::{Limits, Options, Phase, listens_at, raise_descriptor_limit, serve};
use turnstile::client::{config, place};

#[derive(clap::Args, Debug)]
pub struct ServeArgs {
    /// Path of the socket to listen on. Default: /run/turnstile/broker.sock for root; for a user
    /// $XDG_RUNTIME_DIR/turnstile/broker.sock, else a private directory in /tmp.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Exit after this long without members (for example 60s). Default: never.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    idle_exit: Option<std::time::Duration>,
    /// Let other users connect. The proof of access to a database is always an open descriptor of it, so this
    /// opens no data to anyone. Default: yes for root, no for others.
    #[arg(long, value_name = "yes|no", value_parser = parse_yes)]
    everyone: Option<bool>,
    /// Also take databases on FUSE and network filesystems, where turnstile cannot prove that all members see
    /// one file. Two mounts of one directory will lose rows.
    #[arg(long)]
    allow_unsafe_filesystems: bool,
    /// Sessions (processes) that one user may have. Default: as many as a quarter of this process's open files are
    /// enough for (three quarters, if only one's own user connects), 8192 at most.
    #[arg(long, value_name = "N")]
    user_sessions: Option<NonZeroUsize>,
    /// Databases that one user may be the first to open. Default: likewise, 4096 at most.
    #[arg(long, value_name = "N")]
    user_databases: Option<NonZeroUsize>,
    /// Descriptors that may be under way to one user's processes, which do not receive them. Default: an eighth of
    /// the limit of open files, 256 at most.
    #[arg(long, value_name = "N")]
    user_descriptors: Option<NonZeroUsize>,
    /// Leave checkpoints to the programs, as SQLite does.
    #[arg(long)]
    no_checkpointer: bool,
    /// A database that is opened again within this time of its last close (for example 2s) is one that short-lived
    /// programs use: its next last close leaves the file of its WAL, with nothing in it, because using that again is
    /// cheaper than making another one. 0s: every last close removes the WAL.
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "500ms")]
    reuse_wal: std::time::Duration,
    /// Take over from the broker that serves the socket now: its members go on without noticing. (It is sent SIGUSR2,
    /// on which it leaves everything to its keeper and ends.)
    #[arg(long)]
    replace: bool,
    /// Start no process that keeps databases for the next broker if this one is killed.
    #[arg(long, hide = true)]
    no_keeper: bool,
    /// Write one byte to this descriptor once the socket listens.
    #[arg(long, value_name = "FD", hide = true)]
    ready_fd: Option<i32>,
}

fn parse_time(text: &str) -> Result<std::time::Duration, String> {
    config::duration(text).ok_or_else(|| "expected a time such as 60s, 500ms or 2m".into())
}

fn parse_yes(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("expected yes or no".into()),
    }
}

pub fn run(args: ServeArgs) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TURNSTILE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let activated = match activated(args.socket.as_deref()) {
        Ok(activated) => activated,
        Err(e) => return fail(&e),
    };
    let (socket, activated) = match activated {
        Some((socket, fd)) => (socket, Some(fd)),
        None => match args.socket.map_or_else(place::default_socket, Ok) {
            Ok(socket) => (socket, None),
            Err(e) => return fail(&e),
        },
    };
    let root = nix::unistd::geteuid().is_root();
    let everyone = args.everyone.unwrap_or(root);
    let mut limits = Limits::of(raise_descriptor_limit(), everyone);
    for (limit, given) in [
        (&mut limits.sessions, args.user_sessions),
        (&mut limits.databases, args.user_databases),
        (&mut limits.descriptors, args.user_descriptors),
    ] {
        *limit = given.map_or(*limit, NonZeroUsize::get);
    }
    let options = Options {
        socket,
        everyone,
        limits,
        idle_exit: args.idle_exit,
        allow_unsafe: args.allow_unsafe_filesystems,
        checkpointer: (!args.no_checkpointer).then(|| PathBuf::from("/proc/self/exe")),
        reuse_wal: args.reuse_wal,
        keeper: (!args.no_keeper).then(|| PathBuf::from("/proc/self/exe")),
        finder: Some(PathBuf::from("/proc/self/exe")),
        receiver: Some(PathBuf::from("/proc/self/exe")),
        replace: args.replace,
        activated,
        ready: args.ready_fd,
    };
    match serve(options, &tell_manager) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

/// The one socket that a service manager has made (sd_listen_fds(3)), and where it listens; `socket`: where it must.
fn activated(socket: Option<&Path>) -> io::Result<Option<(PathBuf, RawFd)>> {
    let mut given = sd_notify::listen_fds()?;
    let Some(fd) = given.next() else { return Ok(None) };
    if given.next().is_some() {
        return Err(io::Error::other("the service manager passes more than one socket"));
    }
    // SAFETY: the service manager says that it is open, and nothing closes it here.
    let there = listens_at(unsafe { BorrowedFd::borrow_raw(fd) });
    let there = there.map_err(|e| io::Error::new(e.kind(), format!("the service manager's socket: {e}")))?;
    match socket.filter(|socket| *socket != there) {
        Some(socket) => {
            let (socket, there) = (socket.display(), there.display());
            let what = format!("--socket {socket}, but the service manager's listens on {there}");
            Err(io::Error::other(what))
        }
        None => Ok(Some((there, fd))),
    }
}

/// To the service manager, if there is one (sd_notify(3)).
fn tell_manager(phase: Phase) {
    let state = match phase {
        Phase::Listening => sd_notify::NotifyState::Ready,
        Phase::Stopping => sd_notify::NotifyState::Stopping,
    };
    if let Err(e) = sd_notify::notify(&[state]) {
        tracing::warn!("cannot tell the service manager: {e}");
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("turnstile serve: {error}");
    ExitCode::FAILURE
}
