//! Who may know whom (docs/architecture.md): dependencies between modules go one way.

use std::fs;
use std::path::Path;

/// A module and what it may name by `crate::`.
const LAYERS: &[(&str, &[&str])] = &[
    ("planted.rs", &[]),
    ("segment", &["planted"]),
    ("lock", &["segment", "planted"]),
    ("wire", &["lock", "segment"]),
    ("client", &["wire", "lock", "segment", "planted"]),
    ("closing.rs", &["wire"]),
    ("broker", &["closing", "wire", "lock", "segment", "planted"]),
    ("vfs", &["client", "wire", "lock", "segment", "planted"]),
    ("posix", &["client", "wire", "lock", "segment", "planted"]),
];

fn sources(path: &Path, found: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        found.push((path.display().to_string().replace("/./", "/"), fs::read_to_string(path).unwrap()));
    }
}

fn modules_of(path: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path), &mut found);
    assert!(!found.is_empty(), "{path} has no sources");
    found
}

#[test]
fn dependencies_go_one_way() {
    for (module, allowed) in LAYERS {
        let own = module.trim_end_matches(".rs");
        for (file, text) in modules_of(module) {
            for rest in text.split("crate::").skip(1) {
                let named: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                assert!(
                    named == own || allowed.contains(&named.as_str()),
                    "{file}: {own} may not know {named}"
                );
            }
        }
    }
}

#[test]
fn every_module_has_its_place() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for line in lib.lines().filter_map(|l| l.strip_prefix("pub mod ")) {
        let name = line.trim_end_matches(';');
        assert!(LAYERS.iter().any(|(m, _)| m.trim_end_matches(".rs") == name), "{name} is in no layer");
    }
}

/// The standard library drops `O_PATH` on musl, and opens what it was not to touch.
#[test]
fn o_path_is_asked_of_the_kernel_itself() {
    for (file, text) in modules_of(".") {
        assert!(!text.contains("libc::O_PATH"), "{file}: open it by broker::filesystem::named or nix");
    }
}

/// The rules are pure: no I/O, no clock of their own, no SQLite.
#[test]
fn the_rules_do_no_io() {
    for (file, text) in modules_of("lock") {
        for word in ["std::fs", "std::io", "libc::", "nix::", "Instant::now", "ffi::", "unsafe"] {
            assert!(!text.contains(word), "{file} uses {word}");
        }
    }
}

/// `unsafe` stays at the edges, and each block says why it is right.
#[test]
fn unsafe_is_at_the_edges_and_explained() {
    let edges = [
        "vfs/",
        "posix/",
        "segment/",
        "client/",
        "broker/liveness.rs",
        "broker/server.rs",
        "broker/foreign.rs",
        "broker/filesystem.rs",
        "broker/database.rs",
        "wire/socket.rs",
        "cli/",
        "checkpointer/",
        "keeper/",
        "finder/",
        "receiver/",
    ];
    for (file, text) in modules_of(".") {
        let lines: Vec<&str> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let word = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let block = code
                .match_indices("unsafe {")
                .chain(code.match_indices("unsafe impl"))
                .any(|(at, _)| word(at));
            if !block {
                continue;
            }
            assert!(edges.iter().any(|e| file.contains(&format!("src/{e}"))), "{file}:{} unsafe", n + 1);
            let explained = lines[n.saturating_sub(8)..=n]
                .iter()
                .any(|l| l.contains("SAFETY:") || l.contains("# Safety"));
            assert!(explained, "{file}:{}: unsafe without a reason", n + 1);
        }
    }
}

/// A file is one idea.
#[test]
fn files_stay_readable() {
    for (file, text) in modules_of(".") {
        let lines = text.lines().count();
        assert!(lines <= 400, "{file} has {lines} lines: split it");
    }
}
