//! One disk as a power loss may leave it: all that is certain, and of the rest a part that chance picks.
//!
//! A write that is not certain may be there whole, in part or not at all, whatever was written before or after it. Its
//! parts are sectors of 512 bytes: a sector is old or new, never a mixture, and bytes that nobody wrote stay as they
//! are (SQLite's `SQLITE_IOCAP_POWERSAFE_OVERWRITE`, which the unix VFS claims by default). The size of a file may have
//! grown with the data still missing, which then reads as zeros. Of the changes to one name a first few are there.

use super::disk::{Change, Disk, File, put};
use std::collections::BTreeMap;

const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// Files by name.
pub type Image = BTreeMap<String, Vec<u8>>;

/// SplitMix64: small, and the same on every machine, so that an image is its seed.
pub struct Chance(u64);

impl Chance {
    pub fn new(parts: &[u64]) -> Chance {
        let mut chance = Chance(0x7475_726e_7374_696c);
        for part in parts {
            chance.0 = chance.next() ^ part;
        }
        chance
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }
}

/// How one file's pending changes fare.
enum Fate {
    /// Each part of so many bytes by itself, in percent.
    Parts { size: usize, percent: u64 },
    /// The first so many changes, and the first sectors of the next.
    InOrder { changes: usize, sectors: usize },
}

impl Fate {
    fn pick(chance: &mut Chance, changes: usize) -> Fate {
        if chance.percent(25) {
            let sectors = chance.below(9) as usize;
            return Fate::InOrder { changes: chance.below(changes as u64 + 1) as usize, sectors };
        }
        let size = [SECTOR, SECTOR, PAGE, usize::MAX][chance.below(4) as usize];
        let percent = [0, 0, 5, 30, 50, 70, 95, 100][chance.below(8) as usize];
        Fate::Parts { size, percent }
    }
}

/// An image of `disk`.
pub fn make(disk: &Disk, chance: &mut Chance) -> Image {
    let mut names = disk.names.clone();
    let mut changed: Vec<&str> = disk.namings.iter().map(|n| n.name.as_str()).collect();
    changed.sort_unstable();
    changed.dedup();
    for name in changed {
        let of_name: Vec<_> = disk.namings.iter().filter(|n| n.name == name).collect();
        let kept = chance.below(of_name.len() as u64 + 1) as usize;
        match of_name[..kept].last().map(|n| n.file) {
            Some(Some(file)) => drop(names.insert(name.to_owned(), file)),
            Some(None) => drop(names.remove(name)),
            None => {}
        }
    }
    names
        .into_iter()
        .filter_map(|(name, file)| Some((name, contents(disk.files.get(&file)?, chance))))
        .collect()
}

fn contents(file: &File, chance: &mut Chance) -> Vec<u8> {
    let mut bytes = file.durable.clone();
    let fate = Fate::pick(chance, file.pending.len());
    for (n, pending) in file.pending.iter().enumerate() {
        match (&fate, &pending.change) {
            (Fate::InOrder { changes, .. }, change) if n < *changes => change.apply(&mut bytes),
            (Fate::InOrder { changes, sectors }, Change::Write { offset, data }) if n == *changes => {
                let parts = parts(*offset, data, SECTOR).take(*sectors);
                parts.for_each(|(at, part)| put(&mut bytes, at, part));
            }
            (Fate::InOrder { .. }, _) => {}
            (Fate::Parts { size, percent }, Change::Write { offset, data }) => {
                for (at, part) in parts(*offset, data, *size) {
                    if chance.percent(*percent) {
                        put(&mut bytes, at, part);
                    } else if at + part.len() > bytes.len() && chance.percent(10) {
                        bytes.resize(at + part.len(), 0);
                    }
                }
            }
            (Fate::Parts { percent, .. }, change) => {
                if chance.percent(*percent) {
                    change.apply(&mut bytes);
                }
            }
        }
    }
    bytes
}

/// The parts of a write, cut where a multiple of `size` lies in the file.
fn parts(offset: usize, data: &[u8], size: usize) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let done = at - offset;
        if done >= data.len() {
            return None;
        }
        let part = (size - at % size).min(data.len() - done);
        let from = at;
        at += part;
        Some((from, &data[done..done + part]))
    })
}
