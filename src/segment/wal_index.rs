//! What turnstile itself reads of the wal-index: the header's two copies, their checksum, the read marks.
//!
//! Format: SQLite's wal.c, `struct WalIndexHdr` (48 bytes, twice) and `struct WalCkptInfo` behind it;
//! <https://sqlite.org/walformat.html#the_wal_index_header>. In native byte order.

use std::sync::atomic::{AtomicU32, Ordering, fence};

/// `WALINDEX_MAX_VERSION` in wal.c.
const WAL_INDEX_VERSION: u32 = 3_007_000;
/// Bytes of the WAL's header and of each frame's: `WAL_HDRSIZE` and `WAL_FRAME_HDRSIZE` in wal.c
/// (<https://sqlite.org/fileformat2.html#the_write_ahead_log>).
pub const WAL_HEADER: u64 = 32;
pub const FRAME_HEADER: u64 = 24;
/// u32 words in one header copy.
const HEADER_WORDS: usize = 12;
/// Both copies and WalCkptInfo: 136 bytes (`WALINDEX_HDR_SIZE`).
const ALL_WORDS: usize = 34;
/// Word of `WalIndexHdr.mxFrame`.
const MX_FRAME: usize = 4;
/// Word of `WalIndexHdr.nPage`.
const N_PAGE: usize = 5;
/// Frames that a region has page numbers of, `HASHTABLE_NPAGE` in wal.c; the first region has fewer.
const FRAMES: usize = 4096;
const FRAMES_FIRST: usize = FRAMES - ALL_WORDS;
/// Word of `WalIndexHdr.aSalt[0]`.
const SALT: usize = 8;
/// Word of `WalCkptInfo.nBackfill`.
const BACKFILL: usize = 24;
/// Word of `WalCkptInfo.aReadMark[0]`.
const READ_MARKS: usize = 25;

/// One copy of the header, as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header([u32; HEADER_WORDS]);

impl Header {
    /// `mxFrame`: the number of frames that are valid.
    pub fn frames(&self) -> u32 {
        self.0[MX_FRAME]
    }

    /// `szPage`, in bytes; 0: not known yet.
    pub fn page_size(&self) -> u32 {
        let [_, _, a, b] = self.0[3].to_ne_bytes();
        match u16::from_ne_bytes([a, b]) {
            1 => 65536,
            size => u32::from(size),
        }
    }

    /// `nPage`: the database's size after the last valid frame, in pages.
    pub fn pages(&self) -> u32 {
        self.0[N_PAGE]
    }

    /// Where the last valid frame ends in the WAL, bytes.
    pub fn length(&self) -> u64 {
        WAL_HEADER + u64::from(self.frames()) * (FRAME_HEADER + u64::from(self.page_size()))
    }

    /// `aSalt`: what tells one generation of the WAL from another. Its bytes are the WAL header's.
    pub fn salts(&self) -> [u8; 8] {
        let ([a, b, c, d], [e, f, g, h]) = (self.0[SALT].to_ne_bytes(), self.0[SALT + 1].to_ne_bytes());
        [a, b, c, d, e, f, g, h]
    }
}

/// Where the page number of a frame stands: its region, and the word in that (`walFramePgno`). Frames count from 1.
pub fn page_number_at(frame: u32) -> (u32, usize) {
    let frame = frame.max(1) as usize;
    match (frame + FRAMES - FRAMES_FIRST - 1) / FRAMES {
        0 => (0, ALL_WORDS + frame - 1),
        region => (region as u32, (frame - 1 - FRAMES_FIRST) % FRAMES),
    }
}

/// The first region's head, in shared memory that others write at any time: only ever read and written word by
/// word through atomics.
#[derive(Clone, Copy, Debug)]
pub struct WalIndex {
    words: *const AtomicU32,
}

impl WalIndex {
    /// # Safety
    /// `region0` must be the start of a mapped, 4-byte aligned first region that outlives the value.
    pub unsafe fn new(region0: *mut u8) -> WalIndex {
        WalIndex { words: region0.cast() }
    }

    fn word(&self, i: usize) -> &AtomicU32 {
        assert!(i < ALL_WORDS);
        // SAFETY: in bounds of the first region by the assertion; mapped by `new`'s contract.
        unsafe { &*self.words.add(i) }
    }

    fn copy(&self, at: usize) -> Header {
        Header(std::array::from_fn(|i| self.word(at + i).load(Ordering::Relaxed)))
    }

    /// The first copy: what wal.c compares a reader's own header with after it got its read lock.
    pub fn header(&self) -> Header {
        fence(Ordering::SeqCst);
        self.copy(0)
    }

    /// The header if both copies agree, the checksum is right and the index is initialised: what
    /// `walIndexTryHdr` accepts. Read in its order: first copy, barrier, second copy.
    pub fn valid_header(&self) -> Option<Header> {
        let first = self.copy(0);
        fence(Ordering::SeqCst);
        let second = self.copy(HEADER_WORDS);
        let h = first.0;
        let is_init = h[3].to_ne_bytes()[0];
        let sum = checksum(&h[..10]);
        (first == second && is_init != 0 && h[0] == WAL_INDEX_VERSION && sum == [h[10], h[11]])
            .then_some(first)
    }

    /// Frames of the WAL, and how many of them are in the database: each as it was when it was read.
    pub fn progress(&self) -> (u32, u32) {
        (self.word(MX_FRAME).load(Ordering::Relaxed), self.word(BACKFILL).load(Ordering::Relaxed))
    }

    /// Whether SQLite can be given it to read: the header is valid, its page size one that there is, and no more frames
    /// are in the database than there are (wal.c looks for a page from `nBackfill` on, and with a number that is none
    /// it reads before the beginning of an array).
    pub fn is_sane(&self) -> bool {
        let Some(header) = self.valid_header() else { return false };
        let page = header.page_size();
        let pages = page == 0 && header.frames() == 0 || page.is_power_of_two() && page >= 512;
        pages && self.progress().1 <= header.frames()
    }

    /// `aReadMark[i]`.
    pub fn read_mark(&self, i: usize) -> u32 {
        self.word(READ_MARKS + i.min(4)).load(Ordering::SeqCst)
    }

    /// Makes the next reader recover the index from the WAL, beside those that read now: their marks stay.
    pub fn forget_header(&self) {
        for i in 0..2 * HEADER_WORDS {
            self.word(i).store(0, Ordering::SeqCst);
        }
    }

    /// For a private copy: a header that wal.c takes for valid and that no connection has seen, whatever was copied. Who
    /// accepts it drops its cached pages, and finds before it reads that the index says something else.
    pub fn set_apart(&self) {
        let mut h = self.copy(0).0;
        let [_, big_endian, a, b] = h[3].to_ne_bytes();
        h[0] = WAL_INDEX_VERSION;
        h[2] ^= 1 << 31; // iChange, counted commit by commit
        h[3] = u32::from_ne_bytes([1, big_endian, a, b]); // isInit
        [h[10], h[11]] = checksum(&h[..10]);
        for (i, word) in h.into_iter().chain(h).enumerate() {
            self.word(i).store(word, Ordering::SeqCst);
        }
    }

    /// Makes the next reader recover the index from the WAL, which nobody reads now.
    pub fn invalidate(&self) {
        for i in 0..ALL_WORDS {
            self.word(i).store(0, Ordering::SeqCst);
        }
    }
}

/// `walChecksumBytes` in native byte order, over pairs of words.
fn checksum(words: &[u32]) -> [u32; 2] {
    words.chunks_exact(2).fold([0u32, 0u32], |[s1, s2], pair| {
        let s1 = s1.wrapping_add(pair[0]).wrapping_add(s2);
        [s1, s2.wrapping_add(pair[1]).wrapping_add(s1)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in the middle of being written, or was never, is valid afterwards, too, and says nothing that was said.
    #[test]
    fn what_is_set_apart_is_valid_and_new() {
        let mut words = [0u32; ALL_WORDS];
        // SAFETY: as many words as the value looks at, which outlive it.
        let index = unsafe { WalIndex::new(words.as_mut_ptr().cast()) };
        let mut seen = Vec::new();
        for torn in [0u32, 7, 1 << 31] {
            index.word(2).store(torn, Ordering::SeqCst);
            index.word(MX_FRAME).store(5, Ordering::SeqCst);
            seen.push(index.header());
            index.set_apart();
            let header = index.valid_header().expect("wal.c takes it for valid");
            assert!(!seen.contains(&header) && header.frames() == 5);
        }
    }
}
