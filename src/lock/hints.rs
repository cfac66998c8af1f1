//! Which seats are worth a look when somebody asks for an exclusive lock: two bits a seat.
//!
//! Idle (00), lowering (01), raised (11). A seat that takes a shared lock stores its own word first and then finds
//! its hint raised, or raises it. Whoever looks, looks at every seat that is not idle. A hint is lowered in two
//! steps, raised to lowering and, if the seat's word is still empty then, lowering to idle by a compare-and-swap of
//! the whole word: a seat that stored before the first step is seen by the look between them, and one that stored
//! after it does not find its hint raised and changes the word. With one bit and one step there was a moment in
//! which a holder's hint was down, and a third seat looked just then. With two who lower at once the word could
//! come back to what the first had seen: so there is one at a time ([`FileWords::lowering`]).
//!
//! [`FileWords::lowering`]: crate::segment::layout::FileWords::lowering

use super::SeatId;
use super::tries::tries;
use crate::planted::planted;
use crate::segment::atomic::{AtomicU64, SeqCst};

#[derive(Clone, Copy, Debug)]
pub struct Hints<'a>(pub &'a [AtomicU64]);

const SEATS_A_WORD: u32 = 32;

impl<'a> Hints<'a> {
    fn at(self, seat: SeatId) -> Option<(&'a AtomicU64, u32)> {
        let n = seat.checked_sub(1)?;
        Some((self.0.get((n / SEATS_A_WORD) as usize)?, 2 * (n % SEATS_A_WORD)))
    }

    /// The seat has stored a hold. Mostly raised already: then nothing is written.
    pub fn raise(self, seat: SeatId) {
        let Some((word, shift)) = self.at(seat) else { return };
        if word.load(SeqCst) >> shift & 0b11 != 0b11 {
            word.fetch_or(0b11 << shift, SeqCst);
        }
    }

    /// Lowers the hint of a seat whose word was seen empty, unless it turns out not to be. One caller at a time.
    pub fn lower(self, seat: SeatId, empty: impl Fn() -> bool) {
        let Some((word, shift)) = self.at(seat) else { return };
        if planted("hint-lowered-in-one-step") {
            word.fetch_and(!(0b11 << shift), SeqCst);
            if !empty() {
                word.fetch_or(0b11 << shift, SeqCst);
            }
            return;
        }
        word.fetch_and(!(0b10 << shift), SeqCst);
        for _ in tries() {
            let seen = word.load(SeqCst);
            if seen >> shift & 0b11 != 0b01 {
                return; // raised meanwhile
            }
            if !empty() {
                break;
            }
            if word.compare_exchange(seen, seen & !(0b11 << shift), SeqCst, SeqCst).is_ok() {
                return;
            }
        }
        word.fetch_or(0b11 << shift, SeqCst);
    }

    /// Seats that may hold something.
    pub fn iter(self) -> impl Iterator<Item = SeatId> + 'a {
        self.0.iter().enumerate().flat_map(|(i, word)| {
            let pairs = word.load(SeqCst);
            let mut bits = (pairs | pairs >> 1) & 0x5555_5555_5555_5555;
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros();
                bits &= bits.wrapping_sub(1);
                (bit < 64).then(|| i as SeatId * SEATS_A_WORD + bit / 2 + 1)
            })
        })
    }
}
