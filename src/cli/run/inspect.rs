//! Looks at a command before it is started: can an `LD_PRELOAD` library get into it at all?

use std::ffi::{CString, OsStr};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{AccessFlags, access, geteuid, getgid, getuid};

use super::elf::{Elf, Machine};
use crate::cli::libc::Libc;

/// Why `LD_PRELOAD` has no effect in a program.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    #[error("it is statically linked: no dynamic linker runs in it, so nothing can be preloaded")]
    Static,
    #[error("it is a static Go program: no dynamic linker runs in it, so nothing can be preloaded")]
    StaticGo,
    #[error(
        "its SQLite is written in Go ({0}) and speaks to the kernel itself, where nothing that is preloaded gets between"
    )]
    SqliteInGo(&'static str),
    #[error(
        "it changes its user or group when it starts (setuid, setgid): the dynamic linker ignores LD_PRELOAD"
    )]
    SetId,
    #[error("it has file capabilities: the dynamic linker ignores LD_PRELOAD")]
    Capabilities,
    #[error("it is built for another kind of machine ({theirs}) than turnstile's library ({ours})")]
    Machine { theirs: String, ours: String },
    #[error("it runs on {theirs}, and turnstile's library is built for {ours}")]
    Libc { theirs: &'static str, ours: &'static str },
}

impl Obstacle {
    /// What can be done about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Obstacle::Static => {
                "Link it dynamically against libsqlite3, or let it load the extension on its connections. If it \
                 only starts another program, put `turnstile run` behind it."
            }
            Obstacle::StaticGo => {
                "With mattn/go-sqlite3, build with CGO_ENABLED=1 and `-tags libsqlite3`, or load the extension \
                 (sqlite3.SQLiteDriver{Extensions: ...}). If it only starts another program, put \
                 `turnstile run` behind it."
            }
            Obstacle::SqliteInGo(_) => {
                "Use a driver over SQLite's C library, such as mattn/go-sqlite3 (CGO_ENABLED=1): built with \
                 `-tags libsqlite3` it needs nothing else, with SQLite linked in it has to load the extension."
            }
            Obstacle::SetId | Obstacle::Capabilities => {
                "Let it load the extension on its connections, or run `turnstile run` as the user that it \
                 becomes, on a copy without the bit or the capabilities."
            }
            Obstacle::Machine { .. } => "Install the turnstile library that is built for that machine.",
            Obstacle::Libc { .. } => {
                "Put turnstile's library for that C library (libturnstile.so for glibc, libturnstile-musl.so for musl) \
                 beside the other one, or name it in TURNSTILE_LIB."
            }
        }
    }
}

/// A command that cannot be started at all.
#[derive(Debug, PartialEq, Eq)]
pub enum Missing {
    NotFound,
    NotExecutable(Errno),
}

/// Resolves `command` as `execvp(3)` does. The first match that is no executable file is passed over, and
/// remembered in the error.
pub fn find(command: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Missing> {
    if command.is_empty() {
        return Err(Missing::NotFound);
    }
    if command.as_bytes().contains(&b'/') {
        return executable(Path::new(command)).map(|()| command.into());
    }
    let mut outcome = Missing::NotFound;
    for dir in path.unwrap_or(OsStr::new("/bin:/usr/bin")).as_bytes().split(|b| *b == b':') {
        let dir = if dir.is_empty() { b"." } else { dir };
        let candidate = Path::new(OsStr::from_bytes(dir)).join(command);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Missing::NotFound) => {}
            Err(denied) => outcome = denied,
        }
    }
    Err(outcome)
}

fn executable(path: &Path) -> Result<(), Missing> {
    match std::fs::metadata(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(Missing::NotFound);
        }
        Err(e) => {
            return Err(Missing::NotExecutable(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EACCES))));
        }
        Ok(meta) if meta.is_dir() => return Err(Missing::NotExecutable(Errno::EISDIR)),
        Ok(_) => {}
    }
    access(path, AccessFlags::X_OK).map_err(Missing::NotExecutable)
}

/// What stands in the way of preloading `library` into the program that `path` starts. A file that cannot be read is
/// given the benefit of the doubt.
pub fn obstacle(path: &Path, library: &Elf) -> Option<(PathBuf, Obstacle)> {
    let (program, file, elf) = started(path)?;
    judge(&elf, &program, &file, library).map(|o| (program, o))
}

/// The C library that the program that `path` starts runs on, if it can be read and is no static one.
pub fn libc_of(path: &Path) -> Option<Libc> {
    let (_, _, elf) = started(path)?;
    elf.interpreter.is_some().then(|| Libc::of(&elf))
}

/// The program that starts when `path` is executed: the file itself, or the interpreter that it names.
pub fn started(path: &Path) -> Option<(PathBuf, File, Elf)> {
    let mut program = path.to_owned();
    for _ in 0..5 {
        // `binfmt_script` follows no deeper chain either.
        let file = open_regular(&program).ok()?;
        if let Ok(Some(elf)) = Elf::read(&file) {
            return Some((program, file, elf));
        }
        program = interpreter(&file)?;
    }
    None
}

/// Opens what must be a regular file, without waiting for the other end of a pipe.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

/// The program behind a `#!` line; through `env`, the one that `env` looks up.
fn interpreter(file: &File) -> Option<PathBuf> {
    let mut head = [0u8; 256];
    let n = file.read_at(&mut head, 0).ok()?;
    let line = head[..n].strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    let mut words = line.split(|b| b.is_ascii_whitespace()).filter(|w| !w.is_empty());
    let program = PathBuf::from(OsStr::from_bytes(words.next()?));
    if program.file_name() != Some(OsStr::new("env")) {
        return Some(program);
    }
    let target = words.find(|w| !w.starts_with(b"-") && !w.contains(&b'='));
    let found = target.and_then(|t| find(OsStr::from_bytes(t), std::env::var_os("PATH").as_deref()).ok());
    Some(found.unwrap_or(program))
}

fn judge(elf: &Elf, path: &Path, file: &File, library: &Elf) -> Option<Obstacle> {
    if elf.machine != library.machine {
        return Some(Obstacle::Machine { theirs: name(elf.machine), ours: name(library.machine) });
    }
    if elf.is_go()
        && let Ok(Some(package)) = elf.sqlite_in_go(file)
    {
        return Some(Obstacle::SqliteInGo(package));
    }
    if elf.interpreter.is_none() {
        return Some(if elf.is_go() { Obstacle::StaticGo } else { Obstacle::Static });
    }
    let (theirs, ours) = (Libc::of(elf), Libc::of(library));
    if theirs != ours {
        return Some(Obstacle::Libc { theirs: theirs.name(), ours: ours.name() });
    }
    if !privileges_apply(file) {
        return None;
    }
    let meta = file.metadata().ok()?;
    if changes_identity(&meta) {
        return Some(Obstacle::SetId);
    }
    (!getuid().is_root() && has_capabilities(path)).then_some(Obstacle::Capabilities)
}

/// The kernel overlooks setuid bits and file capabilities on `nosuid` mounts and under `no_new_privs`.
fn privileges_apply(file: &File) -> bool {
    let nosuid = fstatvfs(file).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_NOSUID));
    !nosuid && !nix::sys::prctl::get_no_new_privs().unwrap_or(false)
}

/// As in the kernel (`cap_bprm_creds_from_file`): only a change makes the start a secure one, so root's own
/// setuid programs are not.
fn changes_identity(meta: &Metadata) -> bool {
    let mode = meta.permissions().mode();
    let user = mode & 0o4000 != 0 && (meta.uid() != getuid().as_raw() || geteuid() != getuid());
    let group = mode & 0o2010 == 0o2010 && meta.gid() != getgid().as_raw();
    user || group
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: both strings end in NUL and outlive the call; a size of 0 asks for the length and writes nothing.
    unsafe { libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

fn name(machine: Machine) -> String {
    let bits = if machine.wide { 64 } else { 32 };
    match machine.number {
        3 => "i386".into(),
        40 => "ARM".into(),
        62 if !machine.wide => "x32".into(),
        62 => "x86-64".into(),
        183 => "AArch64".into(),
        243 => format!("RISC-V, {bits} bits"),
        n => format!("ELF machine {n}, {bits} bits"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn own() -> Elf {
        Elf::read(&File::open(std::env::current_exe().unwrap()).unwrap()).unwrap().unwrap()
    }

    #[test]
    fn a_command_is_found_as_execvp_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        write(dir.path(), "tool", "", 0o644);
        let tool = write(&sub, "tool", "", 0o755);
        write(dir.path(), "plain", "", 0o644);
        let path = format!("{}:/nonexistent:{}", dir.path().display(), sub.display());
        let find = |name: &str| find(OsStr::new(name), Some(OsStr::new(&path)));
        assert_eq!(find("tool"), Ok(tool.clone()));
        assert_eq!(find("plain"), Err(Missing::NotExecutable(Errno::EACCES)));
        assert_eq!(find("sub"), Err(Missing::NotExecutable(Errno::EISDIR)));
        assert_eq!(find("nothing"), Err(Missing::NotFound));
        assert_eq!(find(""), Err(Missing::NotFound));
        assert_eq!(find(tool.to_str().unwrap()), Ok(tool));
        assert_eq!(find("/nonexistent/tool"), Err(Missing::NotFound));
    }

    #[test]
    fn a_script_leads_to_its_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let script = |text: &str| {
            let path = write(dir.path(), "script", text, 0o755);
            interpreter(&File::open(path).unwrap())
        };
        assert_eq!(script("#!/bin/sh -e\nexit\n"), Some("/bin/sh".into()));
        assert_eq!(script("#! /bin/sh\n"), Some("/bin/sh".into()));
        assert_eq!(script("#!/bin/sh"), Some("/bin/sh".into()));
        let sh = find(OsStr::new("sh"), std::env::var_os("PATH").as_deref()).unwrap();
        assert_eq!(script("#!/usr/bin/env sh\n"), Some(sh.clone()));
        assert_eq!(script("#!/usr/bin/env -S LANG=C sh -x\n"), Some(sh));
        assert_eq!(script("#!/usr/bin/env no-such-program\n"), Some("/usr/bin/env".into()));
        assert_eq!(script("echo a script without a first line\n"), None);
        assert_eq!(script("#!\n"), None);
    }

    #[test]
    fn a_script_that_names_itself_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loop");
        let path = write(dir.path(), "loop", &format!("#!{}\n", path.display()), 0o755);
        assert_eq!(obstacle(&path, &own()), None);
    }

    #[test]
    fn this_program_can_be_reached() {
        assert_eq!(obstacle(&std::env::current_exe().unwrap(), &own()), None);
    }

    #[test]
    fn a_foreign_machine_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut header = vec![0u8; 52];
        header[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        header[18] = 3;
        let path = dir.path().join("i386");
        std::fs::write(&path, header).unwrap();
        let (_, found) = obstacle(&path, &own()).unwrap();
        assert!(matches!(&found, Obstacle::Machine { theirs, .. } if theirs == "i386"), "{found}");
    }
}
