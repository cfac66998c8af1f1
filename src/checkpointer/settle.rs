//! The end of a database that has lingered: nobody has it open, and all of its WAL is in the file.

use super::work::{Refused, Work};
use nix::unistd::{fdatasync, ftruncate};
use turnstile::lock::table::Table;
use turnstile::lock::{Slots, slot};
use turnstile::planted::planted;
use turnstile::segment::layout::CHECKPOINTER;
use turnstile::wire::checkpoint::Outcome;

impl Work {
    /// Puts the file on the disk, and empties the WAL. Nothing is written to the database: somebody may just be putting a
    /// backup in its place. Under all locks of the wal-index, so that a member that comes waits for the end.
    pub fn settle(&self) -> Outcome {
        let Some(all) = Slots::new(slot::WRITE, slot::COUNT) else { return Outcome::Nothing };
        let table = self.table();
        if !table.try_slots_exclusive(CHECKPOINTER, all.mask().unwrap_or(0)) {
            return Outcome::Nothing;
        }
        let outcome = match table.is_complete(self.words(), self.index()) {
            true if !table.wal_open_elsewhere(CHECKPOINTER) => self.empty_wal(table),
            _ => Outcome::Nothing,
        };
        self.unlock(all, false);
        outcome
    }

    fn empty_wal(&self, table: Table<'_>) -> Outcome {
        match self.verify() {
            Ok(()) => {}
            // Somebody has removed it.
            Err(Refused::Stale) => return Outcome::Settled,
            Err(_) => return Outcome::Nothing,
        }
        if !planted("settled-before-synced")
            && let Err(e) = fdatasync(&self.database)
        {
            return Outcome::SyncFailed(format!("it could not be synced after its last close ({e})"));
        }
        // The index first: whoever finds it so recovers it from what is there.
        table.set_copied(0);
        self.commits().lose_count();
        self.index().forget_header();
        let emptied = self.wal.borrow().as_ref().map(|wal| ftruncate(wal, 0));
        match emptied {
            Some(Ok(())) => Outcome::Settled,
            _ => Outcome::Nothing,
        }
    }
}
