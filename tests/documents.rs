//! What docs/reliability.md says of the failures that were seen once is held to the code: each has tests that are there,
//! and a rule whose absence one of those tests notices.

use std::fs;
use std::path::{Path, PathBuf};

struct Row {
    failure: String,
    /// (file, name)
    tests: Vec<(String, String)>,
    rules: Vec<String>,
    /// The third column, as it stands.
    without: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn table() -> Vec<Row> {
    let page = read("docs/reliability.md");
    let (_, part) = page.split_once("## Failures seen once").expect("the table of failures");
    let part = part.split("\n## ").next().unwrap_or(part);
    let cells =
        |line: &str| line.trim_matches('|').split(" | ").map(|c| c.trim().to_owned()).collect::<Vec<_>>();
    part.lines()
        .filter(|l| l.starts_with("| "))
        .skip(1)
        .map(|line| {
            let [failure, tests, without] = <[String; 3]>::try_from(cells(line))
                .unwrap_or_else(|cells| panic!("not three columns: {cells:?}"));
            let tests = tests
                .split(';')
                .flat_map(|group| {
                    let names = quoted(group);
                    let (file, names) = names.split_first().unwrap_or_else(|| panic!("no test: {line}"));
                    names.iter().map(|n| (file.clone(), n.clone())).collect::<Vec<_>>()
                })
                .collect();
            Row { failure, tests, rules: quoted(&without), without }
        })
        .collect()
}

/// The sources in which the tests of `file` are, or their parts.
fn sources_of(file: &str) -> String {
    match file.strip_prefix("test_") {
        Some(_) => read(format!("tests/e2e/{file}.py")),
        // A unit test.
        None if file.starts_with("src/") => read(file),
        None => read(format!("tests/{file}.rs")),
    }
}

/// The lines of one test, with what stands above it.
fn text_of(file: &str, name: &str) -> Option<String> {
    let source = sources_of(file);
    let lines: Vec<&str> = source.lines().collect();
    let begins = |l: &str| {
        l.starts_with(&format!("def {name}(")) || l.trim_start().starts_with(&format!("fn {name}("))
    };
    let at = lines.iter().position(|l| begins(l))?;
    let attributes =
        lines[..at].iter().rev().take_while(|l| l.starts_with('@') || l.starts_with('#')).count();
    let ends = |l: &&str| !l.is_empty() && !l.starts_with([' ', ')']);
    let body = lines[at + 1..].iter().take_while(|l| !ends(l)).count();
    Some(lines[at - attributes..at + 1 + body].join("\n"))
}

fn all_sources(path: PathBuf, text: &mut String) {
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all_sources(path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_failure_has_its_tests() {
    let rows = table();
    assert!(rows.len() >= 30, "{} rows", rows.len());
    for row in &rows {
        assert!(!row.tests.is_empty(), "{}: no test", row.failure);
        for (file, name) in &row.tests {
            let text = text_of(file, name).unwrap_or_else(|| panic!("{}: {file} has no {name}", row.failure));
            let runs = file.starts_with("test_") || text.contains("#[test]");
            assert!(runs, "{file}: {name} is no test");
        }
    }
}

#[test]
fn every_failure_has_a_rule_whose_absence_is_noticed() {
    let mut sources = String::new();
    all_sources(root().join("src"), &mut sources);
    for row in table() {
        if row.rules.is_empty() {
            assert!(
                row.without.starts_with("no rule of its own: "),
                "{}: which rule, or why none",
                row.failure
            );
        }
        for rule in &row.rules {
            let name = format!("\"{rule}\"");
            assert!(sources.contains(&name), "{}: no rule {rule} in src", row.failure);
            let noticed = row.tests.iter().any(|(file, test)| {
                let text = text_of(file, test).unwrap_or_default();
                // One of the rules of a Python test may be there only to make it show: "rule,no-fast-lane".
                text.contains(&format!("fails_without(\"{rule}")) || text.contains(&format!("rule({name}"))
            });
            assert!(noticed, "{}: no test is run without {rule}", row.failure);
        }
    }
}

/// Every end-to-end test that the page names elsewhere.
#[test]
fn every_test_that_is_named_is_there() {
    let page = read("docs/reliability.md");
    let mut all = String::new();
    for entry in fs::read_dir(root().join("tests/e2e")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "py") {
            all.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    let files = |name: &str| root().join(format!("tests/e2e/{name}.py")).exists();
    let named: Vec<String> = quoted(&page).into_iter().filter(|n| n.starts_with("test_")).collect();
    assert!(named.len() > 30);
    for name in named {
        assert!(files(&name) || all.contains(&format!("def {name}(")), "there is no {name}");
    }
}
