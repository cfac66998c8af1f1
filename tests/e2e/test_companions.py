"""The files beside a database, -wal, -shm and -journal: whose they are, and that whoever may write the database may write
them, whoever has made them (src/client/companions.rs)."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess

import clients
import harness
from harness import (PYTHON, Broker, PlainShell, connect, create, fails_without, lib, plain, plain_env, run,
                     status_of, timeout)
from test_belief import LIBC, LOOP, VFS, Member
from test_doctor import examine, expect
from test_foreign import root_only
from test_libc_lane import env_of, need, wrapped

OWNER, READER, MATE, GROUP = 54320, 54321, 54322, 54323
LANES = ("vfs", "libc")
MAY_WRITE = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
os.open(sys.argv[2], os.O_RDWR)
"""
UNLOADED = """
import sqlite3
def opened(path):
    return sqlite3.connect(path, timeout=0, isolation_level=None, uri=True)
code = lambda e: e.sqlite_errorcode
"""


class User(Member):
    """A process of another user with one connection: by the extension, linked in, or plain SQLite."""

    def __init__(self, broker, lane, path, uid, groups=()):
        become = f"import os; os.setgroups({list(groups)!r}); os.setgid({uid}); os.setuid({uid})\n"
        if lane == "libc":
            need("apsw")
            words, env = wrapped(clients.VENV, "-c", become + LIBC + LOOP), env_of(broker)
        else:
            opens = f"EXTENSION = {lib()!r}" + VFS if lane == "vfs" else UNLOADED
            words, env = [PYTHON, "-c", become + opens + LOOP], broker.env if lane == "vfs" else plain_env()
        self.process = subprocess.Popen(words, env={**env, "HOME": "/"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._write(path)
        said = self.answer()
        assert said == {"rows": []}, said

    def close(self):
        """It ends, and closes its connection before."""
        self.process.stdin.close()
        self.process.wait(20)

    def kill(self):
        self.process.kill()
        self.process.wait(20)

    def __exit__(self, *_):
        self.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def everybodys(journal="wal", mode=0o644, gid=OWNER):
    """A broker for everybody, and a database of OWNER's in a directory in which everybody may make files."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        directory = broker.path("data")
        os.mkdir(directory)
        os.chmod(directory, 0o777)
        path = create(os.path.join(directory, "app.db"), journal)
        os.chown(path, OWNER, gid)
        os.chmod(path, mode)
        yield broker, path


def beside(path):
    directory, name = os.path.split(path)
    return {n[len(name):]: os.stat(os.path.join(directory, n)) for n in os.listdir(directory) if n != name}


# --- who comes first ------------------------------------------------------------------------------------------------

def first_comes_the_reader(lane, order):
    with everybodys() as (broker, path):
        with contextlib.ExitStack() as stack:
            if order == "after the owner":
                # Which has not read yet: the reader is the first to open the WAL.
                owner = stack.enter_context(User(broker, "vfs", path, OWNER))
            with User(broker, lane, path, READER) as reader:
                assert reader.run("SELECT count(*) FROM rows") == [[0]]
                assert beside(path)["-wal"].st_uid == READER, "the reader was not the first to open the WAL"
                assert "rows" not in reader.ask("INSERT INTO rows VALUES('r', 0)")
                {"closes": reader.close, "is killed": reader.kill}.get(order, lambda: None)()
                if order != "after the owner":
                    owner = stack.enter_context(User(broker, lane, path, OWNER))
                owner.run("INSERT INTO rows VALUES('o', 1)")
                if reader.process.returncode is None:
                    assert reader.run("SELECT count(*) FROM rows") == [[1]], order
                    # Once more: SQLite gives an empty file of the user's own another mode when it opens it.
                    with User(broker, lane, path, READER) as again:
                        assert again.run("SELECT count(*) FROM rows") == [[1]]
                        owner.run("INSERT INTO rows VALUES('o', 2)")
            owner.run("INSERT INTO rows VALUES('o', 3)")
        # Nothing of it stands in a plain program's way either.
        with User(broker, "plain", path, OWNER) as owner:
            owner.run("INSERT INTO rows VALUES('o', 4)")


def of_lanes(first, *arguments):
    for lane in LANES:
        first(lane, *arguments)


@fails_without("companions-of-the-first", message="readonly")
@timeout(90)
def test_a_reader_that_comes_first_and_stays_does_not_keep_the_owner_from_writing():
    first_comes_the_reader("vfs", "stays")


@fails_without("companions-of-the-first", message="readonly")
@timeout(90)
def test_a_reader_that_came_first_and_has_left_does_not_keep_the_owner_from_writing():
    first_comes_the_reader("vfs", "closes")
    first_comes_the_reader("vfs", "is killed")


@fails_without("companions-of-the-first", message="readonly")
@timeout(90)
def test_a_reader_that_opens_the_wal_first_does_not_keep_the_owner_from_writing():
    first_comes_the_reader("vfs", "after the owner")


@fails_without("companions-of-the-first", message="readonly|ReadOnly")
@timeout(90)
def test_a_reader_with_sqlite_linked_in_that_comes_first_does_not_keep_the_owner_from_writing():
    for order in "stays", "closes", "is killed":
        first_comes_the_reader("libc", order)


@fails_without("companions-of-the-first", message="readonly")
@timeout(90)
def test_a_member_of_the_databases_group_leaves_a_wal_that_the_owner_can_write():
    """A user whose own group is another one, as almost everybody's is."""
    for uid, groups in (OWNER, []), (READER, [GROUP]):
        with everybodys(mode=0o664, gid=GROUP) as (broker, path):
            with User(broker, "vfs", path, MATE, groups=[GROUP]) as mate:
                mate.run("INSERT INTO rows VALUES('m', 1)")
                mate.kill()
            assert beside(path)["-wal"].st_uid == MATE
            with User(broker, "plain", path, uid, groups) as other:
                other.run("INSERT INTO rows VALUES('o', 1)")
    with everybodys(mode=0o664, gid=GROUP) as (broker, path):
        with User(broker, "vfs", path, MATE, groups=[GROUP]) as mate:
            mate.run("INSERT INTO rows VALUES('m', 1)")
            mate.kill()
        for name in path, path + "-wal":
            assert not run([PYTHON, "-c", MAY_WRITE, str(READER), name], check=False).returncode == 0, name


@fails_without("companions-of-the-first", message="unable to open|readonly")
@timeout(90)
def test_the_owner_rolls_back_the_journal_of_a_member_of_the_databases_group():
    for lane in LANES:
        with everybodys("delete", mode=0o664, gid=GROUP) as (broker, path):
            with User(broker, lane, path, MATE, groups=[GROUP]) as mate:
                mate.run("PRAGMA cache_size=5", "BEGIN",
                         "WITH c(n) AS (VALUES(1) UNION ALL SELECT n+1 FROM c WHERE n<5000) "
                         "INSERT INTO rows SELECT 'm', n FROM c")
                assert beside(path)["-journal"].st_size > 512, "nothing has been written back yet"
                mate.kill()
            with User(broker, "plain", path, OWNER) as owner:
                assert owner.run("SELECT count(*) FROM rows") == [[0]]


def test_files_of_one_user_are_made_by_sqlite_alone():
    """No access control list, and no byte in a WAL that nobody has written."""
    with everybodys() as (broker, path):
        os.chown(os.path.dirname(path), OWNER, OWNER)
        with User(broker, "vfs", path, OWNER) as owner:
            owner.run("SELECT * FROM rows")
            assert beside(path)["-wal"].st_size == 0
            assert "system.posix_acl_access" not in os.listxattr(path + "-wal")


@fails_without("foreign-companions-unnamed")
@timeout(90)
def test_the_doctor_names_files_that_the_owner_cannot_write_and_what_mends_it():
    """As plain SQLite's reader leaves them."""
    with everybodys() as (broker, path):
        with User(broker, "plain", path, READER) as reader:
            reader.run("SELECT * FROM rows")
        with User(broker, "vfs", path, OWNER) as owner:
            assert "readonly" in owner.ask("INSERT INTO rows VALUES('o', 1)")["text"]
        status, _, report = examine(path, broker=broker)
        named = [f for f in report["findings"] if f["code"] == "companion-foreign"]
        assert status == 1 and len(named) == 2, report
        for finding, suffix in zip(named, ("-wal", "-shm")):
            assert path + suffix in finding["what"] and str(READER) in finding["what"], finding
            command = finding["advice"].split("(")[0].removeprefix("as root: ")
            run(shlex.split(command))
        _, found, _ = examine(path, broker=broker)
        assert "companion-foreign" not in found, found
        with User(broker, "vfs", path, OWNER) as owner:
            owner.run("INSERT INTO rows VALUES('o', 1)")


# --- a database that is deleted or replaced while it is open ----------------------------------------------------------

def left_behind(path):
    """A plain program is killed, and leaves its -shm."""
    with PlainShell(path) as shell:
        shell.run("INSERT INTO rows VALUES('p', 1)")
        shell.kill()
        shell.process.wait(20)
    assert os.path.exists(path + "-shm")


def delete(path):
    os.unlink(path)


def rename_over(path):
    os.rename(create(path + ".new"), path)


def delete_all(path):
    for name in (path, path + "-wal", path + "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def in_place_of(change, served):
    with Broker() as broker:
        path = create(broker.path("app.db"))
        left_behind(path)
        old = connect(path, broker=broker, mode="gated")
        old.execute("INSERT INTO rows VALUES('old', 1)")
        change(path)
        # The old one's WAL has lost its name, or is removed with an empty file: as in plain SQLite.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + "-wal")
        served(broker, path)
        old.execute("INSERT INTO rows VALUES('old', 2)")
        assert old.execute("SELECT worker FROM rows").fetchall() == [("p",), ("old",), ("old",)]
        # The old one's end takes nothing from the new one.
        new = connect(path, mode="gated")
        new.execute("INSERT INTO rows VALUES('new', 2)")
        before = os.stat(path + "-wal").st_ino
        old.close()
        assert os.stat(path + "-wal").st_ino == before
        new.execute("INSERT INTO rows VALUES('new', 3)")
        assert new.execute("SELECT count(*) FROM rows").fetchone() == (3,)
        new.close()
        assert "another broker" not in broker.log(), broker.log()
        assert plain(path, "SELECT count(*) FROM rows; PRAGMA integrity_check", retry=5) == [["3"], ["ok"]]


def by_plain(broker, path):
    plain(path, "PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS rows(worker TEXT, seq INTEGER); "
                "INSERT INTO rows VALUES('new', 1)")


def by_a_member(broker, path):
    new = connect(path)
    assert status_of(new)["mode"] == "gated", status_of(new)
    new.execute("PRAGMA journal_mode=wal")
    new.execute("CREATE TABLE IF NOT EXISTS rows(worker TEXT, seq INTEGER)")
    new.execute("INSERT INTO rows VALUES('new', 1)")
    new.close()


@fails_without("shm-keeps-its-name", message="locking protocol|locked")
def test_a_plain_client_opens_a_database_whose_name_was_another_ones_that_is_still_open():
    for change in delete, rename_over, delete_all:
        in_place_of(change, by_plain)


@fails_without("shm-keeps-its-name,shm-of-the-deleted", message="locked")
def test_a_member_opens_a_database_whose_name_was_another_ones_that_is_still_open():
    for change in delete, rename_over, delete_all:
        in_place_of(change, by_a_member)


@fails_without("shm-of-the-deleted", message="locked")
def test_a_shm_that_the_deleted_databases_gate_holds_keeps_no_member_out():
    """It has its name yet: whoever joined first was not allowed to remove it, say."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        left_behind(path)
        os.link(path + "-shm", path + ".kept")
        old = connect(path, broker=broker, mode="gated")
        old.execute("INSERT INTO rows VALUES('old', 1)")
        delete_all(path)
        os.link(path + ".kept", path + "-shm")
        by_a_member(broker, path)
        assert not os.path.exists(path + "-shm")
        old.execute("INSERT INTO rows VALUES('old', 2)")
        old.close()


def test_a_shm_or_a_wal_that_is_removed_under_a_member_does_no_harm():
    """Nobody reads a wrong row; who has it open goes on, and nothing acknowledged is lost."""
    for suffix in "-shm", "-wal":
        with Broker() as broker:
            path = create(broker.path("app.db"))
            left_behind(path)
            member = connect(path, broker=broker, mode="gated")
            for n in range(50):
                member.execute("INSERT INTO rows VALUES('m', ?)", (n,))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
            with contextlib.suppress(sqlite3.OperationalError):
                second = connect(path)
                assert second.execute("SELECT count(*) FROM rows").fetchone() == (51,)
                second.execute("INSERT INTO rows VALUES('s', 1)")
                second.execute("DELETE FROM rows WHERE worker='s'")
            with contextlib.suppress(NameError):
                second.close()
            member.execute("INSERT INTO rows VALUES('m', 50)")
            assert member.execute("SELECT count(*) FROM rows").fetchone() == (52,)
            member.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            member.close()
            assert plain(path, "SELECT count(*) FROM rows; PRAGMA integrity_check", retry=5) == [["52"], ["ok"]]


@fails_without("companions-by-name", message="another database's")
def test_a_member_does_not_open_the_wal_of_the_database_that_has_its_name_now():
    with Broker() as broker:
        path = create(broker.path("app.db"))
        first = connect(path, broker=broker, mode="gated")
        for n in range(20):
            first.execute("INSERT INTO rows VALUES('old', ?)", (n,))
        late = connect(path, mode="gated")
        delete_all(path)
        new = connect(path, mode="gated")
        new.execute("PRAGMA journal_mode=wal")
        new.execute("CREATE TABLE rows(worker TEXT, seq INTEGER)")
        for n in range(500):
            new.execute("INSERT INTO rows VALUES('new', ?)", (n,))
        for sql in "SELECT worker FROM rows", "INSERT INTO rows VALUES('late', 1)":
            try:
                rows = late.execute(sql).fetchall()
            except sqlite3.OperationalError as e:
                assert "unable to open" in str(e), e
            else:
                raise AssertionError(f"it works in another database's WAL: {sql}: {rows[:3]}")
        assert first.execute("SELECT count(*) FROM rows").fetchone() == (20,)
        late.close()
        first.close()
        assert new.execute("SELECT worker, count(*) FROM rows GROUP BY 1").fetchall() == [("new", 500)]
        new.close()
        assert plain(path, "SELECT count(*) FROM rows; PRAGMA integrity_check", retry=5) == [["500"], ["ok"]]


def beside_anothers_journal(lane):
    """It sees that nobody writes its own database, and would take the journal for a dead writer's."""
    with Broker() as broker:
        path = create(broker.path("app.db"), "delete")
        with Member(broker, lane, path) as old:
            old.run("INSERT INTO rows VALUES('old', 1)")
            delete(path)
            create(path, "delete")
            with PlainShell(path) as new:
                new.run("PRAGMA cache_size=5; BEGIN; "
                        "WITH c(n) AS (VALUES(1) UNION ALL SELECT n+1 FROM c WHERE n<5000) "
                        "INSERT INTO rows SELECT 'new', n FROM c")
                assert os.path.getsize(path + "-journal") > 512, "nothing has been written back yet"
                said = old.ask("SELECT count(*) FROM rows")
                assert "rows" not in said, f"{lane}: it has used another database's journal: {said}"
                there = os.path.exists(path + "-journal") and os.path.getsize(path + "-journal")
                assert there, f"{lane}: it has removed another database's journal"
                new.kill()
            assert plain(path, "SELECT count(*) FROM rows; PRAGMA integrity_check") == [["0"], ["ok"]]
            assert old.run("SELECT count(*) FROM rows") == [[1]]


@fails_without("companions-by-name", message="another database's journal")
@timeout(90)
def test_a_member_does_not_roll_back_with_the_journal_of_the_database_that_has_its_name_now():
    beside_anothers_journal("vfs")


@fails_without("companions-by-name", message="another database's journal")
@timeout(90)
def test_sqlite_that_is_linked_in_does_not_roll_back_with_another_databases_journal():
    beside_anothers_journal("libc")
