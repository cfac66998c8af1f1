//! Which C library a program runs on, by its dynamic linker. Its names and calls are not the other's: each has a
//! library of turnstile's of its own, and neither linker loads the wrong one without failing.

use super::run::elf::Elf;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Libc {
    Glibc,
    Musl,
}

impl Libc {
    /// musl's own file is called `libc.so` upstream and `libc.musl-*.so.1` in Alpine; glibc's `libc.so.6`.
    pub fn of(elf: &Elf) -> Libc {
        let musl = match &elf.interpreter {
            Some(path) => path.to_string_lossy().contains("ld-musl"),
            None => elf.needed.iter().any(|n| n == "libc.so" || n.starts_with("libc.musl-")),
        };
        if musl { Libc::Musl } else { Libc::Glibc }
    }

    pub fn name(self) -> &'static str {
        match self {
            Libc::Glibc => "glibc",
            Libc::Musl => "musl",
        }
    }

    /// The file name of the extension that is built for it.
    pub fn library(self) -> &'static str {
        match self {
            Libc::Glibc => "libturnstile.so",
            Libc::Musl => "libturnstile-musl.so",
        }
    }

    /// How that is built from a checkout.
    pub fn goal(self) -> &'static str {
        match self {
            Libc::Glibc => "make",
            Libc::Musl => "make musl",
        }
    }
}
