//! What is shown while a copy is made, on standard error: a bar on a terminal, else a line now and then.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines, where there is no terminal.
const LINES: Duration = Duration::from_secs(10);

pub struct Progress {
    /// `None`: no terminal.
    bar: Option<ProgressBar>,
    all: u64,
    file: String,
    said: Cell<Instant>,
}

impl Progress {
    /// Of so many bytes into `file`.
    pub fn new(all: u64, file: &Path) -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(all);
            let style = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            let style = ProgressStyle::with_template(style).expect("a template that indicatif knows");
            bar.set_style(style.progress_chars("=> "));
            bar
        });
        Progress { bar, all, file: file.display().to_string(), said: Cell::new(Instant::now()) }
    }

    pub fn at(&self, done: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.said.get().elapsed() >= LINES => {
                self.said.set(Instant::now());
                let (done, all) = (done >> 20, self.all >> 20);
                let _ = writeln!(io::stderr(), "turnstile backup: {}: {done} of {all} MiB", self.file);
            }
            None => {}
        }
    }

    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    /// No half a bar before an error.
    fn drop(&mut self) {
        self.end();
    }
}
