"""Who keeps the WAL from being copied back: `turnstile status` and `doctor` name the open read transactions."""

import ctypes
import os
import signal
import subprocess
import time

import harness
from harness import PYTHON, Broker, PlainShell, Skip, connect, create, fails_without, run, timeout, wait_until
from test_belief import LOOP, VFS, Member
from test_companions import READER, User
from test_doctor import examine, expect
from test_foreign import root_only

# What the checkpointer lets a WAL become before it waits for readers, in frames (src/checkpointer/job.rs).
LIMIT = 5000


def grow(writer, broker, path, frames):
    """Commits until the WAL has so many frames."""
    while broker.database(path)["wal"]["frames"] < frames:
        for n in range(500):
            writer.execute("INSERT INTO rows VALUES('w', ?)", (n,))


def pinned(broker, path, reader, lane):
    writer = connect(path, broker=broker, mode="gated")
    writer.execute("PRAGMA synchronous=OFF")
    writer.execute("INSERT INTO rows VALUES('w', 0)")
    assert broker.database(path)["reads"] == []
    # `turnstile run` is a process of its own.
    (pid,) = {m["pid"] for m in broker.members(path)} - {os.getpid()}
    before = time.monotonic()
    reader.run("BEGIN", "SELECT count(*) FROM rows")
    begun = time.monotonic()
    grow(writer, broker, path, 2 * LIMIT)
    assert [m["lane"] for m in broker.members(path, pid)] == [lane], broker.members(path)

    def open_for_long():
        asked = time.monotonic()
        said = broker.database(path)
        answered = time.monotonic()
        (read,) = said["reads"]
        assert read["pid"] == pid, said
        # The coarse clock's and the word's eighth of a second, and the seconds that have been cut off.
        seconds = read["open_seconds"]
        assert seconds is not None, "it does not say since when"
        assert asked - begun - 1.3 <= seconds <= answered - before + 0.3, (seconds, asked - begun, answered - before)
        return said if seconds >= 2 else None

    said = wait_until(open_for_long, what="a read that is open since two seconds")
    (read,) = said["reads"]
    assert read["frames_held_back"] >= LIMIT, said["reads"]
    assert said["wal"]["frames"] - said["wal"]["copied"] >= LIMIT, said["wal"]
    text = run([harness.bin(), "status"], env=broker.env).stdout
    assert f"(pid {pid}), since {read['open_seconds']}"[:-1] in text and "holds back" in text, text
    _, found, _ = examine(path, broker=broker)
    expect(found, "wal-pinned", "warning", f"pid {pid}", "since", "holds back", f"kill {pid}")
    # The next one begins anew.
    reader.run("COMMIT")
    assert broker.database(path)["reads"] == []
    reader.run("BEGIN", "SELECT count(*) FROM rows")
    (read,) = broker.database(path)["reads"]
    # Who may only read moves no mark, and holds one that is there.
    assert read["open_seconds"] <= 1 and read["frames_held_back"] < 10, read
    reader.run("COMMIT")
    wait_until(lambda: grow(writer, broker, path, 1) or broker.database(path)["wal"]["frames"] < LIMIT
               or writer.execute("INSERT INTO rows VALUES('w', 1)") and None, what="a WAL that begins anew")
    _, found, _ = examine(path, broker=broker)
    assert "wal-pinned" not in found, found
    writer.close()


@fails_without("reads-without-time", message="since when")
@timeout(120)
def test_a_read_that_pins_the_wal_is_named_on_the_fast_lane():
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with Member(broker, "vfs", path) as reader:
            pinned(broker, path, reader, "fast")


@fails_without("reads-without-time", message="since when")
@timeout(120)
def test_a_read_that_pins_the_wal_is_named_by_sqlite_that_is_linked_in():
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with Member(broker, "libc", path) as reader:
            reader.run("SELECT count(*) FROM rows")  # it joins with its first read
            pinned(broker, path, reader, "fast")


@fails_without("reads-without-time", message="since when")
@timeout(120)
def test_a_read_that_pins_the_wal_is_named_on_the_socket_lane():
    root_only()
    with Broker("--everyone", "yes") as broker:
        path = create(broker.path("app.db"))
        os.chmod(path, 0o644)
        owner = connect(path, broker=broker, mode="gated")
        with User(broker, "vfs", path, READER) as reader:
            pinned(broker, path, reader, "socket")
        owner.close()


AHEAD = 11 * 86400
CLONE_NEWTIME = 0x80


def clock_ahead():
    """What is executed next has a monotonic clock that is eleven days ahead (time_namespaces(7))."""
    if ctypes.CDLL(None).unshare(CLONE_NEWTIME):
        os._exit(99)
    with open("/proc/self/timens_offsets", "w") as f:
        f.write(f"monotonic {AHEAD} 0\n")


class Ahead(Member):
    def __init__(self, broker, path):
        words = [PYTHON, "-c", f"EXTENSION = {harness.lib()!r}" + VFS + LOOP]
        self.process = subprocess.Popen(words, env=broker.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        preexec_fn=clock_ahead)
        self._write(path)
        assert self.answer() == {"rows": []}


@fails_without("one-clock-for-all", message="since when")
@timeout(120)
def test_since_when_is_right_of_a_member_with_another_clock():
    root_only()
    if not os.path.exists("/proc/self/timens_offsets"):
        raise Skip("this kernel has no time namespaces")
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with Ahead(broker, path) as reader:
            pinned(broker, path, reader, "fast")


@fails_without("pins-unnamed")
@timeout(60)
def test_the_doctor_names_all_who_pin_the_wal_and_says_when_one_is_stopped():
    with Broker() as broker:
        path = create(broker.path("app.db"))
        writer = connect(path, broker=broker, mode="gated")
        writer.execute("PRAGMA synchronous=OFF")
        with Member(broker, "vfs", path) as one, Member(broker, "vfs", path) as two, Member(broker, "vfs", path) as late:
            for reader in one, two:
                reader.run("BEGIN", "SELECT count(*) FROM rows")
            grow(writer, broker, path, LIMIT + 1000)
            late.run("BEGIN", "SELECT count(*) FROM rows")
            os.kill(two.process.pid, signal.SIGSTOP)
            _, _, report = examine(path, broker=broker)
            pins = [f for f in report["findings"] if f["code"] == "wal-pinned"]
            assert len(pins) == 2, report["findings"]
            for reader, word in (one, f"kill {one.process.pid}"), (two, f"kill -CONT {two.process.pid}"):
                (finding,) = [f for f in pins if f"pid {reader.process.pid}" in f["what"]]
                assert word in finding["advice"], finding
        writer.close()


@timeout(60)
def test_readers_of_a_rollback_journal_are_named_too():
    with Broker() as broker:
        path = create(broker.path("app.db"), "delete")
        with Member(broker, "vfs", path) as reader:
            reader.run("BEGIN", "SELECT count(*) FROM rows")
            (read,) = broker.database(path)["reads"]
            assert (read["pid"], read["frames_held_back"]) == (reader.process.pid, 0), read
            reader.run("COMMIT")
            assert broker.database(path)["reads"] == []


@timeout(60)
def test_in_guest_mode_reads_are_said_not_to_be_seen_and_the_doctor_names_a_plain_reader():
    """The broker sees no lock of guests and plain clients; `/proc/locks` shows who has a read slot, and not since when."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with PlainShell(path) as reader:
            reader.run("BEGIN; SELECT count(*) FROM rows")
            guest = connect(path, broker=broker, mode="guest")
            assert broker.database(path)["reads"] is None
            assert "read transactions: not seen" in run([harness.bin(), "status"], env=broker.env).stdout
            guest.execute("PRAGMA synchronous=OFF")
            guest.execute("CREATE TABLE big(content)")
            for _ in range(45):
                guest.execute("INSERT INTO big VALUES(zeroblob(1000000))")
            _, found, _ = examine(path, broker=broker)
            expect(found, "wal-pinned", "warning", f"pid {reader.pid}", "cannot be seen")
            reader.run("COMMIT")
            _, found, _ = examine(path, broker=broker)
            expect(found, "wal-large", "warning", "cannot be seen")
            guest.close()
