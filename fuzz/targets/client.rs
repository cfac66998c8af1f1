//! A hostile broker: whatever it answers and sends, the process that asked it goes on.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socketpair};
use nix::sys::stat::Mode as Permissions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;
use turnstile::client::config::Config;
use turnstile::client::joining::Joins;
use turnstile::client::member::{Member, status_report};
use turnstile::lock::{Ask, FileLevel, Release, Request, Slots, Verdict};
use turnstile::segment::layout::{CONTROL_SIZE, LAYOUT_VERSION, MAGIC, REGION_SIZE, WAL_INDEX_SIZE};
use turnstile::segment::memfd;
use turnstile::segment::wal_index::WalIndex;
use turnstile::wire::message::{
    FromBroker, HelloAnswer, Join, Joined, Mode, PROTOCOL_MAGIC, PROTOCOL_VERSION, Refusal, Role, SeatKey,
};
use turnstile::wire::socket;
use turnstile_fuzz::places::{Place, Value};
use turnstile_fuzz::{directory, within};

/// What the broker says, in this order whatever it is asked.
#[derive(Arbitrary, Debug)]
enum Said {
    Joined { guest: bool, read_only: bool, seat: u32, segment: bool, nonce: u8, fds: Vec<Kind> },
    Refused(String),
    Lock { granted: bool, turn: bool, deadlock: bool },
    WalIndex { regions: u32, ok: bool },
    Reserved(bool),
    Left,
    Status(Vec<u8>, bool),
    Blocker,
    Raw(Vec<u8>, Vec<Kind>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Control,
    WalIndex,
    Hold,
    Small,
    Unsealed,
    File,
    Null,
}

#[derive(Arbitrary, Debug)]
enum Asked {
    OpenWalIndex,
    Lock(u8, bool),
    Release(u8),
    Grow(u32),
    Region(u32),
    Reserved,
    Commits,
    Status,
    Blocker,
    WalGrew,
    Header,
}

#[derive(Arbitrary, Debug)]
struct Input {
    greeting: u8,
    said: Vec<Said>,
    scribbled: Vec<(Place, Value)>,
    asked: Vec<Asked>,
}

fn path() -> &'static PathBuf {
    static DIRECTORY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let make = || {
        let directory = directory();
        std::fs::write(directory.path().join("a.db"), [0u8; 4096]).expect("a small file");
        let socket = directory.path().join("s");
        (directory, socket)
    };
    &DIRECTORY.get_or_init(make).1
}

fn file(name: &str, flags: OFlag) -> OwnedFd {
    let path = path().with_file_name(name);
    nix::fcntl::open(&path, flags | OFlag::O_CLOEXEC, Permissions::empty()).expect("a file of ours")
}

fn control(nonce: u64, scribbled: &[(Place, Value)]) -> OwnedFd {
    let fd = memfd::create(c"control", CONTROL_SIZE).expect("a memfd");
    let head = [&MAGIC[..], &LAYOUT_VERSION.to_ne_bytes(), &[0; 4], &nonce.to_ne_bytes()].concat();
    nix::sys::uio::pwrite(&fd, &head, 0).expect("written");
    scribbled.iter().for_each(|(place, value)| place.scribble(&fd, value.number()));
    fd
}

fn descriptor(kind: Kind, nonce: u64, scribbled: &[(Place, Value)]) -> OwnedFd {
    match kind {
        Kind::Control => control(nonce, scribbled),
        Kind::WalIndex => memfd::create(c"index", WAL_INDEX_SIZE).expect("a memfd"),
        Kind::Hold => {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socketpair(AddressFamily::Unix, SockType::Stream, None, flags).expect("a pair").0
        }
        Kind::Small => memfd::create(c"small", 100).expect("a memfd"),
        Kind::Unsealed => {
            let fd = nix::sys::memfd::memfd_create(c"bare", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
            let fd = fd.expect("a memfd");
            nix::unistd::ftruncate(&fd, CONTROL_SIZE as i64).expect("grown");
            fd
        }
        Kind::File => file("a.db", OFlag::O_RDWR),
        Kind::Null => std::fs::File::open("/dev/null").expect("null").into(),
    }
}

/// Messages and their descriptors, in the order in which they are sent.
type Script = Vec<(Vec<u8>, Vec<OwnedFd>)>;

fn encoded(message: &FromBroker) -> Vec<u8> {
    socket::encode(message).unwrap_or_default()
}

fn script(input: &Input) -> Script {
    let refused = (input.greeting & 1 != 0).then(|| "no".to_owned());
    let version = PROTOCOL_VERSION + u32::from(input.greeting & 2);
    let answer = HelloAnswer { magic: PROTOCOL_MAGIC + u32::from(input.greeting & 4), version, refused };
    let mut script: Script = vec![(socket::encode(&answer).expect("short"), Vec::new())];
    if input.greeting & 8 == 0 {
        script.push((encoded(&FromBroker::Welcome { session: 1, broker_pid: 1, your_pid: 1, token: [7; 16] }), Vec::new()));
    }
    // The client counts its requests.
    for (id, said) in (1u64..).zip(input.said.iter().take(32)) {
        let fds = |kinds: &[Kind]| {
            kinds.iter().take(6).map(|k| descriptor(*k, 7, &input.scribbled)).collect::<Vec<_>>()
        };
        let (message, fds) = match said {
            Said::Joined { guest, read_only, seat, segment, nonce, fds: kinds } => {
                let mode = if *guest { Mode::Guest } else { Mode::Gated };
                let role = if *read_only { Role::ReadOnly } else { Role::ReadWrite };
                let seat = SeatKey { database: 1, seat: *seat };
                let nonce = if nonce % 4 == 3 { 8 } else { 7 };
                let whole = [Kind::Control, Kind::WalIndex, Kind::Hold];
                let kinds = match kinds.is_empty() {
                    true if *read_only => &whole[..2],
                    true => &whole[..],
                    false => &kinds[..],
                };
                let joined = Joined { seat, mode, role, nonce, segment: *segment, count: 0 };
                (FromBroker::Joined { id, joined }, fds(if *segment { kinds } else { &[] }))
            }
            Said::Refused(reason) => {
                let reason = reason.chars().take(1000).collect();
                (FromBroker::Refused { id, why: Refusal::Exhausted, reason }, Vec::new())
            }
            Said::Lock { granted, turn, deadlock } => {
                let verdict = match granted {
                    true => Verdict::Granted { turn: *turn, probation: false },
                    false => Verdict::Busy,
                };
                (FromBroker::Lock { id, verdict, deadlock: *deadlock, blocker: None }, Vec::new())
            }
            Said::WalIndex { regions, ok } => {
                (FromBroker::WalIndex { id, regions: *regions, ok: *ok }, Vec::new())
            }
            Said::Reserved(by_other) => (FromBroker::Reserved { id, by_other: *by_other }, Vec::new()),
            Said::Left => (FromBroker::Left { id }, Vec::new()),
            Said::Status(part, last) => {
                (FromBroker::Status { id, part: part.clone(), last: *last }, Vec::new())
            }
            Said::Blocker => (FromBroker::Blocker { id, blocker: None }, Vec::new()),
            Said::Raw(bytes, kinds) => {
                if !bytes.is_empty() {
                    script.push((bytes.clone(), fds(kinds)));
                }
                continue;
            }
        };
        script.push((encoded(&message), fds));
    }
    script
}

/// The thread that is the broker: says what it is told to the next who connects, and closes.
fn broker() -> &'static Sender<Script> {
    static BROKER: OnceLock<Sender<Script>> = OnceLock::new();
    BROKER.get_or_init(|| {
        let (sender, scripts) = channel::<Script>();
        let listener = socket::new_socket().expect("a socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(path()).expect("short")).expect("bound");
        listen(&listener, Backlog::new(100).expect("small")).expect("listening");
        std::thread::spawn(move || {
            loop {
                let _ = socket::wait(&listener, nix::poll::PollFlags::POLLIN, Duration::from_secs(10));
                let Ok(client) = socket::accept(&listener) else { continue };
                // Sent before it connected. Who comes again, without one, is sent away.
                let Ok(script) = scripts.try_recv() else { continue };
                for (bytes, fds) in script {
                    let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
                    if bytes.is_empty() || socket::send(&client, &bytes, &raw).is_err() {
                        break;
                    }
                }
                // Nothing of the client's is left unread, or it would be told of that instead.
                let _ = socket::wait(&client, nix::poll::PollFlags::POLLIN, Duration::from_millis(20));
                while socket::receive(&client).is_ok() {}
            }
        });
        sender
    })
}

fn request(kind: u8) -> Request {
    let slots = |first, count| Slots::new(first, count).expect("in range");
    match kind % 6 {
        0 => Request::File { level: FileLevel::Shared, hot_journal: false },
        1 => Request::File { level: FileLevel::Exclusive, hot_journal: true },
        2 => Request::ShmShared(slots(3 + kind / 6 % 5, 1)),
        3 => Request::ShmExclusive { slots: slots(0, 1), blocking: true },
        4 => Request::ShmExclusive { slots: slots(kind / 6 % 8, 1), blocking: false },
        _ => Request::Turn,
    }
}

fn ask(member: &Member, asked: &Asked, directory: BorrowedFd) {
    let shared = member.shared().cloned();
    match asked {
        Asked::OpenWalIndex => drop(member.open_wal_index(|_| ())),
        Asked::Lock(kind, ahead) => {
            let ask = Ask { request: request(*kind), ahead: *ahead };
            if let Ok(None) = member.try_lock(ask, 1) {
                let _ = member.lock(ask, 1, || true);
            }
        }
        Asked::Release(kind) => {
            let release = match kind % 2 {
                0 => Release::File { level: FileLevel::None, keep_turn: false },
                _ => Release::Turn,
            };
            let _ = member.release(release);
        }
        Asked::Grow(regions) => drop(member.grow_wal_index(regions % 64)),
        // As xShmMap does: only regions that are said to be there.
        Asked::Region(region) => {
            if let Some(shared) = shared.filter(|s| *region < s.regions())
                && let Ok(address) = shared.region(*region)
            {
                // SAFETY: a region that the client takes for mapped: that it can be read is what is tested.
                std::hint::black_box(unsafe { address.add(REGION_SIZE - 1).read_volatile() });
            }
        }
        Asked::Reserved => drop(member.reserved_by_other()),
        Asked::Commits => {
            if let Some(commits) = shared.as_ref().and_then(|s| s.commits()) {
                let _ = (commits.pending(), commits.cut_at(), commits.is_lost(commits.latest()));
            }
        }
        Asked::Status => drop(status_report(member.session())),
        Asked::Blocker => drop(member.blocker()),
        Asked::WalGrew => drop(member.wal_grew(directory.as_fd())),
        Asked::Header => {
            if let Some(shared) = shared.filter(|s| s.regions() > 0)
                && let Ok(address) = shared.region(0)
            {
                // SAFETY: mapped as long as `shared`.
                let index = unsafe { WalIndex::new(address) };
                let _ = (index.valid_header().map(|h| h.length()), index.progress());
            }
        }
    }
}

fuzz_target!(|input: Input| {
    if broker().send(script(&input)).is_err() {
        return;
    }
    let database = file("a.db", OFlag::O_RDWR);
    let mut config = Config::default();
    config.socket = Some(path().clone());
    let join = Join {
        name: Some(b"a.db".to_vec()),
        has_shm: false,
        guest: false,
        allow_unsafe: false,
        sqlite_version: "3.40.1".into(),
        library: 1,
    };
    let directory = file(".", OFlag::O_PATH);
    let claim = Joins { database: database.as_fd(), directory, shm: None, join };
    within(Duration::from_secs(1), "a session with a hostile broker", || {
        if let Ok(member) = Member::join(&config, &claim) {
            input.asked.iter().take(32).for_each(|a| ask(&member, a, claim.directory.as_fd()));
            member.leave();
        }
    });
});
