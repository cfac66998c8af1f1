//! The SQLite side: the only place that speaks SQLite's C ABI.
//!
//! * [`entry`]: the extension's entry points. [`api`]: SQLite's routines, one set a library. [`adopt`]:
//!   connections that are already open. [`anew`]: those that a forked child has inherited.
//! * [`open`]: `xOpen`, `xDelete`; [`companions`]: of files beside a database. [`join`]: from an open file to a seat.
//!   [`wrapped`]: our methods over a file's.
//! * [`methods`]: the C callbacks. [`locks`], [`shm`], [`control`]: what they mean. [`last_close`]: the one that copies the WAL back. [`main_file`]: one
//!   connection's state. [`statement`]: what the connection is doing. [`hook`]: its WAL hook. [`timeouts`]: what it was told. [`waiting`]:
//!   how long its statement waits.

mod adopt;
mod ahead;
mod anew;
mod api;
mod autocheckpoint;
pub mod build;
mod companions;
mod control;
mod durable;
pub mod entry;
mod guest;
mod hook;
mod join;
mod last_close;
mod locks;
mod main_file;
mod methods;
mod note;
mod open;
mod repair;
mod shm;
mod statement;
mod timeouts;
mod waiting;
mod wal;
mod wal_file;
mod wrapped;
