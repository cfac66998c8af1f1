//! Where a result comes from: without it a figure means nothing. And the place where the databases go.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;
use rusqlite::Connection;
use serde::Serialize;
use tempfile::TempDir;
use turnstile::broker::filesystem::{Mount, mount_of};

/// The databases' directory, removed when dropped.
pub struct Place {
    pub directory: TempDir,
    /// The filesystem's type.
    pub filesystem: String,
}

impl Place {
    /// In `asked`; else in the first of the current directory, `/var/tmp` and `TMPDIR` that is on a disk.
    pub fn choose(asked: Option<&Path>) -> Result<Place, String> {
        if let Some(asked) = asked {
            return Place::inside(asked).map_err(|e| format!("--dir {}: {e}", asked.display()));
        }
        let mut reasons = Vec::new();
        for candidate in [PathBuf::from("."), PathBuf::from("/var/tmp"), std::env::temp_dir()] {
            match Place::inside(&candidate) {
                Ok(place) if is_memory(&place.filesystem) => {
                    reasons.push(format!("{} is on {}", candidate.display(), place.filesystem));
                }
                Ok(place) => return Ok(place),
                Err(e) => reasons.push(format!("{}: {e}", candidate.display())),
            }
        }
        Err(format!("no place for the databases, name one with --dir ({})", reasons.join("; ")))
    }

    fn inside(parent: &Path) -> Result<Place, String> {
        let text = |e: std::io::Error| e.to_string();
        let parent = parent.canonicalize().map_err(text)?;
        let mount = File::open(&parent).map_err(text)?;
        let mount = mount_of(&mount, std::process::id() as i32, &[]);
        let mount: Mount = mount.ok_or("its filesystem cannot be told")?;
        if !mount.is_local() {
            return Err(format!("turnstile would refuse it: {}", mount.reason()));
        }
        let directory = tempfile::Builder::new().prefix("turnstile-bench-").tempdir_in(&parent);
        Ok(Place { directory: directory.map_err(text)?, filesystem: mount.kind })
    }
}

pub fn is_memory(filesystem: &str) -> bool {
    matches!(filesystem, "tmpfs" | "ramfs")
}

#[derive(Debug, Serialize)]
pub struct Environment {
    pub turnstile: &'static str,
    pub sqlite: String,
    /// Date and hash of SQLite's own check-in.
    pub sqlite_source: String,
    /// When it began, in UTC.
    pub date: String,
    pub cores: usize,
    pub processor: String,
    pub kernel: String,
    pub architecture: String,
    pub filesystem: String,
    pub directory: PathBuf,
    /// Of the minute before: what else the machine was doing.
    pub load: f64,
}

impl Environment {
    pub fn find(place: &Place) -> Result<Environment, String> {
        let asked = Connection::open_in_memory().and_then(|db| {
            let sql = "SELECT sqlite_version(), sqlite_source_id(), strftime('%Y-%m-%dT%H:%M:%SZ', 'now')";
            db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        });
        let (sqlite, sqlite_source, date) = asked.map_err(|e| e.to_string())?;
        let system = uname().map_err(|e| e.to_string())?;
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Environment {
            turnstile: env!("CARGO_PKG_VERSION"),
            sqlite,
            sqlite_source,
            date,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            processor: processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            kernel: system.release().to_string_lossy().into_owned(),
            architecture: system.machine().to_string_lossy().into_owned(),
            filesystem: place.filesystem.clone(),
            directory: place.directory.path().to_owned(),
            load: load.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default(),
        })
    }

    pub fn line(&self) -> String {
        let Environment { turnstile, sqlite, cores, kernel, filesystem, load, .. } = self;
        let cores = if *cores == 1 { "1 core".to_owned() } else { format!("{cores} cores") };
        let warning = if is_memory(filesystem) { " (memory: nothing is durable there)" } else { "" };
        format!(
            "turnstile {turnstile}, SQLite {sqlite}, {cores}, Linux {kernel}, load {load:.1}\n\
             files in {}, on {filesystem}{warning}",
            self.directory.display(),
        )
    }
}

/// The processor's name, as x86 has it, or nothing.
fn processor(cpuinfo: &str) -> String {
    let name = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
    name.map_or("", |rest| rest.trim_start_matches([' ', '\t', ':'])).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_name_is_found() {
        assert_eq!(processor("processor\t: 0\nmodel name\t: A CPU @ 3 GHz\n"), "A CPU @ 3 GHz");
        assert_eq!(processor("processor: 0\n"), "");
    }

    #[test]
    fn a_place_is_made_and_removed() {
        let parent = tempfile::tempdir().unwrap();
        let place = Place::inside(parent.path()).unwrap();
        assert!(place.directory.path().is_dir() && !place.filesystem.is_empty());
        drop(place);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
        assert!(Place::choose(Some(Path::new("/nonexistent"))).is_err());
    }
}
