//! The mark of a WAL that has ended: all of it is in the database and on the disk.
//!
//! The mark stands in the place of the WAL's header. SQLite's recovery (wal.c `walIndexRecover`) looks for one of two magic
//! numbers there, finds neither, and takes the WAL for empty, whatever lies behind. So the file's blocks can stay, and
//! writing them again costs a third of what appending does. The number tells one end from another: it is drawn by chance,
//! so a mark with a known number is the one that was synced.

use super::atomic::SeqCst;
use super::layout::CheckpointWords;
use super::wal_index::WAL_HEADER;

const TEXT: &[u8; 24] = b"turnstile: all is copied";

pub fn mark(number: u64) -> [u8; WAL_HEADER as usize] {
    let mut bytes = [0; WAL_HEADER as usize];
    bytes[..TEXT.len()].copy_from_slice(TEXT);
    bytes[TEXT.len()..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Whether the WAL's first bytes are the mark with that number; 0 is no number.
pub fn is_mark(bytes: &[u8], number: u64) -> bool {
    number != 0 && bytes == mark(number)
}

impl CheckpointWords {
    /// The wal-index is opened, and nobody else has it open: which WAL it is (0: not known), and whether that is the one whose
    /// mark is on the disk.
    pub fn wal_is_opened(&self, inode: u64, is_marked: bool) {
        if !is_marked {
            self.ended.store(0, SeqCst);
        }
        self.wal_sent.store(0, SeqCst);
        // A file whose mark is on the disk is in its directory on the disk.
        self.wal_linked.store(u32::from(is_marked), SeqCst);
        self.wal_inode.store(inode, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_no_header_of_sqlites() {
        let bytes = mark(7);
        for magic in [0x377f_0682u32, 0x377f_0683] {
            assert_ne!(bytes[..4], magic.to_be_bytes());
        }
        assert!(
            is_mark(&bytes, 7) && !is_mark(&bytes, 8) && !is_mark(&mark(0), 0) && !is_mark(&bytes[..8], 7)
        );
    }
}
