//! `turnstile generate DIRECTORY`: man pages and shell completions, for `make install`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap_complete::Shell;

#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// Where to; it is made
    directory: PathBuf,
}

pub fn run(args: GenerateArgs, mut command: clap::Command) -> ExitCode {
    match generate(&args.directory, &mut command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("turnstile generate: {}: {e}", args.directory.display());
            ExitCode::FAILURE
        }
    }
}

fn generate(directory: &Path, command: &mut clap::Command) -> io::Result<()> {
    let man = directory.join("man");
    fs::create_dir_all(&man)?;
    clap_mangen::generate_to(command.clone(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, command, "turnstile", directory)?;
    }
    Ok(())
}
