//! The database file as a last close left it: what is noted of it, and whether it is still so.

use super::atomic::SeqCst;
use super::layout::CheckpointWords;
use nix::sys::stat::FileStat;

/// Modification time, nanoseconds since 1970.
fn modified(st: &FileStat) -> u64 {
    (st.st_mtime as u64).wrapping_mul(1_000_000_000).wrapping_add(st.st_mtime_nsec as u64)
}

impl CheckpointWords {
    /// To be called under CHECKPOINT.
    pub fn note_left(&self, st: &FileStat) {
        self.size.store(st.st_size as u64, SeqCst);
        self.modified.store(modified(st), SeqCst);
    }

    /// Nobody has written to the file since.
    pub fn is_as_left(&self, st: &FileStat) -> bool {
        st.st_size as u64 == self.size.load(SeqCst) && modified(st) == self.modified.load(SeqCst)
    }
}
