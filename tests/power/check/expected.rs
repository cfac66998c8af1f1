//! What the recorded programs said: what was acknowledged to them and what they have seen. See `workloads.py`.
//!
//! Every transaction counts the database's one counter up and leaves, in rows of its worker, its own number. So the
//! state of a database is a function of the counter, and one number says which transactions are in it.

use super::log::{Event, Record};
use std::collections::{BTreeMap, BTreeSet};

/// How the notes name what they promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub name: String,
    /// An acknowledged transaction survives. Otherwise what survives is a beginning of the order of commits.
    pub durable: bool,
    /// The databases; each transaction writes all of them.
    pub files: Vec<String>,
    /// A transaction is in all of them or in none.
    pub atomic: bool,
}

#[derive(Debug, Clone, Copy)]
struct Acknowledged {
    counter: i64,
    /// The record that says so.
    at: u64,
}

#[derive(Debug)]
pub struct Expected {
    pub workload: Workload,
    /// By worker: the sequence numbers acknowledged to it.
    acknowledged: BTreeMap<i64, BTreeMap<i64, Acknowledged>>,
    /// The transactions acknowledged.
    pub commits: u64,
    /// Record by record: the counter that must survive from there on.
    owed: Vec<(u64, i64)>,
    /// The same for what only was seen, in the first database.
    seen: Vec<(u64, i64)>,
    /// Record by record: what is said of the WAL from there on.
    closed: Vec<(u64, Closed)>,
}

/// Whether the database is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    Open,
    /// The file alone is complete.
    Alone,
    /// The same, and no WAL that anybody would read lies beside it.
    Ended,
}

impl Expected {
    pub fn of(log: &dyn Record) -> Result<Expected, String> {
        let mut workload = None;
        let mut acknowledged: BTreeMap<i64, BTreeMap<i64, Acknowledged>> = BTreeMap::new();
        let (mut owed, mut seen, mut counters) = (Vec::new(), Vec::new(), BTreeSet::new());
        let mut closed = Vec::new();
        for number in 0..log.count() {
            let Event::Note(text) = log.event(number)? else { continue };
            let words: Vec<&str> = text.split(' ').collect();
            let numbers: Vec<i64> = words[1..].iter().filter_map(|w| w.parse().ok()).collect();
            match (words[0], &numbers[..]) {
                ("workload", _) => workload = Some(parse_workload(&words[1..])?),
                ("ready", []) => owed.push((number, 0)),
                (word @ ("ack" | "did"), &[worker, seq, counter]) => {
                    let of_worker = acknowledged.entry(worker).or_default();
                    let before = of_worker.insert(seq, Acknowledged { counter, at: number });
                    if before.is_some() || !counters.insert(counter) {
                        return Err(format!("record {number}: {text} was acknowledged twice: one is lost"));
                    }
                    if word == "ack" {
                        raise(&mut owed, number, counter);
                    }
                }
                ("opens", []) => closed.push((number, Closed::Open)),
                ("closed", []) => closed.push((number, Closed::Alone)),
                ("ended", []) => closed.push((number, Closed::Ended)),
                ("saw", &[counter]) => raise(&mut seen, number, counter),
                _ => return Err(format!("record {number}: what does {text:?} mean?")),
            }
        }
        let workload = workload.ok_or("the record does not say of what")?;
        if owed.is_empty() {
            return Err("the record ends before the databases are there".into());
        }
        Ok(Expected { workload, acknowledged, commits: counters.len() as u64, owed, seen, closed })
    }

    /// A power loss just before record `position` meets the database like this.
    pub fn closed_at(&self, position: u64) -> Closed {
        let before = self.closed.partition_point(|(number, _)| *number < position);
        before.checked_sub(1).map_or(Closed::Open, |last| self.closed[last].1)
    }

    /// What must have survived a power loss just before record `position`: nothing, the databases, or they with all
    /// transactions up to a counter. `first`: of the first database; a reader may have seen a transaction that is
    /// still to be committed in the others, where they are not committed together.
    pub fn owed_at(&self, position: u64, first: bool) -> Option<i64> {
        let owed = at(&self.owed, position)?;
        let seen = at(&self.seen, position).filter(|_| first || self.workload.atomic);
        Some(if self.workload.durable { owed.max(seen.unwrap_or(0)) } else { 0 })
    }

    /// Whether a database whose counter is `counter` may hold `seq` as the last transaction of `worker` after a power
    /// loss just before record `position`. What is acknowledged later binds nobody: its writer may have got its
    /// counter because another, which had it too, was killed.
    pub fn fits(&self, position: u64, counter: i64, worker: i64, seq: i64) -> Result<(), String> {
        let Some(of_worker) = self.acknowledged.get(&worker) else { return Ok(()) };
        let before = of_worker.range(..=seq).rev().find(|(_, a)| a.at < position);
        if let Some((acknowledged, a)) = before
            && a.counter > counter
        {
            return Err(format!("transaction {acknowledged} of worker {worker} is there, which came later"));
        }
        if let Some((next, a)) = of_worker.range(seq + 1..).next()
            && a.at < position
            && a.counter <= counter
        {
            return Err(format!("transaction {next} of worker {worker}, which came before, is missing"));
        }
        Ok(())
    }
}

/// Notes that from record `number` on it is at least `counter`.
fn raise(list: &mut Vec<(u64, i64)>, number: u64, counter: i64) {
    if list.last().is_none_or(|(_, most)| counter > *most) {
        list.push((number, counter));
    }
}

fn at(list: &[(u64, i64)], position: u64) -> Option<i64> {
    let known = list.partition_point(|(number, _)| *number < position);
    list[..known].last().map(|(_, counter)| *counter)
}

/// `NAME durable|prefix atomic|separate FILE...`
fn parse_workload(words: &[&str]) -> Result<Workload, String> {
    match words {
        [name, durable @ ("durable" | "prefix"), atomic @ ("atomic" | "separate"), files @ ..]
            if !files.is_empty() =>
        {
            Ok(Workload {
                name: (*name).to_owned(),
                durable: *durable == "durable",
                atomic: *atomic == "atomic",
                files: files.iter().map(|f| (*f).to_owned()).collect(),
            })
        }
        _ => Err(format!("what workload is {words:?}?")),
    }
}
