//! Places in the control memfd that are worth scribbling on.

use arbitrary::Arbitrary;
use nix::sys::uio::pwrite;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use turnstile::segment::layout::{
    Bitmaps, CheckpointWords, CommitWords, Control, FileWords, Header, LockWords, SeatWords, SyncedWords,
};

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    Turn,
    Tickets,
    Writer(u8),
    Reader(u8),
    Reserved,
    Pending,
    Exclusive,
    Probation,
    Opening,
    Lowering,
    Sleepy,
    Members(u8),
    Line(u8),
    Sleepers(u8),
    SlotHints(u8),
    FileHints(u8),
    Regions,
    Poisoned,
    Duty,
    Asked,
    WalInode,
    Brake,
    Durable,
    /// A word of a seat of the first few.
    Seat(u8, u8),
    Anywhere(u16),
}

impl Place {
    fn offset_and_size(self) -> (usize, usize) {
        let locks = offset_of!(Control, locks);
        let file = locks + offset_of!(LockWords, file);
        let maps = offset_of!(Control, bitmaps);
        let checkpoint = offset_of!(Control, checkpoint);
        match self {
            Place::Turn => (locks + offset_of!(LockWords, turn), 8),
            Place::Tickets => (locks + offset_of!(LockWords, tickets), 8),
            Place::Writer(n) => (locks + offset_of!(LockWords, writers) + 4 * (n as usize % 3), 4),
            Place::Reader(n) => (locks + offset_of!(LockWords, readers) + 4 * (n as usize % 5), 4),
            Place::Reserved => (file + offset_of!(FileWords, reserved), 4),
            Place::Pending => (file + offset_of!(FileWords, pending), 4),
            Place::Exclusive => (file + offset_of!(FileWords, exclusive), 4),
            Place::Probation => (file + offset_of!(FileWords, probation), 4),
            Place::Opening => (file + offset_of!(FileWords, opening), 4),
            Place::Lowering => (file + offset_of!(FileWords, lowering), 4),
            Place::Sleepy => (locks + offset_of!(LockWords, sleepy), 4),
            Place::Members(n) => (maps + offset_of!(Bitmaps, members) + 8 * (n as usize % 16), 8),
            Place::Line(n) => (maps + offset_of!(Bitmaps, line) + 8 * (n as usize % 16), 8),
            Place::Sleepers(n) => (maps + offset_of!(Bitmaps, sleepers) + 8 * (n as usize % 16), 8),
            Place::SlotHints(n) => (maps + offset_of!(Bitmaps, slot_hints) + 8 * (n as usize % 32), 8),
            Place::FileHints(n) => (maps + offset_of!(Bitmaps, file_hints) + 8 * (n as usize % 32), 8),
            Place::Regions => (offset_of!(Header, regions), 4),
            Place::Poisoned => (offset_of!(Header, poisoned), 4),
            Place::Duty => (checkpoint + offset_of!(CheckpointWords, duty), 4),
            Place::Asked => (checkpoint + offset_of!(CheckpointWords, asked), 4),
            Place::WalInode => (checkpoint + offset_of!(CheckpointWords, wal_inode), 8),
            Place::Brake => (checkpoint + offset_of!(CheckpointWords, brake), 4),
            Place::Durable => {
                let synced = offset_of!(Control, commits) + offset_of!(CommitWords, synced);
                (synced + offset_of!(SyncedWords, durable), 8)
            }
            Place::Seat(seat, word) => {
                let words = size_of::<SeatWords>() / 8;
                let seat = offset_of!(Control, seats) + size_of::<SeatWords>() * (seat as usize % 8);
                (seat + 8 * (word as usize % words), 8)
            }
            Place::Anywhere(at) => ((4 * at as usize) % (size_of::<Control>() - 8), 8),
        }
    }

    pub fn scribble(self, control: &OwnedFd, value: u64) {
        let (offset, size) = self.offset_and_size();
        pwrite(control, &value.to_ne_bytes()[..size], offset as i64).expect("a memfd takes what is written");
    }
}

/// Numbers that mean something there, and others.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    Seat(u8),
    /// The turn's word: a seat, its four bits, a generation.
    Turn(u8, u8, u8),
    Bits(u64),
    Most,
}

impl Value {
    pub fn number(self) -> u64 {
        match self {
            Value::Seat(seat) => u64::from(seat % 10),
            Value::Turn(seat, bits, generation) => {
                u64::from(seat % 10) | u64::from(bits & 15) << 16 | u64::from(generation) << 32
            }
            Value::Bits(bits) => bits,
            Value::Most => u64::MAX,
        }
    }
}
