"""When the last close returns, the file alone is complete, durable, and safe from its own WAL: whatever happens next.

`ROUNDS=1000` makes the rounds long (docs/reliability.md has the figures)."""

import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time

import harness
from harness import (PYTHON, SHELL, Broker, Programs, Record, acknowledged, check_rows, connect, create, fails_without, lib,
                     plain, run, slow)
from test_broker_death import processes_of

ROUNDS = int(os.environ.get("ROUNDS", 25))
MAGIC = b"\x37\x7f\x06"

# A member in another process: each line it reads is one connection, with so many rows.
SHORT = """
import sqlite3, sys
db, lib, worker, record = sys.argv[1:5]
seq = 0
log = open(record, "a")
for line in sys.stdin:
    try:
        c = sqlite3.connect(db, timeout=0, isolation_level=None)
        c.enable_load_extension(True)
        c.load_extension(lib)
        if "normal" in line:
            c.execute("PRAGMA synchronous=NORMAL")
        for _ in range(int(line.split()[0])):
            c.execute("INSERT INTO rows VALUES(?, ?)", (worker, seq))
            print(f"{worker} {seq}", file=log, flush=True)
            seq += 1
        c.close()
        print("done", flush=True)
    except Exception as e:
        print(repr(e), flush=True)
"""


class Short(Programs):
    """Processes that open, write and close when they are told to."""

    def __init__(self, n, db, broker, prefix="s"):
        names = [f"{prefix}{i}" for i in range(n)]
        super().__init__({name: [PYTHON, "-c", SHORT, db, lib(), name, broker.record] for name in names}, broker.env)
        self.names = names

    def tell(self, name, what):
        p = self.processes[name]
        p.stdin.write(what.encode() + b"\n")
        p.stdin.flush()

    def done(self, name):
        said = self._line(name, time.monotonic() + 20, "to end")
        assert said == b"done", said

    def each(self, what="1", names=None):
        """All at once."""
        for name in names or self.names:
            self.tell(name, what)
        for name in names or self.names:
            self.done(name)


def made(broker, name="app.db"):
    return create(broker.path(name), "wal", synchronous="FULL")


def held(db):
    return {(w, s) for w, s in plain(db, "SELECT worker, seq FROM rows")}


def wal_of(db):
    """The first bytes of its WAL; None if there is none."""
    try:
        with open(db + "-wal", "rb") as f:
            return f.read(32)
    except FileNotFoundError:
        return None


def is_read_by_nobody(db):
    """Whether a WAL of that name changes nothing for whatever database lies there."""
    header = wal_of(db)
    return header is None or not header.startswith(MAGIC)


def test_a_database_that_is_closed_once_leaves_no_wal():
    with Broker() as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            short.each("3")
            assert broker.database(db) is None
            assert wal_of(db) is None
            plain(db, "INSERT INTO rows VALUES('plain', 1)")


def test_a_stream_of_connections_uses_one_wal():
    with Broker("--reuse-wal", "20s") as broker:
        db = made(broker)
        with Short(3, db, broker) as short:
            short.each("1", ["s0"])
            short.each("1", ["s0"])
            inode = os.stat(db + "-wal").st_ino
            for _ in range(10):
                for name in short.names:
                    short.each("2", [name])
                    assert broker.database(db) is None
                    assert is_read_by_nobody(db)
            assert os.stat(db + "-wal").st_ino == inode
            # One that only reads leaves it too, and one that changes the mode does not.
            short.each("0", ["s1"])
            assert os.stat(db + "-wal").st_ino == inode
            c = connect(db, broker=broker, mode="gated")
            c.execute("PRAGMA journal_mode=DELETE")
            c.close()
            assert wal_of(db) is None
        check_rows(db, broker.record)


def test_no_wal_stays_where_it_is_switched_off():
    with Broker("--reuse-wal", "0s") as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            for _ in range(5):
                short.each()
                assert broker.database(db) is None and wal_of(db) is None


@fails_without("last-close-copies-nothing")
def test_a_copy_after_the_last_close_is_complete():
    with Broker("--reuse-wal", "20s") as broker:
        db, copy = made(broker), broker.path("copy.db")
        with Short(3, db, broker) as short:
            for n in range(120):
                # One alone, three at once, a large one that SQLite's own last close copies.
                names = short.names[:1] if n % 2 else short.names
                short.each(("1", "40 normal", "3", "1 normal")[n % 4] if n % 50 else "700 normal", names)
                shutil.copyfile(db, copy)
                missing = set(acknowledged(broker.record)) - held(copy)
                assert not missing, f"{len(missing)} rows are not in a copy made after the last close, round {n}"
        check_rows(db, broker.record)


@fails_without("each-close-leaves-it-to-others", attempts=3)
def test_of_several_that_close_at_once_one_copies():
    """In plain SQLite none of them may get EXCLUSIVE, and the WAL stays as it is."""
    with Broker("--reuse-wal", "0s") as broker:
        db, copy = made(broker), broker.path("copy.db")
        with Short(6, db, broker) as short:
            for n in range(200):
                short.each()
                assert is_read_by_nobody(db), n
                shutil.copyfile(db, copy)
                c = sqlite3.connect(f"file:{copy}?immutable=1", uri=True)
                [rows] = c.execute("SELECT count(*) FROM rows").fetchone()
                c.close()
                assert rows == 6 * (n + 1), f"round {n}: {rows} rows of {6 * (n + 1)}"
        check_rows(db, broker.record)


@slow
def test_a_thousand_copies_under_a_stream_of_short_lived_writers():
    with Broker() as broker:
        db, copy = made(broker), broker.path("copy.db")
        with Short(4, db, broker) as short:
            for n in range(1000):
                short.each()
                shutil.copyfile(db, copy)
                c = sqlite3.connect(f"file:{copy}?immutable=1", uri=True)
                rows = c.execute("SELECT count(*) FROM rows").fetchone()[0]
                c.close()
                assert rows == 4 * (n + 1), f"round {n}: {rows} rows of {4 * (n + 1)}"
        check_rows(db, broker.record)


@fails_without("wal-left-valid")
def test_the_wal_of_a_closed_database_changes_no_other_one():
    """The file that lies beside the WAL may be any by now, also one that was never in WAL mode."""
    with Broker("--reuse-wal", "20s") as broker:
        db, other = made(broker), broker.path("other.db")
        with Short(1, db, broker) as short:
            for n in range(6):
                for _ in range(2):
                    short.each("20")
                create(other, ("wal", "delete")[n % 2])
                plain(other, f"INSERT INTO rows VALUES('other', {n})")
                shutil.copyfile(db + "-wal", other + "-wal")
                assert plain(other, "SELECT * FROM rows") == [["other", str(n)]]
                assert plain(other, "INSERT INTO rows VALUES('other', 'x'); PRAGMA integrity_check") == [["ok"]]
                assert len(plain(other, "SELECT * FROM rows")) == 2
                os.unlink(other)
        check_rows(db, broker.record)


def test_a_file_that_is_not_the_database_any_more_is_taken_as_it_is():
    """Written over in place, as cp does it, and its WAL cut, removed, or brought back."""
    with Broker("--reuse-wal", "20s") as broker:
        db, old = made(broker), broker.path("old.db")
        create(old)
        plain(old, "INSERT INTO rows VALUES('backup', 1); PRAGMA wal_checkpoint(TRUNCATE)")
        with Short(2, db, broker) as short:
            for n in range(6):
                for _ in range(3):
                    short.each("1", ["s0"])
                with open(old, "rb") as f:
                    content = f.read()
                with open(db, "r+b") as f:
                    f.write(content)
                    f.truncate(len(content) if n % 2 else max(len(content), os.path.getsize(db)))
                if n % 3 == 1:
                    os.truncate(db + "-wal", 0)
                elif n % 3 == 2:
                    os.unlink(db + "-wal")
                short.each("1", ["s1"])
                rows = plain(db, "SELECT worker, count(*) FROM rows GROUP BY 1 ORDER BY 1")
                assert rows == [["backup", "1"], ["s1", "1"]], rows
                assert plain(db, "PRAGMA integrity_check") == [["ok"]]


def test_modes_change_after_a_wal_was_left():
    with Broker("--reuse-wal", "20s") as broker:
        db = made(broker)
        with Short(2, db, broker) as short:
            for sql in ("PRAGMA journal_mode=DELETE", "PRAGMA locking_mode=EXCLUSIVE; BEGIN IMMEDIATE; COMMIT", "VACUUM",
                        "PRAGMA wal_checkpoint(TRUNCATE)"):
                for _ in range(3):
                    short.each("1", ["s0"])
                c = connect(db, broker=broker, mode="gated")
                c.executescript(sql)
                c.execute("PRAGMA locking_mode=NORMAL")
                c.execute("INSERT INTO rows VALUES('m', ?)", (len(sql),))
                c.close()
                short.each("2", ["s1"])
                plain(db, "PRAGMA journal_mode=WAL")
        assert plain(db, "SELECT count(*) FROM rows WHERE worker = 'm'") == [["4"]]
        plain(db, "DELETE FROM rows WHERE worker = 'm'")
        check_rows(db, broker.record)


def test_members_that_stay_are_not_disturbed():
    """Short-lived ones come and go beside one that stays, and alone, by turns."""
    with Broker() as broker:
        db = made(broker)
        record = Record(broker.record)
        with Short(3, db, broker) as short:
            for n in range(10):
                for _ in range(2):
                    short.each("1", ["s0"])
                c = connect(db, broker=broker, mode="gated")
                for seq in range(20):
                    c.execute("INSERT INTO rows VALUES('stays', ?)", (20 * n + seq,))
                    record.add("stays", 20 * n + seq)
                    if seq % 5 == 0:
                        short.each()
                c.close()
        record.close()
        check_rows(db, broker.record)


# --- close, and at once ------------------------------------------------------------------------------------------

class Load:
    """Processes that write and sync all the time, beside the database."""

    WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
block = os.urandom(1 << 20)
while True:
    for n in range(32):
        os.pwrite(fd, block, n << 20)
    os.fsync(fd)
"""

    def __init__(self, directory, n=2):
        self.paths = [os.path.join(directory, f"load{i}") for i in range(n)]

    def __enter__(self):
        self.processes = [subprocess.Popen([PYTHON, "-c", self.WRITER, path]) for path in self.paths]

    def __exit__(self, *_):
        for p in self.processes:
            p.kill()
            p.wait()


def shell(script):
    """Plain sh and sqlite3, started before the close so that it loses no time: it waits for a line."""
    return subprocess.Popen(["sh", "-c", f"read go; {script}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=harness.plain_env())


def at_once(program):
    said, _ = program.communicate("go\n", timeout=60)
    assert program.returncode == 0, f"plain SQLite says after a last close: {said}"
    return said


def close_and(broker, db, what, rounds=None):
    """Short-lived programs, alone and three at once, and `what(n, go)` after each last close; `go()` runs what it yields."""
    with Short(3, db, broker) as short:
        for n in range(rounds or ROUNDS):
            for names, rows in ((["s0"], "1"), (short.names, "20"), ([f"s{n % 3}"], ("1", "30 normal", "3")[n % 3])):
                program = what(n)
                # So that it is one that is opened again and again, be it a new file.
                for _ in range(n % 3):
                    short.each("1", ["s1"])
                short.each(rows, names)
                yield n, program


def test_a_file_is_renamed_over_it_at_once():
    with Broker("--reuse-wal", "5s") as broker, Load(broker.dir):
        db, new, log = made(broker), broker.path("new.db"), broker.record

        def another(n):
            create(new, ("wal", "delete")[n % 2])
            plain(new, f"INSERT INTO rows VALUES('new', {n})")
            return shell(f"mv {new} {db} && {SHELL} {db} 'INSERT INTO rows VALUES(1, {n})'")

        for n, program in close_and(broker, db, another):
            at_once(program)
            assert sorted(plain(db, "SELECT * FROM rows")) == [["1", str(n)], ["new", str(n)]], n
            assert plain(db, "PRAGMA integrity_check") == [["ok"]], n
            plain(db, "PRAGMA journal_mode=WAL")
            os.truncate(log, 0)


def test_it_is_copied_at_once():
    with Broker("--reuse-wal", "5s") as broker, Load(broker.dir):
        db, copy = made(broker), broker.path("copy.db")
        for n, program in close_and(broker, db, lambda n: shell(f"rm -f {copy}*; cp {db} {copy}")):
            at_once(program)
            missing = set(acknowledged(broker.record)) - held(copy)
            assert not missing, f"round {n}: {len(missing)} rows are not in the copy"
            assert plain(copy, "PRAGMA integrity_check") == [["ok"]], n
        check_rows(db, broker.record)


def test_it_is_removed_at_once():
    with Broker("--reuse-wal", "5s") as broker, Load(broker.dir):
        db = made(broker)
        again = "PRAGMA journal_mode=WAL; CREATE TABLE rows(worker TEXT, seq INTEGER); INSERT INTO rows VALUES"
        for n, program in close_and(broker, db, lambda n: shell(f"rm {db} && {SHELL} {db} '{again}(1, {n})'")):
            at_once(program)
            assert plain(db, "SELECT * FROM rows") == [["1", str(n)]], n
            assert plain(db, "PRAGMA integrity_check") == [["ok"]], n
            os.truncate(broker.record, 0)


@fails_without("answered-at-once")
def test_its_filesystem_is_unmounted_at_once():
    unmounted_at_once()


@fails_without("receivers-not-waited-for")
def test_its_filesystem_is_unmounted_at_once_where_others_may_connect():
    """The broker has another process close its files."""
    unmounted_at_once("--everyone", "yes")


def unmounted_at_once(*arguments):
    with Broker("--reuse-wal", "5s", *arguments) as broker:
        if os.geteuid():
            raise harness.Skip("only root can mount")
        image, mount = broker.path("image"), broker.path("mount")
        os.mkdir(mount)
        with open(image, "wb") as f:
            f.truncate(32 << 20)
        run(["mkfs.ext4", "-q", image])
        run(["mount", "-o", "loop", image, mount])
        try:
            db = create(os.path.join(mount, "app.db"))
            umount = f"umount {mount} && mount -o loop {image} {mount}"
            for n, program in close_and(broker, db, lambda n: shell(umount)):
                at_once(program)
            # Nor if the keeper, or who closes for the broker, has no time to close its descriptors just then.
            with Short(1, db, broker, "last") as short:
                short.each()
                keeper, program = broker.status()["broker"]["keeper"], shell(umount)
                closers = processes_of(broker, "turnstile-recv")
                for pid, seconds in ((keeper, 0.2), *((pid, 0.6) for pid in closers)):
                    os.kill(pid, signal.SIGSTOP)
                    threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()
                short.each()
                at_once(program)
            check_rows(db, broker.record)
        finally:
            run(["umount", mount], check=False)


def killed_at_once(victims):
    with Broker("--reuse-wal", "5s") as broker, Load(broker.dir):
        db = made(broker)
        rows = 0
        for n in range(ROUNDS):
            with Short(2, db, broker, f"r{n}.") as short:
                pids = {"broker": broker.pid}
                for _ in range(3):
                    short.each("2")
                if "keeper" in victims:
                    pids["keeper"] = broker.status()["broker"]["keeper"]
                program = shell(f"{SHELL} {db} 'INSERT INTO rows VALUES(1, {n})'")
                short.each("5", short.names[:1])
                for victim in victims:
                    if victim == "broker":
                        broker.process.kill()
                    else:
                        os.kill(pids[victim], signal.SIGKILL)
                at_once(program)
                rows += 1
                assert is_read_by_nobody(db), n
                if "broker" in victims:
                    broker.process.wait(20)
                    broker.process = None
                    broker.start()
                elif n % 3 == 2:
                    # A keeper that ends four times in a minute is not started again.
                    broker.stop()
                    broker.start()
        plain(db, "DELETE FROM rows WHERE worker = '1'")
        check_rows(db, broker.record)


def test_the_broker_is_killed_at_once():
    killed_at_once(["broker"])


def test_the_keeper_is_killed_at_once():
    killed_at_once(["keeper"])


def test_both_are_killed_at_once():
    killed_at_once(["keeper", "broker"])
