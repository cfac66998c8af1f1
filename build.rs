//! Compiles what must be C: `c/api.c` into every artifact, `c/preload.c`, `c/loading.c` and `c/files.c` into the extension
//! alone (the program has a SQLite of its own, whose names the interposers would take).

use std::env;
use std::path::PathBuf;

fn main() {
    let sqlite = env::var("DEP_SQLITE3_INCLUDE").expect("libsqlite3-sys tells where its headers are");
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("set by cargo"));
    println!("cargo:rerun-if-changed=c");

    cc::Build::new().file("c/api.c").include(&sqlite).warnings(true).compile("turnstile_api");

    let mut preload = cc::Build::new();
    preload.files(["c/preload.c", "c/loading.c", "c/files.c"]).include(&sqlite).warnings(true).pic(true);
    if env::var_os("CARGO_FEATURE_PLANTED").is_some() {
        preload.define("TURNSTILE_PLANTED_BUILD", None);
    }
    for object in preload.compile_intermediates() {
        println!("cargo:rustc-cdylib-link-arg={}", object.display());
    }
    // SQLite closes an extension whose entry point fails, and by then its VFS is registered.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // libgcc's unwinder linked in: as a library of its own it is most of what preloading costs a short program.
    let env_is = |key, value| env::var(key).as_deref() == Ok(value);
    if env_is("CARGO_CFG_TARGET_ENV", "gnu") {
        for arg in ["-Wl,--whole-archive", "-l:libgcc_eh.a", "-Wl,--no-whole-archive"] {
            println!("cargo:rustc-cdylib-link-arg={arg}");
        }
    }
    // rustc's own version script exports Rust's names only. lld, the default linker on x86-64, merges a second
    // script; elsewhere it has to be asked for.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--version-script={}", root.join("c/exports.map").display());
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        println!("cargo:rustc-cdylib-link-arg=-fuse-ld=lld");
    }
}
