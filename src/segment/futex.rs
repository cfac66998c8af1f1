//! Sleeping on a word of shared memory (futex(2)), not process-private: the waker may be any process.

use super::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` is `expected`, for `limit` at most. May return early.
pub fn wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let timeout = libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // SAFETY: the word is mapped and aligned as long as it is borrowed; the timeout is read only.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAIT,
            expected,
            &raw const timeout,
            std::ptr::null::<u32>(),
            0,
        );
    }
}

/// Wakes whoever sleeps on `word`.
pub fn wake(word: &AtomicU32) {
    // SAFETY: as above; no other memory is passed.
    unsafe { libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAKE, 1) };
}

/// Wakes everybody who sleeps on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAKE, i32::MAX) };
}

/// Microseconds of `CLOCK_MONOTONIC`.
pub fn micros() -> u64 {
    let (seconds, nanos) = clock(libc::CLOCK_MONOTONIC);
    seconds * 1_000_000 + nanos / 1000
}

/// Milliseconds of `CLOCK_MONOTONIC_COARSE`: a few nanoseconds' work, a few milliseconds' resolution.
pub fn coarse_millis() -> u64 {
    let (seconds, nanos) = clock(libc::CLOCK_MONOTONIC_COARSE);
    seconds * 1000 + nanos / 1_000_000
}

fn clock(id: libc::clockid_t) -> (u64, u64) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel (its vDSO) writes one timespec.
    unsafe { libc::clock_gettime(id, &mut now) };
    (now.tv_sec as u64, now.tv_nsec as u64)
}
