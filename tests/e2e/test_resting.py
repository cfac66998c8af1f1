"""A closed connection's seat rests with its process: opening again is cheap, and yet closed means closed."""

import mmap
import os
import random
import signal
import sqlite3
import struct
import time

from harness import (PYTHON, Broker, Programs, Workers, check_rows, connect, create, fails_without, lib, plain,
                     plain_env, run_workers, slow, timeout, wait_until)
from test_broker_death import kill_both
from test_gate import JOINED, REFUSED, join_by_hand

# A member in another process: says `ready`, then obeys lines.
MEMBER = """
import sqlite3, sys
db, lib = sys.argv[1:3]
open_ = []
def connection():
    c = sqlite3.connect(db, timeout=0, isolation_level=None)
    c.enable_load_extension(True)
    c.load_extension(lib)
    c.execute("SELECT count(*) FROM rows").fetchone()
    return c
for line in sys.stdin:
    try:
        if line == "open\\n":
            open_.append(connection())
        elif line == "close\\n":
            open_.pop().close()
        elif line == "write\\n":
            open_[-1].execute("INSERT INTO rows VALUES('other', 1)")
        print("done", flush=True)
    except Exception as e:
        print(repr(e), flush=True)
"""


class Other(Programs):
    """Another process with connections of its own."""

    def __init__(self, db, broker):
        super().__init__({"other": [PYTHON, "-c", MEMBER, db, lib()]}, broker.env)

    def does(self, what):
        p = self.processes["other"]
        p.stdin.write(what.encode() + b"\n")
        p.stdin.flush()
        said = self._line("other", time.monotonic() + 20, f"to {what}")
        assert said == b"done", said


def resting(broker, db, pid=None):
    entry = broker.database(db)
    return [m for m in (entry["resting"] if entry else []) if pid in (None, m["pid"])]


def log_of_joins(broker):
    return sum("joined" in line for line in broker.log().splitlines())


def test_an_opened_again_connection_takes_its_seat_without_a_message():
    with Broker(log="turnstile=debug") as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            assert len(resting(broker, db, os.getpid())) == 1
            assert len(broker.members(db, os.getpid())) == 0
            before = log_of_joins(broker)
            for n in range(100):
                c = connect(db, mode="gated")
                c.execute("INSERT INTO rows VALUES('m', ?)", (n,))
                assert len(broker.members(db, os.getpid())) == 1
                c.close()
            assert log_of_joins(broker) == before
            # Not all of many.
            many = [connect(db, mode="gated") for _ in range(9)]
            for c in many:
                c.close()
            wait_until(lambda: len(resting(broker, db, os.getpid())) == 4, what="the others to leave")
            other.does("close")
        assert plain(db, "SELECT count(*) FROM rows") == [["100"]]


@fails_without("the-resting-count")
def test_a_plain_client_gets_in_at_the_last_close_although_seats_rest():
    with Broker("--reuse-wal", "0s") as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            with Other(db, broker) as other:
                for _ in range(5):
                    other.does("open")
                    ours = connect(db, broker=broker, mode="gated")
                    ours.close()
                    assert resting(broker, db, os.getpid())
                    ours = connect(db, mode="gated")
                    other.does("write")
                    other.does("close")  # its seat rests now
                    assert resting(broker, db, other.pid("other")) and not resting(broker, db, os.getpid())
                    ours.execute("INSERT INTO rows VALUES('m', 1)")
                    ours.close()
                    # At once, and no WAL is left.
                    plain(db, "INSERT INTO rows VALUES('plain', 1)")
                    assert broker.database(db) is None
                    assert not os.path.exists(db + "-wal")
            assert plain(db, "SELECT worker, count(*) FROM rows GROUP BY 1 ORDER BY 1") == \
                [["m", "5"], ["other", "5"], ["plain", "5"]]
            assert plain(db, "PRAGMA integrity_check") == [["ok"]]


def test_a_process_whose_seats_were_closed_holds_no_descriptor_of_the_database():
    """Closed later, one would drop the POSIX locks of a plain connection of its process."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            other.does("close")
            fds = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{n}")]
            assert db not in fds, fds
            # A plain connection of this process: in, and not disturbed by what the next member's open clears away.
            earlier = sqlite3.connect(f"file:{db}?vfs=unix-excl", uri=True, isolation_level=None)
            earlier.execute("INSERT INTO rows VALUES('p', 1)")
            held = posix_locks(db)
            assert held
            try:
                connect(db).close()  # finds its seat closed; guest mode or refused, the locks stay
            except sqlite3.OperationalError:
                pass
            assert posix_locks(db)[:len(held)] == held
            earlier.close()


def posix_locks(db):
    owner, file = f" {os.getpid()} ", f":{os.stat(db).st_ino} "
    with open("/proc/locks") as f:
        return sorted(line.split()[1:] for line in f if "POSIX" in line and owner in line and file in line)


def test_a_file_that_was_replaced_is_joined_anew():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            # Another file under the name.
            os.rename(db, db + ".old")
            os.rename(db + "-wal", db + ".old-wal")
            create(db)
            c = connect(db, mode="gated")
            c.execute("INSERT INTO rows VALUES('new', 1)")
            assert len(broker.members(db, os.getpid())) == 1
            c.close()
            assert plain(db, "SELECT count(*) FROM rows") == [["1"]]
            assert len(resting(broker, db + ".old", os.getpid())) == 1
            # The old file under another name is the same database somewhere else: refused, as ever.
            try:
                connect(db + ".old").close()
                raise AssertionError("one file under two names")
            except sqlite3.OperationalError:
                pass
            # And back.
            os.rename(db, db + ".new")
            os.rename(db + ".old", db)
            os.rename(db + ".old-wal", db + "-wal")
            c = connect(db, mode="gated")
            c.execute("INSERT INTO rows VALUES('back', 1)")
            c.close()
            other.does("write")
            other.does("close")
        assert plain(db, "SELECT count(*) FROM rows") == [["2"]]


@fails_without("home-is-the-file")
def test_a_file_in_a_directory_of_the_same_name_is_not_at_home():
    """Its WAL would be looked for in the new directory, while others have it open in the old one."""
    with Broker() as broker:
        os.mkdir(broker.path("d"))
        db = create(broker.path("d/app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            os.rename(broker.path("d"), broker.path("e"))
            os.mkdir(broker.path("d"))
            os.link(broker.path("e/app.db"), db)
            try:
                connect(db).close()
                raise AssertionError("one file in two directories")
            except sqlite3.OperationalError:
                pass
            # Through a link to the old name it is not at home either.
            os.unlink(db)
            os.symlink(broker.path("e/app.db"), db)
            c = None
            try:
                c = connect(db)
            except sqlite3.OperationalError:
                pass
            if c is not None:
                c.close()
            other.does("close")


def test_a_database_that_is_deleted_and_made_anew():
    with Broker() as broker:
        db = broker.path("app.db")
        for n in range(3):
            create(db)
            with Other(db, broker) as other:
                other.does("open")
                for _ in range(3):
                    c = connect(db, broker=broker, mode="gated")
                    c.execute("INSERT INTO rows VALUES('m', 1)")
                    c.close()
                other.does("close")
            assert plain(db, "SELECT count(*) FROM rows", busy_ms=5000) == [["3"]], n
            os.unlink(db)


def test_a_fork_with_a_seat_at_rest():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    c = connect(db, mode="gated")
                    c.execute("INSERT INTO rows VALUES('child', 1)")
                    mine = len(broker.members(db, os.getpid()))
                    c.close()
                    os.write(write, b"%d" % mine)
                    os.read(read, 0)
                    signal.pause()
                finally:
                    os._exit(0)
            assert os.read(read, 10) == b"1", "the child has a seat of its own"
            assert len(resting(broker, db, os.getpid())) == 1
            assert len(resting(broker, db, child)) == 1
            c = connect(db, mode="gated")
            c.execute("INSERT INTO rows VALUES('parent', 1)")
            c.close()
            other.does("close")
            plain(db, "INSERT INTO rows VALUES('plain', 1)")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert plain(db, "SELECT count(*) FROM rows") == [["3"]]


def test_processes_with_seats_at_rest_are_killed():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        ours = connect(db, broker=broker, mode="gated")
        with Other(db, broker) as other:
            other.does("open")
            other.does("close")
            assert len(resting(broker, db)) == 1
            other.kill("other")
            wait_until(lambda: not resting(broker, db), what="the dead seat")
        ours.execute("INSERT INTO rows VALUES('m', 1)")
        # And the one in use is killed while another rests.
        with Other(db, broker) as other:
            other.does("open")
            ours.close()
            assert len(resting(broker, db)) == 1
            other.kill("other")
            plain(db, "INSERT INTO rows VALUES('plain', 1)", retry=5)
        wait_until(lambda: broker.database(db) is None, what="the database to be closed")
        c = connect(db, mode="gated")
        assert c.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        c.close()


@fails_without("gate-left-to-the-resting")
def test_the_last_one_out_opens_the_gate_when_the_broker_was_killed():
    """Without a keeper. With one: test_broker_death.py."""
    with Broker("--no-keeper") as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            broker.kill()
            other.does("write")
            other.does("close")
            # This process holds the gate still, by a seat that rests.
            assert plain(db, "SELECT count(*) FROM rows") == [["1"]]
            broker.start()
            c = connect(db, mode="gated")
            c.execute("INSERT INTO rows VALUES('m', 1)")
            c.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["2"]]


def test_an_idle_broker_exits_over_seats_that_rest():
    with Broker("--idle-exit", "300ms") as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other:
            other.does("open")
            connect(db, broker=broker, mode="gated").close()
            other.does("close")
            wait_until(lambda: not broker.alive(), what="the broker's exit")
            broker.process = None
        broker.start()
        c = connect(db, mode="gated")
        c.close()


def test_a_thousand_times_open_and_closed_beside_a_plain_client():
    """The plain client comes whenever nobody is in: it never waits, and sees all that was written."""
    with Broker("--reuse-wal", "0s") as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as other, Plain(db) as plain_client:
            rows = 0
            for n in range(250):
                c = connect(db, broker=broker, mode="gated")
                other.does("open")
                for _ in range(3):
                    c.close()
                    c = connect(db, mode="gated")
                c.execute("INSERT INTO rows VALUES('m', ?)", (n,))
                first, second = (c.close, lambda: other.does("close"))
                for close in (first, second) if n % 2 else (second, first):
                    close()
                rows += 2
                assert plain_client.insert_and_count(n) == rows
        assert plain(db, "PRAGMA integrity_check") == [["ok"]]


SEATS, FIRST_SEAT, SEAT_SIZE, STATE = 1023, 8192, 128, 36  # segment/layout.rs
RESTING = 1


def test_a_seat_at_rest_is_closed_when_its_number_is_wanted():
    """And the process that it belonged to does not take it back, whatever it is by then."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        answer, fds, wire = join_by_hand(broker, db, os.O_RDWR)
        assert answer[0] == JOINED and len(fds) == 3, (answer, fds)
        control = mmap.mmap(fds[0], FIRST_SEAT + SEATS * SEAT_SIZE)

        def state(seat):
            return struct.unpack_from("I", control, FIRST_SEAT + (seat - 1) * SEAT_SIZE + STATE)[0]

        fd, dirfd = os.open(db, os.O_RDWR), os.open(broker.dir, os.O_PATH)
        for _ in range(SEATS - 1):
            answer, _ = wire.join("app.db", fd, dirfd)
            assert answer[0] == JOINED, answer
        assert wire.join("app.db", fd, dirfd)[0][0] == REFUSED
        struct.pack_into("I", control, FIRST_SEAT + 4 * SEAT_SIZE + STATE, RESTING)
        assert wire.join("app.db", fd, dirfd)[0][0] == JOINED
        assert state(5) == 4, "its number has been given out once more"
        assert wire.join("app.db", fd, dirfd)[0][0] == REFUSED


class Plain(Programs):
    """A plain process that opens the database for each insert."""

    def __init__(self, db):
        script = """
import sqlite3, sys
for line in sys.stdin:
    try:
        c = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
        c.execute("INSERT INTO rows VALUES('plain', ?)", (int(line),))
        print(c.execute("SELECT count(*) FROM rows").fetchone()[0], flush=True)
        c.close()
    except Exception as e:
        print(repr(e), flush=True)
"""
        super().__init__({"plain": [PYTHON, "-c", script, db]}, plain_env())

    def insert_and_count(self, n):
        p = self.processes["plain"]
        p.stdin.write(b"%d\n" % n)
        p.stdin.flush()
        said = self._line("plain", time.monotonic() + 20, "to insert")
        assert said.isdigit(), said
        return int(said)


def opening(w):
    """Opens, writes a row, closes. Option: pause, at most so many seconds of each."""
    w.ready()
    seq = 0
    while w.running():
        time.sleep(random.random() * w.options.get("pause", 0))

        def write():
            c = w.connect(timeout=5)
            try:
                c.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            finally:
                c.close()
        if w.measure(write, seq):
            seq += 1


@fails_without("abandoned-before-claimed,members-not-looked-for")
def test_a_seat_that_rests_is_still_its_own_when_its_process_hands_the_database_back():
    """Broker and keeper are gone. Between handing back and saying which seats it has, nobody else's word counts."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(1, "insert", 60.0, db, broker) as w:
            w.ready()  # in, and has nothing to say
            connect(db, broker=broker, mode="gated").close()
            kill_both(broker)
            broker.start()
            member = connect(db, mode="gated")
            member.execute("INSERT INTO rows VALUES('m', 1)")
            assert broker.members(db, os.getpid()), broker.status()
            member.close()
            w.kill(0)
        assert plain(db, "SELECT count(*) FROM rows", retry=10) == [["1"]]
        assert "session ended" not in broker.log()


@fails_without("leaves-what-is-not-its-own", message="session ended")
def test_a_seat_that_the_next_broker_does_not_know_is_not_given_up_to_it():
    """It rested in a segment that ended with a stopped broker. Said to the next one, its number would be another's: the
    session would be ended, and all of its process's seats with it."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(1, "insert", 60.0, db, broker) as w:
            w.ready()
            connect(db, broker=broker, mode="gated").close()
            broker.stop()
            w.kill(0)
        broker.start()
        member = connect(db, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        member.close()
        assert plain(db, "SELECT count(*) FROM rows", retry=10) == [["1"]]
        assert "session ended" not in broker.log(), broker.log()


@timeout(120)
@slow
def test_processes_that_open_write_and_close_in_turn_lose_nothing():
    for journal in ("wal", "delete"):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            results = run_workers(3, opening, 3.0, path=db, broker=broker)
            assert sum(r["committed"] for r in results) > 50, results
            check_rows(db, broker.record)
            assert broker.database(db) is None


@timeout(120)
@slow
def test_beside_a_plain_client_that_opens_and_closes_nothing_is_lost():
    """The gate opens and closes all the time, over seats that rest or have just been taken in use again."""
    for journal in ("wal", "delete"):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            pause = {"options": {"pause": 0.004}}  # so that now and then nobody is in
            with Workers(2, opening, 5.0, db, broker, **pause) as members, \
                    Workers(1, opening, 5.0, db, record=broker.record, first=10, **pause) as others:
                members.ready()
                others.ready()
                members.go()
                others.go()
                results = members.wait() + others.wait()
            assert all(r["committed"] for r in results), results
            check_rows(db, broker.record)
