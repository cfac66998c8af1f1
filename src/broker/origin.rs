//! What the segment says of its own database, for a broker to which nothing was left: by which number its members know
//! it, and where its WAL is found.
//!
//! A member could write there, too: what it says of its own database harms nobody else.

use super::database::{Database, Home, Identity, State};
use crate::segment::atomic::SeqCst;
use crate::segment::layout::{NAME_WORDS, OriginWords};

/// `NAME_MAX`, limits.h.
const NAME_MAX: usize = 255;

impl Database {
    /// A member that may write has said where the database is.
    pub fn is_at(&mut self, number: u32, home: Home) {
        if let State::Gated { segment, .. } = &self.state
            && let Some(control) = segment.control.control()
        {
            write(&control.origin, number, &home);
        }
        self.home = Some(home);
    }
}

fn write(words: &OriginWords, number: u32, home: &Home) {
    words.device.store(home.directory.device, SeqCst);
    words.inode.store(home.directory.inode, SeqCst);
    let mut bytes = [0u8; 8 * NAME_WORDS];
    let length = home.name.len().min(NAME_MAX);
    bytes[..length].copy_from_slice(&home.name[..length]);
    for (word, eight) in words.name.iter().zip(bytes.as_chunks().0) {
        word.store(u64::from_ne_bytes(*eight), SeqCst);
    }
    words.length.store(length as u64, SeqCst);
    words.number.store(u64::from(number), SeqCst);
}

/// The number and the home. `None`: nothing that could be one.
pub fn read(words: &OriginWords) -> Option<(u32, Home)> {
    let length = usize::try_from(words.length.load(SeqCst)).ok().filter(|n| (1..=NAME_MAX).contains(n))?;
    let bytes: Vec<u8> = words.name.iter().flat_map(|word| word.load(SeqCst).to_ne_bytes()).collect();
    let name = bytes[..length].to_vec();
    let number = u32::try_from(words.number.load(SeqCst)).ok().filter(|n| *n != 0)?;
    let directory = Identity { device: words.device.load(SeqCst), inode: words.inode.load(SeqCst) };
    let plain = !name.contains(&b'/') && !name.contains(&0);
    plain.then_some((number, Home { directory, name }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else_is_believed() {
        let words = OriginWords::default();
        assert_eq!(read(&words), None);
        for length in [1, 8, 255] {
            let directory = Identity { device: 1, inode: u64::MAX };
            let home = Home { directory, name: vec![b'x'; length] };
            write(&words, 7, &home);
            assert_eq!(read(&words), Some((7, home)));
        }
        words.length.store(256, SeqCst);
        assert_eq!(read(&words), None);
        words.length.store(4, SeqCst);
        words.name[0].store(u64::from_ne_bytes(*b"../abcde"), SeqCst);
        assert_eq!(read(&words), None);
    }
}
