//! Mappings of the control memfd.

use super::atomic::{AtomicU32, SeqCst};
use super::layout::{CONTROL_SIZE, Control, Header, LAYOUT_VERSION, MAGIC, MAX_REGIONS, REGION_SIZE};
use super::memfd;
use crate::planted::planted;
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// [`Header::poisoned`]: the segment must not be used any more.
const POISONED: u32 = 1;
/// [`Header::poisoned`]: the broker is stopping; no new transactions.
const STOPPING: u32 = 2;

/// The control memfd, mapped: writable by the broker and by read-write members of the same layout version, else
/// read-only.
#[derive(Debug)]
pub struct ControlMap {
    map: MmapRaw,
    /// Only the header may be used: another layout version.
    header_only: bool,
}

impl ControlMap {
    /// The broker's: writes the constant fields, then hands the memfd out.
    pub fn create(fd: &OwnedFd, nonce: u64) -> io::Result<ControlMap> {
        ControlMap::begin(MmapOptions::new().len(CONTROL_SIZE).map_raw(fd)?, nonce)
    }

    /// The broker's own, for a database whose locks are not in a segment (guest mode).
    pub fn private() -> io::Result<ControlMap> {
        ControlMap::begin(MmapOptions::new().len(CONTROL_SIZE).map_anon()?.into(), 0)
    }

    fn begin(map: MmapRaw, nonce: u64) -> io::Result<ControlMap> {
        let p = map.as_mut_ptr().cast::<Header>();
        // SAFETY: the mapping is fresh zeroed memory that no other process has seen yet, large enough and aligned
        // for Control (asserted in layout.rs).
        unsafe {
            (*p).magic = MAGIC;
            (*p).layout_version = LAYOUT_VERSION;
            (*p).nonce = nonce;
        }
        Ok(ControlMap { map, header_only: false })
    }

    /// A member's. Fails when the memory is not what the broker announced.
    pub fn open(fd: &OwnedFd, nonce: u64, writable: bool) -> io::Result<ControlMap> {
        let wrong = || io::Error::other("the broker's shared memory is not the memory it announced");
        let size = usize::try_from(nix::sys::stat::fstat(fd)?.st_size).map_err(io::Error::other)?;
        if size < size_of::<Header>() {
            return Err(wrong());
        }
        let mut options = MmapOptions::new();
        let map = match writable {
            true => options.len(size).map_raw(fd)?,
            false => options.len(size).map_raw_read_only(fd)?,
        };
        let mut map = ControlMap { map, header_only: true };
        let header = map.header();
        if header.magic != MAGIC || header.nonce != nonce {
            return Err(wrong());
        }
        let other_version = header.layout_version != LAYOUT_VERSION || planted("other-layout-version");
        map.header_only = other_version || size != CONTROL_SIZE;
        Ok(map)
    }

    fn header(&self) -> &Header {
        // SAFETY: mapped for self's lifetime, at least this large, sealed against shrinking. The non-atomic fields
        // are written before the descriptor is handed out and never again.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    /// All of it; `None`: its layout is another version's.
    pub fn control(&self) -> Option<&Control> {
        // SAFETY: as `header`; the size was compared with Control's, of which everything else is atomics.
        (!self.header_only).then(|| unsafe { &*self.map.as_ptr().cast::<Control>() })
    }

    /// Address and length of the mapping.
    pub fn extent(&self) -> (usize, usize) {
        (self.map.as_ptr() as usize, self.map.len())
    }

    /// Non-zero once the segment must not be used. SeqCst: it must not be read before the page read, or after the
    /// lock, that it judges; the cost is that of a plain load on x86.
    pub fn poisoned(&self) -> bool {
        self.state() == POISONED
    }

    /// The broker is stopping: no new transactions.
    pub fn stopping(&self) -> bool {
        self.state() == STOPPING
    }

    /// Neither poisoned nor stopping.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.state() == 0
    }

    fn state(&self) -> u32 {
        self.header().poisoned.load(SeqCst)
    }

    pub fn poison(&self) {
        self.header().poisoned.store(POISONED, SeqCst);
    }

    /// The next broker has come: new transactions may begin again.
    pub fn go_on(&self) {
        let _ = self.header().poisoned.compare_exchange(STOPPING, 0, SeqCst, SeqCst);
    }

    pub fn stop(&self) {
        let _ = self.header().poisoned.compare_exchange(0, STOPPING, SeqCst, SeqCst);
    }

    /// Regions that may be touched. SeqCst pairs with [`ControlMap::grow`], where it follows the allocation. Never more
    /// than the memfd has: the number may be a scribbler's, and who touched what is behind the end would be killed.
    pub fn regions(&self) -> u32 {
        let regions = self.regions_word().load(SeqCst);
        if planted("regions-believed") { regions } else { regions.min(MAX_REGIONS) }
    }

    /// At least `wanted` regions of the wal-index, whose memfd this is: their pages are allocated before they are
    /// announced, so that nobody can meet a SIGBUS. The number in shared memory may be anything: a wrong one costs its
    /// members memory, or a region.
    pub fn grow(&self, wal_index: impl AsFd, wanted: u32) -> io::Result<u32> {
        let have = self.regions();
        if wanted > MAX_REGIONS {
            return Err(io::Error::other("the wal-index has reached its limit"));
        }
        if wanted > have {
            let from = have as usize * REGION_SIZE;
            memfd::allocate(wal_index, from, wanted as usize * REGION_SIZE - from)?;
            self.regions_word().fetch_max(wanted, SeqCst);
        }
        Ok(self.regions())
    }

    fn regions_word(&self) -> &AtomicU32 {
        &self.header().regions
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;
    use crate::planted::fails_without;

    /// Who maps a region behind the memfd's end is killed when it touches it.
    #[test]
    fn no_more_regions_than_there_are() {
        fails_without("regions-believed", || {
            let map = ControlMap::private().unwrap();
            for scribbled in [MAX_REGIONS + 1, u32::MAX] {
                map.regions_word().store(scribbled, SeqCst);
                assert_eq!(map.regions(), MAX_REGIONS);
            }
        });
    }
}
