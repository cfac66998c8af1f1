//! A checkpointer that somebody has stopped (SIGSTOP) holds locks for which writers and last closes wait. It is told to go
//! on, and is replaced if it does not.

use super::server::Server;
use crate::planted::planted;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

/// After an order has been out for so long it is looked at, so often.
pub const LOOK: Duration = Duration::from_secs(1);
/// How long it may stay stopped then.
const STAYS: Duration = Duration::from_secs(2);

impl Server {
    /// When the checkpointer is to be looked at.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let at_work = self.checkpointing.iter().filter_map(|number| self.databases.get(number));
        let oldest = at_work.filter_map(|d| d.checkpoints.since()).min()?;
        let running = self.checkpointer.running.as_ref()?;
        Some(running.looked.map_or(oldest, |looked| looked.max(oldest)) + LOOK)
    }

    pub(super) fn watch_checkpointer(&mut self, now: Instant) {
        if self.next_look().is_none_or(|next| now < next) || planted("stopped-checkpointer-left") {
            return;
        }
        let Some(running) = self.checkpointer.running.as_mut() else { return };
        running.looked = Some(now);
        let pid = running.child.id();
        if !is_stopped(pid) {
            running.stopped = None;
            return;
        }
        match running.stopped {
            Some(since) if now.duration_since(since) >= STAYS => {
                tracing::warn!(pid, "the checkpointer stays stopped: it is replaced");
                // It is nobody's fault whose database it was at work on.
                running.replaced = true;
                self.checkpointer.kill();
            }
            Some(_) => {}
            None => {
                tracing::warn!(pid, "the checkpointer was stopped: it is told to go on");
                running.stopped = Some(now);
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGCONT);
            }
        }
    }
}

/// By a signal, or by a tracer (proc(5)). A child that has not been waited for keeps its number.
fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}
