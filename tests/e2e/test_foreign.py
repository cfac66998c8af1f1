"""Clients of other users: what they may see, and what they cannot change."""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback

from harness import (Broker, Skip, acknowledged, bin, check_rows, connect, create, fails_without, run, run_workers,
                     timeout, wait_until)
from test_gate import JOINED, REFUSED, join_by_hand
from test_hostile import ANSWER_WAL_INDEX, OPEN_WAL_INDEX, Hostile, key, varint, victim, with_seat

STRANGER = 54321
WAL_FILE, WAL_GREW = 18, 19
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def root_only():
    if os.geteuid() != 0:
        raise Skip("needs root, to be another user")


@contextlib.contextmanager
def as_user(uid, function, files=None, wait=True):
    """Runs `function` in a process of this user, which stays until the block ends, and yields its result."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            if files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            result = function()
            if isinstance(result, tuple):
                result = [r.decode(errors="replace") if isinstance(r, bytes) else r for r in result]
            theirs.sendall(json.dumps(result).encode() + b"\n")
            theirs.recv(1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    theirs.close()
    try:
        result = None
        if wait:
            line = ours.makefile().readline()
            assert line, f"the process of user {uid} has failed"
            result = json.loads(line)
            if isinstance(result, list) and len(result) == 2 and isinstance(result[1], str):
                result = (result[0], result[1].encode())
        yield result
        if not wait:
            assert ours.makefile().readline(), f"the process of user {uid} has failed"
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            if wait:
                os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def content(fd):
    """What is in a memfd, as far as it has any."""
    parts, at = [], 0
    while True:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return parts
        end = os.lseek(fd, at, os.SEEK_HOLE)
        parts.append((at, os.pread(fd, end - at, at)))
        at = end


def attempts(fd):
    """Every way to write through a descriptor; those that worked."""
    def mapped():
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def protected():
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        if libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memset(address, 0x55, 64)

    def punched():
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")

    ways = {
        "reopened": lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
        "reopened for writing": lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY),
        "reopened of its thread": lambda: os.open(f"/proc/thread-self/fd/{fd}", os.O_RDWR),
        "truncated by name": lambda: os.truncate(f"/proc/self/fd/{fd}", 0),
        "chmod": lambda: os.fchmod(fd, 0o666),
        "written": lambda: os.pwrite(fd, b"\x55" * 64, 0),
        "truncated": lambda: os.ftruncate(fd, 0),
        "mapped": mapped,
        "made writable": protected,
        "punched": punched,
        "sealed": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        "sealed for the future": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10),
    }
    worked = []
    for name, way in ways.items():
        with contextlib.suppress(OSError, ValueError):
            way()
            worked.append(name)
    return worked


@fails_without("read-only-gets-writable", message="worked")
def test_a_reader_of_another_user_changes_no_byte():
    """Whatever it tries with the descriptors that it gets, and at the broker's own."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o644)
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        answer, own, wire = join_by_hand(broker, db, os.O_RDWR)
        assert answer[0] == JOINED and len(own) == 3, answer

        def reader():
            answer, fds, _ = join_by_hand(broker, db, os.O_RDONLY)
            assert answer[0] == JOINED and len(fds) == 2, (answer, fds)
            worked = [(i, name) for i, fd in enumerate(fds) for name in attempts(fd)]
            for process in (broker.pid, os.getppid()):
                with contextlib.suppress(OSError):
                    os.listdir(f"/proc/{process}/fd")
                    worked.append((process, "its descriptors seen"))
                with contextlib.suppress(OSError):
                    open(f"/proc/{process}/mem", "r+b")
                    worked.append((process, "its memory opened"))
            return worked

        # It joins, which the broker notes in the members' bitmap, and leaves, before it is compared.
        with as_user(STRANGER, lambda: reader() and []):
            pass
        wait_until(lambda: len(broker.members(db)) == 2, what="the reader to be gone")
        before = [content(fd) for fd in own[:2]]
        with as_user(STRANGER, reader) as worked:
            assert not worked, f"worked: {worked}"
        wait_until(lambda: len(broker.members(db)) == 2, what="the reader to be gone")
        for was, fd in zip(before, own):
            now = content(fd)
            assert [p[0] for p in was] == [p[0] for p in now]
            changed = [at + i for (at, a), (_, b) in zip(was, now) for i in range(len(a)) if a[i] != b[i]]
            # The broker's own: the count of the reader's seat (`SeatWords::state`), and that it woke whoever sleeps.
            assert len(changed) <= 2, f"changed: {changed}"
        member.execute("INSERT INTO rows VALUES('m', 2)")
        assert member.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        member.close()
        wire.s.close()


def test_who_may_not_open_a_file_cannot_join_it_see_it_or_delay_it():
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o600)
        with victim(broker, db) as goes_on:
            number = broker.database(db)
            assert number

            def stranger():
                for flags in (os.O_RDONLY, os.O_RDWR):
                    try:
                        os.open(db, flags)
                        return "opened it"
                    except PermissionError:
                        pass
                said = json.loads(run([bin(), "status", "--json"], env=broker.env).stdout)
                if said["databases"] or {u["uid"] for u in said["broker"]["users"]} - {STRANGER}:
                    return f"was told {said}"
                if "app.db" in run([bin(), "status"], env=broker.env).stdout:
                    return "was told its name"
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    answer, fds, wire = join_by_hand(broker, db, os.O_PATH)
                    if answer[0] != REFUSED or fds or b"app.db" in answer:
                        return f"joined: {answer}"
                    wire.s.close()
                    os.close(wire.liveness)
                    for database in range(1, 4):
                        for message in with_seat((database, 1)).values():
                            with Hostile(broker) as guess:
                                guess.send(message)
                                guess.ended()
                return "ok"

            with as_user(STRANGER, stranger) as said:
                assert said == "ok", said
            goes_on()


def scribble(path, broker, seconds):
    """A member that writes anything over every byte of its mappings, again and again."""
    def scribbler():
        hostile = Hostile(broker)
        fds = hostile.joined(path)
        wal = os.open(path + "-wal", os.O_RDWR)
        hostile.send(varint(WAL_FILE) + key(hostile.seat), [wal])
        maps = [mmap.mmap(fd, min(os.fstat(fd).st_size, 256 * 1024)) for fd in fds[:2]]
        for fd in fds[:2]:
            for way in (lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 31),
                        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)):
                try:
                    way()
                    return "a sealed memfd was changed"
                except OSError:
                    pass
        chance = random.Random(1)
        end = time.monotonic() + seconds
        patterns = [b"\0", b"\xff", b"\1", b"\1\0\0\0", b"\2\0\1\0\0\0\0\0"]
        while time.monotonic() < end:
            for m in maps:
                pattern = chance.choice(patterns + [chance.randbytes(4096)])
                m[:] = (pattern * (len(m) // len(pattern) + 1))[:len(m)]
            libc.fallocate(fds[chance.randrange(2)], FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
                           ctypes.c_long(0), ctypes.c_long(131072))
            with contextlib.suppress(OSError):
                hostile.s.setblocking(False)
                hostile.send(varint(WAL_GREW) + key(hostile.seat))
                hostile.send(varint(14) + key(hostile.seat))  # it waits
                for message in chance.sample(list(with_seat(hostile.seat).values())[:11], 3):
                    hostile.send(message)
                while hostile.s.recv(65536):
                    pass
        return "ok"
    return scribbler


@timeout(90)
def test_a_member_that_scribbles_over_everything_harms_its_own_database_alone():
    with Broker() as broker:
        evil, good = create(broker.path("evil.db")), create(broker.path("good.db"))
        keep = connect(evil, broker=broker, mode="gated")  # so that there is a WAL
        keep.execute("INSERT INTO rows VALUES('m', 1)")
        with as_user(None, scribble(evil, broker, 2.5), wait=False):
            results = run_workers(2, "insert", 1.5, good, broker)
            assert not sum(r["busy"] for r in results), results
            assert all(r["committed"] > 10 for r in results), results
            for _ in range(10):  # the broker answers, and lets others in
                assert broker.status()["broker"]["pid"] == broker.pid
                with Hostile(broker) as another:
                    another.joined(good)
        assert sum(acknowledged(broker.record).values()) > 20
        check_rows(good, broker.record)
        # What is left of the other one must not be touched by this process's SQLite any more.
        sys.stdout.flush()
        assert broker.alive()


@fails_without("opening-waited-for", message="waited for")
def test_a_seat_that_never_ends_opening_its_index_keeps_only_its_own_database():
    """The broker opens it for those on the socket lane, and looks at a word that any member can write."""
    with Broker() as broker:
        evil, good = create(broker.path("evil.db")), create(broker.path("good.db"))
        with Hostile(broker) as hostile, Hostile(broker) as victim_, Hostile(broker) as other:
            fds = hostile.joined(evil)
            opening = 64 + 256 + 16  # FileWords::opening
            os.pwrite(fds[0], (7).to_bytes(4, "little"), opening)
            for fd in victim_.joined(evil):
                os.close(fd)
            victim_.send(varint(OPEN_WAL_INDEX) + varint(9) + key(victim_.seat))
            other.joined(good)
            victim_.s.setblocking(False)
            try:
                answer = victim_.s.recv(65536)
            except BlockingIOError:
                answer = None
            assert answer is None, f"it was waited for: {answer}"
            os.pwrite(fds[0], bytes(4), opening)
            victim_.s.settimeout(10)
            answer = victim_.s.recv(65536)
            assert answer[0] == ANSWER_WAL_INDEX and answer[-1] == 1, answer


@fails_without("any-index-read")
def test_an_index_that_would_kill_sqlite_does_not_kill_the_checkpointer():
    """More frames in the database than there are: wal.c reads before the beginning of an array. (Found by fuzzing.)"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        with Hostile(broker) as hostile:
            fds = hostile.joined(db)
            index = max(fds, key=lambda fd: os.fstat(fd).st_size)
            wal = os.open(db + "-wal", os.O_RDWR)
            hostile.send(varint(WAL_FILE) + key(hostile.seat), [wal])
            right = os.pread(index, 4, 96)  # WalCkptInfo.nBackfill
            os.pwrite(index, b"\x00\xff\xff\xff", 96)
            hostile.send(varint(WAL_GREW) + key(hostile.seat))
            wait_until(lambda: "checkpointer started" in broker.log(), what="a checkpoint to begin")
            wait_until(lambda: not broker.database(db)["checkpoints"]["running"], what="its end")
            assert "the checkpointer ended" not in broker.log(), broker.log()
            os.pwrite(index, right, 96)
        member.execute("INSERT INTO rows VALUES('m', 2)")
        member.close()


@fails_without("checkpointer-sleeps")
@timeout(60)
def test_an_index_that_cannot_be_read_does_not_keep_the_checkpointer():
    """SQLite tries for ten seconds to get a read lock, with SHARED held, which a last close waits for."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        with Hostile(broker) as hostile:
            fds = hostile.joined(db)
            wal = os.open(db + "-wal", os.O_RDWR)
            hostile.send(varint(WAL_FILE) + key(hostile.seat), [wal])
            owners = 64 + 192  # LockWords::readers: a seat that has all five read slots for itself
            os.pwrite(fds[0], hostile.seat[1].to_bytes(4, "little") * 5, owners)
            hostile.send(varint(WAL_GREW) + key(hostile.seat))
            wait_until(lambda: "checkpointer started" in broker.log(), what="a checkpoint to begin")
            wait_until(lambda: not broker.database(db)["checkpoints"]["running"], timeout=3, what="its end")
            os.pwrite(fds[0], bytes(20), owners)
            assert member.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        member.close()
