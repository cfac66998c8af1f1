"""A forked child has its parent's connections and must not be able to hurt it."""

import ctypes
import os
import shutil
import signal
import sqlite3
import traceback

from harness import Broker, Skip, check_rows, connect, create, fails_without, lib, plain, run, status_of, timeout
from test_artifact import Library


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


# --- a connection that only reads ----------------------------------------------------------------------------------

class Steps:
    """Two processes take turns: each `go` lets the other one take its next step, each `wait` is for that."""

    def __init__(self):
        self.pipes = [os.pipe(), os.pipe()]
        self.parent = os.getpid()

    def go(self):
        os.write(self.pipes[os.getpid() == self.parent][1], b"x")

    def wait(self):
        assert os.read(self.pipes[os.getpid() != self.parent][0], 1) == b"x", "the other one has ended"


def reader(path, load=False, broker=None):
    """A connection that only reads: one that loads the extension itself, or is opened when this process has it."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=0)
    if load:
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        db.enable_load_extension(True)
        db.load_extension(lib())
    return db


def count(db):
    return db.execute("SELECT count(*) FROM rows").fetchone()[0]


def beside(child_does, parent_does, steps):
    """`child_does` in a forked child while `parent_does`; both must come to their end."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            for end in (steps.pipes[0][0], steps.pipes[1][1]):
                os.close(end)
            child_does()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    for end in (steps.pipes[0][1], steps.pipes[1][0]):
        os.close(end)
    try:
        parent_does()
    finally:
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == 0, f"the child ended with {ended}"


@fails_without("inherited-reads-nothing")
def test_a_child_reads_through_a_connection_that_only_reads():
    """As on plain SQLite. It has snapshots of its own, which its parent's checkpoints leave in place; several of them; and
    children of its own."""
    for journal in ("wal", "delete"):
        for load in (True, False):
            with Broker() as broker:
                path = create(broker.path("app.db"), journal)
                writer = connect(path, broker=broker, mode="gated")
                writer.execute("INSERT INTO rows VALUES('p', 1)")
                inherited = [reader(path, load, broker) for _ in range(2)]
                assert [count(db) for db in inherited] == [1, 1]
                steps = Steps()

                def child():
                    assert [count(db) for db in inherited] == [1, 1]
                    steps.go()
                    steps.wait()
                    assert [count(db) for db in inherited] == [41, 41]
                    assert status_of(inherited[0])["mode"] == "gated"
                    if journal == "wal":
                        inherited[0].execute("BEGIN")
                        assert count(inherited[0]) == 41
                        steps.go()
                        steps.wait()
                        assert (count(inherited[0]), count(inherited[1])) == (41, 1041)
                        inherited[0].execute("COMMIT")
                    assert in_child(lambda: (count(inherited[1]), inherited[1].close(), count(inherited[0]))) == 0
                    mine = connect(path, load=False)
                    mine.execute("INSERT INTO rows VALUES('c', 1)")
                    assert count(inherited[0]) == count(mine)
                    for db in (*inherited, mine):
                        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                        db.close()

                def parent():
                    steps.wait()
                    for i in range(40):
                        writer.execute("INSERT INTO rows VALUES('p', ?)", (i,))
                    assert [count(db) for db in inherited] == [41, 41]
                    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    steps.go()
                    if journal == "wal":
                        steps.wait()
                        writer.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<1000) "
                                       "INSERT INTO rows SELECT printf('%.300c', 'x'), i FROM n")
                        writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
                        steps.go()

                beside(child, parent, steps)
                rows = {"wal": 1042, "delete": 42}[journal]
                assert [count(db) for db in (writer, *inherited)] == [rows] * 3
                for db in (writer, *inherited):
                    db.close()
                assert plain(path, "SELECT count(*) FROM rows", retry=5) == [[str(rows)]]
                assert plain(path, "PRAGMA integrity_check") == [["ok"]]


@fails_without("inherited-snapshot-read")
def test_a_transaction_that_was_open_at_the_fork_reads_nothing():
    """Its snapshot is the parent's, who may end it and checkpoint. The next one is the child's own."""
    for journal in ("wal", "delete"):
        with Broker() as broker:
            path = create(broker.path("app.db"), journal)
            writer = connect(path, broker=broker, mode="gated")
            writer.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3000) "
                           "INSERT INTO rows SELECT printf('%.300c', 'x'), i FROM n")
            inherited = reader(path)
            inherited.execute("PRAGMA cache_size=5")
            inherited.execute("BEGIN")
            assert inherited.execute("SELECT seq FROM rows").fetchone() == (1,)

            def child():
                try:
                    seen = count(inherited)
                except sqlite3.OperationalError as e:
                    assert "disk I/O error" in str(e), e
                else:
                    raise AssertionError(f"{seen} rows of a snapshot that nobody keeps")
                assert not inherited.in_transaction  # SQLite rolls it back on an I/O error
                assert count(inherited) == 3000
                inherited.close()

            beside(child, lambda: None, Steps())
            assert count(inherited) == 3000
            inherited.execute("COMMIT")
            writer.execute("DELETE FROM rows")
            for db in (inherited, writer):
                db.close()


@fails_without("child-keeps-its-cache")
def test_a_child_does_not_read_what_its_parent_had_cached():
    """The index of an empty WAL says the same before and after its database was changed and everybody has left."""
    libsqlite = ctypes.CDLL("libsqlite3.so.0")
    with Broker() as broker:
        path = create(broker.path("app.db"))
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        sqlite = Library("libsqlite3.so.0")
        first = sqlite.open(":memory:")
        assert sqlite.load(first) == (0, "")

        def keeps_wal(db):
            one = ctypes.c_int(1)
            assert libsqlite.sqlite3_file_control(db, None, 10, ctypes.byref(one)) == 0  # SQLITE_FCNTL_PERSIST_WAL
            return db

        def wrote(sql):
            db = keeps_wal(sqlite.open(path))
            sqlite.execute(db, "PRAGMA journal_size_limit=0")
            sqlite.execute(db, sql)
            sqlite.close(db)

        wrote("INSERT INTO rows VALUES('p', 1)")
        assert os.path.getsize(path + "-wal") == 0
        inherited = ctypes.c_void_p()
        assert libsqlite.sqlite3_open_v2(path.encode(), ctypes.byref(inherited), 1, None) == 0  # SQLITE_OPEN_READONLY
        keeps_wal(inherited)
        assert sqlite.execute(inherited, "SELECT count(*) FROM rows") == [["1"]]
        steps = Steps()

        def child():
            steps.wait()
            try:
                assert sqlite.execute(inherited, "SELECT count(*) FROM rows") == [["101"]]
            finally:
                steps.go()

        def parent():
            sqlite.close(inherited)
            for i in range(100):
                wrote(f"INSERT INTO rows VALUES('p', {i})")
            keeps = keeps_wal(sqlite.open(path))
            assert sqlite.execute(keeps, "SELECT count(*) FROM rows") == [["101"]]
            steps.go()
            steps.wait()
            sqlite.close(keeps)

        beside(child, parent, steps)


@fails_without("any-wal-is-its-own")
def test_a_child_does_not_read_a_wal_that_was_removed():
    """The database left WAL mode, or everybody left: SQLite in the child believes that this cannot have happened."""
    for sql in ("PRAGMA journal_mode=delete", "INSERT INTO rows VALUES('p', 2)"):
        with Broker("--reuse-wal", "0") as broker:
            path = create(broker.path("app.db"))
            writer = connect(path, broker=broker, mode="gated")
            writer.execute("INSERT INTO rows VALUES('p', 1)")
            inherited = reader(path)
            assert count(inherited) == 1
            steps = Steps()

            def child():
                steps.wait()
                try:
                    assert count(inherited) is None
                except sqlite3.OperationalError as e:
                    assert "disk I/O error" in str(e), e
                inherited.close()

            def parent():
                inherited.close()
                writer.execute(sql)
                writer.close()
                assert not os.path.exists(path + "-wal")
                other = connect(path, load=False)
                other.execute("INSERT INTO rows VALUES('p', 3)")
                steps.go()
                other.close()

            beside(child, parent, steps)
            assert plain(path, "PRAGMA integrity_check", retry=5) == [["ok"]]


def test_a_child_that_closes_a_connection_that_only_reads_changes_nothing():
    """Used or not, beside its parent's transaction."""
    for used in (False, True):
        with Broker() as broker:
            path = create(broker.path("app.db"))
            writer = connect(path, broker=broker, mode="gated")
            inherited = reader(path)
            assert count(inherited) == 0
            spilled_transaction(writer)

            def child():
                if used:
                    assert count(inherited) == 0
                inherited.close()
                writer.close()

            beside(child, lambda: None, Steps())
            assert count(inherited) == 0
            writer.execute("COMMIT")
            assert count(inherited) == 3000
            for db in (writer, inherited):
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                db.close()
            assert plain(path, "SELECT count(*) FROM rows", retry=5) == [["3000"]]


NOBODY = 54321  # a uid that has no user


def test_a_child_of_a_process_that_may_not_write():
    """Its mapping of the index is read-only, and its locks are messages."""
    if os.getuid():
        raise Skip("not root: cannot become another user")
    with Broker() as broker:
        path = create(broker.path("app.db"))
        writer = connect(path, broker=broker, mode="gated")
        writer.execute("INSERT INTO rows VALUES('p', 1)")
        steps = Steps()

        def unprivileged():
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            inherited = reader(path)
            assert count(inherited) == 1 and status_of(inherited)["role"] == "read-only"

            def child():
                assert count(inherited) == 1
                steps.go()
                steps.wait()
                assert count(inherited) == 2 and status_of(inherited)["role"] == "read-only"
                inherited.close()

            assert in_child(child) == 0
            assert count(inherited) == 2
            inherited.close()

        def parent():
            steps.wait()
            writer.execute("INSERT INTO rows VALUES('p', 2)")
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            steps.go()

        beside(unprivileged, parent, steps)
        writer.close()


RUBY = """
require 'sqlite3'
path, library = ARGV
writer = SQLite3::Database.new(path)
writer.enable_load_extension(true)
writer.load_extension(library)
writer.execute("INSERT INTO rows VALUES('r', 1)")
inherited = SQLite3::Database.new(path, readonly: true)
raise 'before' unless inherited.execute('SELECT count(*) FROM rows') == [[1]]
child = fork do
  3.times do
    raise 'in the child' unless inherited.execute('SELECT count(*) FROM rows') == [[1]]
  end
  inherited.close
  exit! 0
end
Process.wait(child)
raise 'the child failed' unless $?.success?
writer.execute("INSERT INTO rows VALUES('r', 2)")
raise 'after' unless inherited.execute('SELECT count(*) FROM rows') == [[2]]
inherited.close
writer.close
"""


@fails_without("inherited-reads-nothing")
def test_a_child_in_ruby_reads_through_the_connection_that_the_gem_keeps():
    if not shutil.which("ruby") or run(["ruby", "-e", "require 'sqlite3'"], check=False).returncode:
        raise Skip("Ruby's sqlite3 is missing: run tests/install")
    with Broker() as broker:
        path = create(broker.path("app.db"))
        run(["ruby", "-e", RUBY, path, lib()], env=broker.env)
