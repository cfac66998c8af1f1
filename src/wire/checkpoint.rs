//! Between the broker and its checkpointer, a child process of its own program: the same packets as a session's.

use serde::{Deserialize, Serialize};

/// A database's number at this broker.
pub type Database = u32;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToCheckpointer {
    /// A database, with control, wal-index and the database itself as descriptors.
    Database { database: Database, nonce: u64 },
    /// The database's WAL as a member has opened it, with its descriptor.
    Wal { database: Database },
    /// A checkpoint, please. Answered by [`FromCheckpointer::Done`].
    Checkpoint { database: Database },
    /// The database is nobody's any more: its descriptors are closed. Answered by [`FromCheckpointer::Forgotten`].
    Forget { database: Database },
}

/// How a checkpoint ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Frames of the WAL, and how many of them are in the database now.
    Copied { frames: u32, backfilled: u32 },
    /// Nothing to do, or somebody else was in the way: asked again when the WAL has grown.
    Nothing,
    /// This database cannot be checkpointed here, and why: its members must.
    Unable(String),
    /// A file could not be synced: what was written may be lost, and nobody else will be told.
    SyncFailed(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromCheckpointer {
    Done {
        database: Database,
        outcome: Outcome,
    },
    /// It has no descriptor of the database any more.
    Forgotten {
        database: Database,
    },
    /// A seat that the broker waits for (socket lane) may go on.
    Kick,
}
