//! After a fork the child shares the parent's wal-index mapping, and SQLite writes there without any VFS call:
//! a `ROLLBACK` in the child would clean the parent's transaction out of the hash tables. So the child gets
//! private copies of the mappings before it runs, and everything it inherited becomes inert. (A connection that only reads
//! joins anew when the child uses it: `vfs/anew.rs`.)
//!
//! The cheap test on every call is a page under `MADV_WIPEONFORK`: zero in a child, however it was made. (A
//! vfork child shares the parent's memory and is the parent until it execs.)

use crate::segment::wal_index::WalIndex;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Changes in every forked child; what was made under another number is inherited, and inert.
static EPOCH: AtomicU64 = AtomicU64::new(1);
static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());
static INSTALL: Once = Once::new();
/// The last epoch that began in the fork handler, before anything of the child ran.
static HANDLED: AtomicU64 = AtomicU64::new(0);

/// A shared mapping, in a list that is only ever appended to: the fork handler walks it without a lock.
struct Mapping {
    /// 0: unused, may be taken again.
    address: AtomicUsize,
    length: AtomicUsize,
    /// It begins with a wal-index's header, and is one connection's: its copy is set apart.
    index: AtomicBool,
    next: AtomicPtr<Mapping>,
}

static MAPPINGS: AtomicPtr<Mapping> = AtomicPtr::new(ptr::null_mut());

/// Descriptors that a child closes: the same kind of list, the value is the number plus one.
struct Descriptor {
    raw: AtomicU32,
    device: AtomicU64,
    inode: AtomicU64,
    next: AtomicPtr<Descriptor>,
}

static DESCRIPTORS: AtomicPtr<Descriptor> = AtomicPtr::new(ptr::null_mut());

/// The current epoch, having noticed a fork if there was one.
#[inline]
pub fn epoch() -> u64 {
    let mark = MARK.load(Ordering::Acquire);
    // SAFETY: once set, the mark page stays mapped for the life of the process.
    if !mark.is_null() && unsafe { (*mark).load(Ordering::Relaxed) } == 0 {
        in_child(false);
    }
    EPOCH.load(Ordering::Relaxed)
}

/// This process is a forked child whose mappings were made private before it ran: nothing has read in its parent's since.
pub fn was_handled() -> bool {
    HANDLED.load(Ordering::Relaxed) == epoch()
}

/// Installs the fork handler and the mark, once a process.
pub fn install() {
    INSTALL.call_once(|| {
        // SAFETY: a fresh anonymous page, never unmapped.
        let page = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), 4096, prot, flags, -1, 0)
        };
        // Without the page there is still the handler.
        // SAFETY: advice on our own page.
        if page != libc::MAP_FAILED && unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) } == 0 {
            let mark = page.cast::<AtomicU32>();
            // SAFETY: page-aligned, zeroed, ours.
            unsafe { (*mark).store(1, Ordering::Relaxed) };
            MARK.store(mark, Ordering::Release);
        }
        if !crate::planted::planted("fork-unguarded") {
            // SAFETY: the handler only makes system calls and touches atomics.
            unsafe { libc::pthread_atfork(None, None, Some(child_handler)) };
        }
    });
}

unsafe extern "C" fn child_handler() {
    in_child(true);
}

/// Runs in the child, once: private copies over the shared mappings, a new epoch and, if the child has not run
/// yet (`fresh`, so that no number can have been reused), inherited descriptors closed.
fn in_child(fresh: bool) {
    if crate::planted::planted("fork-unguarded") {
        return;
    }
    let epoch = EPOCH.fetch_add(1, Ordering::Relaxed) + 1;
    if fresh {
        HANDLED.store(epoch, Ordering::Relaxed);
    }
    let mark = MARK.load(Ordering::Acquire);
    if !mark.is_null() {
        // SAFETY: mapped for the life of the process.
        unsafe { (*mark).store(1, Ordering::Relaxed) };
    }
    let mut node = MAPPINGS.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, appended only.
    while let Some(m) = unsafe { node.as_ref() } {
        let address = m.address.swap(0, Ordering::Relaxed);
        if address != 0 {
            make_private(address, m.length.swap(0, Ordering::Relaxed));
            if m.index.load(Ordering::Relaxed) && !crate::planted::planted("child-keeps-its-cache") {
                // SAFETY: the private copy, as long as a region and more, mapped as long as the connection is open.
                unsafe { WalIndex::new(address as *mut u8) }.set_apart();
            }
        }
        node = m.next.load(Ordering::Acquire);
    }
    let mut node = DESCRIPTORS.load(Ordering::Acquire);
    // SAFETY: as above.
    while let Some(d) = unsafe { node.as_ref() } {
        let raw = d.raw.swap(0, Ordering::Relaxed);
        let known = (d.device.load(Ordering::Relaxed), d.inode.load(Ordering::Relaxed));
        if raw != 0 && fresh && identity(raw as RawFd - 1) == Some(known) {
            // SAFETY: still the descriptor that was registered (the host may have closed it and used the number
            // again), in a child that has not run yet.
            unsafe { libc::close(raw as RawFd - 1) };
        }
        node = d.next.load(Ordering::Acquire);
    }
}

/// Device and inode of a descriptor. Only a system call: it is used in a fork handler.
fn identity(raw: RawFd) -> Option<(u64, u64)> {
    // SAFETY: stat is plain data for which all-zero is valid; fstat fills it for whatever the number is.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        (libc::fstat(raw, &mut st) == 0).then_some((st.st_dev, st.st_ino))
    }
}

/// Replaces a shared mapping by a private copy of its contents, at the same address.
fn make_private(address: usize, length: usize) {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the copy is made in fresh memory and then moved over our own mapping in one system call; the
    // source is mapped and readable. Only pages that are present are copied: a hole of the memfd reads as zeros.
    unsafe {
        let copy = libc::mmap(ptr::null_mut(), length, prot, flags, -1, 0);
        if copy != libc::MAP_FAILED {
            copy_present_pages(address, copy as usize, length);
            let moved =
                libc::mremap(copy, length, length, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, address);
            if moved != libc::MAP_FAILED {
                return;
            }
        }
        // No memory for a copy: zeros are as good, the child's connections are inert.
        libc::mmap(address as *mut _, length, prot, flags | libc::MAP_FIXED, -1, 0);
    }
}

/// Maps `length` bytes of the memfd from `offset` on in the place of a private copy. False: what is there stays there.
///
/// # Safety
/// A mapping of this process of that length at `address`, of which nobody has a reference into its memory.
pub unsafe fn map_over(address: usize, length: usize, fd: BorrowedFd, offset: u64, writable: bool) -> bool {
    let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: by contract.
    let at =
        unsafe { libc::mmap(address as *mut _, length, prot, flags, fd.as_raw_fd(), offset as libc::off_t) };
    at != libc::MAP_FAILED
}

/// # Safety
/// `from` and `to` are page-aligned mappings of `length` bytes.
unsafe fn copy_present_pages(from: usize, to: usize, length: usize) {
    // SAFETY: sysconf has no memory arguments.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    for offset in (0..length).step_by(page) {
        let mut present = 0u8;
        // SAFETY: one page, one byte of answer.
        let known = unsafe { libc::mincore((from + offset) as *mut _, page, &mut present) } == 0;
        if known && present & 1 != 0 {
            // SAFETY: both pages are mapped by the function's contract.
            unsafe { ptr::copy_nonoverlapping((from + offset) as *const u8, (to + offset) as *mut u8, page) };
        }
    }
}

/// Remembers a shared mapping for the fork handler; `forget_mapping` with the same address when it is unmapped. Twice
/// remembered, it is copied twice: from the shared pages, then from the copy.
pub fn remember_mapping(address: usize, length: usize) {
    remember(address, length, false);
}

/// As [`remember_mapping`], of a mapping that begins with a wal-index's header and that one connection has for itself.
pub fn remember_index(address: usize, length: usize) {
    remember(address, length, true);
}

fn remember(address: usize, length: usize, index: bool) {
    let mut node = MAPPINGS.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, appended only.
    while let Some(m) = unsafe { node.as_ref() } {
        let free = m.length.compare_exchange(0, length, Ordering::AcqRel, Ordering::Relaxed);
        if free.is_ok() {
            m.index.store(index, Ordering::Relaxed);
            m.address.store(address, Ordering::Release);
            return;
        }
        node = m.next.load(Ordering::Acquire);
    }
    let new = Box::into_raw(Box::new(Mapping {
        address: AtomicUsize::new(address),
        length: AtomicUsize::new(length),
        index: AtomicBool::new(index),
        next: AtomicPtr::new(ptr::null_mut()),
    }));
    push(&MAPPINGS, new, |m| &m.next);
}

pub fn forget_mapping(address: usize) {
    let mut node = MAPPINGS.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, appended only.
    while let Some(m) = unsafe { node.as_ref() } {
        if m.address.compare_exchange(address, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            m.length.store(0, Ordering::Release);
            return;
        }
        node = m.next.load(Ordering::Acquire);
    }
}

/// A descriptor that a forked child must not keep: the child's copy is closed before the child runs.
pub fn remember_descriptor(raw: RawFd) {
    let value = raw as u32 + 1;
    let Some((device, inode)) = identity(raw) else { return };
    let mut node = DESCRIPTORS.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, appended only.
    while let Some(d) = unsafe { node.as_ref() } {
        if d.raw.compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            // A fork between these lines finds another inode and leaves the child's copy open: harmless.
            d.device.store(device, Ordering::Relaxed);
            d.inode.store(inode, Ordering::Relaxed);
            return;
        }
        node = d.next.load(Ordering::Acquire);
    }
    let next = AtomicPtr::new(ptr::null_mut());
    let new = Box::into_raw(Box::new(Descriptor {
        raw: AtomicU32::new(value),
        device: AtomicU64::new(device),
        inode: AtomicU64::new(inode),
        next,
    }));
    push(&DESCRIPTORS, new, |d| &d.next);
}

pub fn forget_descriptor(raw: RawFd) {
    let value = raw as u32 + 1;
    let mut node = DESCRIPTORS.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, appended only.
    while let Some(d) = unsafe { node.as_ref() } {
        if d.raw.compare_exchange(value, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return;
        }
        node = d.next.load(Ordering::Acquire);
    }
}

/// A process-wide value that a forked child gets anew: the parent's threads may have held its locks.
pub struct PerProcess<T> {
    current: AtomicPtr<(u64, T)>,
}

impl<T: Default> PerProcess<T> {
    pub fn get(&'static self) -> &'static T {
        self.get_from(|_| T::default())
    }
}

impl<T: Default> Default for PerProcess<T> {
    fn default() -> PerProcess<T> {
        PerProcess::new()
    }
}

impl<T> PerProcess<T> {
    pub const fn new() -> PerProcess<T> {
        PerProcess { current: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The value; `make` is given the parent's, if there was one.
    pub fn get_from(&'static self, make: impl Fn(Option<&'static T>) -> T) -> &'static T {
        let epoch = epoch();
        // SAFETY: only ever set to leaked boxes.
        match unsafe { self.current.load(Ordering::Acquire).as_ref() } {
            Some((made_in, value)) if *made_in == epoch => value,
            _ => self.make_anew(epoch, make),
        }
    }

    /// Under a name of its own, by which tests/valgrind.supp knows what is left behind in a child.
    #[cold]
    #[inline(never)]
    fn make_anew(&'static self, epoch: u64, make: impl Fn(Option<&'static T>) -> T) -> &'static T {
        loop {
            let current = self.current.load(Ordering::Acquire);
            // SAFETY: only ever set to leaked boxes.
            let old = unsafe { current.as_ref() };
            if let Some((made_in, value)) = old
                && *made_in == epoch
            {
                return value;
            }
            let new = Box::into_raw(Box::new((epoch, make(old.map(|(_, value)| value)))));
            if self.current.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: nobody has seen it.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }
}

fn push<T>(head: &AtomicPtr<T>, new: *mut T, next: impl Fn(&T) -> &AtomicPtr<T>) {
    let mut old = head.load(Ordering::Acquire);
    loop {
        // SAFETY: `new` is a leaked box that nobody else has seen yet.
        next(unsafe { &*new }).store(old, Ordering::Relaxed);
        match head.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(now) => old = now,
        }
    }
}
