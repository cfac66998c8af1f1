//! `turnstile checkpointer`: the broker's child that copies WALs back into their databases.
//!
//! It has no rights of its own on a client's file: each database's thread gives them up ([`rights`]), and works on descriptors
//! that members have passed to the broker, with the wal-index in the segment, and by the locks there, from a seat of its own.
//! What copies is the SQLite that is linked into this program.
//!
//! * [`work`]: one database: its descriptors, its seat. [`vfs`]: how SQLite sees them. [`job`]: one checkpoint.

mod job;
mod rights;
pub mod vfs;
mod work;

use self::work::{Broker, Work};
use nix::poll::PollFlags;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use turnstile::wire::checkpoint::{Database, FromCheckpointer, Outcome, ToCheckpointer};
use turnstile::wire::socket::{self, Packet};

/// What the thread of one database is told.
enum Order {
    Wal(OwnedFd),
    Checkpoint,
}

/// A database's thread. It ends when it is told nothing more.
struct Worker {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

pub fn run() -> ExitCode {
    // What ends the broker ends this too, but not before the broker: a terminal signals both.
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: ignoring a signal runs no code of ours.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let _ = nix::sys::prctl::set_name(c"turnstile-ckpt");
    let served = io::stdin().as_fd().try_clone_to_owned().and_then(serve);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("turnstile checkpointer (started by `turnstile serve`): {e}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the broker at the other end of `broker` until it closes it.
fn serve(broker: OwnedFd) -> io::Result<()> {
    vfs::register()?;
    let broker = Arc::new(Broker::new(broker));
    let mut workers = BTreeMap::new();
    let served = listen(&broker, &mut workers);
    broker.is_gone();
    for (_, worker) in workers {
        drop(worker.orders);
        let _ = worker.thread.join();
    }
    served
}

fn listen(broker: &Arc<Broker>, workers: &mut BTreeMap<Database, Worker>) -> io::Result<()> {
    loop {
        match socket::receive(broker) {
            Ok(packet) => obey(broker, workers, packet)?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                socket::wait(broker, PollFlags::POLLIN, Duration::from_secs(60))?;
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

fn obey(broker: &Arc<Broker>, workers: &mut BTreeMap<Database, Worker>, packet: Packet) -> io::Result<()> {
    let message = packet.decode()?;
    let tell = |database, order| {
        if let Some(worker) = workers.get(&database) {
            let _ = worker.orders.send(order);
        }
    };
    match message {
        ToCheckpointer::Database { database, nonce } => {
            let worker = Work::new(database, nonce, packet.fds, broker).and_then(|work| {
                let (orders, told) = channel();
                let thread = thread::Builder::new().spawn(move || work_on(work, told))?;
                Ok(Worker { orders, thread })
            });
            match worker {
                Ok(worker) => drop(workers.insert(database, worker)),
                Err(e) => broker.send(&FromCheckpointer::Done {
                    database,
                    outcome: Outcome::Unable(format!("the checkpointer cannot open it: {e}")),
                }),
            }
        }
        ToCheckpointer::Wal { database } => {
            let wal = packet.fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
            tell(database, Order::Wal(wal));
        }
        ToCheckpointer::Checkpoint { database } if !workers.contains_key(&database) => {
            broker.send(&FromCheckpointer::Done { database, outcome: Outcome::Nothing })
        }
        ToCheckpointer::Checkpoint { database } => tell(database, Order::Checkpoint),
        // Its thread ends by itself.
        ToCheckpointer::Forget { database } if workers.remove(&database).is_some() => {}
        ToCheckpointer::Forget { database } => broker.send(&FromCheckpointer::Forgotten { database }),
    }
    Ok(())
}

fn work_on(work: Work, told: Receiver<Order>) {
    let (broker, database) = (Arc::clone(&work.broker), work.number);
    obey_orders(work, told);
    // Its descriptors are closed.
    broker.send(&FromCheckpointer::Forgotten { database });
}

fn obey_orders(work: Work, told: Receiver<Order>) {
    let rights = rights::give_up();
    let mut job = job::Job::new(&work);
    for order in told {
        match (order, rights) {
            (Order::Wal(wal), _) => job.take_wal(wal),
            (Order::Checkpoint, Ok(())) => done(&work, job.checkpoint()),
            (Order::Checkpoint, Err(e)) => {
                done(&work, Outcome::Unable(format!("the checkpointer's rights cannot be given up: {e}")));
            }
        }
    }
}

fn done(work: &Work, outcome: Outcome) {
    work.broker.send(&FromCheckpointer::Done { database: work.number, outcome });
}
