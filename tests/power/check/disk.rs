//! What is on the disk for certain, and what may be: a record, played up to a moment.
//!
//! - A write may be on the disk from its begin on. It is there for certain once a sync of its file has returned that
//!   *began* after the write had *ended*: a sync says nothing of what happened beside it.
//! - A sync that failed makes nothing certain, and the data that it should have written no later sync makes certain
//!   either: the kernel drops the error and takes the pages for clean. Only writing it again does. The size of the file
//!   is no page: the next sync tries again.
//! - A name that was made or removed is so for certain once a sync of the directory has returned that began after it.

use super::log::Event;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    Truncate(usize),
    /// The file has at least this size.
    Extend(usize),
}

impl Change {
    pub fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Change::Write { offset, data } => put(to, *offset, data),
            Change::Truncate(size) => to.resize(*size, 0),
            Change::Extend(size) => to.resize(to.len().max(*size), 0),
        }
    }
}

/// Writes as pwrite(2) does: a gap before it reads as zeros.
pub fn put(to: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if to.len() < end {
        to.resize(end, 0);
    }
    to[offset..end].copy_from_slice(data);
}

#[derive(Debug)]
pub struct Pending {
    /// The record that began it.
    begin: u64,
    pub change: Change,
    ended: bool,
    /// A sync of it has failed.
    lost: bool,
}

#[derive(Debug, Default)]
pub struct File {
    pub durable: Vec<u8>,
    /// In the order in which they began.
    pub pending: Vec<Pending>,
    /// What a process that reads the file sees.
    live: Vec<u8>,
    /// No name will ever lead to it again.
    gone: bool,
}

/// A name that points to a file since, or to none.
#[derive(Debug, PartialEq, Eq)]
pub struct Naming {
    pub name: String,
    pub file: Option<u32>,
}

/// An operation that has begun.
#[derive(Debug)]
enum Running {
    Change(u32),
    /// What the sync covers.
    Sync(u32, Vec<u64>),
    /// How many of the namings it covers, counted from the first of all.
    SyncDir(u64),
}

#[derive(Debug, Default)]
pub struct Disk {
    pub files: HashMap<u32, File>,
    pub names: BTreeMap<String, u32>,
    pub namings: Vec<Naming>,
    /// Namings that are certain, and no longer in `namings`.
    settled: u64,
    live_names: BTreeMap<String, u32>,
    running: HashMap<u64, Running>,
}

impl Disk {
    /// Plays record `number`.
    pub fn play(&mut self, number: u64, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Nothing | Event::Note(_) => {}
            Event::Write { file, offset, data } => {
                self.begin(number, file, Change::Write { offset: offset as usize, data: data.to_vec() })?;
            }
            Event::Truncate { file, size } => self.begin(number, file, Change::Truncate(size as usize))?,
            Event::Allocate { file, end } => self.begin(number, file, Change::Extend(end as usize))?,
            Event::Sync { file } => {
                let pending = &self.file(file)?.pending;
                let covered = pending.iter().filter(|p| p.ended && !p.lost).map(|p| p.begin).collect();
                self.running.insert(number, Running::Sync(file, covered));
            }
            Event::SyncDir => {
                let covered = self.settled + self.namings.len() as u64;
                self.running.insert(number, Running::SyncDir(covered));
            }
            Event::End { begin, result } => self.end(begin, result)?,
            Event::Create { file, name } => {
                self.files.insert(file, File::default());
                self.live_names.insert(name.to_owned(), file);
                self.namings.push(Naming { name: name.to_owned(), file: Some(file) });
            }
            Event::Unlink { name } => {
                self.live_names.remove(name);
                self.namings.push(Naming { name: name.to_owned(), file: None });
            }
        }
        Ok(())
    }

    fn file(&mut self, file: u32) -> Result<&mut File, String> {
        self.files.get_mut(&file).ok_or_else(|| format!("file {file} was never created"))
    }

    fn begin(&mut self, begin: u64, file: u32, change: Change) -> Result<(), String> {
        let of = self.file(file)?;
        if !of.gone {
            of.pending.push(Pending { begin, change, ended: false, lost: false });
        }
        self.running.insert(begin, Running::Change(file));
        Ok(())
    }

    fn end(&mut self, begin: u64, result: i32) -> Result<(), String> {
        match self.running.remove(&begin).ok_or_else(|| format!("record {begin} ends but did not begin"))? {
            Running::Change(file) => {
                let file = self.file(file)?;
                if result < 0 {
                    file.pending.retain(|p| p.begin != begin);
                } else if let Some(p) = file.pending.iter_mut().find(|p| p.begin == begin) {
                    p.ended = true;
                    if let Change::Write { data, .. } = &mut p.change {
                        data.truncate(result as usize);
                    }
                    p.change.apply(&mut file.live);
                }
            }
            Running::Sync(file, covered) => {
                let file = self.file(file)?;
                match result {
                    0 => file.settle(&covered),
                    _ => file.lose(&covered),
                }
            }
            Running::SyncDir(covered) if result == 0 => {
                let now = covered.saturating_sub(self.settled) as usize;
                self.settled += now as u64;
                for Naming { name, file } in self.namings.drain(..now) {
                    let before = match file {
                        Some(file) => self.names.insert(name, file),
                        None => self.names.remove(&name),
                    };
                    if let Some(gone) = before.and_then(|file| self.files.get_mut(&file)) {
                        *gone = File { gone: true, ..File::default() };
                    }
                }
            }
            Running::SyncDir(_) => {}
        }
        Ok(())
    }

    /// Only one image is possible.
    pub fn is_certain(&self) -> bool {
        self.namings.is_empty() && self.names.values().all(|n| self.files[n].pending.is_empty())
    }

    /// What a process sees that lists and reads the directory: names, contents, and the bytes of which that cannot be
    /// said, because who changed them was killed before it came back.
    pub fn live(&self) -> impl Iterator<Item = (&str, &[u8], Vec<Range<usize>>)> {
        self.live_names.iter().filter_map(|(name, file)| {
            let file = self.files.get(file)?;
            let running = file.pending.iter().filter(|p| !p.ended);
            let doubtful = running.map(|p| match &p.change {
                Change::Write { offset, data } => *offset..offset + data.len(),
                Change::Truncate(size) | Change::Extend(size) => *size..usize::MAX,
            });
            Some((name.as_str(), file.live.as_slice(), doubtful.collect()))
        })
    }
}

impl File {
    fn settle(&mut self, covered: &[u64]) {
        for begin in covered {
            let Some(at) = self.pending.iter().position(|p| p.begin == *begin) else { continue };
            let settled = self.pending.remove(at);
            settled.change.apply(&mut self.durable);
            // What began earlier and is not certain can no longer show through it.
            let (earlier, later) = {
                let later = self.pending.split_off(at);
                (std::mem::take(&mut self.pending), later)
            };
            self.pending.extend(earlier.into_iter().flat_map(|p| hidden_by(p, &settled.change)));
            self.pending.extend(later);
        }
    }

    fn lose(&mut self, covered: &[u64]) {
        for p in self.pending.iter_mut().filter(|p| covered.contains(&p.begin)) {
            p.lost = matches!(p.change, Change::Write { .. });
        }
    }
}

/// What is left of an earlier change when `later` is certain.
fn hidden_by(earlier: Pending, later: &Change) -> Vec<Pending> {
    let Change::Write { offset, data } = &earlier.change else { return Vec::new() };
    let (from, to) = (*offset, offset + data.len());
    let (cut, resume) = match later {
        Change::Write { offset, data } => (*offset, offset + data.len()),
        Change::Truncate(size) => (*size, usize::MAX),
        Change::Extend(_) => (usize::MAX, usize::MAX),
    };
    let piece = |a: usize, b: usize| {
        (a < b).then(|| Pending {
            change: Change::Write { offset: a, data: data[a - from..b - from].to_vec() },
            ..earlier
        })
    };
    if cut >= to || resume <= from {
        return vec![earlier];
    }
    [piece(from, cut.max(from)), piece(resume.min(to), to)].into_iter().flatten().collect()
}
