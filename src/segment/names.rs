//! The names of memfds (memfd_create(2)). By them a broker to which nothing has been left finds a segment again, in its
//! members' tables of descriptors. A name never changes, and who made a memfd its owner says.

use serde::{Deserialize, Serialize};
use std::ffi::CString;

pub const LIVENESS: &std::ffi::CStr = c"turnstile-liveness";

/// Where a broker serves: the file beside its socket that it has locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub device: u64,
    pub inode: u64,
}

/// Which of a segment's memfds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Control,
    WalIndex,
}

/// A memfd of the segment with this nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    pub part: Part,
    pub nonce: u64,
    pub place: Place,
}

const PARTS: [(Part, &str); 2] =
    [(Part::Control, "turnstile-control-"), (Part::WalIndex, "turnstile-wal-index-")];

impl Name {
    pub fn to_c(self) -> CString {
        let prefix = PARTS.iter().find(|(part, _)| *part == self.part).map_or("", |(_, prefix)| prefix);
        let Place { device, inode } = self.place;
        CString::new(format!("{prefix}{:016x}-{device:x}.{inode:x}", self.nonce)).unwrap_or_default()
    }

    /// From what a link in `/proc/PID/fd` says.
    pub fn of_link(link: &str) -> Option<Name> {
        let name = of_memfd(link)?;
        let (part, rest) =
            PARTS.iter().find_map(|(part, prefix)| Some((*part, name.strip_prefix(prefix)?)))?;
        let (nonce, place) = rest.split_once('-')?;
        let (device, inode) = place.split_once('.')?;
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        let place = Place { device: number(device)?, inode: number(inode)? };
        Some(Name { part, nonce: number(nonce)?, place })
    }
}

/// A link in `/proc/PID/fd` says that it is a session's liveness memfd.
pub fn is_liveness(link: &str) -> bool {
    of_memfd(link).is_some_and(|name| name.as_bytes() == LIVENESS.to_bytes())
}

fn of_memfd(link: &str) -> Option<&str> {
    link.strip_prefix("/memfd:")?.strip_suffix(" (deleted)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::memfd;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_name_is_read_back_from_the_link() {
        let place = Place { device: 0xfe01, inode: u64::MAX };
        for part in [Part::Control, Part::WalIndex] {
            let name = Name { part, nonce: 7, place };
            let fd = memfd::create(&name.to_c(), 4096).unwrap();
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(Name::of_link(link.to_str().unwrap()), Some(name));
            assert!(!is_liveness(link.to_str().unwrap()));
        }
        for other in ["/memfd:turnstile-control (deleted)", "/tmp/turnstile-control-7-1.2", "socket:[7]"] {
            assert_eq!(Name::of_link(other), None, "{other}");
        }
        assert!(is_liveness("/memfd:turnstile-liveness (deleted)"));
    }
}
