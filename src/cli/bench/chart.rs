//! The ratios as bars, in SVG: one drawing that is readable on light and dark, alone in its file (no script, no
//! font from elsewhere). The axis is logarithmic, so that half as fast and twice as fast look the same.

use std::fmt::Write;

use super::report::Report;
use super::table::ratio;

const WIDTH: f64 = 800.0;
/// Where the axis begins and ends; left of it are names, right of it figures.
const LEFT: f64 = 220.0;
const RIGHT: f64 = 735.0;
const TOP: f64 = 84.0;
const BAR: f64 = 14.0;
const STEP: f64 = 18.0;
/// Between two workloads.
const GAP: f64 = 10.0;

const STYLE: &str = "\
text{font-family:system-ui,sans-serif;font-size:12px;fill:#24292f}\
.title{font-size:16px;font-weight:600}.dim{fill:#57606a}.end{text-anchor:end}.mid{text-anchor:middle}\
.paper{fill:#fff}.grid{stroke:#d0d7de}.one{stroke:#24292f}.faster{fill:#1f77b4}.slower{fill:#d9822b}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9da7b3}.paper{fill:#0d1117}.grid{stroke:#30363d}\
.one{stroke:#e6edf3}.faster{fill:#58a6ff}.slower{fill:#f0a35e}}";

/// One bar.
struct Bar {
    workload: &'static str,
    processes: usize,
    /// `None`: plain SQLite did nothing, or turnstile did not.
    ratio: Option<f64>,
    tip: String,
}

pub fn svg(report: &Report) -> String {
    let bars: Vec<Bar> = report
        .results
        .iter()
        .map(|r| Bar {
            workload: r.case.workload.name,
            processes: r.case.processes,
            ratio: r.ratio().filter(|n| *n > 0.0),
            tip: format!("{:.0} → {:.0} operations/s", r.plain.ops_per_s(), r.turnstile.ops_per_s()),
        })
        .collect();
    let e = &report.environment;
    let below = format!(
        "SQLite {}, {} cores, {}, {} × {} s; by number of processes",
        e.sqlite, e.cores, e.filesystem, report.rounds, report.seconds
    );
    draw(&bars, &below)
}

fn draw(bars: &[Bar], below: &str) -> String {
    let groups = bars.chunk_by(|a, b| a.workload == b.workload);
    let count = groups.clone().count() as f64;
    let bottom = TOP + STEP * bars.len() as f64 + GAP * count;
    let height = bottom + 16.0;
    let axis = Axis::around(bars.iter().filter_map(|b| b.ratio));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<title>Operations per second: turnstile by plain SQLite</title>\n\
         <style>{STYLE}</style>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"16\" y=\"26\">Operations per second, turnstile by plain SQLite</text>\n\
         <text class=\"dim\" x=\"16\" y=\"46\">{}</text>\n",
        escaped(below)
    );
    for tick in axis.ticks() {
        let (x, class) = (axis.x(tick), if tick == 1.0 { "one" } else { "grid" });
        let _ = writeln!(out, "<path class=\"{class}\" d=\"M{x:.1} {TOP}V{bottom}\"/>");
        let _ = writeln!(out, "<text class=\"dim mid\" x=\"{x:.1}\" y=\"{}\">{tick}×</text>", TOP - 8.0);
    }
    let mut y = TOP + GAP / 2.0;
    for group in groups {
        let _ = writeln!(out, "<text x=\"16\" y=\"{:.1}\">{}</text>", y + 11.0, escaped(group[0].workload));
        for bar in group {
            draw_bar(&mut out, bar, &axis, y);
            y += STEP;
        }
        y += GAP;
    }
    out + "</svg>\n"
}

fn draw_bar(out: &mut String, bar: &Bar, axis: &Axis, y: f64) {
    let base = y + 11.0;
    let _ = writeln!(
        out,
        "<text class=\"dim end\" x=\"{}\" y=\"{base:.1}\">{}</text>",
        LEFT - 8.0,
        bar.processes
    );
    let one = axis.x(1.0);
    let end = bar.ratio.map_or(one, |r| axis.x(r));
    let (class, x, width) = if end < one { ("slower", end, one - end) } else { ("faster", one, end - one) };
    let _ = writeln!(
        out,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\">\
         <title>{}, {} processes: {}</title></rect>",
        width.max(1.0),
        escaped(bar.workload),
        bar.processes,
        escaped(&bar.tip)
    );
    // Beside the bar's end where the line at 1 is not in the way: right of both.
    let figure = bar.ratio.map_or("–".to_owned(), |r| format!("{}×", ratio(r)));
    let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{base:.1}\">{figure}</text>", end.max(one) + 6.0);
}

/// Ratios from `low` to `high`, powers of `step` around 1.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    fn around(ratios: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = ratios.fold((0.5, 2.0), |(l, h): (f64, f64), r| (l.min(r), h.max(r)));
        let step: f64 = if low >= 1.0 / 16.0 && high <= 16.0 { 2.0 } else { 10.0 };
        Axis { low: step.powf(low.log(step).floor()), high: step.powf(high.log(step).ceil()), step }
    }

    fn x(&self, ratio: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (ratio / self.low).ln() / (self.high / self.low).ln()
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let exponent = |n: f64| n.log(self.step).round() as i32;
        let step = self.step;
        // 10^-2 as 1 / 100: the quotient is the double that prints as 0.01.
        (exponent(self.low)..=exponent(self.high))
            .map(move |e| if e < 0 { 1.0 / step.powi(-e) } else { step.powi(e) })
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(workload: &'static str, processes: usize, ratio: Option<f64>) -> Bar {
        Bar { workload, processes, ratio, tip: "1 → 2 operations/s".to_owned() }
    }

    #[test]
    fn faster_is_right_of_one_and_slower_is_left_of_it() {
        let axis = Axis::around([0.02, 3.0].into_iter());
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [0.01, 0.1, 1.0, 10.0]);
        assert!(axis.x(0.02) < axis.x(1.0) && axis.x(1.0) < axis.x(3.0));
        assert!((axis.x(0.01) - LEFT).abs() < 1e-6 && (axis.x(10.0) - RIGHT).abs() < 1e-6);
        let near = Axis::around([0.9, 3.0].into_iter());
        assert_eq!(near.ticks().collect::<Vec<_>>(), [0.5, 1.0, 2.0, 4.0]);
    }

    #[test]
    fn every_case_has_a_bar_and_nothing_has_no_figure() {
        let bars = [bar("select", 1, Some(2.5)), bar("select", 2, Some(0.5)), bar("open", 1, None)];
        let svg = draw(&bars, "a < b & c");
        assert_eq!(svg.matches("height=\"14\"").count(), 3);
        assert!(svg.contains("2.50×") && svg.contains("0.50×") && svg.contains(">–<"), "{svg}");
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(draw(&[], "").ends_with("</svg>\n"));
    }
}
