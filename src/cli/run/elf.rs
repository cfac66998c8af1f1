//! What an ELF file says about how it is started and what it needs, as far as `turnstile run` has to know.
//!
//! Reads by offset and never maps: the files are other people's, and one that shrinks under a mapping kills its
//! reader. Every offset in them is taken as a claim; a file that contradicts itself is an `InvalidData` error.
//! Layouts and numbers are those of `elf(5)`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::search::found_in;

mod symbols;

/// Nothing that is read here is larger in a real file (the largest: the dynamic symbols' names).
const LARGEST_TABLE: u64 = 64 << 20;

/// SQLite translated to Go, or to WebAssembly that Go runs: files and locks go to the kernel without any C library.
const SQLITES_IN_GO: [&str; 2] = ["modernc.org/sqlite", "github.com/ncruces/go-sqlite3"];

/// The parts of an ELF header that tell for which machine the file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// 8 bytes a word, else 4 (`ELFCLASS64`, `ELFCLASS32`).
    pub wide: bool,
    /// Most significant byte first (`ELFDATA2MSB`).
    pub big: bool,
    /// `e_machine`.
    pub number: u16,
}

/// An ELF executable or shared object.
#[derive(Debug)]
pub struct Elf {
    pub machine: Machine,
    /// The dynamic linker that starts it (`PT_INTERP`); none in a static executable and in a library.
    pub interpreter: Option<PathBuf>,
    /// `DT_NEEDED`, in order.
    pub needed: Vec<String>,
    /// Its own functions call each other directly, past any interposer (`DT_SYMBOLIC`, `DF_SYMBOLIC`).
    pub symbolic: bool,
    segments: Vec<Segment>,
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Segment {
    kind: u32,
    address: u64,
    offset: u64,
    size: u64,
}

#[derive(Debug)]
struct Section {
    name: String,
    kind: u32,
    offset: u64,
    size: u64,
    link: u32,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const SHT_NOBITS: u32 = 8;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
const DT_SYMBOLIC: u64 = 16;
const DT_FLAGS: u64 = 30;
const DF_SYMBOLIC: u64 = 2;

impl Elf {
    /// Reads `file`'s headers; `None` when it is not an ELF file at all.
    pub fn read(file: &File) -> io::Result<Option<Elf>> {
        let mut ident = [0u8; 20];
        if file.read_at(&mut ident, 0)? < ident.len() || &ident[..4] != b"\x7fELF" {
            return Ok(None);
        }
        let mut machine = Machine { wide: ident[4] == 2, big: ident[5] == 2, number: 0 };
        machine.number = machine.number_at(&ident, 18, 2)? as u16;
        let header = table(file, 0, if machine.wide { 64 } else { 52 })?;
        let mut elf = Elf {
            machine,
            interpreter: None,
            needed: Vec::new(),
            symbolic: false,
            segments: read_segments(file, machine, &header)?,
            // Only refinements come from the sections, and a stripped file may have lost them.
            sections: read_sections(file, machine, &header).unwrap_or_default(),
        };
        if let Some(s) = elf.segment(PT_INTERP) {
            elf.interpreter = Some(PathBuf::from(string(&table(file, s.offset, s.size)?, 0)?));
        }
        elf.read_dynamic(file)?;
        Ok(Some(elf))
    }

    fn segment(&self, kind: u32) -> Option<&Segment> {
        self.segments.iter().find(|s| s.kind == kind)
    }

    fn read_dynamic(&mut self, file: &File) -> io::Result<()> {
        let Some(s) = self.segment(PT_DYNAMIC) else { return Ok(()) };
        let bytes = table(file, s.offset, s.size)?;
        let word = self.machine.word();
        let (mut needed, mut strings, mut strings_size) = (Vec::new(), None, 0);
        for at in (0..bytes.len() / (2 * word)).map(|i| i * 2 * word) {
            let tag = self.machine.number_at(&bytes, at, word)?;
            let value = self.machine.number_at(&bytes, at + word, word)?;
            match tag {
                0 => break,
                DT_NEEDED => needed.push(value),
                DT_STRTAB => strings = Some(value),
                DT_STRSZ => strings_size = value,
                DT_SYMBOLIC => self.symbolic = true,
                DT_FLAGS => self.symbolic |= value & DF_SYMBOLIC != 0,
                _ => {}
            }
        }
        if let Some(address) = strings.filter(|_| !needed.is_empty()) {
            let names = table(file, self.offset_of(address)?, strings_size)?;
            self.needed = needed.into_iter().map(|at| string(&names, at)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    /// Where in the file the byte lies that is loaded at `address`.
    fn offset_of(&self, address: u64) -> io::Result<u64> {
        let within = |s: &&Segment| s.kind == PT_LOAD && address.wrapping_sub(s.address) < s.size;
        let s = self.segments.iter().find(within).ok_or_else(malformed)?;
        s.offset.checked_add(address - s.address).ok_or_else(malformed)
    }

    /// Built by the Go toolchain.
    pub fn is_go(&self) -> bool {
        self.sections.iter().any(|s| s.name == ".note.go.buildid" || s.name == ".go.buildinfo")
    }

    /// The content of the section of this name.
    pub fn section(&self, file: &File, name: &str) -> io::Result<Option<Vec<u8>>> {
        let found = self.sections.iter().find(|s| s.name == name && s.kind != SHT_NOBITS);
        found.map(|s| table(file, s.offset, s.size)).transpose()
    }

    /// Where constants such as strings lie: the sections for them, or all that is loaded if the file has lost
    /// its section table.
    fn constants(&self) -> Vec<(u64, u64)> {
        let sections = self.sections.iter().filter(|s| s.kind != SHT_NOBITS && s.name.starts_with(".rodata"));
        let found: Vec<_> = sections.map(|s| (s.offset, s.size)).collect();
        if !found.is_empty() {
            return found;
        }
        self.segments.iter().filter(|s| s.kind == PT_LOAD).map(|s| (s.offset, s.size)).collect()
    }

    /// Whether the file's constants contain `bytes`.
    pub fn holds(&self, file: &File, bytes: &[u8]) -> io::Result<bool> {
        found_in(&self.constants(), file, bytes)
    }

    /// The SQLite that a Go program has got in Go: its package, by the names of functions, which `strip` leaves.
    pub fn sqlite_in_go(&self, file: &File) -> io::Result<Option<&'static str>> {
        let tables = self.sections.iter().filter(|s| s.kind != SHT_NOBITS && s.name.ends_with(".gopclntab"));
        let tables: Vec<_> = tables.map(|s| (s.offset, s.size)).collect();
        for package in SQLITES_IN_GO {
            if found_in(&tables, file, package.as_bytes())? {
                return Ok(Some(package));
            }
        }
        Ok(None)
    }
}

impl Machine {
    fn word(self) -> usize {
        if self.wide { 8 } else { 4 }
    }

    fn number_at(self, bytes: &[u8], at: usize, size: usize) -> io::Result<u64> {
        let field = at.checked_add(size).and_then(|end| bytes.get(at..end)).ok_or_else(malformed)?;
        let digits = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Ok(if self.big { field.iter().fold(0, digits) } else { field.iter().rev().fold(0, digits) })
    }
}

fn read_segments(file: &File, m: Machine, header: &[u8]) -> io::Result<Vec<Segment>> {
    let (table_at, size_at, kind) = if m.wide { (32, 54, 56) } else { (28, 42, 32) };
    let size = (m.number_at(header, size_at, 2)? as usize).max(kind);
    let count = m.number_at(header, size_at + 2, 2)?;
    let bytes = table(file, m.number_at(header, table_at, m.word())?, count * size as u64)?;
    let (offset, address, filesz) = if m.wide { (8, 16, 32) } else { (4, 8, 16) };
    let segment = |p: &[u8]| {
        Ok(Segment {
            kind: m.number_at(p, 0, 4)? as u32,
            address: m.number_at(p, address, m.word())?,
            offset: m.number_at(p, offset, m.word())?,
            size: m.number_at(p, filesz, m.word())?,
        })
    };
    bytes.chunks_exact(size).map(segment).collect()
}

fn read_sections(file: &File, m: Machine, header: &[u8]) -> io::Result<Vec<Section>> {
    let (table_at, size_at, kind) = if m.wide { (40, 58, 64) } else { (32, 46, 40) };
    let size = (m.number_at(header, size_at, 2)? as usize).max(kind);
    let count = m.number_at(header, size_at + 2, 2)?;
    let names_index = m.number_at(header, size_at + 4, 2)? as usize;
    let bytes = table(file, m.number_at(header, table_at, m.word())?, count * size as u64)?;
    let (offset, filesz, link) = if m.wide { (24, 32, 40) } else { (16, 20, 24) };
    let range =
        |s: &[u8]| Ok::<_, io::Error>((m.number_at(s, offset, m.word())?, m.number_at(s, filesz, m.word())?));
    let (at, len) = range(bytes.chunks_exact(size).nth(names_index).ok_or_else(malformed)?)?;
    let names = table(file, at, len)?;
    let section = |s: &[u8]| {
        let (offset, size) = range(s)?;
        Ok(Section {
            name: string(&names, m.number_at(s, 0, 4)?)?,
            kind: m.number_at(s, 4, 4)? as u32,
            offset,
            size,
            link: m.number_at(s, link, 4)? as u32,
        })
    };
    bytes.chunks_exact(size).map(section).collect()
}

/// `size` bytes at `offset`, which must be there.
fn table(file: &File, offset: u64, size: u64) -> io::Result<Vec<u8>> {
    let beyond = offset.checked_add(size).is_none_or(|end| end > i64::MAX as u64);
    if size > LARGEST_TABLE || beyond {
        return Err(malformed());
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn string(bytes: &[u8], at: u64) -> io::Result<String> {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).ok_or_else(malformed)?;
    let end = memchr::memchr(0, rest).unwrap_or(rest.len());
    Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed ELF file")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The test program itself: dynamic, 64 bits on the machines that build this.
    fn own() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn this_program_is_dynamic_and_needs_libc() {
        let elf = Elf::read(&file_of(&own())).unwrap().unwrap();
        assert!(elf.interpreter.as_ref().is_some_and(|i| i.to_string_lossy().contains("ld-")), "{elf:?}");
        assert!(elf.needed.iter().any(|n| n.starts_with("libc.")), "{:?}", elf.needed);
        assert!(!elf.is_go());
        assert_eq!(elf.machine.wide, cfg!(target_pointer_width = "64"));
    }

    #[test]
    fn constants_are_found_and_others_are_not() {
        let file = file_of(&own());
        let elf = Elf::read(&file).unwrap().unwrap();
        assert!(elf.holds(&file, b"malformed ELF file").unwrap());
        let absent: Vec<u8> = b"absent from this program".iter().map(|b| b ^ 0xa5).collect();
        assert!(!elf.holds(&file, &absent).unwrap());
    }

    /// A file of one segment: found at each place around the border between two reads.
    #[test]
    fn a_match_across_two_reads_is_found() {
        let machine = Machine { wide: true, big: false, number: 62 };
        for at in (256 << 10) - 20..(256 << 10) + 4 {
            let mut bytes = vec![0u8; 300 << 10];
            bytes[at..at + 16].copy_from_slice(b"SQLite format 3\0");
            let segment = Segment { kind: PT_LOAD, address: 0, offset: 0, size: bytes.len() as u64 };
            let elf = Elf {
                machine,
                interpreter: None,
                needed: vec![],
                symbolic: false,
                segments: vec![segment],
                sections: vec![],
            };
            assert!(elf.holds(&file_of(&bytes), b"SQLite format 3\0").unwrap(), "at {at}");
        }
    }

    #[test]
    fn a_script_and_an_empty_file_are_not_elf() {
        assert!(
            Elf::read(&file_of(b"#!/bin/sh\necho a longer line than an ELF header\n")).unwrap().is_none()
        );
        assert!(Elf::read(&file_of(b"")).unwrap().is_none());
    }

    #[test]
    fn a_32_bit_big_endian_header_is_read_in_its_own_order() {
        let mut header = vec![0u8; 52];
        header[..7].copy_from_slice(b"\x7fELF\x01\x02\x01");
        header[19] = 20; // EM_PPC
        let elf = Elf::read(&file_of(&header)).unwrap().unwrap();
        assert_eq!(elf.machine, Machine { wide: false, big: true, number: 20 });
        assert_eq!(elf.interpreter, None);
    }

    /// Cut short or with any header byte changed, a file is an answer or an error, never a panic.
    #[test]
    fn a_damaged_file_is_no_more_than_an_error() {
        let bytes = own();
        let elf = Elf::read(&file_of(&bytes)).unwrap().unwrap();
        let headers = elf.segments.len() * 56 + 64;
        for cut in (0..headers).chain([bytes.len() / 2]) {
            let _ = Elf::read(&file_of(&bytes[..cut]));
        }
        let short = &bytes[..bytes.len().min(1 << 16)];
        for at in 4..headers {
            let mut damaged = short.to_vec();
            damaged[at] ^= 0xff;
            let file = file_of(&damaged);
            if let Ok(Some(elf)) = Elf::read(&file) {
                let _ = elf.open_symbols(&file);
            }
        }
    }
}
