//! Versions of turnstile's own parts, and what is known of those of SQLite.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde_json::Value;
use turnstile::vfs::build::{Identity, SECTION};

use super::broker::Broker;
use super::findings::Findings;
use crate::cli::extension;
use crate::cli::libc::Libc;
use crate::cli::run::elf::Elf;

pub fn look(broker: Option<&Broker>, database: Option<&Value>, findings: &mut Findings) {
    let own = Identity::own();
    let sqlite = rusqlite::version();
    findings.ok(
        "version",
        format!(
            "turnstile {}, protocol {}, layout {}, its own SQLite {sqlite}",
            own.version, own.protocol, own.layout
        ),
    );
    extensions(&own, findings);
    if let Some(broker) = broker.filter(|broker| broker.version() != own.version) {
        findings.warning(
            "broker-version",
            format!("the broker is of version {}, this program of {}", broker.version(), own.version),
            "install one version everywhere, then `turnstile serve --replace` (or systemctl restart turnstile): its \
             members go on",
        );
    }
    members(database, findings);
}

/// The extension that this program hands to others; musl's, too, if there are two.
fn extensions(own: &Identity, findings: &mut Findings) {
    match extension::find(None) {
        Ok(path) => {
            extension_of(own, &path, findings);
            if let Some(second) = extension::find(Some(Libc::Musl)).ok().filter(|second| *second != path) {
                extension_of(own, &second, findings);
            }
        }
        Err(e) => findings.problem("extension-missing", e, "install the two together"),
    }
}

fn extension_of(own: &Identity, path: &Path, findings: &mut Findings) {
    let name = path.display();
    match identity(path) {
        Some(found) if found == *own => findings.ok("extension", format!("extension: {name}, of the same version")),
        Some(Identity { version, protocol, layout }) => findings.problem(
            "extension-version",
            format!("the extension {name} is another build: version {version}, protocol {protocol}, layout {layout}"),
            "install program and extension together",
        ),
        None => findings.problem(
            "extension-unknown",
            format!("{name} is no extension of turnstile's, or one that does not say which"),
            "install program and extension together",
        ),
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let file = File::open(path).ok()?;
    let elf = Elf::read(&file).ok()??;
    Identity::read(&elf.section(&file, SECTION).ok()??)
}

/// Who has an SQLite of which something is known.
fn members(database: Option<&Value>, findings: &mut Findings) {
    let mut by_version: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for member in database.into_iter().flat_map(|d| d["members"].as_array().into_iter().flatten()) {
        let text = |key: &str| member[key].as_str().unwrap_or("?").to_owned();
        by_version.entry(text("sqlite")).or_default().push(format!(
            "{} (pid {})",
            text("program"),
            member["pid"]
        ));
    }
    for (version, who) in &by_version {
        let more = if who.len() > 1 { format!(" and {} more", who.len() - 1) } else { String::new() };
        let beside_plain = database.is_some_and(|d| d["mode"] == "guest");
        sqlite(version, &format!("{}{more}", who[0]), beside_plain, findings);
    }
}

/// What is known of a version of SQLite that `who` uses. `beside_plain`: in guest mode.
pub fn sqlite(version: &str, who: &str, beside_plain: bool, findings: &mut Findings) {
    let Some(v) = parsed(version) else { return };
    if v < [3, 34, 0] {
        return findings.problem(
            "sqlite-too-old",
            format!("{who} has SQLite {version}: turnstile needs 3.34 or later"),
            "let it use a newer one",
        );
    }
    match has_reset_race(v) {
        true if beside_plain => findings.warning(
            "sqlite-wal-reset",
            format!(
                "{who} has SQLite {version}: a plain client that begins the WAL anew beside its checkpoint can damage \
                 the database (sqlite.org/wal.html#walresetbug)"
            ),
            "SQLite 3.51.3 or later, 3.50.7 or 3.44.6, or no plain clients",
        ),
        true => findings.ok(
            "sqlite-wal-reset",
            format!("{who} has SQLite {version}, whose WAL-reset race cannot happen among members"),
        ),
        false => {}
    }
    if has_savepoint_fault(v) {
        findings.warning(
            "sqlite-savepoint",
            format!("{who} has SQLite {version}: after ROLLBACK TO a savepoint in a transaction too large for the \
                     cache, commits are lost if all programs die or power fails before the next checkpoint"),
            SAVEPOINT_FIXED,
        );
    }
}

fn parsed(version: &str) -> Option<[u32; 3]> {
    let mut numbers = version.split('.').map(|part| part.parse().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)])
}

/// Mended in 3.51.3, and in two older lines.
fn has_reset_race(v: [u32; 3]) -> bool {
    let mended = v >= [3, 51, 3] || (v[1] == 50 && v[2] >= 7) || (v[1] == 44 && v[2] >= 6);
    !mended
}

const SAVEPOINT_FIXED: &str = "SQLite 3.50.2 or later";

/// `sqlite3WalSavepointUndo` keeps the frame from which checksums are to be computed anew, though it has been undone. By
/// trying: 3.40.1, 3.41.2, 3.43.2, 3.46.1 to 3.49.2 and 3.50.1 have it, 3.50.2, 3.50.4 and 3.54.1 have not.
fn has_savepoint_fault(v: [u32; 3]) -> bool {
    v < [3, 50, 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_and_not_text() {
        assert_eq!(parsed("3.40.1"), Some([3, 40, 1]));
        assert_eq!(parsed("3.9"), Some([3, 9, 0]));
        assert_eq!(parsed("three"), None);
        assert!(parsed("3.9.2") < parsed("3.34.0"));
    }

    #[test]
    fn what_is_mended_is_not_named() {
        for old in ["3.40.1", "3.44.5", "3.50.6", "3.51.2", "3.45.0"] {
            assert!(has_reset_race(parsed(old).unwrap()), "{old}");
        }
        for new in ["3.51.3", "3.53.0", "3.50.7", "3.44.6", "3.54.1"] {
            assert!(!has_reset_race(parsed(new).unwrap()), "{new}");
        }
        assert!(has_savepoint_fault([3, 40, 1]) && has_savepoint_fault([3, 50, 1]));
        assert!(!has_savepoint_fault([3, 50, 2]) && !has_savepoint_fault([3, 54, 1]));
    }
}
