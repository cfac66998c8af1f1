//! From an open database file to a seat, or to the reason why not.

use super::api::Library;
use super::main_file::Service;
use crate::client::JoinError;
use crate::client::claim;
use crate::client::config::{BadSetting, Config, Fallback};
use crate::client::member::Member;
use crate::wire::message::{self, Mode};
use libsqlite3_sys as ffi;
use nix::sys::stat::fstat;
use std::ffi::c_int;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// A database that is not opened: SQLite's code and a sentence for people.
#[derive(Debug)]
pub struct Refusal {
    pub code: c_int,
    pub reason: String,
}

impl Refusal {
    pub fn setting(bad: BadSetting) -> Refusal {
        Refusal { code: ffi::SQLITE_CANTOPEN, reason: bad.to_string() }
    }

    pub fn unopened(reason: &str) -> Refusal {
        Refusal { code: ffi::SQLITE_CANTOPEN, reason: reason.into() }
    }
}

impl From<JoinError> for Refusal {
    fn from(e: JoinError) -> Refusal {
        let code = match &e {
            JoinError::Refused {
                why: message::Refusal::OtherBroker | message::Refusal::Stopping, ..
            } => ffi::SQLITE_BUSY,
            _ => ffi::SQLITE_CANTOPEN,
        };
        Refusal { code, reason: e.to_string() }
    }
}

/// Joins the database behind `fd`, which SQLite has open at `path`.
pub fn join(
    library: &'static Library,
    config: &Config,
    fd: BorrowedFd,
    path: &Path,
) -> Result<Service, Refusal> {
    let which = library.api.vfs_register as usize as u64;
    match claim::take_seat(config, which, library.version(), fd, path) {
        Ok(member) => admitted(library, member, fd, path),
        Err(JoinError::NoBroker(reason)) if config.fallback == Fallback::Plain => {
            let reason = format!("no broker, TURNSTILE_FALLBACK=plain: {reason}");
            library.log(ffi::SQLITE_WARNING, &format!("{}: plain SQLite: {reason}", path.display()));
            Ok(Service::Plain(reason))
        }
        Err(e) => Err(e.into()),
    }
}

fn admitted(
    library: &'static Library,
    member: Member,
    fd: BorrowedFd,
    path: &Path,
) -> Result<Service, Refusal> {
    let inherited = fstat(fd).is_ok_and(|st| super::open::inherited_guest((st.st_dev, st.st_ino)));
    if member.mode() == Mode::Guest && inherited {
        member.leave();
        return Err(Refusal::unopened(
            "a connection to it was inherited over a fork and is still open, in guest mode: SQLite would take its \
             parent's locks for its own; close the inherited connection first",
        ));
    }
    if member.mode() == Mode::Guest {
        let text = format!(
            "{}: guest mode, because plain clients hold the file or it was asked for: locks are SQLite's own",
            path.display()
        );
        library.log(ffi::SQLITE_NOTICE, &text);
    }
    Ok(Service::Seat(member))
}
