//! Where `libturnstile.so` is, for the commands that hand it to other programs.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

const NAME: &str = "libturnstile.so";

/// `TURNSTILE_LIB`; else beside this program or, as `cargo run` leaves it, in `deps` beside it (the newer of the
/// two: what the last build made); else in the `lib` beside its `bin`.
pub fn find() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os("TURNSTILE_LIB").filter(|p| !p.is_empty()) {
        let named = PathBuf::from(named);
        return named.canonicalize().map_err(|e| format!("TURNSTILE_LIB={}: {e}", named.display()));
    }
    let program = std::env::current_exe().map_err(|e| format!("where am I? {e}"))?;
    let dir = program.parent().unwrap_or(Path::new("/"));
    // Mostly two names of one file: then the last one, the one that people know.
    let built = [dir.join("deps").join(NAME), dir.join(NAME)];
    let changed =
        |path: &PathBuf| path.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let newest = built.iter().filter(|p| p.exists()).max_by_key(|p| changed(p)).cloned();
    let found = newest.unwrap_or_else(|| dir.join("../lib").join(NAME));
    found.canonicalize().map_err(|_| {
        format!(
            "no {NAME} beside {} nor in ../lib: build it with `cargo build --release`, or name it in TURNSTILE_LIB",
            program.display()
        )
    })
}
