//! An ELF file's dynamic symbols: what it offers to other objects, and what it calls of theirs.

use std::fs::File;
use std::io;

use super::{Elf, malformed, string, table};

const SHT_DYNSYM: u32 = 11;

/// No constant that is read here is longer.
const LONGEST_TEXT: u64 = 64;

/// How the file takes part in calls of `sqlite3_open*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenSymbols {
    /// It offers them to other objects.
    pub defined: bool,
    /// It calls another object's.
    pub undefined: bool,
}

struct Symbol<'a> {
    name: &'a [u8],
    /// Another object's.
    undefined: bool,
    /// Where it is loaded.
    address: u64,
    size: u64,
}

impl Elf {
    /// How it defines or uses `sqlite3_open`, `sqlite3_open_v2` and `sqlite3_open16`.
    pub fn open_symbols(&self, file: &File) -> io::Result<OpenSymbols> {
        let mut found = OpenSymbols::default();
        self.each_symbol(file, |symbol| {
            let Some(rest) = symbol.name.strip_prefix(b"sqlite3_open") else { return };
            if [&b""[..], b"_v2", b"16"].contains(&rest) {
                found.defined |= !symbol.undefined;
                found.undefined |= symbol.undefined;
            }
        })?;
        Ok(found)
    }

    /// It calls another object's function of one of these names.
    pub fn calls(&self, file: &File, names: &[&str]) -> io::Result<bool> {
        let mut found = false;
        self.each_symbol(file, |symbol| {
            found |= symbol.undefined && names.iter().any(|n| n.as_bytes() == symbol.name);
        })?;
        Ok(found)
    }

    /// It offers this name to other objects.
    pub fn defines(&self, file: &File, name: &str) -> io::Result<bool> {
        Ok(self.place_of(file, name)?.is_some())
    }

    /// The string constant that it offers under this name.
    pub fn text(&self, file: &File, name: &str) -> io::Result<Option<String>> {
        let Some((address, size)) = self.place_of(file, name)? else { return Ok(None) };
        let bytes = table(file, self.offset_of(address)?, size.min(LONGEST_TEXT))?;
        string(&bytes, 0).map(Some)
    }

    fn place_of(&self, file: &File, name: &str) -> io::Result<Option<(u64, u64)>> {
        let mut found = None;
        self.each_symbol(file, |symbol| {
            if !symbol.undefined && symbol.name == name.as_bytes() {
                found = Some((symbol.address, symbol.size));
            }
        })?;
        Ok(found)
    }

    fn each_symbol(&self, file: &File, mut seen: impl FnMut(Symbol)) -> io::Result<()> {
        let Some(symbols) = self.sections.iter().find(|s| s.kind == SHT_DYNSYM) else { return Ok(()) };
        let names = self.sections.get(symbols.link as usize).ok_or_else(malformed)?;
        let names = table(file, names.offset, names.size)?;
        // Elf64_Sym: name, info, other, shndx, value, size. Elf32_Sym: name, value, size, info, other, shndx.
        let m = self.machine;
        let (entry, section_at, value_at) = if m.wide { (24, 6, 8) } else { (16, 14, 4) };
        for symbol in table(file, symbols.offset, symbols.size)?.chunks_exact(entry) {
            let name = m.number_at(symbol, 0, 4)? as usize;
            if let Some(name) = names.get(name..).and_then(|n| n.split(|b| *b == 0).next()) {
                seen(Symbol {
                    name,
                    undefined: m.number_at(symbol, section_at, 2)? == 0,
                    address: m.number_at(symbol, value_at, m.word())?,
                    size: m.number_at(symbol, value_at + m.word(), m.word())?,
                });
            }
        }
        Ok(())
    }
}
