//! Reading a record: the layout of `tests/power/log.h`, as events.

use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

const MAGIC: u64 = 0x3152_4557_504c_4f47;
const RECORD_SIZE: usize = 48;
const MOST_RECORDS: u64 = 1 << 20;
/// `struct log` up to its orders: magic, two offsets, device, inode, two cursors, four words, the directory.
const FULL_AT: usize = 56;
const DIRECTORY_AT: usize = 72;
const DIRECTORY_SIZE: usize = 512;

/// What one process did to one file, or said. `file` is a number that is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Drawn by a process that was killed before it had filled it in: its operation was not begun.
    Nothing,
    Write {
        file: u32,
        offset: u64,
        data: &'a [u8],
    },
    Truncate {
        file: u32,
        size: u64,
    },
    Allocate {
        file: u32,
        end: u64,
    },
    Sync {
        file: u32,
    },
    SyncDir,
    /// The operation that record `begin` began has ended, with its system call's result or a negative errno.
    End {
        begin: u64,
        result: i32,
    },
    Create {
        file: u32,
        name: &'a str,
    },
    Unlink {
        name: &'a str,
    },
    Note(&'a str),
}

/// A whole record.
pub trait Record {
    fn count(&self) -> u64;
    fn event(&self, number: u64) -> Result<Event<'_>, String>;
}

pub struct Log {
    map: Mmap,
    records_at: usize,
    bytes_at: usize,
    count: u64,
    pub directory: String,
}

impl Log {
    pub fn open(path: &Path) -> Result<Log, String> {
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        // SAFETY: nobody writes to the log any more: the recorded processes have ended.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| e.to_string())?;
        if map.len() < DIRECTORY_AT + DIRECTORY_SIZE || u64_at(&map, 0) != MAGIC {
            return Err(format!("{} is no record", path.display()));
        }
        if u32_at(&map, FULL_AT) != 0 {
            return Err("the record is full: something is missing from it".into());
        }
        let directory = &map[DIRECTORY_AT..DIRECTORY_AT + DIRECTORY_SIZE];
        let directory = directory.split(|b| *b == 0).next().unwrap_or_default();
        Ok(Log {
            records_at: u64_at(&map, 8) as usize,
            bytes_at: u64_at(&map, 16) as usize,
            count: u64_at(&map, 40).min(MOST_RECORDS),
            directory: String::from_utf8_lossy(directory).into_owned(),
            map,
        })
    }
}

impl Record for Log {
    fn count(&self) -> u64 {
        self.count
    }

    fn event(&self, number: u64) -> Result<Event<'_>, String> {
        let at = self.records_at + number as usize * RECORD_SIZE;
        let u32s = |n: usize| u32_at(&self.map, at + n);
        let u64s = |n: usize| u64_at(&self.map, at + n);
        let (file, offset, length) = (u32s(8), u64s(16), u64s(24));
        let data = || {
            let from = self.bytes_at + u64s(32) as usize;
            &self.map[from..from + length as usize]
        };
        let text = || std::str::from_utf8(data()).map_err(|e| format!("record {number}: {e}"));
        Ok(match u32s(0) {
            0 => Event::Nothing,
            1 => Event::Write { file, offset, data: data() },
            2 => Event::Truncate { file, size: offset },
            3 => Event::Allocate { file, end: offset + length },
            4 => Event::Sync { file },
            5 => Event::SyncDir,
            6 => Event::End { begin: u64s(40), result: u32s(12) as i32 },
            7 => Event::Create { file, name: text()? },
            8 => Event::Unlink { name: text()? },
            9 => Event::Note(text()?),
            10 => return Err(format!("record {number}: what cannot be recorded was done: {}", text()?)),
            other => return Err(format!("record {number} is of unknown kind {other}")),
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].try_into().map(u32::from_le_bytes).unwrap_or_default()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or_default()
}
