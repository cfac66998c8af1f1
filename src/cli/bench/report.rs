//! Everything that was found out, for the table, for programs (JSON) and for the chart.

use serde_json::{Value, json};

use super::environment::Environment;
use super::outcome::Runs;
use super::task::Side;
use super::workloads::Case;

/// A case on both sides.
pub struct Comparison {
    pub case: Case,
    pub plain: Runs,
    pub turnstile: Runs,
    /// What the busy timeout was on the two sides.
    pub busy_timeout_ms: [u32; 2],
}

impl Comparison {
    /// Turnstile's operations/s by plain SQLite's.
    pub fn ratio(&self) -> Option<f64> {
        let plain = self.plain.ops_per_s();
        (plain > 0.0).then(|| self.turnstile.ops_per_s() / plain)
    }

    fn sides(&self) -> [(Side, &Runs); 2] {
        [(Side::Plain, &self.plain), (Side::Turnstile, &self.turnstile)]
    }

    /// What is wrong: (whether it makes the whole result bad, in words).
    fn problems(&self) -> Vec<(bool, String)> {
        let mut problems = Vec::new();
        for (side, runs) in self.sides() {
            let where_ = format!("{}, n = {}, {}", self.case.workload.name, self.case.processes, side.name());
            problems.extend(runs.faults().map(|fault| (true, format!("{where_}: {fault}"))));
            if let Some(error) = runs.first_error() {
                let text = format!("{where_}: {} errors other than BUSY: {error}", runs.errors());
                problems.push((side == Side::Turnstile, text));
            }
        }
        problems
    }

    fn json(&self) -> Value {
        let workload = self.case.workload;
        let side = |runs: &Runs, timeout: u32| {
            let mut value = runs.json();
            value["busy_timeout_ms"] = json!(timeout);
            value
        };
        let beside = workload
            .beside
            .map(|(processes, what)| json!({"processes": processes, "operation": what.words()}));
        json!({
            "name": workload.name,
            "about": workload.about,
            "operation": workload.operation.words(),
            "journal_mode": workload.journal,
            "synchronous": workload.synchronous,
            "measured_one_of": workload.operation.sampling(),
            "processes": self.case.processes,
            "beside": beside,
            "ratio": self.ratio(),
            "plain": side(&self.plain, self.busy_timeout_ms[0]),
            "turnstile": side(&self.turnstile, self.busy_timeout_ms[1]),
        })
    }
}

pub struct Report {
    pub environment: Environment,
    pub seconds: f64,
    pub warm_up_seconds: f64,
    pub rounds: usize,
    pub quick: bool,
    pub only: Vec<String>,
    pub processes: Vec<usize>,
    pub busy_timeout_ms: Option<u32>,
    pub results: Vec<Comparison>,
}

impl Report {
    /// Every record check passed, no worker died, and turnstile's side met no error but BUSY.
    pub fn is_good(&self) -> bool {
        !self.results.iter().flat_map(Comparison::problems).any(|(bad, _)| bad)
    }

    pub fn problems(&self) -> impl Iterator<Item = String> {
        self.results.iter().flat_map(Comparison::problems).map(|(bad, text)| match bad {
            true => format!("FAILED {text}"),
            false => text,
        })
    }

    pub fn json(&self) -> Value {
        json!({
            "environment": self.environment,
            "options": {
                "seconds": self.seconds,
                "warm_up_seconds": self.warm_up_seconds,
                "rounds": self.rounds,
                "quick": self.quick,
                "only": self.only,
                "processes": self.processes,
                "busy_timeout_ms": self.busy_timeout_ms,
            },
            "good": self.is_good(),
            "problems": self.problems().collect::<Vec<_>>(),
            "workloads": self.results.iter().map(Comparison::json).collect::<Vec<_>>(),
        })
    }
}
