//! The command as a child process: started with the signal state that `turnstile run` was given, told of the
//! signals that reach `turnstile run` alone, stopped and continued with it, and died like.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, raise, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::unistd::Pid;

/// What is passed on. `SIGCHLD` is for ourselves, and comes by the same descriptor.
const FORWARDED: [Signal; 9] = [
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    /// By the signal of this number.
    Killed(i32),
}

/// The signals of this process, taken in through a descriptor from now on.
pub struct Signals {
    pub fd: SignalFd,
    /// The mask before, which the command gets.
    inherited: SigSet,
}

impl Signals {
    pub fn take() -> nix::Result<Signals> {
        // An ignored SIGCHLD would have the kernel reap the command, and its status with it.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(Signal::SIGCHLD, &default)? };
        let mut taken: SigSet = FORWARDED.into_iter().collect();
        taken.add(Signal::SIGCHLD);
        let inherited = taken.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let fd = SignalFd::with_flags(&taken, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd, inherited })
    }
}

/// The running command.
pub struct Child {
    pid: Pid,
}

impl Child {
    /// Starts `program` with the given arguments (the first is its own name) and environment.
    pub fn start(program: &Path, args: &[CString], env: &[CString], signals: &Signals) -> nix::Result<Child> {
        let mut attr = PosixSpawnAttr::init()?;
        attr.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
        attr.set_sigmask(&signals.inherited)?;
        // Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored in what is started.
        attr.set_sigdefault(&SigSet::from(Signal::SIGPIPE))?;
        let actions = PosixSpawnFileActions::init()?;
        let spawn = |program: &CStr, args: &[CString]| posix_spawn(program, &actions, &attr, args, env);
        let path = CString::new(program.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
        let pid = match spawn(&path, args) {
            // A script without a `#!` line is the shell's, as execvp(3) has it.
            Err(Errno::ENOEXEC) => {
                let mut shell = vec![c"sh".to_owned(), path];
                shell.extend_from_slice(args.get(1..).unwrap_or_default());
                spawn(c"/bin/sh", &shell)?
            }
            other => other?,
        };
        Ok(Child { pid })
    }

    /// Acts on one signal that this process got.
    pub fn pass_on(&self, info: &siginfo) {
        let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else { return };
        if FORWARDED.contains(&signal) && is_for_us_alone(info, self.pid) {
            let _ = kill(self.pid, signal);
        }
    }

    /// Collects every child that changed its state: as process 1 of a container, strangers too. Stops when the
    /// command stopped. Returns how the command ended, if it did.
    pub fn reap(&self) -> Option<End> {
        loop {
            let mut status = 0;
            // SAFETY: a place for one int. (nix's waitpid has no name for real-time signals and loses them.)
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::WUNTRACED) };
            if pid <= 0 {
                return None;
            }
            if pid != self.pid.as_raw() {
                continue;
            }
            if libc::WIFEXITED(status) {
                return Some(End::Exited(libc::WEXITSTATUS(status)));
            }
            if libc::WIFSIGNALED(status) {
                return Some(End::Killed(libc::WTERMSIG(status)));
            }
            if let Ok(signal) = Signal::try_from(libc::WSTOPSIG(status)) {
                stop_by(signal);
            }
        }
    }
}

/// A signal that the terminal sent (`SI_KERNEL`) has reached the command too: it is in our process group, or has
/// made a group of its own so as not to be reached. One that a process sent may be for the whole group as well;
/// that cannot be told, and the command gets it twice then, as `timeout(1)` does it. What the command itself sent
/// (`kill 0`) does not go back to it.
fn is_for_us_alone(info: &siginfo, child: Pid) -> bool {
    info.ssi_code <= 0 && info.ssi_pid != child.as_raw() as u32
}

/// Stops this process as the command was stopped, so that the shell sees the job stop; returns when continued.
fn stop_by(signal: Signal) {
    if signal == Signal::SIGSTOP {
        let _ = raise(signal);
        return;
    }
    // Blocked until it is raised, and lifted then: it merges with one that is pending already, and stops us once.
    let only = SigSet::from(signal);
    let before = only.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let _ = raise(signal);
    let _ = only.thread_unblock();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
}

/// Ends this process as the command ended.
pub fn end_like(end: End) -> ExitCode {
    match end {
        End::Exited(status) => ExitCode::from(status as u8),
        End::Killed(signal) => {
            // The command has dumped its core; ours would only hide it (a dump through a pipe knows no limit).
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            let _ = nix::sys::prctl::set_dumpable(false);
            // SAFETY: the default action runs no code of ours, and the set lives through both calls.
            unsafe {
                let mut only = std::mem::zeroed();
                libc::sigemptyset(&mut only);
                libc::sigaddset(&mut only, signal);
                libc::signal(signal, libc::SIG_DFL);
                libc::sigprocmask(libc::SIG_UNBLOCK, &only, std::ptr::null_mut());
                libc::raise(signal);
            }
            // Still here: process 1 of a container does not die by its own signals.
            ExitCode::from(128u8.wrapping_add(signal as u8))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(code: i32, sender: u32) -> siginfo {
        // SAFETY: a struct of numbers; all zero is a value of it.
        let mut info: siginfo = unsafe { std::mem::zeroed() };
        info.ssi_code = code;
        info.ssi_pid = sender;
        info
    }

    #[test]
    fn only_what_others_sent_to_us_is_passed_on() {
        let child = Pid::from_raw(77);
        assert!(is_for_us_alone(&info(libc::SI_USER, 5), child));
        assert!(is_for_us_alone(&info(libc::SI_TKILL, 5), child));
        assert!(!is_for_us_alone(&info(libc::SI_KERNEL, 0), child), "the terminal reached it too");
        assert!(!is_for_us_alone(&info(libc::SI_USER, 77), child), "it came from there");
    }
}
