//! Checks recordings against power loss: `power_check --images N --seed S DIRECTORY...`, each with a `log` and the
//! recorded files in `db`. Run by tests/power/run; docs/power-loss.md says what is modelled and what was found.

mod disk;
mod expected;
mod image;
mod job;
mod judge;
mod log;

use clap::Parser;
use job::{Job, Violation};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Options {
    /// How many images, of all recordings together.
    #[arg(long, default_value_t = 10_000)]
    images: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this image of the one recording, left in its directory.
    #[arg(long, num_args = 2, value_names = ["POSITION", "COPY"])]
    replay: Option<Vec<u64>>,
    /// Stop after so many violations.
    #[arg(long, default_value_t = 5)]
    violations: u64,
    recordings: Vec<PathBuf>,
}

/// What all threads count.
#[derive(Default)]
pub struct Counts {
    pub images: AtomicU64,
    pub violations: AtomicU64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    let share = options.images.div_ceil(options.recordings.len().max(1) as u64);
    let mut jobs = Vec::new();
    for (n, path) in options.recordings.iter().enumerate() {
        let job = Job::open(path, options.seed + n as u64, share);
        jobs.push(job.map_err(|e| format!("{}: {e}", path.display()))?);
    }
    if let (Some(at), [job]) = (&options.replay, &jobs[..]) {
        let verdict = job.replay(at[0], at[1])?;
        println!("{}: {verdict:?}; what it was judged on is in {}", job.name(), job.kept().display());
        return Ok(());
    }
    let counts = Counts::default();
    let started = Instant::now();
    let violations = check(&jobs, &counts, options.violations)?;
    let images = counts.images.load(Relaxed);
    for job in &jobs {
        println!("{}", job.summary());
    }
    for v in &violations {
        println!("VIOLATION {v}");
    }
    let rate = images as f64 / started.elapsed().as_secs_f64();
    println!("{images} images, {} violations, {rate:.0} images/s", counts.violations.load(Relaxed));
    std::process::exit(i32::from(!violations.is_empty()));
}

/// All jobs on all processors. An image lies where the recorded files were, so a job is one thread's at a time.
fn check(jobs: &[Job], counts: &Counts, most: u64) -> Result<Vec<Violation>, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| progress(jobs, counts, &done));
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut violations = Vec::new();
                    while let Some(mut turn) = jobs.iter().find_map(Job::take) {
                        violations.extend(turn.run(counts, most)?);
                        if counts.violations.load(Relaxed) >= most {
                            break;
                        }
                    }
                    Ok(violations)
                })
            })
            .collect();
        let results: Vec<Result<Vec<Violation>, String>> = workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| Err("a thread of the checker panicked".into())))
            .collect();
        done.store(true, Relaxed);
        let all: Result<Vec<_>, _> = results.into_iter().collect();
        Ok(all?.into_iter().flatten().collect())
    })
}

/// A line every ten seconds.
fn progress(jobs: &[Job], counts: &Counts, done: &AtomicBool) {
    let started = Instant::now();
    let total: u64 = jobs.iter().map(Job::share).sum();
    let mut next = Duration::from_secs(10);
    while !done.load(Relaxed) {
        std::thread::park_timeout(Duration::from_millis(50));
        if started.elapsed() >= next {
            next += Duration::from_secs(10);
            let (images, violations) = (counts.images.load(Relaxed), counts.violations.load(Relaxed));
            eprintln!("{:.0?}: {images} of {total} images, {violations} violations", started.elapsed());
        }
    }
}
