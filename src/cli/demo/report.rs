//! The demo's result, as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::outcome::Outcome;
use super::programs::Programs;
use super::workloads::{Side, Workload};

/// Everything that was found out.
#[derive(Default)]
pub struct Report {
    pub seconds: u64,
    pub results: Vec<(Workload, Side, Outcome)>,
    /// What the broker did wrong.
    pub broker: Option<String>,
}

impl Report {
    /// Turnstile's side had no failure and lost no row.
    pub fn is_good(&self) -> bool {
        self.broker.is_none() && self.of(Side::Turnstile).all(Outcome::is_flawless)
    }

    fn of(&self, side: Side) -> impl Iterator<Item = &Outcome> {
        self.results.iter().filter(move |(_, s, _)| *s == side).map(|(_, _, outcome)| outcome)
    }

    /// At most 100 columns.
    pub fn table(&self) -> String {
        let line = "─".repeat(WIDTH);
        let mut out =
            row(["", "attempts", "committed", "locked", "rows", "least", "most", "fair", "worst wait"]);
        for (workload, side, outcome) in &self.results {
            if *side == Side::Plain {
                let _ = write!(out, "\n{line}\n{}", workload.description(self.seconds));
            }
            let _ = write!(out, "\n{}", numbers(*side, outcome));
        }
        let _ = write!(out, "\n{line}\n{LEGEND}");
        for (workload, side, outcome) in &self.results {
            if let Some(problem) = outcome.problems.first() {
                let _ = write!(out, "\n{}, {}: {problem}", workload.who(), side.name());
            }
            if let more @ 1.. = outcome.problems.len().saturating_sub(1) {
                let _ = write!(out, " (and {more} more)");
            }
        }
        out + "\n\n" + &self.sentence()
    }

    /// What the table shows.
    fn sentence(&self) -> String {
        let sum = |side, of: fn(&Outcome) -> u64| self.of(side).map(of).sum::<u64>();
        let refused = sum(Side::Plain, |o| o.locked);
        let tried = thousands(sum(Side::Plain, |o| o.attempts));
        let committed = thousands(sum(Side::Turnstile, |o| o.committed));
        let mut plain = match refused {
            0 => format!("Plain SQLite refused none of {tried} attempts this time"),
            _ => format!("Plain SQLite refused {} of {tried} attempts", thousands(refused)),
        };
        if let Some((least, most)) = self.worst_starved() {
            let _ = write!(plain, ".\nIt let one process commit {most} rows while another committed {least}");
        }
        match self.is_good() {
            true => format!(
                "{plain}.\nWith turnstile nobody was refused: all {committed} writes were committed, and all are \
                 in the files."
            ),
            false => format!("{plain}.\nWith turnstile something went wrong: {}.", self.wrong()),
        }
    }

    /// Plain SQLite's least and most commits, where that was very unfair to processes that write for seconds.
    fn worst_starved(&self) -> Option<(String, String)> {
        let timed = self.results.iter().filter(|(w, s, _)| *w != Workload::Shells && *s == Side::Plain);
        let worst = timed.map(|(_, _, o)| o).min_by(|a, b| a.fairness().total_cmp(&b.fairness()))?;
        (worst.fairness() < 0.5).then(|| (thousands(worst.least), thousands(worst.most)))
    }

    fn wrong(&self) -> String {
        let mut wrong: Vec<String> = self.broker.iter().cloned().collect();
        for (workload, side, outcome) in &self.results {
            if *side == Side::Turnstile && !outcome.is_flawless() {
                let rows = outcome.rows.map_or("unknown".to_owned(), thousands);
                wrong.push(format!(
                    "{}: {} locked, {} failed otherwise, {} committed, rows in the file: {rows}",
                    workload.who(),
                    thousands(outcome.locked),
                    thousands(outcome.failed_otherwise),
                    thousands(outcome.committed),
                ));
            }
        }
        wrong.join("; ")
    }

    pub fn json(&self, programs: &Programs, kept: Option<&std::path::Path>) -> Value {
        let side = |workload, side| {
            let found = self.results.iter().find(|(w, s, _)| *w == workload && *s == side);
            found.map_or(Value::Null, |(_, _, outcome)| {
                let mut value = json!(outcome);
                value["fairness"] = json!(outcome.fairness());
                value
            })
        };
        let ran = |w: &&Workload| self.results.iter().any(|(r, _, _)| r == *w);
        let workloads: Vec<Value> = Workload::ALL
            .iter()
            .filter(ran)
            .map(|w| {
                json!({
                    "name": w.name(),
                    "description": w.description(self.seconds),
                    "plain": side(*w, Side::Plain),
                    "turnstile": side(*w, Side::Turnstile),
                })
            })
            .collect();
        let skipped: Vec<Value> = Workload::ALL
            .iter()
            .filter_map(|w| w.missing(programs).map(|m| (w, m)))
            .map(|(w, m)| json!({"name": w.name(), "reason": m.reason, "remedy": m.remedy}))
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "good": self.is_good(),
            "seconds": self.seconds,
            "sqlite": {
                "shell": programs.shell.as_ref().ok(),
                "python": programs.python.as_ref().ok(),
                "linked": rusqlite::version(),
            },
            "workloads": workloads,
            "skipped": skipped,
            "broker": self.broker,
            "kept": kept,
        })
    }
}

const WIDTH: usize = 96;
const LEGEND: &str = "\
locked: attempts that failed with \"database is locked\"; rows: found in the file afterwards;
least, most: commits of the processes with the fewest and the most; fair: least / most;
worst wait: the longest time from wanting to write a row to having written it, failed attempts
included (for a shell: its whole run).";

fn row(cells: [&str; 9]) -> String {
    let [side, attempts, committed, locked, rows, least, most, fair, wait] = cells;
    format!(
        "{side:<16}{attempts:>11}{committed:>11}{locked:>11}{rows:>10}{least:>9}{most:>9}{fair:>7}{wait:>12}"
    )
}

fn numbers(side: Side, outcome: &Outcome) -> String {
    let name = match side {
        Side::Plain => "  plain SQLite",
        Side::Turnstile => "  with turnstile",
    };
    row([
        name,
        &thousands(outcome.attempts),
        &thousands(outcome.committed),
        &thousands(outcome.locked),
        &outcome.rows.map_or("?".to_owned(), thousands),
        &thousands(outcome.least),
        &thousands(outcome.most),
        &format!("{:.2}", outcome.fairness()),
        &format!("{} ms", thousands(outcome.worst_wait_ms.round() as u64)),
    ])
}

/// `1234567` as `1,234,567`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(turnstile: Outcome) -> Report {
        let big = Outcome {
            attempts: 12_345_678,
            committed: 999_999,
            locked: 11_345_679,
            rows: Some(999_999),
            most: 999_999,
            worst_wait_ms: 60_000.4,
            ..Outcome::default()
        };
        let results = Workload::ALL
            .into_iter()
            .flat_map(|w| [(w, Side::Plain, big.clone()), (w, Side::Turnstile, turnstile.clone())]);
        Report { seconds: 60, results: results.collect(), broker: None }
    }

    #[test]
    fn the_table_fits_a_hundred_columns() {
        let flawless = Outcome { attempts: 7, committed: 7, rows: Some(7), ..Outcome::default() };
        for line in report(flawless).table().lines() {
            assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn the_sentence_praises_only_what_was_flawless() {
        let flawless = Outcome { attempts: 7, committed: 7, rows: Some(7), ..Outcome::default() };
        assert!(report(flawless.clone()).is_good());
        assert!(report(flawless.clone()).sentence().contains("all 21 writes were committed"));
        let lost = report(Outcome { rows: Some(6), ..flawless });
        assert!(!lost.is_good());
        assert!(lost.sentence().contains("rows in the file: 6"), "{}", lost.sentence());
    }

    #[test]
    fn thousands_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(thousands(n), text);
        }
    }
}
