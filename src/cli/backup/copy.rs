//! The snapshot's pages into the copy: the file as it is, in large pieces, and over that the newest frame of each page that
//! the snapshot has in the WAL.
//!
//! Why that is the snapshot, though others checkpoint meanwhile: a checkpoint writes no page into the file but from a frame
//! at or before the oldest read mark, and ours is not newer than the snapshot. So a page that is written while the file
//! is read here (it may be read torn) has a frame that the snapshot has, and the newest of those is written over it. Every
//! other page is not written. And while the snapshot needs the WAL, its read mark keeps everybody from beginning it anew;
//! if it does not, all of it is in the file, and the same lock keeps checkpoints from writing (`WAL_READ_LOCK(0)` in wal.c), or
//! its mark keeps them from writing anything newer.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use memmap2::MmapMut;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::pwrite;
use turnstile::planted::planted;

use super::Failure;
use super::pace::Pace;
use super::progress::Progress;
use super::source::Snapshot;
use super::target::Target;

/// What is read and written at once. A multiple of every page size.
const PIECE: usize = 1 << 20;

/// What a direct write's place and length are multiples of, on any disk.
const BLOCK: usize = 4096;

/// SQLite never uses the page that holds this byte.
const LOCK_BYTE: u64 = 0x4000_0000;

pub fn copy(
    snapshot: &Snapshot,
    target: &Target,
    pace: Option<Pace>,
    progress: &Progress,
    go_on: &dyn Fn() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut buffer = MmapMut::map_anon(PIECE).map_err(Failure::doing("no memory"))?;
    let mut out = Output::new(target);
    let (pages, page_size) = (snapshot.pages(), u64::from(snapshot.page_size()));
    let end = u64::from(pages) * page_size;
    let mut paced = pace.map(|pace| pace.beside(snapshot));
    // The first byte that the file does not have.
    let mut missing = end;
    let mut at = 0;
    while at < end {
        go_on()?;
        let length = PIECE.min((end - at) as usize);
        if !snapshot.read(&mut buffer[..length], at)? {
            missing = missing.min(at);
        }
        out.write(&mut buffer, length, at)?;
        at += length as u64;
        progress.at(at);
        if let Some(pace) = &mut paced {
            pace.rest(go_on)?;
        }
    }
    out.buffered()?;
    let newest = newest_frames(snapshot, go_on)?;
    if missing < end {
        has_all(&newest, missing / page_size + 1, u64::from(pages), LOCK_BYTE / page_size + 1, snapshot)?;
    }
    let mut in_order: Vec<_> = newest.into_iter().collect();
    in_order.sort_unstable();
    for (nth, (page, frame)) in in_order.into_iter().enumerate() {
        go_on()?;
        if let (0, Some(pace)) = ((nth + 1) % (PIECE / page_size as usize), &mut paced) {
            pace.rest(go_on)?;
        }
        let (Some(frames), Some(bytes)) = (snapshot.frames(), buffer.get_mut(..page_size as usize)) else {
            break;
        };
        frames.read(frame, bytes)?;
        if !planted("backup-without-wal") {
            out.write(&mut buffer, page_size as usize, u64::from(page - 1) * page_size)?;
        }
    }
    snapshot.frames().map_or(Ok(()), |frames| frames.stand())?;
    if planted("backup-page-lost") {
        buffer.fill(0);
        out.write(&mut buffer, page_size as usize, u64::from(pages / 2) * page_size)?;
    }
    Ok(())
}

/// Of each page of the snapshot that is in the WAL, the newest frame.
fn newest_frames(
    snapshot: &Snapshot,
    go_on: &dyn Fn() -> Result<(), Failure>,
) -> Result<HashMap<u32, u32>, Failure> {
    let mut newest = HashMap::new();
    let Some(frames) = snapshot.frames() else { return Ok(newest) };
    for frame in 1..=frames.count() {
        if frame % 4096 == 0 {
            go_on()?;
        }
        let page = frames.page_of(frame)?;
        // The database may have been longer once.
        if (1..=snapshot.pages()).contains(&page) {
            newest.insert(page, frame);
        }
    }
    Ok(newest)
}

/// Pages that the file does not have are in the WAL.
fn has_all(
    newest: &HashMap<u32, u32>,
    first: u64,
    last: u64,
    lock_page: u64,
    snapshot: &Snapshot,
) -> Result<(), Failure> {
    let page_size = u64::from(snapshot.page_size());
    for page in (first..=last).filter(|page| *page != lock_page && !newest.contains_key(&(*page as u32))) {
        let there = snapshot.read(&mut vec![0; page_size as usize], (page - 1) * page_size)?;
        if !there {
            return Err(Failure::Failed(format!(
                "the database is damaged: it has {last} pages, and page {page} is neither in the file nor in its WAL"
            )));
        }
    }
    Ok(())
}

/// The copy's descriptor. Written past the page cache where that can be done: it takes a third of the processor's time, and
/// leaves the others' pages in memory.
struct Output<'a> {
    fd: BorrowedFd<'a>,
    direct: bool,
}

impl<'a> Output<'a> {
    fn new(target: &'a Target) -> Output<'a> {
        let fd = target.descriptor();
        let direct = fcntl(fd, FcntlArg::F_SETFL(OFlag::O_DIRECT)).is_ok();
        Output { fd, direct }
    }

    /// Writes the first `length` bytes. (To the end of a block, if directly: who cuts the file knows its length.)
    fn write(&mut self, buffer: &mut MmapMut, length: usize, at: u64) -> Result<(), Failure> {
        let mut done = 0;
        while done < length {
            let end = if self.direct { length.next_multiple_of(BLOCK) } else { length };
            match pwrite(self.fd, &buffer[done..end], (at + done as u64) as i64) {
                Ok(0) => return Err(Failure::Failed("the copy cannot be written: nothing is taken".into())),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL) if self.direct => self.buffered()?,
                Err(e) => return Err(Target::unwritten(e)),
            }
        }
        Ok(())
    }

    fn buffered(&mut self) -> Result<(), Failure> {
        if self.direct {
            fcntl(self.fd, FcntlArg::F_SETFL(OFlag::empty())).map_err(Failure::doing("fcntl"))?;
            self.direct = false;
        }
        Ok(())
    }
}
