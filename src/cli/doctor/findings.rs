//! What was found, for people and for programs.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::settings::Settings;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It works, and may not do what is expected.
    Warning,
    /// It does not work, or data is at risk.
    Problem,
}

#[derive(Debug, Serialize)]
pub struct Finding {
    level: Level,
    /// By which programs know it.
    code: &'static str,
    what: String,
    /// What to do.
    advice: Option<String>,
}

#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    pub fn ok(&mut self, code: &'static str, what: impl Into<String>) {
        self.add(Level::Ok, code, what.into(), None);
    }

    pub fn warning(&mut self, code: &'static str, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Warning, code, what.into(), Some(advice.into()));
    }

    pub fn problem(&mut self, code: &'static str, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Problem, code, what.into(), Some(advice.into()));
    }

    fn add(&mut self, level: Level, code: &'static str, what: String, advice: Option<String>) {
        self.0.push(Finding { level, code, what: printable(&what), advice: advice.map(|a| printable(&a)) });
    }

    pub fn problems(&self) -> usize {
        self.count(Level::Problem)
    }

    fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|f| f.level == level).count()
    }

    pub fn json(&self, path: &Path, settings: &Settings) -> String {
        let report = json!({
            "database": path.display().to_string(),
            "problems": self.problems(),
            "warnings": self.count(Level::Warning),
            "findings": self.0,
            "settings": settings.listed(),
        });
        serde_json::to_string_pretty(&report).unwrap_or_default()
    }

    pub fn text(&self, path: &Path, settings: &Settings) -> String {
        let mut out = printable(&path.display().to_string());
        for finding in &self.0 {
            let mark = match finding.level {
                Level::Ok => "ok",
                Level::Warning => "WARNING",
                Level::Problem => "PROBLEM",
            };
            let _ = write!(out, "\n  {mark:<8} {}", finding.what);
            if let Some(advice) = &finding.advice {
                let _ = write!(out, "\n           -> {advice}");
            }
        }
        out.push_str("\n  settings");
        for setting in settings.listed() {
            let _ = write!(
                out,
                "\n           {:<24} {}  ({})",
                setting.name,
                printable(&setting.value),
                setting.from
            );
        }
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let warnings = count(self.count(Level::Warning), "warning");
        let _ = write!(out, "\n{}, {warnings}", count(self.problems(), "problem"));
        out
    }
}

/// Names of files and programs are others' choice: no control characters on a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
