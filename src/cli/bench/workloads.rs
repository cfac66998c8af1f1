//! The workloads, as a table.

use serde::Serialize;

/// What one process does again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// One row by rowid, with so many other prepared statements cached on the connection.
    Select {
        others: usize,
    },
    Insert,
    /// The same, and then so many milliseconds of something else.
    InsertAndPause {
        ms: u64,
    },
    Immediate,
    /// On one counter that all share.
    ReadWrite,
    /// Opening, one select, closing; with another connection of the same process open, or not.
    Open {
        same_process: bool,
    },
    /// Opening, one row, closing; nobody else has the database open.
    OpenInsert,
    /// From one database into another, processes of even and odd number in opposite directions.
    Attach,
    /// A statement of about a second that reads the database and writes a temporary table.
    Fill,
    /// Nothing: so many connections of one process that have read once and stay open.
    Hold {
        connections: usize,
    },
}

impl Operation {
    pub fn writes(self) -> bool {
        use Operation::{Attach, Immediate, Insert, InsertAndPause, OpenInsert, ReadWrite};
        matches!(self, Insert | InsertAndPause { .. } | Immediate | ReadWrite | OpenInsert | Attach)
    }

    /// Every how many operations one is measured. A select takes some 400 ns and two looks at the clock 50 ns.
    pub fn sampling(self) -> u32 {
        if matches!(self, Self::Select { .. }) { 64 } else { 1 }
    }

    /// One of them, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Select { .. } => "SELECT one row by rowid, its own read transaction",
            Self::Insert => "INSERT one row, autocommit",
            Self::InsertAndPause { .. } => "INSERT one row, autocommit, and a pause",
            Self::Immediate => "BEGIN IMMEDIATE; INSERT one row; COMMIT",
            Self::ReadWrite => "BEGIN; SELECT the counter; UPDATE it; COMMIT",
            Self::Open { .. } => "open a connection, SELECT one row, close",
            Self::OpenInsert => "open a connection, INSERT one row, close",
            Self::Attach => "INSERT INTO b.rows SELECT ... FROM main.items, one row, autocommit",
            Self::Fill => "INSERT INTO temp.fill SELECT ... FROM items",
            Self::Hold { .. } => "nothing",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Journal {
    Wal,
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Synchronous {
    Normal,
    Full,
}

/// How many processes are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counts {
    /// These, unless `--processes` says otherwise.
    Usually(&'static [usize]),
    /// The workload makes sense with this number only.
    Always(usize),
}

#[derive(Debug)]
pub struct Workload {
    pub name: &'static str,
    pub about: &'static str,
    pub operation: Operation,
    pub journal: Journal,
    pub synchronous: Synchronous,
    pub counts: Counts,
    /// Processes that are there as well and are not measured: how many, and what each does.
    pub beside: Option<(usize, Operation)>,
    /// Whether `--quick` runs it unasked.
    pub quick: bool,
}

impl Workload {
    /// What the process of this number does, of which `processes` are measured.
    pub fn operation_of(&self, number: usize, processes: usize) -> Operation {
        match self.beside {
            Some((_, operation)) if number >= processes => operation,
            _ => self.operation,
        }
    }
}

/// What most workloads are; the table says how each differs.
const BASE: Workload = Workload {
    name: "",
    about: "",
    operation: Operation::Insert,
    journal: Journal::Wal,
    synchronous: Synchronous::Normal,
    counts: Counts::Usually(&[1, 2, 4]),
    beside: None,
    quick: true,
};

const READERS: Operation = Operation::Select { others: 0 };
const PAUSING: Operation = Operation::InsertAndPause { ms: 2 };
const MANY: Counts = Counts::Usually(&[1, 2, 4, 8, 32]);
const HOLDER: Option<(usize, Operation)> = Some((1, Operation::Hold { connections: 1 }));

pub const ALL: &[Workload] = &[
    Workload {
        name: "select",
        about: "point selects, each its own read transaction",
        operation: Operation::Select { others: 0 },
        ..BASE
    },
    Workload {
        name: "select-500",
        about: "the same with 500 other prepared statements cached on the connection",
        operation: Operation::Select { others: 500 },
        ..BASE
    },
    Workload { name: "insert-normal", about: "one row a commit", counts: MANY, ..BASE },
    Workload {
        name: "insert-full",
        about: "one row a commit, durable",
        synchronous: Synchronous::Full,
        counts: MANY,
        ..BASE
    },
    Workload {
        name: "crowd-full",
        about: "one row a commit, durable, from 64 processes",
        synchronous: Synchronous::Full,
        counts: Counts::Always(64),
        quick: false,
        ..BASE
    },
    Workload {
        name: "busy-commits",
        about: "8 busy writers, durable, beside 4 busy readers: the commits",
        synchronous: Synchronous::Full,
        counts: Counts::Always(8),
        beside: Some((4, READERS)),
        quick: false,
        ..BASE
    },
    Workload {
        name: "busy-reads",
        about: "the same 8 and 4: the reads",
        operation: READERS,
        synchronous: Synchronous::Full,
        counts: Counts::Always(4),
        beside: Some((8, Operation::Insert)),
        quick: false,
        ..BASE
    },
    Workload {
        name: "pausing-commits",
        about: "4 writers that pause 2 ms after each durable commit, beside 2 busy readers: the commits",
        operation: PAUSING,
        synchronous: Synchronous::Full,
        counts: Counts::Always(4),
        beside: Some((2, READERS)),
        quick: false,
        ..BASE
    },
    Workload {
        name: "pausing-reads",
        about: "the same 4 and 2: the reads",
        operation: READERS,
        synchronous: Synchronous::Full,
        counts: Counts::Always(2),
        beside: Some((4, PAUSING)),
        quick: false,
        ..BASE
    },
    Workload {
        name: "insert-delete-full",
        about: "one row a commit, durable, rollback journal (SQLite's default)",
        journal: Journal::Delete,
        synchronous: Synchronous::Full,
        counts: MANY,
        ..BASE
    },
    Workload {
        name: "insert-delete-normal",
        about: "one row a commit, rollback journal",
        journal: Journal::Delete,
        counts: MANY,
        ..BASE
    },
    Workload {
        name: "immediate",
        about: "explicit transactions that say that they will write",
        operation: Operation::Immediate,
        counts: Counts::Usually(&[1, 2, 8]),
        ..BASE
    },
    Workload {
        name: "read-write",
        about: "transactions that read first and then write: BUSY is rolled back and counted",
        operation: Operation::ReadWrite,
        counts: Counts::Usually(&[1, 2, 8]),
        ..BASE
    },
    Workload {
        name: "open",
        about: "a connection for one select, while another process has the database open",
        operation: Operation::Open { same_process: false },
        counts: Counts::Usually(&[1, 2]),
        beside: HOLDER,
        ..BASE
    },
    Workload {
        name: "open-same",
        about: "a connection for one select, while the same process has another one open",
        operation: Operation::Open { same_process: true },
        counts: Counts::Usually(&[1, 2]),
        ..BASE
    },
    Workload {
        name: "open-commit",
        about: "a connection for one durable row, nobody else has the database open",
        operation: Operation::OpenInsert,
        synchronous: Synchronous::Full,
        counts: ONE,
        ..BASE
    },
    Workload {
        name: "crowd",
        about: "one row a commit from 200 processes",
        counts: Counts::Always(200),
        quick: false,
        ..BASE
    },
    Workload { name: "idle-0", about: "one writer alone, to compare with idle-1000", counts: ONE, ..BASE },
    Workload {
        name: "idle-1000",
        about: "one writer among 1,000 idle connections of 4 other processes",
        counts: ONE,
        beside: Some((4, Operation::Hold { connections: 250 })),
        quick: false,
        ..BASE
    },
    Workload {
        name: "temp-fill",
        about: "two processes insert while a third fills temp tables, 1 s a statement: see their worst wait",
        counts: Counts::Always(2),
        beside: Some((1, Operation::Fill)),
        ..BASE
    },
    Workload {
        name: "mirrored-attach",
        about: "two processes copy between two databases in opposite directions",
        operation: Operation::Attach,
        counts: Counts::Always(2),
        ..BASE
    },
];

const ONE: Counts = Counts::Always(1);

pub fn named(name: &str) -> Option<&'static Workload> {
    ALL.iter().find(|w| w.name == name)
}

/// A workload with a number of processes: what is run on both sides and compared.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub workload: &'static Workload,
    pub processes: usize,
}

/// What to run. A pattern is a workload's name, or a part of the names of several.
pub fn choose(only: &[String], processes: &[usize], quick: bool) -> Result<Vec<Case>, String> {
    if let Some(stranger) = only.iter().find(|p| !ALL.iter().any(|w| matches(w.name, p))) {
        return Err(format!("no workload is called '{stranger}': see --list"));
    }
    let asked = |w: &Workload| match only {
        [] => w.quick || !quick,
        patterns => patterns.iter().any(|p| matches(w.name, p)),
    };
    let counts = |w: &Workload| match w.counts {
        Counts::Always(n) => vec![n],
        Counts::Usually(_) if !processes.is_empty() => processes.to_vec(),
        Counts::Usually(usual) => usual.iter().copied().filter(|n| !quick || *n <= 2).collect(),
    };
    let cases = ALL.iter().filter(|w| asked(w));
    Ok(cases.flat_map(|w| counts(w).into_iter().map(move |n| Case { workload: w, processes: n })).collect())
}

fn matches(name: &str, pattern: &str) -> bool {
    if named(pattern).is_some() { name == pattern } else { name.contains(pattern) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(only: &[&str], processes: &[usize], quick: bool) -> Vec<(&'static str, usize)> {
        let only: Vec<String> = only.iter().map(|s| (*s).to_owned()).collect();
        let cases = choose(&only, processes, quick).unwrap();
        cases.iter().map(|c| (c.workload.name, c.processes)).collect()
    }

    #[test]
    fn a_whole_name_means_itself_and_a_part_means_all_that_have_it() {
        assert_eq!(chosen(&["open"], &[1], false), [("open", 1)]);
        assert_eq!(chosen(&["ope"], &[1], false), [("open", 1), ("open-same", 1), ("open-commit", 1)]);
        assert!(choose(&["nothing".to_owned()], &[], false).is_err());
    }

    #[test]
    fn a_fixed_number_of_processes_stays() {
        assert_eq!(chosen(&["immediate", "crowd"], &[3], false), [("immediate", 3), ("crowd", 200)]);
    }

    #[test]
    fn quick_is_small_unless_asked_for_more() {
        assert!(chosen(&[], &[], true).iter().all(|(name, n)| *n <= 2 && *name != "idle-1000"));
        assert_eq!(chosen(&["crowd"], &[], true), [("crowd", 200)]);
    }

    #[test]
    fn names_fit_the_table_and_are_their_own() {
        for (i, w) in ALL.iter().enumerate() {
            assert!((1..=20).contains(&w.name.len()) && !w.about.is_empty(), "{w:?}");
            assert!(ALL[..i].iter().all(|other| other.name != w.name), "{w:?}");
        }
    }
}
