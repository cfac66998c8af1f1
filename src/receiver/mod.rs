//! `turnstile receiver`: the broker's child that receives what one other user's processes send with descriptors.
//!
//! Whoever receives a descriptor must close it some day, if only by ending, and the filesystem that it is on may be the
//! sender's own and never answer. So that is this process. It passes on what the kernel says to be harmless, without
//! asking the file; the rest it neither touches nor closes. What has to be asked of the files of a join, it asks. And it closes
//! what the broker, or its keeper, has no use for any more. That it may hang over all this, or when it ends, is nobody's
//! concern.

use nix::poll::PollFlags;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;
use turnstile::broker::foreign::unsafe_place;
use turnstile::broker::join;
use turnstile::planted::planted;
use turnstile::segment::hold;
use turnstile::wire::message::ToBroker;
use turnstile::wire::receiver::{FromReceiver, Received, ToReceiver};
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
        let packet = match socket::receive_any(&broker) {
            Ok(packet) => packet,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                socket::wait(&broker, PollFlags::POLLIN, Duration::from_secs(60))?;
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let (answer, fds) = match packet.decode()? {
            ToReceiver::Receive { session, pid } => {
                let sender = packet.fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
                let (received, fds) = receive_for(session, pid, &sender);
                // If the broker has let go of it meanwhile, this is the last one.
                drop(sender);
                (FromReceiver::Received(received), fds)
            }
            ToReceiver::Close => {
                drop(packet.fds);
                (FromReceiver::Closed, Vec::new())
            }
        };
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        socket::send_within(&broker, &socket::encode(&answer)?, &raw, PATIENCE)?;
    }
}

fn receive_for(session: u64, pid: i32, sender: &OwnedFd) -> (Received, Vec<OwnedFd>) {
    match socket::receive_any(sender) {
        Ok(packet) => judged(session, pid, packet),
        // It is the broker's to find that out.
        Err(_) => {
            let (bytes, strange, judged) = (Vec::new(), None, None);
            (Received { session, bytes, fds_lost: true, too_much: false, strange, judged }, Vec::new())
        }
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
    let mut verdict = None;
    if let Ok(ToBroker::Join { join, .. }) = &message
        && strange.is_none()
        && !too_much
        && !planted("judged-by-the-broker")
    {
        let candidate = join::judge(join, mem::take(&mut harmless), pid, false);
        verdict = Some(candidate.map(|candidate| {
            let (said, fds) = candidate.told();
            harmless = fds;
            said
        }));
    }
    (Received { session, bytes, fds_lost, too_much, strange, judged: verdict }, harmless)
}
