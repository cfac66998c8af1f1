//! SQLite libraries of this process whose connections the VFS serves: what they ask of the C library is not for
//! anybody else to answer.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Where objects with such a library begin. One that finds no room is served twice, which its gate refuses.
static SERVED: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];

/// Where the object begins that the address is in; 0: in none (code made at run time).
pub fn object_of(address: usize) -> usize {
    // SAFETY: plain data for which all-zero is valid.
    let mut found: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address is a valid argument; the answer is written to `found`.
    let known = unsafe { libc::dladdr(address as *const _, &mut found) } != 0;
    if known { found.dli_fbase as usize } else { 0 }
}

/// The library with a function at this address is served from now on.
pub fn serve(address: usize) {
    let object = object_of(address);
    for place in &SERVED {
        match place.compare_exchange(0, object, SeqCst, SeqCst) {
            Err(other) if other != object => {}
            _ => return,
        }
    }
}

pub fn is_served(object: usize) -> bool {
    object != 0 && SERVED.iter().any(|place| place.load(SeqCst) == object)
}
