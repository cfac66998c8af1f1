//! How the broker ends: at a signal, or when nobody is left.

use super::database::{Database, State};
use super::server::Server;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use std::time::{Duration, Instant};

/// How long open transactions may take to end after SIGTERM.
const STOP_GRACE: Duration = Duration::from_secs(5);

impl Server {
    pub(super) fn signalled(&mut self, signals: &SignalFd) {
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo == Signal::SIGUSR2 as u32 {
                self.hand_over();
            } else if self.stopping.replace(Instant::now()).is_some() {
                tracing::warn!("second signal: not waiting for open transactions");
                self.stopping = Some(Instant::now() - STOP_GRACE);
            } else {
                tracing::info!("stopping: waiting for open transactions");
                for db in self.databases.values() {
                    if let State::Gated { segment, .. } = &db.state {
                        segment.control.stop();
                    }
                }
                self.stop_listening();
            }
        }
    }

    /// Nobody new comes in. Who knocks at the service manager's socket waits there for the next broker.
    fn stop_listening(&mut self) {
        if self.listener.is_given() {
            let _ = self.epoll.delete(&self.listener.socket);
            self.deaf = false;
        }
        self.listener.unlink();
    }

    pub(super) fn may_exit(&mut self, now: Instant) -> bool {
        if self.handing_over {
            return true;
        }
        if let Some(since) = self.stopping {
            let quiet = self.databases.values().all(Database::is_quiet) && self.forming.is_empty();
            if !quiet && now.duration_since(since) < STOP_GRACE {
                return false;
            }
            self.let_everything_go();
            return true;
        }
        let idle = self.databases.is_empty() && self.forming.is_empty();
        match (idle, self.idle_since) {
            (true, None) => self.idle_since = Some(now),
            (false, _) => self.idle_since = None,
            _ => {}
        }
        let due =
            self.idle_since.zip(self.options.idle_exit).is_some_and(|(since, limit)| now >= since + limit);
        if due {
            tracing::info!("nobody is left: exiting");
            self.listener.unlink();
        }
        due
    }

    /// Leaves nothing locked: a quiet database's segment is poisoned (its idle members find out at their next
    /// call) and its gate opened. One with an open transaction keeps its gate, which its members hold: the
    /// kernel opens it when they end.
    fn let_everything_go(&mut self) {
        for (number, db) in std::mem::take(&mut self.databases) {
            if let State::Gated { segment, .. } = &db.state {
                segment.control.poison();
            }
            // After it: a member that takes a lock from now on looks and sees the poison.
            let quiet = db.is_quiet();
            let identity = db.identity;
            if let State::Gated { gate, .. } = self.close_database(db) {
                if quiet {
                    gate.open();
                } else {
                    tracing::warn!(database = ?identity, "stopped over an open transaction: its members keep the gate");
                }
            }
            self.keeping.database_gone(number);
        }
        self.keeping.flush_within(Duration::from_secs(1));
        self.listener.unlink();
    }
}
