//! The rules that came with the shared words: what the lanes and their sleeping and waking bring with them.

mod checkpoint;
mod death;
mod leaving_wal;
mod offers;
mod streaks;
mod takeover;
mod waking;
