//! What the file says of itself (sqlite.org/fileformat2.html), and the files beside it.

use std::os::unix::fs::FileExt;

use turnstile::planted::planted;

use super::findings::Findings;
use super::place::{Database, size_beside};

#[derive(Debug, PartialEq, Eq)]
struct Header {
    wal: bool,
    page_size: u32,
    reserved: u8,
    pages: u32,
    /// `SQLITE_VERSION_NUMBER` of who wrote it last.
    written_by: u32,
}

/// `None`: it does not begin as a database of SQLite's does.
fn header(bytes: &[u8; 100]) -> Option<Header> {
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let page_size = match u16::from_be_bytes([bytes[16], bytes[17]]) {
        1 => 65536,
        n => u32::from(n),
    };
    let known = &bytes[..16] == b"SQLite format 3\0" && page_size >= 512 && page_size.is_power_of_two();
    known.then(|| Header {
        wal: bytes[18] == 2 && bytes[19] == 2,
        page_size,
        reserved: bytes[20],
        pages: word(28),
        written_by: word(96),
    })
}

pub fn look(database: &Database, findings: &mut Findings) {
    let wal = size_beside(&database.path, "-wal").unwrap_or(0);
    if database.size == 0 {
        let what = match wal {
            0 => "an empty file: a new database",
            _ => "the file is empty: all of the database is in its -wal",
        };
        return findings.ok("format", what);
    }
    if planted("doctor-asks-sqlite") {
        let _ = rusqlite::Connection::open(&database.path)
            .and_then(|db| db.pragma_query(None, "schema_version", |_| Ok(())));
    }
    let mut bytes = [0; 100];
    let read = database.file.read_exact_at(&mut bytes, 0);
    let Some(header) = read.ok().and_then(|()| header(&bytes)) else {
        return findings.warning(
            "format-unknown",
            "it does not begin as a database of SQLite's does: encrypted, or something else",
            "if it is encrypted (SQLCipher, SEE): locks and turns work, checkpoints are left to its programs",
        );
    };
    let (mode, by) = (if header.wal { "WAL" } else { "rollback journal" }, header.written_by);
    let by = format!("{}.{}.{}", by / 1_000_000, by / 1000 % 1000, by % 1000);
    let (size, pages) = (header.page_size, header.pages);
    findings.ok("format", format!("{mode}, {pages} pages of {size} bytes, last written by SQLite {by}"));
    if header.reserved > 0 {
        findings.warning(
            "format-reserved",
            format!("{} bytes of each page are reserved (a checksum or a cipher)", header.reserved),
            "checkpoints are left to its programs, as in plain SQLite: nothing to do",
        );
    }
    if !header.wal {
        findings.warning(
            "format-rollback",
            "with a rollback journal readers and a writer keep each other out, and commits share no sync",
            "if several programs use it: PRAGMA journal_mode=wal, once",
        );
        if size_beside(&database.path, "-journal").is_some_and(|size| size > 0) {
            findings.warning(
                "journal",
                "there is a -journal: a transaction is under way, or its program has died in it",
                "never remove it: the next program that opens the database rolls back with it",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_and_another_file_is_none() {
        let mut bytes = [0u8; 100];
        bytes[..16].copy_from_slice(b"SQLite format 3\0");
        bytes[16..21].copy_from_slice(&[0x10, 0, 2, 2, 32]);
        bytes[31] = 7;
        bytes[96..].copy_from_slice(&3_040_001u32.to_be_bytes());
        let expected = Header { wal: true, page_size: 4096, reserved: 32, pages: 7, written_by: 3_040_001 };
        assert_eq!(header(&bytes), Some(expected));
        bytes[16..18].copy_from_slice(&[0, 1]);
        assert_eq!(header(&bytes).unwrap().page_size, 65536);
        bytes[16..18].copy_from_slice(&[0, 3]);
        assert_eq!(header(&bytes), None);
        bytes[0] = 0;
        assert_eq!(header(&bytes), None);
    }
}
