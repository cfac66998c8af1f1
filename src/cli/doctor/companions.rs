//! Files beside the database that its owner cannot write: made by another user, who came first.

use turnstile::client::companions::{Rights, beside};
use turnstile::planted::planted;

use super::findings::Findings;
use super::place::Database;

pub fn look(file: &Database, findings: &mut Findings) {
    let Ok(database) = Rights::at(&file.path) else { return };
    let (uid, gid) = database.owner();
    if !database.may_write(uid, gid) {
        return;
    }
    for suffix in ["-wal", "-shm", "-journal"] {
        let path = beside(&file.path, suffix);
        let Ok(rights) = Rights::at(&path) else { continue };
        if rights.may_write(uid, gid) || planted("foreign-companions-unnamed") {
            continue;
        }
        let (name, (by, _)) = (path.display(), rights.owner());
        findings.problem(
            "companion-foreign",
            format!(
                "{name} is user {by}'s, and the database's owner, user {uid}, cannot write it: the owner gets \
                 \"attempt to write a readonly database\""
            ),
            format!("as root: chown {uid}:{gid} '{name}' (also while it is in use; open connections must be opened again)"),
        );
    }
}
