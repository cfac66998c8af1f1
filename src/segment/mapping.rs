//! Shared mappings of the segment's memfds.

use super::layout::{CONTROL_SIZE, Control, LAYOUT_VERSION, MAGIC};
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

/// The control page, mapped read-only by members and writable by the broker.
#[derive(Debug)]
pub struct ControlMap {
    map: MmapRaw,
}

impl ControlMap {
    /// The broker's: writes the constant fields, then hands the memfd out.
    pub fn create(fd: &OwnedFd, nonce: u64) -> io::Result<ControlMap> {
        let map = MmapOptions::new().len(CONTROL_SIZE).map_raw(fd)?;
        let p = map.as_mut_ptr().cast::<Control>();
        // SAFETY: the mapping is a fresh zeroed page that no other process has seen yet, large enough and aligned
        // for Control (asserted in layout.rs).
        unsafe {
            (*p).magic = MAGIC;
            (*p).layout_version = LAYOUT_VERSION;
            (*p).nonce = nonce;
        }
        Ok(ControlMap { map })
    }

    /// A member's. Fails when the memory is not what the broker announced.
    pub fn open(fd: &OwnedFd, nonce: u64) -> io::Result<ControlMap> {
        let map = MmapOptions::new().len(CONTROL_SIZE).map_raw_read_only(fd)?;
        let map = ControlMap { map };
        let c = map.get();
        if c.magic != MAGIC || c.layout_version != LAYOUT_VERSION || c.nonce != nonce {
            return Err(io::Error::other("the broker's shared memory is not the memory it announced"));
        }
        Ok(map)
    }

    fn get(&self) -> &Control {
        // SAFETY: mapped for self's lifetime and sealed against shrinking. The non-atomic fields are written
        // before the descriptor is handed out and never again.
        unsafe { &*self.map.as_ptr().cast::<Control>() }
    }

    /// Non-zero once the segment must not be used. SeqCst: it must not be read before the page read that it
    /// judges; the cost is that of a plain load on x86.
    pub fn poisoned(&self) -> bool {
        self.get().poisoned.load(Ordering::SeqCst) != 0
    }

    pub fn poison(&self) {
        self.get().poisoned.store(1, Ordering::SeqCst);
    }

    /// Regions that may be touched. SeqCst pairs with [`ControlMap::set_regions`], which follows the allocation.
    pub fn regions(&self) -> u32 {
        self.get().regions.load(Ordering::SeqCst)
    }

    pub fn set_regions(&self, regions: u32) {
        self.get().regions.store(regions, Ordering::SeqCst);
    }
}
