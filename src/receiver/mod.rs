//! `turnstile receiver`: the broker's child that receives what one other user's processes send with descriptors.
//!
//! Whoever receives a descriptor must close it some day, if only by ending, and the filesystem that it is on may be the
//! sender's own and never answer. So that is this process. It passes on what the kernel says to be harmless, without
//! asking the file; the rest it neither touches nor closes. That it may hang when it ends is nobody's concern.

use nix::poll::PollFlags;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;
use turnstile::broker::foreign::unsafe_place;
use turnstile::segment::hold;
use turnstile::wire::message::ToBroker;
use turnstile::wire::receiver::{Receive, Received};
use turnstile::wire::socket::{self, Packet};
use turnstile::wire::{MAX_FDS, MAX_PACKET};

/// How long the broker may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// No message that comes with descriptors is longer.
const LONGEST: usize = MAX_PACKET / 2;

pub fn run() -> ExitCode {
    // It ends with its broker, not before: a terminal signals both.
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: ignoring a signal runs no code of ours.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let _ = nix::sys::prctl::set_name(c"turnstile-recv");
    match io::stdin().as_fd().try_clone_to_owned().and_then(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(broker: OwnedFd) -> io::Result<()> {
    loop {
        let packet = match socket::receive(&broker) {
            Ok(packet) => packet,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                socket::wait(&broker, PollFlags::POLLIN, Duration::from_secs(60))?;
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let Receive { session, pid } = packet.decode()?;
        let sender = packet.fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
        let (answer, fds) = match socket::receive_any(&sender) {
            Ok(packet) => judged(session, pid, packet),
            // It is the broker's to find that out.
            Err(_) => (
                Received { session, bytes: Vec::new(), fds_lost: true, too_much: false, strange: None },
                Vec::new(),
            ),
        };
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        socket::send_within(&broker, &socket::encode(&answer)?, &raw, PATIENCE)?;
    }
}

fn judged(session: u64, pid: i32, packet: Packet) -> (Received, Vec<OwnedFd>) {
    let message = packet.decode::<ToBroker>();
    let Packet { bytes, fds, fds_lost, too_much } = packet;
    let mut harmless = Vec::new();
    let mut strange: Option<(u32, String)> = None;
    let mut judge = |fd: OwnedFd, harmless: &mut Vec<OwnedFd>| match unsafe_place(&fd, pid) {
        None => harmless.push(fd),
        Some(why) => {
            mem::forget(fd);
            strange = Some((strange.as_ref().map_or(0, |(n, _)| *n) + 1, why));
        }
    };
    for fd in fds {
        judge(fd, &mut harmless);
    }
    if matches!(message, Ok(ToBroker::HandBack { .. })) {
        // What is in the queue of its socket may be anything, too.
        harmless.truncate(MAX_FDS - 1);
        if let Some(gate) = harmless.get(2).and_then(hold::copy) {
            judge(gate, &mut harmless);
        }
    }
    let too_much = too_much || bytes.len() > LONGEST || harmless.len() > MAX_FDS;
    if too_much {
        harmless.clear();
    }
    let bytes = if too_much { Vec::new() } else { bytes };
    (Received { session, bytes, fds_lost, too_much, strange }, harmless)
}
