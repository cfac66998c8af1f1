//! The `turnstile` program.

mod checkpointer;
mod cli;
mod finder;
mod keeper;
mod receiver;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Every process and container on one Linux host writes the same SQLite database at once.
#[derive(Parser)]
#[command(version, about, long_about = None, after_help = "\
Start with `turnstile demo`. Then, unchanged programs: `turnstile run -- COMMAND`; or load libturnstile.so as a \
SQLite extension. A broker is started when there is none.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a program with turnstile under its SQLite, unchanged.
    Run(cli::run::RunArgs),
    /// Run the broker (programs start one by themselves when there is none).
    Serve(cli::serve::ServeArgs),
    /// Show databases, members, who has the turn and who waits.
    Status(cli::status::StatusArgs),
    /// Find out what is wrong with a database, its place, its users and their settings. Changes nothing.
    Doctor(cli::doctor::DoctorArgs),
    /// Copy a database that others write meanwhile.
    Backup(cli::backup::BackupArgs),
    /// Compare plain SQLite with turnstile on this machine, in less than half a minute.
    Demo(cli::demo::DemoArgs),
    /// Measure plain SQLite against turnstile on this machine.
    Bench(cli::bench::BenchArgs),
    /// Man pages and shell completions, for `make install`.
    #[command(hide = true)]
    Generate(cli::generate::GenerateArgs),
    /// What the broker starts for itself.
    #[command(hide = true)]
    Checkpointer,
    /// Likewise: it outlives the broker.
    #[command(hide = true)]
    Keeper,
    /// Likewise: it looks for members that were left alone.
    #[command(hide = true)]
    Finder,
    /// Likewise: it receives what other users send.
    #[command(hide = true)]
    Receiver,
    #[command(hide = true)]
    DemoWorker(cli::demo::worker::WorkerArgs),
    #[command(hide = true)]
    BenchWorker(cli::bench::worker::WorkerArgs),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run(args) => cli::run::run(args),
        Command::Serve(args) => cli::serve::run(args),
        Command::Status(args) => cli::status::run(args),
        Command::Doctor(args) => cli::doctor::run(args),
        Command::Backup(args) => cli::backup::run(args),
        Command::Demo(args) => cli::demo::run(args),
        Command::Bench(args) => cli::bench::run(args),
        Command::Generate(args) => cli::generate::run(args, Arguments::command()),
        Command::Checkpointer => checkpointer::run(),
        Command::Keeper => keeper::run(),
        Command::Finder => finder::run(),
        Command::Receiver => receiver::run(),
        Command::DemoWorker(args) => cli::demo::worker::run(args),
        Command::BenchWorker(args) => cli::bench::worker::run(args),
    }
}
