//! What clients say: real messages, with seats of their own, of others, and none.

use arbitrary::Arbitrary;
use turnstile::lock::{Ask, FileLevel, Release, Request, Slots};
use turnstile::wire::message::{Join, SeatKey, ToBroker};

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Which {
    Own(u8),
    Anybodys(u8),
    Made(u32, u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Wish {
    File(u8, bool),
    Shared(u8, u8),
    Exclusive(u8, u8, bool),
    Turn,
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Message {
    Lock { seat: Which, wish: Wish, ahead: bool, connection: u8 },
    Cancel(Which),
    Unlock { seat: Which, wish: Wish, keep: bool },
    CheckReserved(Which),
    JournalClear(Which),
    TurnUsed(Which),
    OpenWalIndex(Which),
    Grow(Which, u32),
    CloseWalIndex(Which),
    Leave(Which),
    Status,
    Log(String),
    Waiting(Which),
    Kick(u32),
    AskBlocker(Which),
    LetGo(Which, u8),
    WalFile(Which),
    WalGrew(Which),
    Resume(u8),
    ClaimNothing(bool),
}

/// A range that need not be one.
fn slots(first: u8, count: u8) -> Slots {
    Slots::new(first % 8, count % 8).or(Slots::new(first % 8, 1)).expect("one slot")
}

fn level(level: u8) -> FileLevel {
    FileLevel::from_sqlite(i32::from(level % 5)).expect("five levels")
}

fn request(wish: Wish) -> Request {
    match wish {
        Wish::File(l, hot_journal) => Request::File { level: level(l), hot_journal },
        Wish::Shared(first, count) => Request::ShmShared(slots(first, count)),
        Wish::Exclusive(first, count, blocking) => {
            Request::ShmExclusive { slots: slots(first, count), blocking }
        }
        Wish::Turn => Request::Turn,
    }
}

fn release(wish: Wish, keep_turn: bool) -> Release {
    match wish {
        Wish::File(l, _) => Release::File { level: level(l), keep_turn },
        Wish::Shared(first, count) => Release::ShmShared { slots: slots(first, count), keep_turn },
        Wish::Exclusive(first, count, _) => Release::ShmExclusive { slots: slots(first, count), keep_turn },
        Wish::Turn => Release::Turn,
    }
}

impl Message {
    pub fn say(&self, id: u64, seat: impl Fn(Which) -> SeatKey) -> ToBroker {
        match self.clone() {
            Message::Lock { seat: s, wish, ahead, connection } => ToBroker::Lock {
                id,
                seat: seat(s),
                ask: Ask { request: request(wish), ahead },
                connection: u64::from(connection % 4),
                thread: 1,
            },
            Message::Cancel(s) => ToBroker::Cancel { seat: seat(s) },
            Message::Unlock { seat: s, wish, keep } => {
                ToBroker::Unlock { seat: seat(s), release: release(wish, keep) }
            }
            Message::CheckReserved(s) => ToBroker::CheckReserved { id, seat: seat(s) },
            Message::JournalClear(s) => ToBroker::JournalClear { seat: seat(s) },
            Message::TurnUsed(s) => ToBroker::TurnUsed { seat: seat(s) },
            Message::OpenWalIndex(s) => ToBroker::OpenWalIndex { id, seat: seat(s) },
            Message::Grow(s, regions) => ToBroker::GrowWalIndex { id, seat: seat(s), regions },
            Message::CloseWalIndex(s) => ToBroker::CloseWalIndex { seat: seat(s) },
            Message::Leave(s) => ToBroker::Leave { id, seat: seat(s) },
            Message::Status => ToBroker::Status { id },
            Message::Log(text) => ToBroker::Log { text },
            Message::Waiting(s) => ToBroker::Waiting { seat: seat(s) },
            Message::Kick(database) => ToBroker::Kick { database },
            Message::AskBlocker(s) => ToBroker::AskBlocker { id, seat: seat(s) },
            Message::LetGo(s, count) => ToBroker::LetGo { seat: seat(s), count: 4 * u32::from(count) },
            Message::WalFile(s) => ToBroker::WalFile { seat: seat(s) },
            Message::WalGrew(s) => ToBroker::WalGrew { seat: seat(s) },
            Message::Resume(byte) => ToBroker::Resume { id, token: [byte; 16] },
            Message::ClaimNothing(last) => ToBroker::Claim { id, seats: Vec::new(), last },
        }
    }
}

/// How a join is meant.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Manner {
    pub file: u8,
    pub read_only: bool,
    pub has_shm: bool,
    pub guest: bool,
    pub allow_unsafe: bool,
    pub library: u8,
    /// Another name than the file's.
    pub lie: Option<u8>,
}

impl Manner {
    pub fn join(&self, name: &[u8]) -> Join {
        let name = match self.lie {
            None => Some(name.to_vec()),
            Some(0) => None,
            Some(1) => Some(b"..".to_vec()),
            Some(2) => Some(b"link".to_vec()),
            Some(n) => Some(vec![n; usize::from(n)]),
        };
        Join {
            name,
            has_shm: self.has_shm,
            guest: self.guest,
            allow_unsafe: self.allow_unsafe,
            sqlite_version: "3.40.1".into(),
            library: u64::from(self.library % 2),
        }
    }
}
