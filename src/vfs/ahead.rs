//! Whether a transaction that begins takes its turn before its snapshot, and what is learned from how it goes on.

use super::main_file::MainFile;
use super::statement::{self, Statement};
use super::waiting::Rerun;
use crate::client::config::Begin;
use crate::client::member::Member;
use crate::lock::learned::{Learned, Lesson};
use crate::planted::planted;
use crate::segment::layout::{FOR_GUESS, FOR_TRANSACTION};
use crate::wire::message::Role;

/// A transaction, as it began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Begun {
    /// A hash of the text of its first statement; 0: it does not matter.
    text: u64,
    /// That statement writes.
    writes: bool,
    /// See [`Statement::silent`](statement::Statement::silent).
    silent: bool,
    /// The turn was taken ahead.
    ahead: bool,
    /// For the transaction, because others that began like it wrote.
    guessed: bool,
    /// A write lock was asked for.
    wrote: bool,
}

impl MainFile {
    /// A transaction begins: whether it takes its turn before its snapshot.
    pub fn takes_turn_ahead(&mut self) -> bool {
        if !self.writable || self.seat().is_none_or(|m| m.role() != Role::ReadWrite) {
            return false;
        }
        let noted = self.note().and_then(|note| note.statement());
        let statement = noted.unwrap_or_else(|| statement::walk(&self.library.api, self.db()));
        let text = match statement.text {
            0 => 0,
            // The same text may mean this file by `main` here and by another name elsewhere.
            text => text.wrapping_add(u64::from(self.is_main())) | 1 << 63,
        };
        let Statement { writes, silent, .. } = statement;
        let mut begun = Begun { text, writes, silent, ..Begun::default() };
        let mut turn_for = 0;
        if statement.writes {
            begun.ahead = !self.knows(text, Lesson::WritesElsewhere);
        } else if self.config.begin != Begin::Deferred
            && statement::in_transaction(&self.library.api, self.db())
        {
            begun.guessed = self.config.begin == Begin::Learn && self.knows(text, Lesson::WritesLater);
            begun.ahead = begun.guessed || self.config.begin == Begin::Immediate;
            turn_for = if self.config.begin == Begin::Immediate { FOR_TRANSACTION } else { FOR_GUESS };
        }
        begun.ahead |= self.second_chance;
        begun.ahead &= !self.waited_out() && !planted("no-turn-ahead");
        self.begun = begun;
        if begun.ahead {
            if let Some(member) = self.seat() {
                member.turn_is_for(turn_for);
            }
            match noted {
                // A statement that is prepared anew is not traced again.
                Some(_) => self.rerun = Rerun::default(),
                None => self.note_rerun(),
            }
        }
        begun.ahead
    }

    /// Nothing of what the transaction reads gets out yet.
    pub fn keeps_to_itself(&mut self) -> bool {
        let file = std::ptr::from_mut(self);
        self.begun.silent && self.own_note().is_some_and(|note| !note.settles_elsewhere(file))
    }

    /// The transaction asks for the write lock.
    pub fn transaction_writes(&mut self) {
        let begun = self.begun;
        self.begun.wrote = true;
        let in_time = begun.ahead && self.gated().is_some_and(Member::has_turn);
        if in_time && !begun.guessed {
            return;
        }
        // It began by reading and writes now; or its statement does write this file.
        if begun.writes {
            self.learned(|l| l.refute(begun.text, Lesson::WritesElsewhere), begun);
        } else if self.config.begin == Begin::Learn && !planted("upgrades-not-learned") {
            self.learned(|l| l.learn(begun.text, Lesson::WritesLater), begun);
        }
    }

    /// The transaction is over; to be called while its turn is still its own, if it has it.
    pub fn transaction_ends(&mut self) {
        let begun = std::mem::take(&mut self.begun);
        if !begun.ahead || begun.wrote {
            return;
        }
        if begun.guessed {
            self.learned(|l| l.doubt(begun.text, Lesson::WritesLater), begun);
        } else if begun.writes
            && !planted("elsewhere-not-learned")
            && self.gated().is_some_and(Member::has_no_turn)
        {
            // Its turn was taken back, or left for another file, before it was used.
            self.learned(|l| l.learn(begun.text, Lesson::WritesElsewhere), begun);
        }
    }

    fn lessons(&self) -> Option<Learned<'_>> {
        self.gated()?.shared()?.learned()
    }

    fn knows(&self, text: u64, lesson: Lesson) -> bool {
        text != 0 && self.lessons().is_some_and(|l| l.knows(text, lesson))
    }

    fn learned(&self, body: impl FnOnce(Learned), begun: Begun) {
        if let Some(learned) = self.lessons().filter(|_| begun.text != 0) {
            body(learned);
        }
    }
}
