//! The broker that `demo` and `bench` start for their own databases, and end.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::Signal;

use super::processes::{Process, Signals, Stop, cleaned};

/// A broker for one command's databases alone. Dropped, it is ended.
pub struct Broker {
    process: Process,
    pub socket: PathBuf,
    log: PathBuf,
}

impl Broker {
    /// Starts it, with its socket and its log in `directory`, and waits until it listens.
    pub fn start(program: &Path, directory: &Path, signals: &Signals) -> Result<Broker, Stop> {
        const LIMIT: Duration = Duration::from_secs(10);
        let (socket, log) = (directory.join("broker.sock"), directory.join("broker.log"));
        let start = || {
            let (ready, tell) = io::pipe()?;
            fcntl(&ready, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            let mut command = cleaned(Command::new(program));
            command.arg("serve").arg("--socket").arg(&socket).args(["--everyone", "no", "--ready-fd"]);
            command.arg(tell.as_raw_fd().to_string());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
            let number = tell.as_raw_fd();
            // SAFETY: one system call between fork and exec, on a descriptor that `tell` keeps open.
            unsafe {
                command.pre_exec(move || {
                    fcntl(BorrowedFd::borrow_raw(number), FcntlArg::F_SETFD(FdFlag::empty()))?;
                    Ok(())
                });
            }
            Ok((ready, Process::start(&mut command, Signal::SIGTERM)?))
        };
        let (mut ready, process) = start().map_err(Stop::doing::<io::Error>("cannot start the broker"))?;
        let mut broker = Broker { process, socket, log };
        let until = Instant::now() + LIMIT;
        while broker.process.ended().is_none() && Instant::now() < until {
            signals.wait(until, Some(ready.as_fd()))?;
            if ready.read(&mut [0]).is_ok_and(|n| n == 1) {
                return Ok(broker);
            }
        }
        Err(Stop::Failed(format!("the broker did not start: {}", broker.last_words())))
    }

    /// It should still be there when the work is done.
    pub fn fault(&mut self) -> Option<String> {
        let (status, _) = self.process.ended()?;
        Some(format!("the broker ended before its time ({status}): {}", self.last_words()))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().next_back().unwrap_or("its log is empty").to_owned()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process.end(Duration::from_secs(5));
    }
}
