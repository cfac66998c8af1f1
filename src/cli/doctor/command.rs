//! A command that is to use the database: can `turnstile run` reach it, which SQLite has it, can it load extensions?

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::findings::Findings;
use super::versions;
use crate::cli::extension;
use crate::cli::libc::Libc;
use crate::cli::program::{Kind, Program, Sqlite, output_within};
use crate::cli::run::elf::Elf;
use crate::cli::run::inspect;

/// Interpreters whose SQLite comes with a module: asked for it, three lines. The version; the shared library, or
/// nothing where it is linked in; whether connections can load extensions.
const INTERPRETERS: &[(&str, &[&str])] = &[
    (
        "python",
        &[
            "-c",
            "import sqlite3\n\
             sqlite3.connect(':memory:')\n\
             print(sqlite3.sqlite_version)\n\
             print(next((l.split()[-1] for l in open('/proc/self/maps') if 'libsqlite3' in l), ''))\n\
             print(hasattr(sqlite3.Connection, 'enable_load_extension'))",
        ],
    ),
    (
        "php",
        &[
            "-r",
            "$v = SQLite3::version()['versionString']; $l = ''; \
             foreach (file('/proc/self/maps') as $m) if (strpos($m, 'libsqlite3')) $l = trim(strrchr($m, ' ')); \
             echo \"$v\\n$l\\n\", ini_get('sqlite3.extension_dir') ? 'True' : 'False', \"\\n\";",
        ],
    ),
    ("node", &["-e", "console.log(process.versions.sqlite || '', '\\n\\nTrue')"]),
    (
        "ruby",
        &[
            "-rsqlite3",
            "-e",
            "SQLite3::Database.new(':memory:'); puts SQLite3::SQLITE_VERSION; \
             puts File.read('/proc/self/maps')[/\\S*libsqlite3\\S*$/].to_s; \
             puts SQLite3::Database.method_defined?(:load_extension) ? 'True' : 'False'",
        ],
    ),
];

/// What is known of the SQLite that a program would use.
struct Known {
    version: String,
    /// None: it is linked in.
    library: Option<PathBuf>,
    loads_extensions: bool,
}

pub fn look(command: &[OsString], findings: &mut Findings) {
    let name = command[0].to_string_lossy().into_owned();
    let Ok(path) = inspect::find(&command[0], std::env::var_os("PATH").as_deref()) else {
        let advice = "is the name right, and is it executable?";
        return findings.problem("command-missing", format!("{name}: not found, or not executable"), advice);
    };
    let Some(program) = Program::of(&path) else {
        let advice = "name the program that has SQLite in it";
        return findings.warning(
            "command-unread",
            format!("{name} cannot be read, or is no program"),
            advice,
        );
    };
    let by = if program.path == path { String::new() } else { format!(" by {}", program.path.display()) };
    findings.ok("command", format!("{}{by}: {}", path.display(), program.kind.describe()));
    let known = known(&path, &program);
    reach(&path, &program, known.as_ref(), findings);
    if let Some(known) = known {
        describe(&name, &known, findings);
    }
}

const LINKED_IN: &str = "it has SQLite linked in: under `turnstile run` it waits for its turn in its busy handler, so give it a \
                         busy timeout, and its commits share no sync";

/// By `turnstile run`, or by loading the extension.
fn reach(path: &Path, program: &Program, known: Option<&Known>, findings: &mut Findings) {
    let linked_in = program.sqlite == Sqlite::LinkedIn || known.is_some_and(|k| k.library.is_none());
    let libc = inspect::libc_of(path);
    let library = match extension::find(libc) {
        Err(why) if libc == Some(Libc::Musl) => {
            let what = format!(
                "`turnstile run` does not reach {}: it runs on musl, and there is {why}",
                program.path.display()
            );
            return findings.problem("command-unreached", what, "docs/installing.md says how that is had");
        }
        found => found.ok().and_then(|library| Elf::read(&File::open(library).ok()?).ok()?),
    };
    let obstacle = library.and_then(|library| inspect::obstacle(path, &library));
    let loads = known.is_some_and(|known| known.loads_extensions);
    match obstacle {
        Some((object, obstacle)) => {
            let what = format!("`turnstile run` does not reach {}: {obstacle}", object.display());
            findings.problem("command-unreached", what, obstacle.remedy());
        }
        None if linked_in && loads => findings.warning(
            "command-linked-in",
            LINKED_IN,
            "better: load the extension on its first connection (README, \"Use it\")",
        ),
        None if linked_in => findings.warning(
            "command-linked-in",
            LINKED_IN,
            "better: load the extension from it if it can, or build it against the shared libsqlite3",
        ),
        None if known.is_some() => findings.ok("command-reached", "`turnstile run` reaches its SQLite"),
        None if matches!(program.kind, Kind::Static | Kind::StaticGo) => {}
        None => findings.ok(
            "command-reached",
            "no SQLite is seen in it yet; whatever shared libsqlite3 it loads, `turnstile run` reaches",
        ),
    }
}

fn describe(name: &str, known: &Known, findings: &mut Findings) {
    let from = match &known.library {
        Some(library) => library.display().to_string(),
        None => "linked in".into(),
    };
    findings.ok("command-sqlite", format!("SQLite {} ({from})", known.version));
    if !known.loads_extensions {
        findings.warning("command-no-extensions", "it cannot load extensions", "use `turnstile run` for it");
    }
    versions::sqlite(&known.version, name, false, findings);
}

fn known(path: &Path, program: &Program) -> Option<Known> {
    if let Sqlite::Shared(library) = &program.sqlite {
        return of_library(library);
    }
    // The command itself, if it is called so: a script of that name, such as pyenv's, finds the right one.
    let (asked, arguments) =
        [path, &program.path].into_iter().find_map(|path| Some((path, questions(path)?)))?;
    let mut command = Command::new(asked);
    // Not by a turnstile that is preloaded into this program.
    command.args(arguments).env_remove("LD_PRELOAD");
    let text = output_within(command, Duration::from_secs(10))?;
    let mut lines = text.lines().map(str::trim);
    let version = lines.next().filter(|v| !v.is_empty())?.to_owned();
    let library = lines.next().filter(|l| l.starts_with('/')).map(PathBuf::from);
    Some(Known { version, library, loads_extensions: lines.next() == Some("True") })
}

/// How an interpreter is asked: `python3`, `python3.11`, `php8.2`.
fn questions(path: &Path) -> Option<&'static [&'static str]> {
    let name = path.file_name()?.to_string_lossy();
    let versioned = |rest: &str| rest.chars().all(|c| c.is_ascii_digit() || c == '.');
    let found =
        INTERPRETERS.iter().find(|(interpreter, _)| name.strip_prefix(interpreter).is_some_and(versioned));
    found.map(|(_, questions)| *questions)
}

/// By what the library's file says: it may be the other C library's, and a static program can load none.
fn of_library(path: &Path) -> Option<Known> {
    let file = inspect::open_regular(path).ok()?;
    let elf = Elf::read(&file).ok()??;
    let version = elf.text(&file, "sqlite3_version").ok()??;
    let loads_extensions = elf.defines(&file, "sqlite3_load_extension").ok()?;
    Some(Known { version, library: Some(path.to_owned()), loads_extensions })
}
