//! What the processes of a run did together, and what the runs of a case come to.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::meter::histogram;
use super::task::Tally;

/// One case on one side, once.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    pub ops_per_s: f64,
    /// All that succeeded inside the window.
    pub operations: u64,
    /// Of the process with the fewest, and of the one with the most.
    pub least: u64,
    pub most: u64,
    /// Tries that failed with `SQLITE_BUSY`.
    pub busy: u64,
    /// Tries that failed otherwise.
    pub errors: u64,
    pub first_error: Option<String>,
    #[serde(rename = "worst_wait_us", serialize_with = "as_us")]
    pub worst_wait_ns: u64,
    /// Writes that returned success, warm-up included, and what the database had of them afterwards.
    pub acknowledged: u64,
    pub written: Option<u64>,
    /// Why this run proves nothing, or proves something bad.
    pub faults: Vec<String>,
    /// The slowest try that succeeded.
    #[serde(skip)]
    pub slowest_ns: u64,
    #[serde(skip)]
    pub latency: Histogram<u64>,
}

impl Run {
    pub fn of(tallies: &[Tally], measured: Duration) -> Run {
        let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).sum::<u64>();
        let most = |of: fn(&Tally) -> u64| tallies.iter().map(of).max().unwrap_or_default();
        let mut latency = histogram();
        for (value, count) in tallies.iter().flat_map(|t| &t.latency) {
            latency.saturating_record_n(*value, *count);
        }
        let mut run = Run {
            ops_per_s: sum(|t| t.operations) as f64 / measured.as_secs_f64(),
            operations: sum(|t| t.operations),
            least: tallies.iter().map(|t| t.operations).min().unwrap_or_default(),
            most: most(|t| t.operations),
            busy: sum(|t| t.busy),
            errors: 0,
            first_error: None,
            worst_wait_ns: most(|t| t.worst_wait_ns),
            acknowledged: sum(|t| t.acknowledged),
            written: None,
            faults: Vec::new(),
            slowest_ns: most(|t| t.slowest_ns),
            latency,
        };
        run.add_errors(tallies);
        run
    }

    pub fn add_errors(&mut self, tallies: &[Tally]) {
        self.errors += tallies.iter().map(|t| t.errors).sum::<u64>();
        let first = tallies.iter().find_map(|t| t.first_error.clone());
        self.first_error = self.first_error.take().or(first);
    }

    fn fairness(&self) -> f64 {
        if self.most == 0 { 0.0 } else { self.least as f64 / self.most as f64 }
    }
}

/// The runs of a case on one side.
#[derive(Debug, Clone, Default)]
pub struct Runs(pub Vec<Run>);

impl Runs {
    pub fn ops_per_s(&self) -> f64 {
        median(self.0.iter().map(|r| r.ops_per_s))
    }

    /// Least by most operations of a process: 1 is fair, 0 is a process that got nothing.
    pub fn fairness(&self) -> f64 {
        median(self.0.iter().map(Run::fairness))
    }

    pub fn busy(&self) -> u64 {
        self.0.iter().map(|r| r.busy).sum()
    }

    pub fn errors(&self) -> u64 {
        self.0.iter().map(|r| r.errors).sum()
    }

    pub fn first_error(&self) -> Option<&str> {
        self.0.iter().find_map(|r| r.first_error.as_deref())
    }

    pub fn worst_wait_ns(&self) -> u64 {
        self.0.iter().map(|r| r.worst_wait_ns).max().unwrap_or_default()
    }

    pub fn faults(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|r| &r.faults).map(String::as_str)
    }

    /// Of all rounds together.
    pub fn latency_ns(&self, quantile: f64) -> u64 {
        self.latency().value_at_quantile(quantile).min(self.slowest_ns())
    }

    fn latency(&self) -> Histogram<u64> {
        let mut all = histogram();
        for run in &self.0 {
            all.add(&run.latency).expect("all histograms have the same bounds");
        }
        all
    }

    fn slowest_ns(&self) -> u64 {
        self.0.iter().map(|r| r.slowest_ns).max().unwrap_or_default()
    }

    pub fn json(&self) -> Value {
        let round = |run: &Run| {
            let mut value = json!(run);
            value["latency_us"] = percentiles(&run.latency, run.slowest_ns);
            value
        };
        json!({
            "ops_per_s": self.ops_per_s(),
            "latency_us": percentiles(&self.latency(), self.slowest_ns()),
            "busy": self.busy(),
            "errors": self.errors(),
            "first_error": self.first_error(),
            "fairness": self.fairness(),
            "worst_wait_us": us(self.worst_wait_ns()),
            "rounds": self.0.iter().map(round).collect::<Vec<_>>(),
        })
    }
}

fn percentiles(latency: &Histogram<u64>, slowest_ns: u64) -> Value {
    let at = |quantile| us(latency.value_at_quantile(quantile).min(slowest_ns));
    json!({"p50": at(0.5), "p99": at(0.99), "p99_9": at(0.999), "max": us(slowest_ns)})
}

fn as_us<S: Serializer>(ns: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(us(*ns))
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(operations: u64, latency: &[(u64, u64)]) -> Tally {
        let slowest_ns = latency.iter().map(|(value, _)| *value).max().unwrap_or_default();
        Tally { operations, latency: latency.to_vec(), slowest_ns, ..Tally::default() }
    }

    #[test]
    fn processes_are_added_and_histograms_merged() {
        let tallies = [tally(90, &[(1000, 90)]), tally(10, &[(1000, 8), (50_000, 2)])];
        let run = Run::of(&tallies, Duration::from_millis(500));
        assert_eq!((run.operations, run.ops_per_s, run.least, run.most), (100, 200.0, 10, 90));
        let runs = Runs(vec![run]);
        assert!((990..=1010).contains(&runs.latency_ns(0.5)), "{}", runs.latency_ns(0.5));
        assert_eq!((runs.latency_ns(0.99), runs.latency_ns(1.0)), (50_000, 50_000));
        assert!((runs.fairness() - 1.0 / 9.0).abs() < 1e-9);
    }

    #[test]
    fn rounds_give_a_median() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert_eq!(median([].into_iter()), 0.0);
    }

    #[test]
    fn a_run_that_did_nothing_is_not_fair() {
        let runs = Runs(vec![Run::of(&[tally(0, &[]), tally(0, &[])], Duration::from_secs(1))]);
        assert_eq!((runs.fairness(), runs.ops_per_s(), runs.latency_ns(0.99)), (0.0, 0.0, 0));
    }
}
