//! `turnstile keeper`: the broker's child that outlives it.
//!
//! It holds descriptors and what was said with them, and does nothing else as long as its broker lives. When the broker
//! is gone it gives everything to the next one, which knocks at a socket beside the broker's; until then it sees to it
//! that no gate stands for members that are dead or have left. It ends when nothing is kept and there is no broker.
//!
//! * [`store`]: what is kept, and when it is nobody's any more.

mod store;

use self::store::Store;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt::PeerCredentials};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use turnstile::planted::planted;
use turnstile::segment::layout::LAYOUT_VERSION;
use turnstile::wire::keeper::{FromKeeper, Greeting, KEEPER_MAGIC, KEEPER_VERSION, Kept, ToKeeper};
use turnstile::wire::socket;

/// Without a broker: how often it is looked for members that called exec or closed everything, which no pidfd tells.
const LOOK: u16 = 250;
/// And while the last broker is about to end.
const LOOK_SOON: u16 = 5;
/// How long the next broker may take to read what it is given.
const PATIENCE: Duration = Duration::from_secs(5);

struct Keeper {
    /// The broker's, if there is one.
    broker: Option<OwnedFd>,
    /// Where the next one knocks, and the path of the broker's own socket.
    listener: Option<(OwnedFd, PathBuf)>,
    /// The broker's socket is not for us to remove.
    leave_socket: bool,
    /// Who has knocked and said nothing yet.
    visitors: Vec<OwnedFd>,
    store: Store,
    /// What the broker waits for, and the mark up to which it has to be closed.
    asked: Vec<(u64, u64)>,
    /// Closed where there is no room for a descriptor that must be had: the next broker's, when it knocks.
    spare: Option<OwnedFd>,
}

pub fn run() -> ExitCode {
    // What ends the broker does not end this.
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR2] {
        // SAFETY: ignoring a signal runs no code of ours.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let _ = nix::sys::prctl::set_name(c"turnstile-keep");
    let Ok(broker) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    // The broker's end must be seen: its socket is held by this alone.
    if let Ok(null) = OpenOptions::new().read(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(null);
    }
    let mut keeper = Keeper {
        broker: Some(broker),
        listener: None,
        leave_socket: false,
        visitors: Vec::new(),
        store: Store::default(),
        asked: Vec::new(),
        spare: None,
    };
    while keeper.round() {}
    keeper.unlink();
    ExitCode::SUCCESS
}

impl Keeper {
    /// Waits for whatever comes, and does it. False: nothing is left to do.
    fn round(&mut self) -> bool {
        if self.spare.is_none() {
            self.spare = io::stdin().as_fd().try_clone_to_owned().ok();
        }
        let mut timeout = PollTimeout::NONE;
        if self.broker.is_none() {
            let soon = self.store.drop_what_is_nobodys(&mut self.spare);
            timeout = PollTimeout::from(if soon { LOOK_SOON } else { LOOK });
            if self.store.is_empty() && self.visitors.is_empty() {
                return false;
            }
        }
        self.store.close_elsewhere();
        self.answer();
        if timeout == PollTimeout::NONE && self.store.is_closing() {
            timeout = PollTimeout::from(LOOK);
        }
        self.wait(timeout);
        self.hear_broker();
        self.answer();
        self.accept();
        for visitor in std::mem::take(&mut self.visitors) {
            self.hear_visitor(visitor);
        }
        true
    }

    fn wait(&self, timeout: PollTimeout) {
        let own = self.broker.iter().chain(self.listener.as_ref().map(|l| &l.0)).chain(&self.visitors);
        let mut watched: Vec<&OwnedFd> = own.collect();
        // The broker sees to the members, if there is one.
        match self.broker {
            Some(_) => watched.extend(self.store.closing_socket()),
            None => watched.extend(self.store.watched()),
        }
        let mut fds: Vec<PollFd> =
            watched.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, timeout);
    }

    fn hear_broker(&mut self) {
        let mut lost = false;
        while let Some(broker) = &self.broker {
            let packet = match socket::receive(broker) {
                Ok(packet) => packet,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // It has ended, however.
                Err(_) => return self.broker = None,
            };
            // Half of what belongs together is worse than nothing: it is told again.
            if packet.fds_lost {
                lost = true;
                continue;
            }
            match packet.decode() {
                Ok(ToKeeper::Listen { broker }) => {
                    self.listener = packet.fds.into_iter().next().map(|fd| (fd, broker));
                }
                Ok(ToKeeper::Keep(kept)) => self.store.keep(kept, packet.fds),
                Ok(ToKeeper::LeaveSocket) => self.leave_socket = true,
                Ok(ToKeeper::Ask(number)) => {
                    let mark = self.store.closing().mark();
                    self.asked.push((mark, number));
                }
                Ok(ToKeeper::GiveBack) | Err(_) => {}
            }
        }
        if let Some(broker) = self.broker.as_ref().filter(|_| lost && !planted("lost-in-silence")) {
            let said = socket::encode(&FromKeeper::Lost).map(|bytes| socket::send(broker, &bytes, &[]));
            drop(said);
        }
    }

    /// What the broker has asked for is said when what was let go before is closed.
    fn answer(&mut self) {
        let closing = self.store.closing();
        let due: Vec<_> = self.asked.extract_if(.., |(mark, _)| closing.has_closed(*mark)).collect();
        for (_, number) in due {
            let Some(broker) = &self.broker else { return };
            // A broker that does not read has others to thank for it, and asks no more.
            let answer = socket::encode(&FromKeeper::Done(number));
            let _ = answer.and_then(|bytes| socket::send(broker, &bytes, &[]));
        }
    }

    fn next_visitor(&mut self) -> Option<OwnedFd> {
        let (listener, _) = self.listener.as_ref()?;
        let accept = || accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
        let fd = match accept() {
            Err(Errno::EMFILE) if self.spare.take().is_some() => accept(),
            accepted => accepted,
        };
        // SAFETY: accept4 has just made this descriptor; it is ours.
        fd.ok().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn accept(&mut self) {
        while let Some(visitor) = self.next_visitor() {
            let uid = getsockopt(&visitor, PeerCredentials).map(|c| c.uid());
            let own = nix::unistd::geteuid().as_raw();
            if !uid.is_ok_and(|uid| uid == own || uid == 0) {
                continue;
            }
            let greeting = Greeting {
                magic: KEEPER_MAGIC,
                version: KEEPER_VERSION,
                layout: if planted("keeper-of-another-layout") { 0 } else { LAYOUT_VERSION },
                occupied: self.broker.is_some(),
                pid: std::process::id() as i32,
            };
            if socket::encode(&greeting).is_ok_and(|bytes| socket::send(&visitor, &bytes, &[]).is_ok()) {
                self.visitors.push(visitor);
            }
        }
    }

    fn hear_visitor(&mut self, visitor: OwnedFd) {
        let message = match socket::receive(&visitor) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.visitors.push(visitor),
            Err(_) => return,
            Ok(packet) => packet.decode(),
        };
        // Everything is one broker's.
        if matches!(message, Ok(ToKeeper::GiveBack))
            && self.broker.is_none()
            && self.give_back(&visitor).is_ok()
        {
            self.store.forget_listener();
            self.broker = Some(visitor);
        }
    }

    /// Nothing is let go: if the next broker ends before it has said what became of it, all of it is still here.
    fn give_back(&self, broker: &OwnedFd) -> io::Result<()> {
        let send = |message: &FromKeeper, fds: &[&OwnedFd]| {
            let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
            socket::send_within(broker, &socket::encode(message)?, &raw, PATIENCE)
        };
        self.store.for_each(|kept: Kept, fds: &[&OwnedFd]| send(&FromKeeper::Kept(kept), fds))?;
        send(&FromKeeper::All, &[])
    }

    /// Leaves no sockets behind, unless another broker uses their paths by now.
    fn unlink(&self) {
        let Some((_, broker)) = &self.listener else { return };
        let suffixed = |suffix: &str| {
            let mut name = broker.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let lock = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(suffixed(".lock"));
        let lock = lock.map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
        if let Ok(Ok(_lock)) = lock {
            let _ = fs::remove_file(suffixed(".keeper"));
            if !self.leave_socket || planted("keeper-takes-the-socket") {
                let _ = fs::remove_file(broker);
            }
        }
    }
}
