//! What the fuzz targets share: a broker in this process, its hostile clients, and one that is not.

pub mod clients;
pub mod messages;
pub mod places;

use std::time::Duration;
use tempfile::TempDir;

/// A directory where tests/fuzz says, which removes it: libFuzzer ends a process without its destructors. Else in memory.
pub fn directory() -> TempDir {
    let builder = |at: &str| tempfile::Builder::new().prefix("turnstile-fuzz-").tempdir_in(at);
    let at = std::env::var("TURNSTILE_FUZZ_DIRECTORY").unwrap_or_else(|_| "/dev/shm".into());
    builder(&at).or_else(|_| builder("/tmp")).expect("a directory for a few small files")
}

/// How many descriptors this process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Runs `body`, which may take so much of this thread's processor time and no more.
pub fn within<T>(limit: Duration, what: &str, body: impl FnOnce() -> T) -> T {
    let before = processor_time();
    let result = body();
    let took = processor_time() - before;
    assert!(took < limit, "{what} took {took:?} of the processor");
    result
}

fn processor_time() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock");
    Duration::new(now.tv_sec() as u64, now.tv_nsec() as u32)
}
