//! One recording and the images that are to be made of it.

use crate::Counts;
use crate::disk::Disk;
use crate::expected::{Closed, Expected};
use crate::image::{self, Chance, Image};
use crate::judge;
use crate::log::{Log, Record};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard};

/// So many images are picked at once: playing the record is then cheap beside them.
const ROUND: u64 = 4_000;

pub struct Job {
    directory: PathBuf,
    log: Log,
    expected: Expected,
    seed: u64,
    share: u64,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    images: u64,
    rounds: u64,
    /// Images of more than what is certain.
    uncertain: u64,
}

/// An image that is not what it must be, and how to make it again.
#[derive(Debug)]
pub struct Violation {
    directory: PathBuf,
    seed: u64,
    position: u64,
    copy: u64,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { directory, seed, position, copy, what } = self;
        let directory = directory.display();
        write!(f, "{directory}: {what} (--seed {seed} --replay {position} {copy} {directory})")
    }
}

/// The right to put images where the recorded files were.
pub struct Turn<'a> {
    job: &'a Job,
    progress: MutexGuard<'a, Progress>,
}

impl Job {
    /// Reads a recording and makes sure that nothing is missing from it: played to its end it must give the files
    /// that the recorded programs have left.
    pub fn open(directory: &Path, seed: u64, share: u64) -> Result<Job, String> {
        let log = Log::open(&directory.join("log"))?;
        let expected = Expected::of(&log)?;
        if expected.commits == 0 {
            return Err("nothing was acknowledged".into());
        }
        let job = Job {
            directory: fs::canonicalize(directory).map_err(|e| e.to_string())?,
            log,
            expected,
            seed,
            share,
            progress: Mutex::default(),
        };
        if job.files().to_str() != Some(&job.log.directory) {
            return Err(format!(
                "recorded in {}: journals name each other by their paths, so it must stay there",
                job.log.directory
            ));
        }
        job.is_complete()?;
        Ok(job)
    }

    fn files(&self) -> PathBuf {
        self.directory.join("db")
    }

    pub fn kept(&self) -> PathBuf {
        self.directory.join("image")
    }

    pub fn name(&self) -> &str {
        &self.expected.workload.name
    }

    pub fn share(&self) -> u64 {
        self.share
    }

    /// Once for a recording: the files are overwritten by images afterwards.
    fn is_complete(&self) -> Result<(), String> {
        let mark = self.directory.join("complete");
        if mark.exists() {
            return Ok(());
        }
        let mut disk = Disk::default();
        for number in 0..self.log.count() {
            disk.play(number, self.log.event(number)?)?;
        }
        let mut names = Vec::new();
        for (name, bytes, doubtful) in disk.live() {
            let there = fs::read(self.files().join(name)).map_err(|e| format!("{name}: {e}"))?;
            let certain = |at: &usize| !doubtful.iter().any(|d| d.contains(at));
            let differs = |at: &usize| there.get(*at) != bytes.get(*at);
            if let Some(at) = (0..there.len().max(bytes.len())).filter(differs).find(certain) {
                return Err(format!(
                    "{name} is not what was recorded: {} bytes, {} by the record, the first difference at {at}",
                    there.len(),
                    bytes.len()
                ));
            }
            names.push(name.to_owned());
        }
        for entry in fs::read_dir(self.files()).map_err(|e| e.to_string())? {
            let name = entry.map_err(|e| e.to_string())?.file_name().to_string_lossy().into_owned();
            if !names.contains(&name) && !name.ends_with("-shm") {
                return Err(format!("{name} is there and not in the record"));
            }
        }
        fs::write(mark, "").map_err(|e| e.to_string())
    }

    /// `None`: nothing is left to do, or another thread is at it.
    pub fn take(&self) -> Option<Turn<'_>> {
        let progress = self.progress.try_lock().ok()?;
        (progress.images < self.share).then_some(Turn { job: self, progress })
    }

    fn check(&self, disk: &Disk, position: u64, copy: u64) -> Result<bool, String> {
        let mut chance = Chance::new(&[self.seed, position, copy]);
        let image = image::make(disk, &mut chance);
        let files = self.files();
        let put = |image: &Image| {
            judge::put(image, &files).map_err(|e| format!("the image cannot be written: {e}"))
        };
        put(&image)?;
        judge::judge(&files, &self.expected, position)?;
        if self.expected.closed_at(position) != Closed::Open {
            let alone = judge::alone(image, &self.expected, position)?;
            put(&alone)?;
            judge::judge(&files, &self.expected, position).map_err(|e| format!("without its WAL: {e}"))?;
        }
        Ok(disk.is_certain())
    }

    /// Makes one image again, keeps it as it was before it was opened, and judges it.
    pub fn replay(&self, position: u64, copy: u64) -> Result<Result<bool, String>, String> {
        let mut disk = Disk::default();
        for number in 0..position.min(self.log.count()) {
            disk.play(number, self.log.event(number)?)?;
        }
        let mut chance = Chance::new(&[self.seed, position, copy]);
        let image = image::make(&disk, &mut chance);
        fs::create_dir_all(self.kept()).map_err(|e| e.to_string())?;
        judge::put(&image, &self.kept()).map_err(|e| e.to_string())?;
        Ok(self.check(&disk, position, copy))
    }

    pub fn summary(&self) -> String {
        let progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (count, commits) = (self.log.count(), self.expected.commits);
        let Progress { images, uncertain, .. } = *progress;
        format!(
            "{:26} {images:8} images, {uncertain} of them uncertain; {commits} commits acknowledged, {count} records",
            self.name()
        )
    }
}

impl Turn<'_> {
    /// Some of the images, in the order of the record.
    pub fn run(&mut self, counts: &Counts, most: u64) -> Result<Vec<Violation>, String> {
        let job = self.job;
        let mut chance = Chance::new(&[job.seed, self.progress.rounds]);
        self.progress.rounds += 1;
        let images = ROUND.min(job.share - self.progress.images);
        // A loss of power at record N happens before it and after all records before it.
        let mut positions: Vec<u64> = (0..images).map(|_| 1 + chance.below(job.log.count())).collect();
        positions.sort_unstable();
        let mut violations = Vec::new();
        let mut disk = Disk::default();
        let mut played = 0;
        for (n, &position) in positions.iter().enumerate() {
            while played < position {
                let event = job.log.event(played)?;
                disk.play(played, event)?;
                played += 1;
            }
            let copy = self.progress.rounds * ROUND + n as u64;
            match job.check(&disk, position, copy) {
                Ok(certain) => self.progress.uncertain += u64::from(!certain),
                Err(what) => {
                    let (directory, seed) = (job.directory.clone(), job.seed);
                    violations.push(Violation { directory, seed, position, copy, what });
                    counts.violations.fetch_add(1, Relaxed);
                }
            }
            self.progress.images += 1;
            counts.images.fetch_add(1, Relaxed);
            if counts.violations.load(Relaxed) >= most {
                break;
            }
        }
        Ok(violations)
    }
}
