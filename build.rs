//! Compiles what must be C: `c/api.c` into every artifact, `c/preload.c`, `c/loading.c` and `c/files.c` into the extension
//! alone (the program has a SQLite of its own, whose names the interposers would take).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    match env::var("CARGO_CFG_TARGET_ENV").as_deref() {
        Ok("gnu") => {
            for arg in ["-Wl,--whole-archive", "-l:libgcc_eh.a", "-Wl,--no-whole-archive"] {
                println!("cargo:rustc-cdylib-link-arg={arg}");
            }
        }
        Ok("musl") => link_for_musl(),
        _ => {}
    }
    // rustc's own version script exports Rust's names only. lld, the default linker on x86-64, merges a second
    // script; elsewhere it has to be asked for.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--version-script={}", root.join("c/exports.map").display());
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        println!("cargo:rustc-cdylib-link-arg=-fuse-ld=lld");
    }
}

/// Rust links everything of a build for musl statically, or nothing (`-C target-feature=-crt-static`, as `make musl` has
/// it): an extension is there only in the second case. The program is linked statically even so: it shall run in an image
/// that holds nothing else.
fn link_for_musl() {
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let rustc = env::var_os("RUSTC").expect("set by cargo");
    let (target, host) = (env::var("TARGET").expect("set by cargo"), env::var("HOST").expect("set by cargo"));
    let asked = Command::new(rustc).args(["--print", "sysroot"]).output().expect("rustc runs");
    let toolchain = Path::new(String::from_utf8_lossy(&asked.stdout).trim()).join("lib/rustlib");
    let own = toolchain.join(&target).join("lib/self-contained");
    if features.split(',').any(|f| f == "crt-static") || !own.join("libunwind.a").exists() {
        return; // static already; or a distribution's Rust, which knows its own musl
    }
    let directory = |name: &str, scripts: &[(&str, &str)]| {
        let path = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join(name);
        fs::create_dir_all(&path).expect("OUT_DIR is for that");
        for (library, archive) in scripts {
            let text = format!("INPUT({})\n", own.join(archive).display());
            fs::write(path.join(library), text).expect("OUT_DIR is for that");
        }
        path.display().to_string()
    };
    // Rust's own unwinder for the libgcc_s that it asks for: that one is glibc's on most machines.
    let unwinder = ("libgcc_s.so", "libunwind.a");
    println!("cargo:rustc-cdylib-link-arg=-L{}", directory("dynamic", &[unwinder]));
    let libraries = directory("static", &[unwinder, ("libc.so", "libc.a")]);
    let start = own.join("rcrt1.o").display().to_string();
    for arg in [&format!("-L{libraries}"), "-nostartfiles", &start, "-Wl,--no-dynamic-linker,-z,text"] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
    // Two version scripts need lld, and this linker has other defaults than the host's.
    let lld = toolchain.join(host).join("bin/gcc-ld");
    if lld.exists() {
        println!("cargo:rustc-link-arg=-B{}", lld.display());
    }
    // `c/exports.map` names what glibc alone has, too.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--undefined-version");
    println!("cargo:rustc-link-arg=-fuse-ld=lld");
}
