"""The libc lane: programs with SQLite linked in and hidden, under `turnstile run`, as members.

APSW, node:sqlite, better-sqlite3 and rusqlite, alone, all together, and mixed with members that load the extension;
their deaths and forks; and that nothing but SQLite databases is touched.
"""

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess

import harness
from harness import (Broker, PYTHON, Programs, Skip, Workers, check_rows, create, fails_without, plain,
                     run, wait_until, waits)

import clients
import test_commits
from test_commits import recording

TIMEOUT = "2000"  # milliseconds
LIMIT = 60


def wrapped(*words, options=()):
    return [harness.bin(), "run", *options, "--", *words]


KINDS = ("apsw", "node_sqlite", "better_sqlite3", "rust")


def missing(kind):
    return clients.KINDS[kind].missing()


def need(kind):
    reason = missing(kind)
    if reason:
        raise Skip(reason)


def env_of(broker):
    env = clients.environment(broker, clients.RUN)
    for name in ("LD_PRELOAD", "TURNSTILE_RUN", "TURNSTILE_RUN_REPORT"):
        env.pop(name, None)
    return {**env, "WORKER_TIMEOUT": TIMEOUT, "WORKER_SECONDS": str(LIMIT)}


class Hidden(Programs):
    """Clients on one database under `turnstile run`, by name and kind."""

    def __init__(self, names, db, rows, broker, timeout=TIMEOUT):
        super().__init__({}, None, LIMIT)
        for name, kind in names.items():
            words = wrapped(*clients.KINDS[kind].command(), db, name, str(rows), broker.record)
            self._start(name, words, {**env_of(broker), "WORKER_TIMEOUT": timeout})


def check(results, rows):
    for r in results:
        assert r["committed"] == rows == r["seen"], r
        assert r["busy"] == 0, f"BUSY, in spite of its busy timeout: {r}"


def alone(kind):
    need(kind)
    for journal, rows in (("wal", 200), ("delete", 50)):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            with Hidden({kind: kind}, db, rows, broker) as programs:
                programs.ready()
                programs.go()
                check(programs.wait(), rows)
            assert 'name="app.db"' in broker.log() and 'mode="gated"' in broker.log(), f"{journal}: it was no member"
            assert check_rows(db, broker.record) == rows


def test_apsw():
    alone("apsw")


def test_node_sqlite():
    alone("node_sqlite")


def test_better_sqlite3():
    alone("better_sqlite3")


def test_rusqlite():
    alone("rust")


def four_of_each(journal, extension, rows, timeout=TIMEOUT):
    """Four processes of each kind, and some members with the extension."""
    kinds = [k for k in KINDS if not missing(k)]
    if not kinds:
        raise Skip("no client with SQLite linked in")
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        names = {f"{kind}-{i}": kind for kind in kinds for i in range(4)}
        with Hidden(names, db, rows, broker, timeout) as programs, contextlib.ExitStack() as stack:
            workers = None
            if extension:
                workers = stack.enter_context(Workers(extension, "insert", LIMIT, db, broker, rows=rows)).ready()
            programs.go()
            if workers:
                assert all(r["busy"] == 0 for r in workers.go().wait()), "a member with the extension saw BUSY"
            check(programs.wait(), rows)
        assert check_rows(db, broker.record) == rows * (len(names) + extension)


def test_four_of_each_kind_and_members_with_the_extension():
    four_of_each("wal", extension=4, rows=100)


def test_four_of_each_kind_in_a_rollback_journal():
    """A commit is some ten syncs, and a round of sixteen takes its time."""
    four_of_each("delete", extension=0, rows=15, timeout="10000")


# --- APSW: one process at a time --------------------------------------------------------------------------------

PRELUDE = """
import os, sys, time
import apsw
def connect(path, timeout=2000):
    db = apsw.Connection(path)
    db.set_busy_timeout(timeout)
    return db
"""


def apsw(broker, code, *arguments, check=True, options=(), **more):
    need("apsw")
    return run(wrapped(clients.VENV, "-c", PRELUDE + code, *arguments, options=options), env=env_of(broker), check=check, **more)


class Python:
    """A Python under `turnstile run` that waits on its input between its steps."""

    def __init__(self, broker, code, *arguments, env=None):
        need("apsw")
        self.process = subprocess.Popen(wrapped(clients.VENV, "-uc", PRELUDE + code, *arguments),
                                        env={**env_of(broker), **(env or {})},
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()

    def line(self, timeout=60.0):
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise AssertionError(f"nothing said within {timeout:g} s")
        return self.process.stdout.readline().strip()

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def test_a_plain_client_is_held_out_while_it_has_the_database_open_and_not_after():
    code = """
db = connect(sys.argv[1])
db.execute("INSERT INTO rows VALUES('a', 0)")
print("in", flush=True); sys.stdin.readline()
db.close()
print("out", flush=True); sys.stdin.readline()
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Python(broker, code, db) as program:
            assert program.line() == "in"
            assert not os.path.exists(db + "-shm"), "the index is in a file, too"
            try:
                plain(db, "SELECT count(*) FROM rows")
            except harness.PlainError as e:
                assert "locked" in str(e), e
            else:
                raise AssertionError("a plain client got in beside the segment")
            program.go()
            assert program.line() == "out"
            assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["1"]]


def test_a_killed_process_leaves_its_turn_to_the_next():
    """SIGKILL between BEGIN IMMEDIATE and COMMIT."""
    code = """
db = connect(sys.argv[1])
db.execute("BEGIN IMMEDIATE; INSERT INTO rows VALUES('dead', 0)")
print(os.getpid(), flush=True); sys.stdin.readline()
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Python(broker, code, db) as program:
            os.kill(int(program.line()), signal.SIGKILL)
            apsw(broker, """connect(sys.argv[1]).execute("INSERT INTO rows VALUES('next', 0)")""", db)
        assert plain(db, "SELECT * FROM rows", retry=5) == [["next", "0"]]


def kill_command(pid):
    """SIGKILL to what a `turnstile run` has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        os.kill(int(f.read()), signal.SIGKILL)


def test_killed_at_any_moment_nothing_acknowledged_is_lost():
    """Beside members with the extension, which see no BUSY."""
    need("apsw")
    deaths = 12
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(2, "insert", 6.0, db, broker) as workers:
            workers.go()
            names = [f"w{i}" for i in range(deaths + 2)]
            with Hidden({n: "apsw" for n in names}, db, 100_000, broker) as programs:
                programs.go()
                for i, name in enumerate(names[:deaths]):
                    rows = sum(harness.acknowledged(broker.record).values())
                    wait_until(lambda: sum(harness.acknowledged(broker.record).values()) > rows + 20, timeout=30,
                               what=f"more rows after {i} deaths")
                    kill_command(programs.pid(name))
                assert all(r["busy"] == 0 for r in workers.wait())
                for name in names[deaths:]:
                    kill_command(programs.pid(name))
                for name in names:
                    programs.processes[name].wait(20)
        check_rows(db, broker.record, killed=names)


FORK = """
db = connect(sys.argv[1])
db.execute("BEGIN IMMEDIATE; INSERT INTO rows VALUES('parent', 0)")
child = os.fork()
if not child:
    try: db.execute("ROLLBACK")
    except apsw.Error: pass
    try: db.close()
    except apsw.Error: pass
    own = connect(sys.argv[1], 20)
    try: own.execute("INSERT INTO rows VALUES('child', 0)"); said = 3
    except apsw.BusyError: said = 4
    os._exit(said)
said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
db.execute("INSERT INTO rows VALUES('parent', 1); COMMIT")
print(said, db.execute("PRAGMA integrity_check").fetchone()[0])
db.close()
"""


def forks(journal):
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        done = apsw(broker, FORK, db)
        assert done.stdout == "4 ok\n", done
        assert plain(db, "SELECT * FROM rows", retry=5) == [["parent", "0"], ["parent", "1"]]


@fails_without("childs-files")
def test_a_forked_child_rolls_back_and_closes_while_its_parent_writes():
    """Its own connection meets its parent's lock; its parent's transaction is whole."""
    forks("wal")
    forks("delete")


def test_children_by_vfork_close_only_their_own_descriptors():
    """Python's subprocess closes everything in a child that runs in its parent's memory."""
    code = """
import subprocess
db = connect(sys.argv[1])
db.execute("INSERT INTO rows VALUES('a', 0)")
assert subprocess.run(["/bin/true"], close_fds=True).returncode == 0
db.execute("INSERT INTO rows VALUES('a', 1)")
print("in", flush=True); sys.stdin.readline()
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Python(broker, code, db) as program:
            assert program.line() == "in"
            assert len(broker.members(db)) == 1, broker.members(db)


def test_another_file_is_untouched():
    """Locks, a name that ends in -shm, mappings: of a file that is no database they are the kernel's."""
    code = """
import fcntl, mmap, struct
path = sys.argv[1]
f = open(path, "w+b"); f.truncate(4096)
fcntl.fcntl(f, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 120, 9, 0))
m = mmap.mmap(f.fileno(), 4096); m[0:5] = b"hello"; m.flush()
f.seek(0); assert f.read(5) == b"hello"
print(open("/proc/locks").read().count(f":{os.stat(path).st_ino} 120 128"), os.path.getsize(path))
f.close(); os.unlink(path)
assert not os.path.exists(path)
"""
    with Broker() as broker:
        done = apsw(broker, code, broker.path("other-shm"))
        assert done.stdout == "1 4096\n", done
        assert not broker.status()["databases"]


def test_it_is_said_where_sqlite_was_reached():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = apsw(broker, """connect(sys.argv[1]).execute("SELECT * FROM rows")""", db, options=["-v"])
        assert f"{db} is brokered through the C library" in done.stderr, done.stderr
        assert "cannot be reached" not in done.stderr, done.stderr


def test_without_a_broker_nothing_is_opened_silently():
    """TURNSTILE_FALLBACK=refuse, with nobody on the socket: an I/O error, and the reason; =plain: plain SQLite."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        broker.stop()
        code = """
try: print(connect(sys.argv[1]).execute("SELECT count(*) FROM rows").fetchone()[0])
except apsw.IOError as e: print("I/O error")
"""
        for fallback, expected in (("refuse", "I/O error\n"), ("plain", "0\n")):
            os.environ["TURNSTILE_FALLBACK"] = fallback
            done = apsw(broker, code, db)
            assert done.stdout == expected, done
            assert db in done.stderr, done.stderr
        broker.start()


@waits
@fails_without("blind-sleep")
def test_the_busy_handlers_sleep_is_a_place_in_the_line():
    code = """
db = connect(sys.argv[1], 20000)
db.execute("INSERT INTO rows VALUES('waiter', 0)")
print("done", flush=True); sys.stdin.readline()
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = harness.connect(db, broker=broker, mode="gated")
        holder.execute("BEGIN IMMEDIATE")
        with Python(broker, code, db) as waiter:
            line = wait_until(lambda: broker.database(db)["line"], timeout=5, what="a place in the line")
            assert [w["waits_for"] for w in line] == ["the turn"], line
            holder.execute("COMMIT")
            assert waiter.line() == "done"
        holder.close()


@waits
@fails_without("overtime-for-each-sleep")
def test_a_busy_timeout_is_kept_to_half_a_second():
    """Thirteen sleeps of SQLite's busy handler; each of them may not last half a second longer."""
    code = """
db = connect(sys.argv[1], 300)
begun = time.monotonic()
try: db.execute("INSERT INTO rows VALUES('waiter', 0)")
except apsw.BusyError: print(time.monotonic() - begun, flush=True)
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = harness.connect(db, broker=broker, mode="gated")
        holder.execute("BEGIN IMMEDIATE")
        waited = float(apsw(broker, code, db).stdout)
        assert 0.25 < waited < 2.0, waited
        holder.execute("COMMIT")
        holder.close()


@waits
@fails_without("lane-reads-before-sync")
def test_a_reader_does_not_see_what_is_not_durable():
    """A member with the extension publishes its commit before its sync, which takes nearly a second here."""
    code = """
db = connect(sys.argv[1])
db.execute("SELECT count(*) FROM rows").fetchall()
print("ready", flush=True)
while not db.execute("SELECT count(*) FROM rows").fetchone()[0]: pass
print(time.monotonic(), flush=True)
"""
    need("apsw")
    with recording.Recording(sync_usec=900_000) as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"))
        with test_commits.held(record, broker), Python(broker, code, db, env=record.env) as reader:
            assert reader.line() == "ready"
            with test_commits.under(record, broker, 1, test_commits.insert_full, rows=1) as writers:
                [writer] = writers.ready().go().wait()
            seen = float(reader.line())
        assert writer["done"][0] - seen < 0.5, (writer, seen)


@waits
@fails_without("lane-reads-before-sync")
def test_a_checkpoint_copies_nothing_that_is_not_on_the_disk():
    """A commit whose member was killed before its sync. At synchronous=OFF SQLite makes none before it copies, so what
    takes time here, nearly a second, is ours: a checkpoint reads what it copies."""
    code = """
db = connect(sys.argv[1])
db.execute("PRAGMA synchronous=OFF").fetchall()
db.execute("SELECT count(*) FROM rows").fetchall()
before = (os.path.getsize(sys.argv[1] + "-wal") - 32) // (24 + 4096)
print("ready", flush=True)
sys.stdin.readline()
begun = time.monotonic()
while True:
    _, known, copied = db.execute("PRAGMA wal_checkpoint").fetchone()
    if known > before and copied == known: break
print(time.monotonic() - begun, flush=True)
"""
    need("apsw")
    with recording.Recording(sync_usec=900_000) as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"))
        with test_commits.held(record, broker), Python(broker, code, db, env=record.env) as program:
            assert program.line() == "ready"
            with test_commits.under(record, broker, 1, test_commits.insert_full) as workers:
                workers.ready()
                record.order(recording.SYNC, "-wal", recording.KILL_BEFORE, pid=workers.pid(0))
                workers.go()
                wait_until(lambda: workers.processes[0].poll() is not None, what="the writer's death")
            program.go()
            took = float(program.line())
        assert took > 0.8, took


@fails_without("lane-commits-uncounted")
def test_a_sync_that_fails_takes_back_nothing_that_was_synced_before():
    """Members with the extension count their commits; those in between are not counted, and are on the disk."""
    with recording.Recording() as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"))
        with test_commits.held(record, broker):
            with test_commits.under(record, broker, 1, test_commits.insert_full, rows=1) as workers:
                workers.go().wait()
            apsw(broker, """
db = connect(sys.argv[1])
db.execute("PRAGMA synchronous=FULL").fetchall()
db.execute("INSERT INTO rows VALUES('lane', 0)")
""", db)
            with test_commits.under(record, broker, 1, test_commits.insert_again, rows=1, first=1) as workers:
                workers.ready()
                order = record.order(recording.SYNC, "-wal", errno.EIO, pid=workers.pid(1))
                [result] = workers.go().wait()
            assert recording.fired(order) == 1 and result["failed"] == ["SQLITE_IOERR_FSYNC"], result
            # What a recovery makes of the WAL as it lies there.
            copy = broker.path("copy.db")
            for suffix in ("", "-wal"):
                shutil.copyfile(db + suffix, copy + suffix)
        assert plain(copy, "SELECT worker FROM rows ORDER BY worker") == [["0"], ["1"], ["lane"]]


@fails_without("served-twice")
def test_a_library_that_has_the_extension_is_left_to_it():
    """In guest mode the extension's own locks are the unix VFS's: those of a member, and not another one's."""
    code = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("INSERT INTO rows VALUES('a', 0)")
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        run(wrapped(PYTHON, "-c", code, db), env={**env_of(broker), "TURNSTILE_MODE": "guest"})
        assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["1"]]


def test_both_kinds_of_sqlite_in_one_process():
    """The system's, which has the extension, and APSW's, on one database: two members, that wait for each other."""
    code = """
import sqlite3, threading
own = connect(sys.argv[1], 20000)
other = sqlite3.connect(sys.argv[1], isolation_level=None, check_same_thread=False)
def insert(execute, name):
    for i in range(200): execute("INSERT INTO rows VALUES(?, ?)", (name, i))
threads = [threading.Thread(target=insert, args=a) for a in ((own.execute, "own"), (other.execute, "other"))]
for t in threads: t.start()
for t in threads: t.join()
print(own.execute("SELECT count(*) FROM rows").fetchone()[0])
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        assert apsw(broker, code, db).stdout == "400\n"
        assert plain(db, "PRAGMA integrity_check; SELECT count(*) FROM rows", retry=5) == [["ok"], ["400"]]


def test_threads_share_a_seat():
    code = """
import threading
def insert(name):
    db = connect(sys.argv[1], 20000)
    for i in range(100):
        db.execute("INSERT INTO rows VALUES(?, ?)", (name, i))
        db.execute("SELECT max(seq) FROM rows WHERE worker = ?", (name,)).fetchall()
    db.close()
threads = [threading.Thread(target=insert, args=(f"{sys.argv[2]}-{n}",)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()
"""
    need("apsw")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        both = [subprocess.Popen(wrapped(clients.VENV, "-c", PRELUDE + code, db, str(n)), env=env_of(broker)) for n in (1, 2)]
        wait_until(lambda: len({m["pid"] for m in broker.members(db)}) == 2, what="both processes")
        assert len(broker.members(db)) == 2, broker.members(db)
        assert [p.wait(60) for p in both] == [0, 0]
        assert plain(db, "PRAGMA integrity_check; SELECT count(*) FROM rows", retry=5) == [["ok"], ["800"]]


def test_descriptors_closed_by_a_daemon_and_reused():
    """What was closed is gone; the same numbers, opened again, are a connection of its own."""
    code = """
db = connect(sys.argv[1])
db.execute("INSERT INTO rows VALUES('a', 0)")
os.closerange(3, 200)
again = connect(sys.argv[2])
again.execute("INSERT INTO rows VALUES('b', 0)")
print(again.execute("PRAGMA integrity_check").fetchone()[0])
os._exit(0)
"""
    with Broker() as broker:
        first, second = create(broker.path("app.db")), create(broker.path("other.db"))
        assert apsw(broker, code, first, second).stdout == "ok\n"
        for db, row in ((first, ["a", "0"]), (second, ["b", "0"])):
            assert plain(db, "PRAGMA integrity_check; SELECT * FROM rows", retry=5) == [["ok"], row]


def test_the_broker_is_killed_under_it():
    code = """
db = connect(sys.argv[1], 20000)
for i in range(3):
    db.execute("INSERT INTO rows VALUES('a', ?)", (i,))
    print(i, flush=True); sys.stdin.readline()
db.close()
print("closed", flush=True)
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Python(broker, code, db) as program:
            assert program.line() == "0"
            broker.kill()
            program.go()
            assert program.line() == "1"
            broker.start()
            program.go()
            assert program.line() == "2"
            program.go()
            assert program.line() == "closed"
        assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["3"]]


def test_checkpoints_and_journal_modes():
    code = """
db = connect(sys.argv[1])
db.execute("PRAGMA synchronous=NORMAL").fetchall()
for i in range(3000): db.execute("INSERT INTO rows VALUES('a', ?)", (i,))
print(os.path.getsize(sys.argv[1] + "-wal") < 8 << 20, flush=True)
print(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0], os.path.getsize(sys.argv[1] + "-wal"))
print(db.execute("PRAGMA journal_mode=delete").fetchone()[0], os.path.exists(sys.argv[1] + "-wal"))
db.execute("INSERT INTO rows VALUES('a', 3000)")
print(db.execute("PRAGMA journal_mode=wal").fetchone()[0])
db.execute("INSERT INTO rows VALUES('a', 3001); VACUUM")
print(db.execute("PRAGMA integrity_check").fetchone()[0])
db.close()
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = apsw(broker, "import apsw\n" + code.replace("db = connect(sys.argv[1])",
                                                          "db = connect(sys.argv[1]); db.execute('PRAGMA synchronous=NORMAL')"), db)
        assert done.stdout.split("\n") == ["True", "0 0", "delete False", "wal", "ok", ""], done
        assert not os.path.exists(db + "-wal"), "closed, and its WAL is still there"
        assert plain(db, "PRAGMA integrity_check; SELECT count(*) FROM rows", retry=5) == [["ok"], ["3002"]]
