//! Which build an extension is, told without loading it: a section of its file.

use crate::segment::layout::LAYOUT_VERSION;
use crate::wire::message::PROTOCOL_VERSION;

/// The section's name.
pub const SECTION: &str = ".turnstile";
const MAGIC: [u8; 16] = *b"turnstile build\n";

/// What the section holds; its beginning never changes.
#[repr(C)]
pub struct Build {
    magic: [u8; 16],
    protocol: u32,
    layout: u32,
    /// Ends with NUL.
    version: [u8; 40],
}

#[used]
#[unsafe(link_section = ".turnstile")]
pub static BUILD: Build = Build {
    magic: MAGIC,
    protocol: PROTOCOL_VERSION,
    layout: LAYOUT_VERSION,
    version: padded(env!("CARGO_PKG_VERSION").as_bytes()),
};

const fn padded(text: &[u8]) -> [u8; 40] {
    let mut out = [0; 40];
    let mut at = 0;
    while at < text.len() {
        out[at] = text[at];
        at += 1;
    }
    out
}

/// What was read from an extension's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub version: String,
    pub protocol: u32,
    pub layout: u32,
}

impl Identity {
    /// This build's.
    pub fn own() -> Identity {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Identity { version, protocol: PROTOCOL_VERSION, layout: LAYOUT_VERSION }
    }

    /// `None`: the section is not turnstile's.
    pub fn read(section: &[u8]) -> Option<Identity> {
        let rest = section.strip_prefix(&MAGIC)?;
        let word = |at: usize| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let version = rest.get(8..)?.split(|b| *b == 0).next()?;
        let version = String::from_utf8_lossy(version).into_owned();
        Some(Identity { version, protocol: word(0)?, layout: word(4)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_says_what_this_build_is() {
        let mut section = MAGIC.to_vec();
        section.extend(BUILD.protocol.to_ne_bytes());
        section.extend(BUILD.layout.to_ne_bytes());
        section.extend(BUILD.version);
        assert_eq!(Identity::read(&section), Some(Identity::own()));
        assert_eq!(Identity::read(&section[..20]), None);
        assert_eq!(Identity::read(b"something else that is longer than it"), None);
    }
}
