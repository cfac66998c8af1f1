//! The libc lane: a SQLite that is linked in and hidden can be given no VFS, but what its unix VFS asks of the C library
//! can be answered (`c/files.c`, under `turnstile run`).
//!
//! One seat a process and database (and copy of SQLite), as the unix VFS itself shares one set of POSIX locks among its
//! connections: the lock bytes of the file and of `-shm` become requests of that seat, and `-shm` the segment's
//! wal-index. The statement is not seen from here, so no turn is taken ahead: who has met a busy database or a stale
//! snapshot waits for its turn in the sleep of SQLite's busy handler. Commits are synced by SQLite itself.
//!
//! * [`table`]: which descriptors these are. [`join`]: how a database is recognised. [`database`]: its seat.
//! * [`locks`]: `fcntl` on the database. [`shm`]: the `-shm` file. [`wal`]: what others' durable commits need.
//! * [`turn`]: waiting. [`abi`]: what C calls.

pub mod abi;
mod companions;
mod database;
mod join;
mod locks;
mod shm;
mod table;
mod turn;
mod wal;
