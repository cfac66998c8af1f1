"""A forked child has its parent's connections and must not be able to hurt it."""

import ctypes
import os
import signal
import sqlite3

from harness import Broker, check_rows, connect, create, fails_without, plain, timeout


def in_child(body, limit=30):
    """Runs `body` in a forked child; returns its exit status. The child never returns into the test."""
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        status = 1
        try:
            body()
            status = 0
        except sqlite3.Error:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spilled_transaction(db):
    """A transaction so large that its pages have left the cache: in WAL mode frames are in the WAL and the
    wal-index, in rollback mode the file is changed and the journal is hot."""
    db.execute("PRAGMA cache_size=5")
    db.execute("BEGIN IMMEDIATE")
    db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3000) "
               "INSERT INTO rows SELECT printf('%.300c', 'x'), i FROM n")


def parent_survives(child_does, journal, mode="gated"):
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        plain(db, "INSERT INTO rows VALUES('before', 0)")
        parent = connect(db, broker=broker, mode=mode)
        other = connect(db)
        parent.execute("INSERT INTO rows VALUES('first', 0)")  # walCleanupHash does nothing for an empty WAL
        spilled_transaction(parent)
        in_child(lambda: child_does(parent, db))
        parent.execute("INSERT INTO rows VALUES('after', 1)")
        parent.execute("COMMIT")
        for c in (parent, other):
            assert c.execute("SELECT count(*) FROM rows").fetchone() == (3003,), journal
            assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",), journal
        other.execute("INSERT INTO rows VALUES('other', 1)")
        parent.close()
        other.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["3004"]]
        assert plain(db, "PRAGMA integrity_check") == [["ok"]]


@fails_without("fork-unguarded")
def test_a_child_that_rolls_back_in_wal_mode():
    """SQLite cleans the hash tables of the wal-index without any VFS call: over the parent's transaction."""
    parent_survives(lambda parent, _: parent.execute("ROLLBACK"), "wal")


@fails_without("fork-unguarded")
def test_a_child_that_rolls_back_a_rollback_journal():
    parent_survives(lambda parent, _: parent.execute("ROLLBACK"), "delete")


@fails_without("fork-unguarded")
def test_a_child_that_closes():
    for journal in ("wal", "delete"):
        parent_survives(lambda parent, _: parent.close(), journal)


@fails_without("fork-unguarded")
def test_a_child_that_commits():
    for journal in ("wal", "delete"):
        parent_survives(lambda parent, _: parent.execute("COMMIT"), journal)


@fails_without("guest-maps-shared")
def test_in_guest_mode_a_child_changes_nothing_either():
    """There the wal-index is the `-shm` file, mapped by the unix VFS, which SQLite's own rollback writes to."""
    os.environ["TURNSTILE_MODE"] = "guest"
    for child_does in ("ROLLBACK", "COMMIT", "close"):
        for journal in ("wal", "delete"):
            parent_survives(lambda parent, _: parent.close() if child_does == "close" else parent.execute(child_does),
                            journal, "guest")


@fails_without("childs-super-journal")
def test_a_child_has_nothing_to_do_with_super_journals():
    """Nor does it look for one: a child that rolled back while its parent committed found the name of the parent's in the
    journal, and removed it; and the name of one that it makes is that of the parent's, as their random numbers are."""
    libc = ctypes.CDLL(None)
    with Broker() as broker:
        path, attached = (create(broker.path(name), "delete") for name in ("app.db", "b.db"))
        parent = connect(path, broker=broker, mode="gated")
        parent.execute(f"ATTACH '{attached}' AS b")
        parent.execute("PRAGMA b.cache_size=5")
        spilled_transaction(parent)
        parent.execute("INSERT INTO b.rows SELECT * FROM main.rows")  # EXCLUSIVE on both: the child asks for no lock
        watch = libc.inotify_init1(os.O_NONBLOCK)
        in_create = 0x100
        assert libc.inotify_add_watch(watch, broker.dir.encode(), in_create) >= 0
        in_child(lambda: parent.execute("COMMIT"))
        try:
            seen = os.read(watch, 65536)
        except BlockingIOError:
            seen = b""
        assert b"-mj" not in seen, seen
        parent.execute("COMMIT")
        assert b"-mj" in os.read(watch, 65536)
        parent.close()
        for each in (path, attached):
            assert plain(each, "SELECT count(*) FROM rows", retry=5) == [["3000"]]


def test_a_child_that_just_exits():
    for journal in ("wal", "delete"):
        parent_survives(lambda *_: None, journal)


def test_a_child_opens_its_own_connection_and_writes():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        parent = connect(db, broker=broker)
        parent.execute("INSERT INTO rows VALUES('p', 1)")

        def child():
            mine = sqlite3.connect(db, isolation_level=None, timeout=0)
            assert '"gated"' in mine.execute("PRAGMA turnstile_status").fetchone()[0]
            for i in range(20):
                mine.execute("INSERT INTO rows VALUES('c', ?)", (i,))
            mine.close()
            parent.close()

        assert in_child(child) == 0
        parent.execute("INSERT INTO rows VALUES('p', 2)")
        assert parent.execute("SELECT count(*) FROM rows").fetchone() == (22,)
        parent.close()


def test_a_childs_inherited_connection_says_so():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        parent = connect(db, broker=broker)
        parent.execute("SELECT count(*) FROM rows").fetchone()
        seen = []

        def child():
            seen.append(parent.execute("PRAGMA turnstile_status").fetchone()[0])
            assert "inherited" in seen[0], seen
            parent.execute("INSERT INTO rows VALUES('c', 1)")

        assert in_child(child) == 3  # an error, not a row
        assert parent.execute("SELECT count(*) FROM rows").fetchone() == (0,)
        parent.close()


@timeout(60)
def test_the_parent_dies_and_the_child_lives():
    """The child holds copies of descriptors; its parent's seats are cleared all the same, and the gate opens."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        r, w = os.pipe()
        middle = os.fork()
        if middle == 0:
            parent = connect(db, broker=broker)
            parent.execute("BEGIN IMMEDIATE")
            parent.execute("INSERT INTO rows VALUES('half', 1)")
            if os.fork() == 0:
                os.write(w, f"{os.getpid()}\n".encode())
                signal.alarm(50)
                signal.pause()
            os.read(r, 0)
            signal.pause()
        survivor = int(os.read(r, 20))
        try:
            os.kill(middle, signal.SIGKILL)
            os.waitpid(middle, 0)
            assert plain(db, "SELECT count(*) FROM rows", retry=10) == [["0"]]
        finally:
            os.kill(survivor, signal.SIGKILL)


def test_nested_forks_and_many_children():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        record = broker.record
        parent = connect(db, broker=broker)

        def writes(name, depth):
            from harness import Record
            mine = connect(db, load=False)
            log = Record(record)
            for i in range(5):
                mine.execute("INSERT INTO rows VALUES(?, ?)", (name, i))
                log.add(name, i)
            if depth:
                assert in_child(lambda: writes(name + "x", depth - 1)) == 0
            mine.execute("INSERT INTO rows VALUES(?, 99)", (name,))
            log.add(name, 99)
            mine.close()

        for i in range(4):
            assert in_child(lambda: writes(f"c{i}", 2)) == 0
        check_rows(parent, record)
        parent.close()
