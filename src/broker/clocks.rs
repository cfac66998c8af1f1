//! Members' clocks. A process in a time namespace of its own has another monotonic clock than the broker
//! (time_namespaces(7)), and what it writes into the segment is by that.

use crate::planted::planted;
use std::fs;

/// By how many milliseconds the monotonic clock of that process is ahead of this one's. 0 where that cannot be told.
pub fn ahead(pid: i32) -> i64 {
    let offset = |who: &str| offset(&fs::read_to_string(format!("/proc/{who}/timens_offsets")).ok()?);
    let both = (pid > 0).then(|| Some((offset(&pid.to_string())?, offset("self")?))).flatten();
    both.filter(|_| !planted("one-clock-for-all")).map_or(0, |(theirs, ours)| theirs.saturating_sub(ours))
}

/// `monotonic SECONDS NANOSECONDS`, of the namespace in which a process and its children are.
fn offset(table: &str) -> Option<i64> {
    let line = table.lines().find_map(|line| line.strip_prefix("monotonic"))?;
    let mut numbers = line.split_whitespace().map(str::parse::<i64>);
    let (seconds, nanos) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    seconds.checked_mul(1000)?.checked_add(nanos / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        assert_eq!(offset("monotonic     1000000         0\nboottime  0  0\n"), Some(1_000_000_000));
        assert_eq!(offset("monotonic -7 500000000\n"), Some(-6500));
        assert_eq!(offset("monotonic\n"), None);
        assert_eq!(offset(""), None);
        assert_eq!(ahead(std::process::id() as i32), 0);
        assert_eq!(ahead(0), 0);
    }
}
