"""What one user may have at a broker, and that it does not get more: others need the rest."""

import contextlib
import os
import resource
import socket
import sqlite3
import time

from harness import Broker, connect, create, fails_without, is_busy, run, bin, timeout, wait_until
from test_foreign import STRANGER, as_user, root_only
from test_gate import JOINED, REFUSED
from test_hostile import Hostile, join, victim

CROWD = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200)


HELD = []  # as long as their process lives


def sockets(broker, count):
    """Connects as often as it can, all at once, and says how many the broker turned away, with what it said."""
    def crowd():
        refused = b""
        for _ in range(count):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.connect(broker.socket)
            HELD.append(s)
        turned_away = 0
        for s in HELD:
            s.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                answer = s.recv(4096)
                turned_away += 1
                refused = answer or refused
        return turned_away, refused
    return crowd


@fails_without("users-without-limit")
@timeout(60)
def test_a_user_that_holds_ten_thousand_sockets_keeps_nobody_out():
    root_only()
    with Broker("--everyone", "yes", "--user-sessions", "300") as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            with as_user(STRANGER, sockets(broker, CROWD), files=CROWD + 100) as (turned_away, refused):
                assert b"as many as one user may" in refused and b"--user-sessions" in refused, refused
                # Those that came last may not have been accepted when they looked.
                wait_until(lambda: user(broker, STRANGER)["sessions"] == 300, what="its sessions to be as many as it may")
                assert turned_away > CROWD / 2, turned_away
                goes_on()
                with Hostile(broker) as another:
                    another.joined(db)
                said, = [as_result(STRANGER, lambda: refusal(broker))]
                assert "as many as one user may" in said, said
            wait_until(lambda: not user(broker, STRANGER), what="the crowd to be gone")
            goes_on()
        assert broker.log().count("session refused") < CROWD / 10, "its lines fill the log"  # a hundred a second


def refusal(broker):
    done = run([bin(), "status"], env=broker.env, check=False)
    return done.stdout + done.stderr


def as_result(uid, function):
    with as_user(uid, function) as result:
        return result


def user(broker, uid):
    return next((u for u in broker.status()["broker"]["users"] if u["uid"] == uid), None)


@fails_without("users-without-limit")
def test_a_user_opens_no_more_databases_than_it_may():
    with Broker("--user-databases", "2") as broker:
        paths = [create(broker.path(f"{n}.db")) for n in range(3)]
        one, two = (connect(p, broker=broker, mode="gated") for p in paths[:2])
        seen = user(broker, os.geteuid())
        assert seen["databases"] == 2 and broker.status()["broker"]["limits"]["databases"] == 2, seen
        with Hostile(broker) as other:
            other.joined(paths[2], answered=REFUSED)
            assert "2 databases at this broker, as many as one user may" in broker.log()
            other.joined(paths[0])  # it is open already
        one.execute("INSERT INTO rows VALUES('v', 1)")
        one.close()
        wait_until(lambda: not broker.database(paths[0]), what="the first to be closed")
        three = connect(paths[2], mode="gated")
        three.execute("INSERT INTO rows VALUES('v', 1)")
        for db in (two, three):
            db.close()
        shown = run([bin(), "status"], env=broker.env).stdout
        assert "a user may have" in shown and "2 databases" in shown, shown


@fails_without("users-without-limit")
def test_descriptors_that_are_not_received_are_not_sent_for_ever():
    """The kernel counts those that are under way against the broker's user, over all its sockets."""
    with Broker("--user-descriptors", "7") as broker:
        paths = [create(broker.path(f"{n}.db")) for n in range(4)]
        goes_on = connect(create(broker.path("other.db")), broker=broker, mode="gated")

        def ask(hostile, path):
            fd, directory = os.open(path, os.O_RDWR), os.open(os.path.dirname(path), os.O_PATH)
            hostile.send(join(os.path.basename(path)), [fd, directory])
            os.close(fd)
            os.close(directory)

        # Three for each; also of a session that has ended with them unread.
        with Hostile(broker) as gone, Hostile(broker) as hostile:
            ask(gone, paths[0])
            wait_until(lambda: broker.database(paths[0]), what="the first to be open")
            gone.send(b"\xff")
            ask(hostile, paths[1])
            wait_until(lambda: broker.database(paths[1]), what="the second to be open")
            ask(hostile, paths[2])
            wait_until(lambda: "descriptors that it has not received" in broker.log(), timeout=3,
                       what="the third to be refused")
            assert broker.database(paths[2]) is None, "kept open for nobody"
            assert user(broker, os.geteuid())["descriptors"] >= 6
            for expected in (JOINED, REFUSED):
                answer, fds, _, _ = socket.recv_fds(hostile.s, 65536, 4)
                assert answer[0] == expected and len(fds) == (3 if expected == JOINED else 0), answer
            hostile.joined(paths[3])
        goes_on.execute("INSERT INTO rows VALUES('v', 1)")
        goes_on.close()


@timeout(60)
def test_a_flood_of_connections_and_messages_stops_nobody():
    """Connecting as fast as it can, and saying as much as it can, from two processes at once."""
    with Broker() as broker:
        db = create(broker.path("app.db"))

        def connections():
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, contextlib.suppress(OSError):
                    s.setblocking(False)
                    s.connect(broker.socket)

        def messages():
            from test_hostile import LOG, STATUS, text, varint
            end = time.monotonic() + 1.2
            with Hostile(broker) as flood:
                flood.s.setblocking(False)
                while time.monotonic() < end:
                    with contextlib.suppress(OSError):
                        flood.send(varint(LOG) + text("x" * 1000))
                        flood.send(varint(STATUS) + varint(1))
                        flood.s.recv(65536)

        with victim(broker, db) as goes_on:
            with as_user(None, connections, wait=False), as_user(None, messages, wait=False):
                for _ in range(5):
                    with Hostile(broker) as another:
                        another.joined(db)
                    goes_on()
        assert broker.log().count("x" * 900) <= 500, "its lines fill the log"
        assert "more lines about this user" in broker.log()
        member = connect(db, broker=broker, mode="gated")
        try:
            member.execute("INSERT INTO rows VALUES('v', 1)")
        except sqlite3.OperationalError as e:
            raise AssertionError("busy" if is_busy(e) else str(e)) from None
        member.close()


def seats(broker, path, most):
    """Joins as often as it may, to read, and says how often that was and what it was told then."""
    def reader():
        hostile = Hostile(broker)
        HELD.append(hostile)
        fd, directory = os.open(path, os.O_RDONLY), os.open(os.path.dirname(path), os.O_PATH)
        for count in range(most):
            hostile.send(join(os.path.basename(path)), [fd, directory])
            answer, fds, _, _ = socket.recv_fds(hostile.s, 65536, 4)
            for received in fds:
                os.close(received)
            if answer[0] != JOINED:
                return count, answer
        return most, b""
    return reader


@fails_without("readers-take-all")
@timeout(60)
def test_readers_leave_seats_for_those_who_may_write():
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o644)
        first = connect(db, broker=broker, mode="gated")
        with as_user(STRANGER, seats(broker, db, 1100)) as (one, said), \
                as_user(STRANGER + 1, seats(broker, db, 1100)) as (other, _):
            try:
                with contextlib.closing(connect(db, timeout=0)) as writer:
                    writer.execute("INSERT INTO rows VALUES('w', 1)")
            except sqlite3.Error as e:
                raise AssertionError(f"{one} and {other} readers, and a writer is refused: {e}") from None
            assert (one, other) == (512, 256), (one, other)
            assert b"for those who may write" in said, said
        first.close()
