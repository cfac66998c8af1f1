//! How often a compare-and-swap of a shared word is tried again.

use crate::planted::planted;

/// More than honest seats ever need: a try that fails is another's that succeeded, and no seat has so many at once.
const TRIES: usize = 1000;

/// The tries of one change. Who writes to the words what it likes could make each of them fail, and the broker and
/// its checkpointer run these loops too: they would serve nobody else.
pub(super) fn tries() -> impl Iterator<Item = usize> {
    0..if planted("tries-without-end") { usize::MAX } else { TRIES }
}
