//! Looking for bytes in parts of a file, by reading: the file is somebody else's, and may shrink meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memchr::memmem;

/// Whether one of the parts of the file (offset and size) contains `bytes`.
pub fn found_in(parts: &[(u64, u64)], file: &File, bytes: &[u8]) -> io::Result<bool> {
    let finder = memmem::Finder::new(bytes);
    let mut buffer = vec![0u8; 256 << 10];
    for &(offset, size) in parts {
        let (mut at, end, mut kept) = (offset, offset.saturating_add(size), 0);
        while at < end {
            let room = (buffer.len() - kept).min((end - at) as usize);
            let n = file.read_at(&mut buffer[kept..kept + room], at)?;
            if n == 0 {
                break;
            }
            let filled = kept + n;
            if finder.find(&buffer[..filled]).is_some() {
                return Ok(true);
            }
            // A match may span two reads.
            kept = filled.min(bytes.len() - 1);
            buffer.copy_within(filled - kept..filled, 0);
            at += n as u64;
        }
    }
    Ok(false)
}
