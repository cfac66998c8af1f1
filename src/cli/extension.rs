//! Where the extension is, for the commands that hand it to other programs: `libturnstile.so`, and for programs that run
//! on musl `libturnstile-musl.so`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::libc::Libc;
use super::run::elf::Elf;

/// `TURNSTILE_LIB`; else beside this program or, as `cargo run` leaves it, in `deps` beside it (the newer of the
/// two: what the last build made); else in the `lib` beside its `bin`. `None`: for whichever C library there is one.
pub fn find(libc: Option<Libc>) -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os("TURNSTILE_LIB").filter(|p| !p.is_empty()) {
        return find_named(Path::new(&named), libc);
    }
    let program = std::env::current_exe().map_err(|e| format!("where am I? {e}"))?;
    let dir = program.parent().unwrap_or(Path::new("/"));
    let names = names(libc);
    names.iter().find_map(|name| find_in(dir, name, libc)).ok_or_else(|| {
        let (name, goal) = (names[0], libc.unwrap_or(Libc::Glibc).goal());
        format!(
            "no {name} beside {} nor in ../lib: build it with `{goal}`, or name it in TURNSTILE_LIB",
            program.display()
        )
    })
}

/// musl's may have the other's name: in a root that knows no other C library, or as cargo leaves it.
fn names(libc: Option<Libc>) -> &'static [&'static str] {
    const NAMES: [&str; 3] = ["libturnstile.so", "libturnstile-musl.so", "libturnstile.so"];
    match libc {
        Some(Libc::Glibc) => &NAMES[..1],
        Some(Libc::Musl) => &NAMES[1..],
        None => &NAMES[..2],
    }
}

/// The one that is named or, for a program on the other C library, the one beside it.
fn find_named(named: &Path, libc: Option<Libc>) -> Result<PathBuf, String> {
    let found = named.canonicalize().map_err(|e| format!("TURNSTILE_LIB={}: {e}", named.display()))?;
    if is_for(&found, libc) {
        return Ok(found);
    }
    let beside = libc.and_then(|libc| Some(found.parent()?.join(libc.library())));
    Ok(beside.filter(|path| path.exists() && is_for(path, libc)).unwrap_or(found))
}

fn find_in(dir: &Path, name: &str, libc: Option<Libc>) -> Option<PathBuf> {
    let there = |path: &PathBuf| path.exists() && is_for(path, libc);
    // Mostly two names of one file: then the last one, the one that people know.
    let built = [dir.join("deps").join(name), dir.join(name)];
    let changed =
        |path: &PathBuf| path.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let newest = built.into_iter().filter(there).max_by_key(changed);
    newest.or_else(|| Some(dir.join("../lib").join(name)).filter(there))?.canonicalize().ok()
}

/// What is no library at all is somebody else's to complain about.
fn is_for(path: &Path, libc: Option<Libc>) -> bool {
    let elf = File::open(path).and_then(|file| Elf::read(&file));
    elf.ok().flatten().is_none_or(|elf| libc.is_none_or(|libc| Libc::of(&elf) == libc))
}

/// What goes into `LD_PRELOAD` for this library. Children inherit it, and may run on the other C library, whose linker
/// stops them at a library that is not its own. Where both are installed each linker takes its own: in
/// `libturnstile.both/$PLATFORM/libturnstile.so` glibc puts the processor's name (ld.so(8)), and musl takes it as it stands.
pub fn preload_path(library: &Path) -> PathBuf {
    let dir = library.parent().unwrap_or(Path::new("/"));
    let both = dir.join("libturnstile.both");
    let leads = |platform: &str, libc: Libc| {
        let own = dir.join(libc.library());
        both.join(platform).join("libturnstile.so").canonicalize().is_ok_and(|led| led == own)
    };
    let known = [Libc::Glibc, Libc::Musl].iter().any(|libc| library == dir.join(libc.library()));
    if known && leads("$PLATFORM", Libc::Musl) && leads(std::env::consts::ARCH, Libc::Glibc) {
        return both.join("$PLATFORM/libturnstile.so");
    }
    library.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn both_libraries_are_preloaded_by_one_name_where_both_are_there() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().canonicalize().unwrap();
        let (glibc, musl) = (dir.join("libturnstile.so"), dir.join("libturnstile-musl.so"));
        std::fs::write(&glibc, "").unwrap();
        assert_eq!(preload_path(&glibc), glibc);
        std::fs::write(&musl, "").unwrap();
        assert_eq!(preload_path(&musl), musl, "without the names that lead to both");
        for (name, to) in [("$PLATFORM", "libturnstile-musl.so"), (std::env::consts::ARCH, "libturnstile.so")]
        {
            assert_eq!(preload_path(&glibc), glibc, "one alone");
            std::fs::create_dir_all(dir.join("libturnstile.both").join(name)).unwrap();
            let link = dir.join("libturnstile.both").join(name).join("libturnstile.so");
            symlink(Path::new("../..").join(to), link).unwrap();
        }
        let both = dir.join("libturnstile.both/$PLATFORM/libturnstile.so");
        assert_eq!((preload_path(&glibc), preload_path(&musl)), (both.clone(), both));
        let other = dir.join("other.so");
        assert_eq!(preload_path(&other), other, "TURNSTILE_LIB names another file");
    }
}
