//! The table: a row a case, printed as the cases end. At most 100 columns.

use super::report::{Comparison, Report};
use super::stage::PLAIN_WRITERS_BUSY_TIMEOUT_MS;

const WIDTH: usize = 98;

pub fn header() -> String {
    let titles = row(["workload", "n", "operations/s", "ratio", "p99", "worst wait", "BUSY", "least/most"]);
    format!("{titles}\n{}", "─".repeat(WIDTH))
}

pub fn line(result: &Comparison) -> String {
    let (plain, turnstile) = (&result.plain, &result.turnstile);
    row([
        result.case.workload.name,
        &result.case.processes.to_string(),
        &pair(number(plain.ops_per_s()), number(turnstile.ops_per_s()), 5),
        &result.ratio().map_or("-".to_owned(), ratio),
        &pair(time(plain.latency_ns(0.99)), time(turnstile.latency_ns(0.99)), 5),
        &pair(time(plain.worst_wait_ns()), time(turnstile.worst_wait_ns()), 5),
        &pair(number(plain.busy() as f64), number(turnstile.busy() as f64), 5),
        &pair(format!("{:.2}", plain.fairness()), format!("{:.2}", turnstile.fairness()), 4),
    ])
}

/// What the columns mean, and what went wrong.
pub fn footer(report: &Report) -> String {
    let timeouts = match report.busy_timeout_ms {
        Some(ms) => format!("{ms} ms on both sides"),
        None => format!(
            "0 on turnstile's side, where writers wait in line;\n{} s for plain SQLite's writers, which at 0 fail \
             nearly every contended try; 0 for readers",
            PLAIN_WRITERS_BUSY_TIMEOUT_MS / 1000
        ),
    };
    let mut out = format!(
        "{}\nEach pair: plain SQLite → turnstile. n: processes; ratio: of the operations/s, above 1 turnstile is\n\
         faster; p99: of the tries that succeeded; worst wait: the longest time from an operation's first\n\
         try to its success; BUSY: tries that failed with it; least/most: operations of the process with\n\
         the fewest by those of the one with the most. Medians of the rounds; of worst waits the worst.\n\
         Of selects every 64th is timed. Busy timeout: {timeouts}.",
        "─".repeat(WIDTH)
    );
    for problem in report.problems() {
        out += &format!("\n{problem}");
    }
    out
}

fn row(cells: [&str; 8]) -> String {
    let [name, n, rate, ratio, p99, wait, busy, fair] = cells;
    let line = format!("{name:<20}{n:>4} {rate:^13}{ratio:>6} {p99:^13} {wait:^13} {busy:^13} {fair:^11}");
    line.trim_end().to_owned()
}

fn pair(plain: String, turnstile: String, width: usize) -> String {
    format!("{plain:>width$} → {turnstile:<width$}")
}

/// Three digits.
fn number(n: f64) -> String {
    match n {
        n if n >= 999_500.0 => format!("{}M", digits(n / 1e6)),
        n if n >= 999.5 => format!("{}k", digits(n / 1e3)),
        n if n == n.trunc() => format!("{n}"),
        n => digits(n),
    }
}

fn digits(n: f64) -> String {
    match n {
        n if n >= 99.95 => format!("{n:.0}"),
        n if n >= 9.995 => format!("{n:.1}"),
        n => format!("{n:.2}"),
    }
}

pub fn ratio(n: f64) -> String {
    if n < 0.0995 { format!("{n:.3}") } else { digits(n) }
}

/// Two or three digits and a unit.
fn time(ns: u64) -> String {
    let ns = ns as f64;
    let (n, unit) = match ns {
        n if n < 999.5 => return format!("{n:.0}ns"),
        n if n < 999.5e3 => (n / 1e3, "µs"),
        n if n < 999.5e6 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    if n < 9.95 { format!("{n:.1}{unit}") } else { format!("{n:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (n, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (8.54, "8.54"),
            (812.0, "812"),
            (812.4, "812"),
            (6872.0, "6.87k"),
            (999_400.0, "999k"),
            (999_900.0, "1.00M"),
            (1_064_000.0, "1.06M"),
        ] {
            assert_eq!(number(n), text);
        }
        for (ns, text) in [
            (410, "410ns"),
            (1234, "1.2µs"),
            (81_000, "81µs"),
            (999_900, "1.0ms"),
            (36_400_000, "36ms"),
            (3_334_000_000, "3.3s"),
        ] {
            assert_eq!(time(ns), text);
        }
        for (n, text) in [(0.0051, "0.005"), (0.34, "0.34"), (12.34, "12.3"), (240.0, "240")] {
            assert_eq!(ratio(n), text);
        }
    }

    #[test]
    fn rows_fit_a_hundred_columns() {
        let wide = pair("99.9k".to_owned(), "99.9k".to_owned(), 5);
        let fair = pair("0.99".to_owned(), "0.99".to_owned(), 4);
        let line = row(["insert-delete-normal", "1000", &wide, "0.005", &wide, &wide, &wide, &fair]);
        assert!(line.chars().count() <= 100, "{line}");
        assert!(header().lines().all(|l| l.chars().count() <= 100));
    }
}
