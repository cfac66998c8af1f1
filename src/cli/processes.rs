//! Processes that begin together and never outlive the command that started them, and the signals that end it early.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

/// Why a command ends without a result.
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    #[error("stopped by {}", .0.as_str())]
    Signal(Signal),
    #[error("{0}")]
    Failed(String),
}

impl Stop {
    /// For `map_err`: what was being done, and what the system said.
    pub fn doing<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Stop {
        move |e| Stop::Failed(format!("{what}: {e}"))
    }
}

/// The signals of this process, taken in through a descriptor from now on.
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    pub fn take() -> Result<Signals, Stop> {
        let take = || {
            let set: SigSet =
                [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
            set.thread_block()?;
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        };
        Ok(Signals { fd: take().map_err(Stop::doing("cannot take signals"))? })
    }

    /// Sleeps until a child ended, until `other` has something to read, or until the time has come.
    pub fn wait(&self, until: Instant, other: Option<BorrowedFd>) -> Result<(), Stop> {
        let mut fds = vec![PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        fds.extend(other.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        // Rounded up, or the last millisecond would be spent asking.
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        while let Ok(Some(info)) = self.fd.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) | Err(_) => {}
                Ok(signal) => return Err(Stop::Signal(signal)),
            }
        }
        Ok(())
    }
}

/// `command` without any setting of turnstile's: neither side of the comparison may inherit one.
pub fn cleaned(mut command: Command) -> Command {
    for (name, value) in std::env::vars_os() {
        let name_is_ours = name.as_encoded_bytes().starts_with(b"TURNSTILE_");
        let preloads_us = name == "LD_PRELOAD" && value.to_string_lossy().contains("libturnstile");
        if name_is_ours || preloads_us {
            command.env_remove(name);
        }
    }
    command
}

/// A started process. Dropped, it is killed and reaped.
pub struct Process {
    child: Child,
    ended: Option<(ExitStatus, Instant)>,
}

impl Process {
    /// Starts it. The kernel sends it `at_our_death` should this process end without a chance to clean up.
    pub fn start(command: &mut Command, at_our_death: Signal) -> io::Result<Process> {
        // SAFETY: between fork and exec only two system calls, both async-signal-safe, on memory of this frame.
        unsafe {
            command.pre_exec(move || {
                SigSet::empty().thread_set_mask()?;
                Ok(set_pdeathsig(at_our_death)?)
            });
        }
        Ok(Process { child: command.spawn()?, ended: None })
    }

    /// Its status and when it was seen to have ended, if it has.
    pub fn ended(&mut self) -> Option<(ExitStatus, Instant)> {
        if self.ended.is_none() {
            let status = self.child.try_wait().ok().flatten();
            self.ended = status.map(|s| (s, Instant::now()));
        }
        self.ended
    }

    /// Asks it to end, and kills it if it has not after `patience`.
    pub fn end(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        self.signal(Signal::SIGTERM);
        while self.ended().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
    }

    fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
    }

    /// Only while it has not been reaped: its pid is its own until then.
    fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// Processes that say `ready` on their standard output, begin when their standard input ends, and say later, in
/// a line of less than `PIPE_BUF` bytes, what came of it. All share both pipes: one close() starts them all.
pub struct Group {
    processes: Vec<Process>,
    barrier: Option<PipeWriter>,
    lines: Option<PipeReader>,
    text: Vec<u8>,
}

/// What became of a group.
pub struct Finished {
    pub began: Instant,
    /// In the order of the commands. `None`: had to be killed because its time was over.
    pub endings: Vec<Option<(ExitStatus, Instant)>>,
    /// What they said after `ready`, in any order.
    pub lines: Vec<String>,
}

impl Group {
    /// Starts the commands; their standard error is the caller's to set.
    pub fn start(commands: Vec<Command>) -> io::Result<Group> {
        let (release, barrier) = io::pipe()?;
        let (lines, say) = io::pipe()?;
        fcntl(&lines, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut group =
            Group { processes: Vec::new(), barrier: Some(barrier), lines: Some(lines), text: Vec::new() };
        for mut command in commands {
            command.stdin(Stdio::from(release.try_clone()?)).stdout(Stdio::from(say.try_clone()?));
            group.processes.push(Process::start(&mut command, Signal::SIGKILL)?);
        }
        Ok(group)
    }

    /// Waits until all are ready, lets them begin, and waits for their end, `limit` for each of the two.
    pub fn run(mut self, signals: &Signals, limit: Duration) -> Result<Finished, Stop> {
        self.ready(signals, limit)?;
        self.finish(signals, limit)
    }

    /// Waits until all are ready. One that ends instead has an error to show, and is not waited for.
    pub fn ready(&mut self, signals: &Signals, limit: Duration) -> Result<(), Stop> {
        let until = Instant::now() + limit;
        while self.count_ready() + self.count_ended() < self.processes.len() && Instant::now() < until {
            self.pass_time(signals, until)?;
        }
        Ok(())
    }

    /// Lets them begin and waits for their end.
    pub fn finish(mut self, signals: &Signals, limit: Duration) -> Result<Finished, Stop> {
        self.barrier = None;
        let began = Instant::now();
        let until = began + limit;
        while self.count_ended() < self.processes.len() && Instant::now() < until {
            self.pass_time(signals, until)?;
        }
        let endings = self.processes.iter_mut().map(Process::ended).collect();
        self.kill();
        self.read();
        let text = String::from_utf8_lossy(&self.text);
        let lines = text.lines().filter(|l| *l != "ready").map(str::to_owned).collect();
        Ok(Finished { began, endings, lines })
    }

    fn pass_time(&mut self, signals: &Signals, until: Instant) -> Result<(), Stop> {
        signals.wait(until, self.lines.as_ref().map(|l| l.as_fd()))?;
        self.read();
        Ok(())
    }

    fn read(&mut self) {
        let Some(lines) = &mut self.lines else { return };
        // Not an error: nothing more for now. The end: nobody has the pipe any more, and polling it is pointless.
        if lines.read_to_end(&mut self.text).is_ok() {
            self.lines = None;
        }
    }

    fn count_ready(&self) -> usize {
        self.text.split(|b| *b == b'\n').filter(|line| *line == b"ready").count()
    }

    fn count_ended(&mut self) -> usize {
        self.processes.iter_mut().filter_map(Process::ended).count()
    }

    fn kill(&mut self) {
        self.processes.iter_mut().for_each(Process::kill);
    }
}

impl Drop for Group {
    /// All are killed before the first is waited for.
    fn drop(&mut self) {
        self.kill();
    }
}
