//! `turnstile doctor DB [-- COMMAND]`: what is wrong with a database, its place, its users and their settings, and what
//! to do about it.
//!
//! It looks and never touches: the database is opened for reading, by no SQLite, and not locked; nothing is joined,
//! recovered or checkpointed. (This process holds no lock on the file, so closing it drops none.)
//!
//! * [`findings`]: what is found, and how it is said. [`settings`]: `TURNSTILE_*`. [`place`]: where the file is.
//!   [`format`]: what it says of itself. [`broker`]: who serves it. [`holders`]: who has it open or locked.
//!   [`pins`]: who keeps the WAL from being copied. [`companions`]: files beside it that its owner cannot write.
//!   [`versions`]: of turnstile and of every SQLite that is seen. [`command`]: a program that is to use it.

mod broker;
mod command;
mod companions;
mod findings;
mod format;
mod holders;
mod pins;
mod place;
mod settings;
mod versions;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use findings::Findings;
use settings::Settings;

/// Find out what keeps a database's users from working together.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
It changes nothing: the file is opened for reading, and not locked.

  turnstile doctor app.db
  turnstile doctor app.db -- python3 app.py      also: can this command be served, and how?

Run it where the program runs (the same user, container and environment). As root it sees everybody's processes.

Exit status: 0 if nothing is wrong (warnings included), 1 if there is a problem.")]
pub struct DoctorArgs {
    /// The database, also as a `file:` URI with settings
    database: OsString,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// The broker's socket. Default: as a program of this user finds it
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A command that is to use it
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// The exit status: 0, or 1 if there is a problem.
pub fn run(args: DoctorArgs) -> ExitCode {
    let mut findings = Findings::default();
    let (path, mut settings) = Settings::of(&args.database, &mut findings);
    if let Some(socket) = args.socket {
        settings.use_socket(socket);
    }
    let file = place::look(&path, &settings, &mut findings);
    if let Some(file) = &file {
        format::look(file, &mut findings);
        companions::look(file, &mut findings);
    }
    let broker = broker::look(&settings, &mut findings);
    let database = file.as_ref().and_then(|file| broker.as_ref()?.database(file.device, file.inode));
    if let Some(database) = &database {
        broker::judge(database, &mut findings);
    }
    if let Some(file) = &file {
        holders::look(file, broker.as_ref(), database.as_ref(), &mut findings);
        pins::look(file, database.as_ref(), &mut findings);
    }
    versions::look(broker.as_ref(), database.as_ref(), &mut findings);
    if !args.command.is_empty() {
        command::look(&args.command, &mut findings);
    }
    let text = match args.json {
        true => findings.json(&path, &settings),
        false => findings.text(&path, &settings),
    };
    // Whoever reads it may have gone; the exit status still tells.
    let _ = writeln!(io::stdout(), "{text}");
    ExitCode::from(u8::from(findings.problems() > 0))
}
