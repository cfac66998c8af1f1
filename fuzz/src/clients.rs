//! A broker and its clients, in one process.

use crate::messages::{Manner, Message, Which};
use crate::places::{Place, Value};
use crate::{descriptors, directory, within};
use arbitrary::Arbitrary;
use memmap2::MmapOptions;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;
use turnstile::broker::rig::Rig;
use turnstile::broker::{Limits, Options};
use turnstile::lock::{Ask, FileLevel, Release, Request, Verdict};
use turnstile::segment::layout::{CONTROL_SIZE, LIVENESS_SIZE};
use turnstile::segment::memfd;
use turnstile::wire::message::{
    FromBroker, Hello, Introduction, PROTOCOL_MAGIC, PROTOCOL_VERSION, SeatKey, ToBroker,
};
use turnstile::wire::socket;

/// A round of the broker's loop with a few clients takes some microseconds.
const ROUND_LIMIT: Duration = Duration::from_millis(500);
const MOST_OPS: usize = 256;
const MOST_CLIENTS: usize = 12;

#[derive(Arbitrary, Clone, Debug)]
pub enum Op {
    /// As far as this: nothing said, hello, introduced.
    Connect(u8),
    Close(u8),
    Join(u8, Manner),
    Say(u8, Message, Vec<Kind>),
    Raw(u8, Vec<u8>, Vec<Kind>),
    Hear(u8),
    Round(u16),
    Scribble(u8, Place, Value),
    Write(u8, u16, Vec<u8>),
}

/// Descriptors to send.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Kind {
    Database,
    ReadOnly,
    PathOnly,
    Directory,
    Memfd,
    Null,
    /// The very socket that it is sent through.
    Itself,
}

struct Client {
    socket: Option<OwnedFd>,
    seats: Vec<SeatKey>,
    next: u64,
}

/// The files: two to be attacked, one of somebody else's.
struct Files {
    directory: tempfile::TempDir,
    names: [&'static str; 3],
}

fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let directory = directory();
        let names = ["a.db", "b.db", "other.db"];
        for name in names.iter().copied().chain(["a.db-shm"]) {
            std::fs::write(directory.path().join(name), [0u8; 4096]).expect("a small file");
        }
        std::fs::hard_link(directory.path().join("a.db"), directory.path().join("link")).expect("a link");
        Files { directory, names }
    })
}

fn path(file: u8) -> PathBuf {
    files().directory.path().join(files().names[usize::from(file)])
}

fn open(path: PathBuf, flags: OFlag) -> OwnedFd {
    nix::fcntl::open(&path, flags | OFlag::O_CLOEXEC, Mode::empty()).expect("a file of ours")
}

fn socket_of(kind: Kind, socket: &OwnedFd) -> OwnedFd {
    match kind {
        Kind::Database => open(path(0), OFlag::O_RDWR),
        Kind::ReadOnly => open(path(0), OFlag::O_RDONLY),
        Kind::PathOnly => open(path(0), OFlag::O_PATH),
        Kind::Directory => open(files().directory.path().into(), OFlag::O_PATH),
        Kind::Memfd => memfd::create(c"fuzz", LIVENESS_SIZE).expect("a memfd"),
        Kind::Null => File::open("/dev/null").expect("null").into(),
        Kind::Itself => socket.try_clone().expect("a copy"),
    }
}

impl Client {
    fn send(&mut self, message: &ToBroker, fds: &[OwnedFd]) {
        if let Ok(bytes) = socket::encode(message) {
            self.send_raw(&bytes, fds);
        }
    }

    fn send_raw(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        if let Some(socket) = self.socket.as_ref().filter(|_| !bytes.is_empty()) {
            let _ = socket::send(socket, bytes, &raw);
        }
    }

    /// Reads all answers; the last lock's verdict, if there is one.
    fn hear(&mut self) -> Option<Verdict> {
        let mut last = None;
        while let Some(packet) = self.socket.as_ref().and_then(|s| socket::receive(s).ok()) {
            match packet.decode() {
                Ok(FromBroker::Joined { joined, .. }) => self.seats.push(joined.seat),
                Ok(FromBroker::Lock { verdict, .. }) => last = Some(verdict),
                _ => {}
            }
        }
        last
    }
}

/// The broker and everybody.
pub struct Bench {
    rig: Rig,
    clients: Vec<Client>,
    /// Somebody else, with a database that nobody else may open.
    other: Client,
    other_database: u32,
    before: Vec<u8>,
}

impl Bench {
    fn new(checkpointer: bool) -> Bench {
        let options = Options {
            socket: files().directory.path().join("socket"),
            everyone: false,
            idle_exit: None,
            allow_unsafe: false,
            limits: Limits { sessions: 10, databases: 3, descriptors: 12 },
            checkpointer: checkpointer.then(|| "/bin/false".into()),
            keeper: None,
            finder: None,
            receiver: None,
            reuse_wal: Duration::ZERO,
            replace: false,
            activated: None,
            ready: None,
        };
        let rig = Rig::new(options).expect("a broker");
        let other = Client { socket: None, seats: Vec::new(), next: 1 };
        let mut bench = Bench { rig, clients: Vec::new(), other, other_database: 0, before: Vec::new() };
        let manner = Manner {
            file: 2,
            read_only: false,
            has_shm: false,
            guest: false,
            allow_unsafe: false,
            library: 0,
            lie: None,
        };
        bench.connect(2);
        bench.join(0, manner);
        bench.round(0);
        bench.other = bench.clients.pop().expect("just connected");
        bench.other.hear();
        bench.other_database = bench.other.seats.first().expect("a seat").database;
        bench.before = bench.others_memory();
        bench
    }

    fn others_memory(&self) -> Vec<u8> {
        let [control, _] = self.rig.segment(self.other_database).expect("its database is there");
        let map = MmapOptions::new().len(CONTROL_SIZE).map_raw_read_only(control).expect("a mapping");
        // SAFETY: nobody writes meanwhile: one thread.
        unsafe { std::slice::from_raw_parts(map.as_ptr(), CONTROL_SIZE) }.to_vec()
    }

    fn connect(&mut self, stage: u8) {
        if self.clients.len() >= MOST_CLIENTS {
            return;
        }
        let socket = self.rig.connect().expect("a socket");
        let mut client = Client { socket: Some(socket), seats: Vec::new(), next: 1 };
        if stage > 0 {
            let hello = Hello { magic: PROTOCOL_MAGIC, version: PROTOCOL_VERSION };
            client.send_raw(&socket::encode(&hello).expect("short"), &[]);
        }
        if stage > 1 {
            let who = Introduction { program: "fuzz".into(), pid: 1, container: None };
            let liveness = memfd::create(c"liveness", LIVENESS_SIZE).expect("a memfd");
            client.send(&ToBroker::Introduce(who), &[liveness]);
        }
        self.clients.push(client);
    }

    fn join(&mut self, client: u8, manner: Manner) {
        let file = if self.before.is_empty() { manner.file } else { manner.file % 2 };
        let flags = if manner.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
        let mut fds = vec![open(path(file), flags), open(files().directory.path().into(), OFlag::O_PATH)];
        if manner.has_shm {
            fds.push(open(files().directory.path().join("a.db-shm"), OFlag::O_RDWR));
        }
        let join = manner.join(files().names[usize::from(file)].as_bytes());
        if let Some(client) = self.client(client) {
            client.next += 1;
            let id = client.next;
            client.send(&ToBroker::Join { id, join }, &fds);
        }
    }

    fn client(&mut self, n: u8) -> Option<&mut Client> {
        let count = self.clients.len().max(1);
        self.clients.get_mut(usize::from(n) % count)
    }

    fn seat(&self, client: &Client, which: Which) -> SeatKey {
        let nobody = SeatKey { database: 1, seat: 1 };
        let pick = |seats: &[SeatKey], n: u8| seats.get(usize::from(n) % seats.len().max(1)).copied();
        match which {
            Which::Own(n) => pick(&client.seats, n).unwrap_or(nobody),
            Which::Anybodys(n) => {
                let others = self.clients.iter().chain([&self.other]);
                let all: Vec<SeatKey> = others.flat_map(|c| c.seats.iter().copied()).collect();
                pick(&all, n).unwrap_or(nobody)
            }
            Which::Made(database, seat) => SeatKey { database: database % 4, seat },
        }
    }

    fn round(&mut self, milliseconds: u16) {
        let later = Duration::from_millis(u64::from(milliseconds % 300));
        within(ROUND_LIMIT, "a round", || self.rig.round(later).expect("epoll"));
    }

    pub fn step(&mut self, op: &Op) {
        match op {
            Op::Connect(stage) => self.connect(stage % 4),
            Op::Close(n) => {
                if let Some(client) = self.client(*n) {
                    *client = Client { socket: None, seats: Vec::new(), next: 0 };
                }
                self.clients.retain(|c| c.socket.is_some());
            }
            Op::Join(n, manner) => self.join(*n, *manner),
            Op::Say(n, message, kinds) => {
                let count = self.clients.len().max(1);
                let Some(client) = self.clients.get(usize::from(*n) % count) else { return };
                let Some(socket) = client.socket.as_ref() else { return };
                let fds: Vec<OwnedFd> = kinds.iter().take(6).map(|k| socket_of(*k, socket)).collect();
                let said = message.say(client.next + 1, |which| self.seat(client, which));
                if let Some(client) = self.client(*n) {
                    client.next += 1;
                    client.send(&said, &fds);
                }
            }
            Op::Raw(n, bytes, kinds) => {
                if let Some(client) = self.client(*n) {
                    let Some(socket) = client.socket.as_ref() else { return };
                    let fds: Vec<OwnedFd> = kinds.iter().take(6).map(|k| socket_of(*k, socket)).collect();
                    client.send_raw(bytes, &fds);
                }
            }
            Op::Hear(n) => {
                self.client(*n).map(Client::hear);
            }
            Op::Round(ms) => {
                self.round(*ms);
            }
            Op::Scribble(n, place, value) => {
                if let Some([control, _]) = self.victim(*n).and_then(|n| self.rig.segment(n)) {
                    place.scribble(control, value.number());
                }
            }
            Op::Write(n, at, bytes) => {
                if let Some([control, _]) = self.victim(*n).and_then(|n| self.rig.segment(n)) {
                    let at = (usize::from(*at) * 4).min(CONTROL_SIZE - bytes.len().min(CONTROL_SIZE));
                    let _ =
                        nix::sys::uio::pwrite(control, &bytes[..bytes.len().min(CONTROL_SIZE)], at as i64);
                }
            }
        }
    }

    /// A database that may be scribbled on: not the other's.
    fn victim(&self, n: u8) -> Option<u32> {
        let all: Vec<u32> = self.rig.databases().into_iter().filter(|d| *d != self.other_database).collect();
        all.get(usize::from(n) % all.len().max(1)).copied()
    }

    /// The other one's memory is as it was, and it is served.
    fn check_other(&mut self) {
        assert!(self.others_memory() == self.before, "somebody else's segment has changed");
        let seat = *self.other.seats.first().expect("a seat");
        let shared = Request::File { level: FileLevel::Shared, hot_journal: false };
        for id in [1000, 1001] {
            let ask = Ask { request: shared, ahead: true };
            self.other.send(&ToBroker::Lock { id, seat, ask, connection: 1, thread: 1 }, &[]);
            self.round(0);
            let verdict = self.other.hear();
            assert!(matches!(verdict, Some(Verdict::Granted { turn: true, .. })), "not served: {verdict:?}");
            let release = Release::File { level: FileLevel::None, keep_turn: false };
            self.other.send(&ToBroker::Unlock { seat, release }, &[]);
            self.round(0);
        }
    }

    /// All but the other one go, and leave nothing.
    fn end(mut self) {
        self.round(0);
        self.check_other();
        self.clients.clear();
        for _ in 0..1000 {
            self.round(100);
            // A gate that is tried for, a checkpointer that is being started.
            if self.rig.sessions() == 1 && self.rig.databases().len() == 1 && !self.rig.is_checkpointing() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.rig.sessions(), 1, "sessions are left");
        assert_eq!(self.rig.databases(), [self.other_database], "databases are left");
        self.other.socket = None;
        self.round(100);
        self.round(100);
        assert_eq!((self.rig.sessions(), self.rig.databases().len()), (0, 0), "the last one is left");
    }
}

/// One life of a broker. `begin`: what has happened already.
pub fn run(begin: &[Op], ops: &[Op], checkpointer: bool) {
    files();
    let before = descriptors();
    let mut bench = Bench::new(checkpointer);
    begin.iter().chain(ops.iter().take(MOST_OPS)).for_each(|op| bench.step(op));
    bench.end();
    let after = descriptors();
    assert_eq!(after, before, "descriptors are left");
}
