"""A hostile client: whatever it sends, and however often, it hurts nobody's session but its own, and the broker
neither grows nor stops."""

import contextlib
import fcntl
import os
import signal
import socket
import sqlite3
import tempfile
import time

from harness import (Broker, Workers, bin, check_rows, connect, create, fails_without, is_busy, plain, run, slow, timeout,
                     wait_until, waits)
from test_gate import JOINED, PROTOCOL_VERSION, REFUSED, Wire, varint

# The messages by their number, in the order of src/wire/message.rs.
(INTRODUCE, JOIN, LOCK, CANCEL, UNLOCK, CHECK_RESERVED, JOURNAL_CLEAR, TURN_USED, OPEN_WAL_INDEX, GROW_WAL_INDEX,
 CLOSE_WAL_INDEX, LEAVE, STATUS, LOG) = range(14)
WAL_FILE, WAL_GREW = 18, 19
ANSWER_LOCK, ANSWER_WAL_INDEX, ANSWER_LEFT = 3, 5, 6
MAX_PACKET = 16 * 1024
HELLO = varint(0x74575253) + varint(PROTOCOL_VERSION)
FILE_SHARED = varint(0) + varint(1) + b"\0"  # Request::File { level: Shared, hot_journal: false }


def text(s):
    return varint(len(s.encode())) + s.encode()


def introduction(program="hostile"):
    return varint(INTRODUCE) + text(program) + varint(2 * os.getpid()) + b"\0"


def join(name, version="3.40.1"):
    """Join { id: 7, join: { name, has_shm, guest, allow_unsafe, sqlite_version, library } }"""
    return varint(JOIN) + varint(7) + b"\1" + text(name) + bytes(3) + text(version) + varint(1)


def liveness_memfd(size=4096, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL):
    fd = os.memfd_create("liveness", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    fcntl.lockf(fd, fcntl.LOCK_EX, 1)
    return fd


class Hostile(Wire):
    """Connected, and as far through the greeting as it is told to go."""

    def __init__(self, broker, program="hostile", hello=True, introduce=True):
        self.s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.s.connect(broker.socket)
        self.s.settimeout(10)
        self.liveness = self.seat = None
        if hello:
            self.send(HELLO)
            self.s.recv(4096)
        if hello and introduce:
            self.liveness = liveness_memfd()
            self.send(introduction(program), [self.liveness])
            assert self.s.recv(4096)[0] == 0, "no welcome"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.s.close()
        if self.liveness is not None:
            os.close(self.liveness)

    def joined(self, path, name=None, version="3.40.1", answered=JOINED):
        """Joins; `seat` is then (database, seat) as they travel. Returns the descriptors of the answer."""
        fd, directory = os.open(path, os.O_RDWR), os.open(os.path.dirname(path), os.O_PATH)
        self.send(join(name or os.path.basename(path), version), [fd, directory])
        os.close(fd)
        os.close(directory)
        answer, fds, _, _ = socket.recv_fds(self.s, 65536, 4)
        assert answer[0] == answered, answer
        if answered != JOINED:
            return fds
        _, rest = number(answer[1:])
        database, rest = number(rest)
        self.seat = (database, number(rest)[0])
        return fds

    def ask(self, data, fds=()):
        self.send(data, fds)
        return self.s.recv(65536)

    def ended(self):
        """Waits until the broker has ended the session."""
        try:
            while self.s.recv(65536):
                pass
        except ConnectionResetError:
            pass  # it had not read all
        except socket.timeout:
            raise AssertionError("the broker goes on with the session") from None


def number(data):
    """A varint and what follows it."""
    value = 0
    for i, byte in enumerate(data):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, data[i + 1:]
    raise AssertionError(f"half a number: {data!r}")


def key(seat):
    return varint(seat[0]) + varint(seat[1])


def lock(seat, request=FILE_SHARED, id_=7):
    """Lock { id, seat, ask: { request, ahead: false }, connection, thread }"""
    return varint(LOCK) + varint(id_) + key(seat) + request + b"\0" + varint(1) + varint(2 * os.getpid())


def with_seat(seat):
    """Every message that names a seat."""
    k, i = key(seat), varint(7)
    return {
        "Lock": lock(seat),
        "Cancel": varint(CANCEL) + k,
        "Unlock": varint(UNLOCK) + k + varint(0) + varint(0) + b"\0",  # Release::File { level: None, .. }
        "Unlock WRITE": varint(UNLOCK) + k + varint(2) + bytes([0, 1, 0]),  # Release::ShmExclusive
        "Unlock the turn": varint(UNLOCK) + k + varint(3),
        "CheckReserved": varint(CHECK_RESERVED) + i + k,
        "JournalClear": varint(JOURNAL_CLEAR) + k,
        "TurnUsed": varint(TURN_USED) + k,
        "OpenWalIndex": varint(OPEN_WAL_INDEX) + i + k,
        "GrowWalIndex": varint(GROW_WAL_INDEX) + i + k + varint(1),
        "CloseWalIndex": varint(CLOSE_WAL_INDEX) + k,
        "Leave": varint(LEAVE) + i + k,
    }


@contextlib.contextmanager
def victim(broker, db):
    """A member that writes all the time. Yields a function that waits until it has gone on for a while; at the end
    its rows are counted."""
    with Workers(1, "insert", 90.0, db, broker) as w:
        def goes_on(what="the victim to go on"):
            before = os.path.getsize(broker.record) if os.path.exists(broker.record) else 0
            wait_until(lambda: os.path.exists(broker.record) and os.path.getsize(broker.record) > before + 100
                       or w.processes[0].poll() is not None, what=what)
            assert w.processes[0].poll() is None, f"{what}: {w._stderr(0)}"
        w.go()
        goes_on("the victim to begin")
        yield goes_on
        goes_on()
        assert len(broker.members(db, w.pid(0))) == 1
        w.kill(0)
    check_rows(db, broker.record, killed=(0,))


def descriptors(broker):
    return len(os.listdir(f"/proc/{broker.pid}/fd"))


# --- what a client says of itself --------------------------------------------------------------------------------

def test_a_long_program_name_does_not_end_anothers_session():
    """The blocker's name goes into the answer to whoever waited for it; an answer that did not fit a packet ended the
    waiter's session, with all its databases."""
    with Broker() as broker:
        shared, private = create(broker.path("shared.db"), "delete"), create(broker.path("private.db"), "delete")
        one = connect(f"file:{shared}?turnstile_wait=300ms", uri=True, broker=broker, mode="gated")
        two = connect(private, mode="gated")
        one.execute("INSERT INTO rows VALUES('v', 0)")
        name = "x" * (MAX_PACKET - len(introduction("")) - 2)  # its length takes two bytes more
        with Hostile(broker, name) as hostile:
            hostile.joined(shared)
            assert hostile.ask(lock(hostile.seat))[0] == ANSWER_LOCK
            try:
                one.execute("INSERT INTO rows VALUES('v', 1)")
                raise AssertionError("wrote beside a reader")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            two.execute("INSERT INTO rows VALUES('v', 1)")
            assert one.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        one.execute("INSERT INTO rows VALUES('v', 1)")
        one.close()
        two.close()


def test_control_characters_of_a_client_reach_neither_status_nor_log():
    """They could rewrite the terminal of whoever looks."""
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m"
    with Broker() as broker:
        os.mkdir(broker.path("d"))
        db = create(broker.path("d/a\x1b[2J\n.db"))
        with Hostile(broker, "e" + evil) as hostile:
            hostile.joined(db, version="v" + evil)
            hostile.send(varint(LOG) + text("said " + evil))
            hostile.joined(db, name="no" + evil, answered=REFUSED)
            shown = run([bin(), "status"], env=broker.env).stdout
            assert "]0;owned" in shown and "hostile" not in shown, shown
            hostile.send(b"\xff")
            hostile.ended()
        for where, what in (("status", shown), ("log", broker.log())):
            odd = {c for c in what if c != "\n" and not c.isprintable()}
            assert not odd, f"{where}: {odd}: {what!r}"
        assert len([line for line in shown.splitlines() if "owned" in line]) == 1, shown


# --- what a client takes -----------------------------------------------------------------------------------------

def test_descriptors_that_are_not_wanted_are_closed():
    """Those of a packet that carried too many were received and kept open for ever."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            null = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
            wait_until(lambda: broker.status()["broker"]["sessions"] == 2)  # the victim's and status's
            before = descriptors(broker)
            for i in range(100):
                with Hostile(broker, hello=i % 2, introduce=i % 4 == 1) as hostile:
                    hostile.send(b"x" if i % 3 else HELLO, null)
                    hostile.ended()
            for n in (1, 2, 3, 4, 5, 253):
                with Hostile(broker) as hostile:
                    for message in (varint(STATUS) + varint(1), varint(LOG) + text("x")):
                        with contextlib.suppress(BrokenPipeError):  # ended at the first
                            hostile.send(message, (null * 26)[:n])
            wait_until(lambda: descriptors(broker) <= before, what=f"{descriptors(broker)} descriptors to be {before}")
            goes_on()


def test_a_wal_index_grows_by_what_is_used():
    """A client asked for 30,000 regions and the broker allocated a gigabyte."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            for count in (30000, 32768, 32769, 2**32 - 1):
                with Hostile(broker) as hostile:
                    fds = hostile.joined(db)
                    answer = hostile.ask(varint(GROW_WAL_INDEX) + varint(7) + key(hostile.seat) + varint(count))
                    assert answer[0] == ANSWER_WAL_INDEX, answer
                    index = max(fds, key=lambda fd: os.fstat(fd).st_size)
                    assert os.fstat(index).st_size == 1 << 30, "which one is the wal-index?"
                    assert os.fstat(index).st_blocks * 512 < 1 << 20, os.fstat(index)
                    assert hostile.ask(varint(LEAVE) + varint(8) + key(hostile.seat))[0] == ANSWER_LEFT
                    for fd in fds:
                        os.close(fd)
            goes_on()


@fails_without("late-cancel-is-foul")
def test_a_cancellation_that_has_crossed_its_answer_is_no_offence():
    """No hostile one: a client gives up a wait, reads that it was answered just then, and leaves. The broker reads both
    messages in one round and serves the second first. It ended the session, and with it every connection of the process.
    """
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Hostile(broker) as client:
            fds = client.joined(db)
            os.kill(broker.pid, signal.SIGSTOP)
            client.send(varint(CANCEL) + key(client.seat))
            client.send(varint(LEAVE) + varint(8) + key(client.seat))
            os.kill(broker.pid, signal.SIGCONT)
            answer = client.s.recv(65536)
            assert answer[:1] == bytes([ANSWER_LEFT]), f"{answer}\n{broker.log()}"
            try:
                answer = client.ask(varint(STATUS) + varint(9))
            except ConnectionError:
                answer = b""
            assert answer, f"the session was ended\n{broker.log()}"
            for fd in fds:
                os.close(fd)


@fails_without("old-news-is-foul")
def test_what_is_said_of_a_seat_that_was_closed_meanwhile_is_no_offence():
    """A client says that it has opened the WAL and lets its seat rest, which the broker sees in the segment before it reads
    that: with descriptors in it, and from another user, it takes a process more to be read. It closed the seat, and ended
    the session because of a seat that is not its own, at each open of a database that was opened again and again."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Hostile(broker) as client, open(db, "rb") as wal:
            for fd in client.joined(db):
                os.close(fd)
            assert client.ask(varint(LEAVE) + varint(8) + key(client.seat))[0] == ANSWER_LEFT
            client.send(varint(WAL_FILE) + key(client.seat), [wal.fileno()])
            client.send(varint(WAL_GREW) + key(client.seat))
            try:
                answer = client.ask(varint(STATUS) + varint(9))
            except ConnectionError:
                answer = b""
            assert answer, f"the session was ended\n{broker.log()}"


def opens_and_closes(paths):
    def program():
        for path in paths:
            db = connect(path)
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("INSERT INTO rows VALUES('o', 1)")
            db.close()
            time.sleep(0.003)
        return "ok"
    return program


def test_a_program_of_another_user_that_opens_and_closes_keeps_its_session():
    from test_foreign import STRANGER, as_user, root_only
    root_only()
    # In memory: a close that takes its time lets the broker read on.
    with Broker("--everyone", "yes") as broker, tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        # So many that each has lingered to its end when its turn comes again.
        dbs = [create(f"{place}/{i}.db") for i in range(16)]
        for path in (place, *dbs):
            os.chown(path, STRANGER, STRANGER)
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        with as_user(STRANGER, opens_and_closes(dbs * 3)) as said:
            assert said == "ok"
        assert "session ended" not in broker.log(), "session ended: " + broker.log()


def test_five_hundred_connections_at_once_disturb_nobody():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            wait_until(lambda: broker.status()["broker"]["sessions"] == 2)
            before = descriptors(broker)
            for hello in (False, True):
                crowd = [Hostile(broker, hello=hello, introduce=False) for _ in range(500)]
                goes_on()
                for hostile in crowd:
                    hostile.s.close()
                goes_on()
            wait_until(lambda: descriptors(broker) <= before, what=f"{descriptors(broker)} descriptors to be {before}")


@waits
@slow
@timeout(60)
def test_a_client_that_does_not_introduce_itself_is_dropped():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on, Hostile(broker, hello=False) as mute, \
                Hostile(broker, introduce=False) as shy, Hostile(broker) as idle:
            for hostile in (mute, shy):
                hostile.s.settimeout(20)
                hostile.ended()
            assert idle.ask(varint(STATUS) + varint(1))
            assert broker.log().count("it does not introduce itself") == 2
            goes_on()


# --- what a client sends -----------------------------------------------------------------------------------------

def test_a_broken_rule_ends_the_session_that_broke_it():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            stages = {"greeting": dict(hello=False), "introducing": dict(introduce=False), "open": {}}
            status = varint(STATUS) + varint(1)
            bad = {
                "half a message": {"greeting": HELLO[:3], "introducing": introduction()[:5],
                                   "open": join("app.db")[:-3]},
                "garbage": dict.fromkeys(stages, bytes(range(255, 0, -1))),
                "an unknown message": dict.fromkeys(stages, varint(17)),
                "bytes left over": {"greeting": HELLO + b"\0", "introducing": introduction() + b"\0",
                                    "open": status + b"\0"},
                "an oversized packet": dict.fromkeys(stages, varint(LOG) + text("x" * MAX_PACKET)),
                "a hundred thousand bytes": dict.fromkeys(stages, bytes(100_000)),
                "a string longer than its packet": dict.fromkeys(stages, varint(LOG) + varint(2**63) + b"x"),
                "a message out of order": {"greeting": status, "introducing": join("app.db"), "open": introduction()},
                "a text that is none": {"open": varint(LOG) + varint(2) + b"\xff\xfe"},
            }
            for what, messages in bad.items():
                for stage, message in messages.items():
                    with Hostile(broker, **stages[stage]) as hostile:
                        hostile.send(message)
                        try:
                            hostile.ended()
                        except AssertionError as e:
                            raise AssertionError(f"{what}, {stage}: {e}") from None
            with Hostile(broker, hello=False) as older:
                answer = older.ask(varint(0x74575253) + varint(99))
                assert b"install the same version" in answer, answer
                older.ended()
            goes_on()


def test_only_a_sealed_memfd_is_taken_for_liveness():
    """The broker asks it for its lock at each tick; of a file on a filesystem of the client's own it could wait for
    ever."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on, tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), 4096)
            fcntl.lockf(file, fcntl.LOCK_EX, 1)
            pipe = os.pipe()
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            bad = {
                "a file": file.fileno(), "a pipe": pipe[1], "a directory": os.open(broker.dir, os.O_RDONLY),
                "/dev/zero": os.open("/dev/zero", os.O_RDWR), "O_PATH": os.open(db, os.O_PATH),
                "no seals": liveness_memfd(seals=0), "a memfd without F_SEAL_SEAL": liveness_memfd(seals=seals),
                "a small memfd": liveness_memfd(1), "a large memfd": liveness_memfd(1 << 30),
            }
            for what, fd in bad.items():
                with Hostile(broker, introduce=False) as hostile:
                    hostile.send(introduction(), [fd])
                    try:
                        hostile.ended()
                    except AssertionError as e:
                        raise AssertionError(f"{what}: {e}") from None
            assert broker.log().count("is not a sealed memfd") == len(bad), broker.log()
            with Hostile(broker, introduce=False) as hostile:
                hostile.send(introduction())
                hostile.ended()
            goes_on()


def test_anothers_seat_ends_the_liars_session_only():
    """And does nothing to the seat: its owner is in the middle of a transaction."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            owner = connect(db, broker=broker, mode="gated")
            owner.execute("BEGIN IMMEDIATE")
            owner.execute("INSERT INTO rows VALUES('v', 0)")
            entry, turn = broker.members(db), broker.database(db)["turn"]["seat"]
            assert len(entry) == 1 and entry[0]["seat"] == turn
            for what in with_seat((0, 0)):
                with Hostile(broker) as liar:
                    for fd in liar.joined(db):
                        os.close(fd)
                    for seat in ((liar.seat[0], turn), (liar.seat[0], 1000), (2**32 - 1, turn)):
                        with Hostile(broker) as another:
                            another.send(with_seat(seat)[what])
                            try:
                                another.ended()
                            except AssertionError as e:
                                raise AssertionError(f"{what}, {seat}: {e}") from None
                    liar.send(with_seat((liar.seat[0], turn))[what])
                    liar.ended()
                assert broker.database(db)["turn"]["seat"] == turn, what
                owner.execute("INSERT INTO rows VALUES('v', 1)")
            owner.execute("COMMIT")
            wait_until(lambda: len(broker.members(db)) == 1, what="the liars' own seats")
            owner.execute("INSERT INTO rows VALUES('v', 2)")
            owner.close()
            assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["14"]]


def test_locks_that_do_not_exist_are_not_had():
    """Wal-index slots out of range, levels that SQLite never asks for, two requests of one seat at once."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on:
            with Hostile(broker) as hostile:
                hostile.joined(db)
                for first, count in ((0, 0), (8, 1), (7, 2), (255, 255), (0, 255)):
                    for request in (varint(1) + bytes([first, count]), varint(2) + bytes([first, count, 0])):
                        answer = hostile.ask(lock(hostile.seat, request))
                        assert answer[:3] == bytes([ANSWER_LOCK, 7, 1]), (first, count, answer)
                    for kind in (1, 2):
                        hostile.send(varint(UNLOCK) + key(hostile.seat) + varint(kind) + bytes([first, count, 0]))
                for level in (0, 3, 2, 4):
                    answer = hostile.ask(lock(hostile.seat, varint(0) + varint(level) + b"\0"))
                    assert answer[:3] == bytes([ANSWER_LOCK, 7, 1]), (level, answer)
                goes_on()
            goes_on()
        other = create(broker.path("other.db"), "delete")
        owner = connect(other, broker=broker, mode="gated")
        owner.execute("BEGIN EXCLUSIVE")
        with Hostile(broker) as hostile:
            for fd in hostile.joined(other):
                os.close(fd)
            for _ in range(2):
                hostile.send(lock(hostile.seat))
            hostile.ended()
        owner.execute("INSERT INTO rows VALUES('v', 1)")
        owner.execute("COMMIT")
        owner.close()


def test_a_client_that_does_not_read_its_answers_is_dropped():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with victim(broker, db) as goes_on, Hostile(broker) as hostile:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(100_000):
                    hostile.send(varint(STATUS) + varint(1))
                raise AssertionError("the broker keeps all the answers")
            hostile.ended()
            goes_on()
