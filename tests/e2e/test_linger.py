"""Databases of short-lived programs linger with the broker: cheap to close and open, and yet closed means complete."""

import os
import shutil
import sqlite3
import threading
import time

from harness import (PYTHON, Broker, Programs, Record, acknowledged, check_rows, connect, create, fails_without, lib, plain,
                     plain_env, run, run_workers, slow, wait_until)

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

    def __init__(self, n, db, broker):
        names = [f"s{i}" for i in range(n)]
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


def lingers(broker, db):
    entry = broker.database(db)
    return bool(entry and entry["lingers"])


def made(broker, name="app.db"):
    return create(broker.path(name), "wal", synchronous="FULL")


def stream(short, broker, db, connections=3):
    """So many connections, one after the other: from the second one on the database lingers."""
    for _ in range(connections):
        short.each("1", short.names[:1])
    assert lingers(broker, db), broker.status()


def held(db):
    return {(w, s) for w, s in plain(db, "SELECT worker, seq FROM rows")}


def test_a_database_that_is_closed_once_does_not_linger():
    with Broker() as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            short.each("3")
            assert broker.database(db) is None
            assert not os.path.exists(db + "-wal")
            plain(db, "INSERT INTO rows VALUES('plain', 1)")


def test_a_stream_of_connections_keeps_the_segment_and_the_wal():
    with Broker(log="turnstile=debug") as broker:
        db = made(broker)
        with Short(3, db, broker) as short:
            stream(short, broker, db)
            inode = os.stat(db + "-wal").st_ino
            opened = broker.log().count(" opened database")
            for _ in range(10):
                for name in short.names:
                    short.each("2", [name])
            assert broker.log().count(" opened database") == opened
            assert os.stat(db + "-wal").st_ino == inode
            # And when nobody comes any more, it ends.
            wait_until(lambda: broker.database(db) is None, what="the database to be let go")
            assert os.path.getsize(db + "-wal") == 0
            plain(db, "INSERT INTO rows VALUES('plain', 1)")
            plain(db, "DELETE FROM rows WHERE worker = 'plain'")
        check_rows(db, broker.record)


@fails_without("last-close-copies-nothing")
def test_a_copy_after_the_last_close_is_complete():
    with Broker() as broker:
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


def test_a_plain_client_that_opens_it_gets_in_soon():
    with Broker("--linger", "20s") as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            for _ in range(5):
                stream(short, broker, db)
                begun = time.monotonic()
                plain(db, "INSERT INTO rows VALUES('plain', 1)", busy_ms=5000)
                assert time.monotonic() - begun < 2
        assert plain(db, "SELECT count(*) FROM rows WHERE worker = 'plain'") == [["5"]]


def test_no_linger_where_it_is_switched_off():
    with Broker("--linger", "0s") as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            for _ in range(5):
                short.each()
                assert broker.database(db) is None and not os.path.exists(db + "-wal")


def backup(db, path):
    """A database of one row, as somebody may put it in the place of `db`."""
    shutil.copyfile(db, path)
    plain(path, "DELETE FROM rows; INSERT INTO rows VALUES('backup', 1)")
    plain(path, "PRAGMA wal_checkpoint(TRUNCATE)")


@fails_without("changed-file-trusted")
def test_a_backup_that_is_written_over_it_is_what_the_next_one_finds():
    with Broker("--linger", "20s", log="turnstile=debug") as broker:
        db, old = made(broker), broker.path("old.db")
        backup(db, old)
        with Short(2, db, broker) as short:
            for n in range(3):
                stream(short, broker, db, 4)
                with open(old, "rb") as f:
                    content = f.read()
                # In place, as cp does it, and of the same size.
                size = os.path.getsize(db)
                with open(db, "r+b") as f:
                    f.write(content)
                    f.truncate(max(len(content), size) if n == 1 else len(content))
                short.each("1", short.names[1:])
                rows = plain(db, "SELECT worker, count(*) FROM rows GROUP BY 1 ORDER BY 1", busy_ms=5000)
                assert rows == [["backup", "1"], ["s1", "1"]], rows
                assert plain(db, "PRAGMA integrity_check", busy_ms=5000) == [["ok"]]


@fails_without("replaced-file-lingers")
def test_a_backup_that_is_renamed_over_it_is_what_plain_clients_find():
    with Broker("--linger", "20s") as broker:
        db, old = made(broker), broker.path("old.db")
        with Short(1, db, broker) as short:
            stream(short, broker, db, 5)
            backup(db, old)
            stream(short, broker, db, 5)
            assert os.path.getsize(db + "-wal") > 0
            os.rename(old, db)
            wait_until(lambda: os.path.getsize(db + "-wal") == 0, timeout=3, what="its WAL to be emptied")
            assert plain(db, "SELECT worker, seq FROM rows") == [["backup", "1"]]
            assert plain(db, "PRAGMA integrity_check") == [["ok"]]


@fails_without("name-not-looked-at,replaced-file-lingers", attempts=5)
def test_a_member_of_a_file_that_was_renamed_over_it_finds_no_wal_of_the_other():
    with Broker("--linger", "20s") as broker:
        db, old = made(broker), broker.path("old.db")
        with Short(2, db, broker) as short:
            stream(short, broker, db, 5)
            backup(db, old)
            stream(short, broker, db, 5)
            short.tell("s0", "1")
            short.done("s0")
            os.rename(old, db)
            short.each("1", ["s1"])
            rows = plain(db, "SELECT worker, count(*) FROM rows GROUP BY 1 ORDER BY 1", busy_ms=5000)
            assert rows == [["backup", "1"], ["s1", "1"]], rows


def test_a_wal_that_somebody_removed_is_not_missed():
    with Broker("--linger", "20s") as broker:
        db = made(broker)
        with Short(2, db, broker) as short:
            for what in (lambda: os.unlink(db + "-wal"), lambda: os.truncate(db + "-wal", 0)):
                stream(short, broker, db)
                what()
                short.each("1", ["s1"])
        check_rows(db, broker.record, retry=30)


def test_modes_change_after_it_has_lingered():
    with Broker() as broker:
        db = made(broker)
        with Short(2, db, broker) as short:
            for sql in ("PRAGMA journal_mode=DELETE", "PRAGMA locking_mode=EXCLUSIVE; BEGIN IMMEDIATE; COMMIT", "VACUUM",
                        "PRAGMA wal_checkpoint(TRUNCATE)"):
                stream(short, broker, db)
                c = connect(db, broker=broker, mode="gated")
                c.executescript(sql)
                c.execute("PRAGMA locking_mode=NORMAL")
                c.execute("INSERT INTO rows VALUES('m', ?)", (len(sql),))
                c.close()
                short.each("2", ["s1"])
                plain(db, "PRAGMA journal_mode=WAL", busy_ms=5000)
        assert plain(db, "SELECT count(*) FROM rows WHERE worker = 'm'", busy_ms=5000) == [["4"]]
        plain(db, "DELETE FROM rows WHERE worker = 'm'", busy_ms=5000)
        check_rows(db, broker.record)


def test_a_broker_that_stops_leaves_no_wal():
    with Broker("--linger", "20s") as broker:
        db = made(broker)
        with Short(1, db, broker) as short:
            stream(short, broker, db)
            broker.stop()
            assert os.path.getsize(db + "-wal") == 0
            plain(db, "SELECT count(*) FROM rows")
        check_rows(db, broker.record)


def test_members_that_stay_are_not_disturbed():
    """Short-lived ones come and go beside one that stays, and alone, by turns."""
    with Broker() as broker:
        db = made(broker)
        record = Record(broker.record)
        with Short(3, db, broker) as short:
            for n in range(10):
                stream(short, broker, db, 2)
                c = connect(db, broker=broker, mode="gated")
                for seq in range(20):
                    c.execute("INSERT INTO rows VALUES('stays', ?)", (20 * n + seq,))
                    record.add("stays", 20 * n + seq)
                    if seq % 5 == 0:
                        short.each()
                c.close()
        record.close()
        check_rows(db, broker.record)


def test_one_process_opens_and_closes_without_a_message():
    with Broker(log="turnstile=debug") as broker:
        db = made(broker)
        record = Record(broker.record)
        before = None
        for seq in range(300):
            c = connect(db, broker=broker, mode="gated")
            c.execute("INSERT INTO rows VALUES('m', ?)", (seq,))
            c.close()
            record.add("m", seq)
            if seq == 3:
                before = broker.log().count("joined")
        assert broker.log().count("joined") - before <= 3, broker.log()
        record.close()
        check_rows(db, broker.record, retry=30)
