"""A member believes nothing that it has read once the gate is gone, by whatever way the bytes come, on both lanes.

Somebody unlocks the gate under a member that is in the middle of something; a plain client then changes the files as it
may; the member goes on. It must get an I/O error, and never the plain client's bytes (src/client/belief.rs).
"""

import ctypes
import fcntl
import functools
import json
import os
import select
import shutil
import signal
import struct
import subprocess

import clients
from harness import (Broker, PYTHON, PlainShell, Skip, connect, create, fails_without, lib, plain, planted_build, run,
                     timeout, wait_until, waits)
from test_libc_lane import env_of, need, wrapped

IOERR, BUSY = 10, 5
IOERR_READ, IOERR_FSTAT, IOERR_DELETE, IOERR_CHECKRESERVEDLOCK = (IOERR | n << 8 for n in (1, 7, 10, 14))
ROWS = 400
SUM = "SELECT sum(length(pad)) FROM rows"
TRUE = ROWS * 3600
F_OFD_SETLK = 37
PIDFD_OPEN, PIDFD_GETFD = 434, 438


# --- a member whose calls can be held -------------------------------------------------------------------------------

# Holds the first call that `$HOLD/arm` names ("pread -wal": of a file whose name ends so), after the C library has
# answered it: `$HOLD/held` is there then, and it goes on when `$HOLD/go` is.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
static int there(const char *name){
  char path[PATH_MAX];
  snprintf(path, sizeof(path), "%s/%s", getenv("HOLD"), name);
  return syscall(SYS_faccessat, AT_FDCWD, path, F_OK)==0;
}
static void held(const char *call, const char *name){
  static int done;
  char path[PATH_MAX], armed[256] = {0};
  int fd, length;
  if( done || !getenv("HOLD") || !there("arm") ) return;
  snprintf(path, sizeof(path), "%s/arm", getenv("HOLD"));
  fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
  length = syscall(SYS_read, fd, armed, sizeof(armed) - 1);
  syscall(SYS_close, fd);
  if( length<=0 ) return;
  char *end = strchr(armed, ' ');
  if( !end ) return;
  *end++ = 0;
  size_t n = strlen(name), m = strlen(end);
  if( strcmp(armed, call) || n<m || strcmp(name + n - m, end) ) return;
  done = 1;
  snprintf(path, sizeof(path), "%s/held", getenv("HOLD"));
  syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, path, O_CREAT|O_WRONLY, 0644));
  while( !there("go") ) syscall(SYS_nanosleep, &(struct timespec){0, 1000000}, NULL);
}
static void held_fd(const char *call, int fd){
  char link[64], name[PATH_MAX];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, name, sizeof(name) - 1);
  if( n>0 ){ name[n] = 0; held(call, name); }
}
#define NEXT(type, name) static __typeof__(type) real; if( !real ) real = (__typeof__(type))dlsym(RTLD_NEXT, name)
#define PREAD(f) ssize_t f(int fd, void *to, size_t n, off_t at){ \
  NEXT(ssize_t (*)(int, void *, size_t, off_t), #f); ssize_t got = real(fd, to, n, at); held_fd("pread", fd); return got; }
PREAD(pread) PREAD(pread64)
#define FSTAT(f, type) int f(int fd, struct type *to){ \
  NEXT(int (*)(int, struct type *), #f); int got = real(fd, to); held_fd("fstat", fd); return got; }
FSTAT(fstat, stat) FSTAT(fstat64, stat64)
#define STAT(f, type) int f(const char *name, struct type *to){ \
  NEXT(int (*)(const char *, struct type *), #f); int got = real(name, to); held("stat", name); return got; }
STAT(stat, stat) STAT(stat64, stat64)
#define XSTAT(f, type) int f(int version, const char *name, struct type *to){ /* built for glibc before 2.33 */ \
  NEXT(int (*)(int, const char *, struct type *), #f); int got = real(version, name, to); held("stat", name); return got; }
XSTAT(__xstat, stat) XSTAT(__xstat64, stat64)
int access(const char *name, int mode){
  NEXT(int (*)(const char *, int), "access"); int got = real(name, mode); held("stat", name); return got; }
"""

VFS = """
import sqlite3
def opened(path):
    db = sqlite3.connect(path, timeout=0, isolation_level=None, uri=True)
    db.enable_load_extension(True)
    db.load_extension(EXTENSION)
    return db
code = lambda e: e.sqlite_errorcode
"""
LIBC = """
import apsw
def opened(path):
    return apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI)
code = lambda e: e.extendedresult
"""
LOOP = """
import json, sys
db = None
for line in sys.stdin:
    try:
        if db is None: db, rows = opened(line.strip()), []
        else: rows = list(db.execute(json.loads(line)))
        print(json.dumps({"rows": rows}), flush=True)
    except Exception as e:
        print(json.dumps({"code": code(e), "text": str(e)}), flush=True)
"""


def shim(broker):
    if not shutil.which("gcc"):
        raise Skip("gcc is missing")
    source, built = broker.path("held.c"), broker.path("held.so")
    with open(source, "w") as f:
        f.write(SHIM)
    run(["gcc", "-O1", "-shared", "-fPIC", "-o", built, source, "-ldl"])
    return built


class Member:
    """A process with one connection, by the extension ("vfs") or linked in ("libc")."""

    def __init__(self, broker, lane, path, preload=None, hold=None, env=None):
        more = {**(env or {}), **({"LD_PRELOAD": preload, "HOLD": hold} if preload else {})}
        if lane == "vfs":
            words, env = [PYTHON, "-c", f"EXTENSION = {lib()!r}" + VFS + LOOP], broker.env
        else:
            need("apsw")
            words, env = wrapped(clients.VENV, "-c", LIBC + LOOP), env_of(broker)
        self.process = subprocess.Popen(words, env={**env, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._write(path)
        assert self.answer() == {"rows": []}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()

    def _write(self, text):
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def send(self, sql):
        self._write(json.dumps(sql))

    def answer(self, limit=30.0):
        assert select.select([self.process.stdout], [], [], limit)[0], f"nothing said within {limit:g} s"
        return json.loads(self.process.stdout.readline())

    def ask(self, sql):
        self.send(sql)
        return self.answer()

    def run(self, *statements):
        for sql in statements:
            said = self.ask(sql)
            assert "rows" in said, (sql, said)
        return said["rows"]


def both(test):
    """The test on either lane."""
    @functools.wraps(test)
    def of_both():
        test("vfs")
        test("libc")
    return of_both


# --- a gate that somebody unlocks -----------------------------------------------------------------------------------

def gate_of(broker, path):
    """A descriptor of the gate's description, as whoever may trace the broker can take it (pidfd_getfd(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    pidfd = libc.syscall(PIDFD_OPEN, broker.pid, 0)
    assert pidfd >= 0
    for name in os.listdir(f"/proc/{broker.pid}/fd"):
        try:
            if os.readlink(f"/proc/{broker.pid}/fd/{name}") != path:
                continue
            with open(f"/proc/{broker.pid}/fdinfo/{name}") as f:
                if "OFDLCK" not in f.read():
                    continue
        except FileNotFoundError:
            continue
        fd = libc.syscall(PIDFD_GETFD, pidfd, int(name), 0)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        os.close(pidfd)
        return fd
    raise AssertionError("the broker has no gate")


def unlock(gate):
    fcntl.fcntl(gate, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0x40000000, 512, 0))


def poison(broker, path):
    """Unlocks the gate, and waits until the broker has noticed."""
    gate = gate_of(broker, path)
    unlock(gate)
    wait_until(lambda: "the segment is poisoned" in broker.log(), what="the poison")
    os.close(gate)


def filled(broker, journal="wal", name="app.db"):
    path = broker.path(name)
    plain(path, f"PRAGMA journal_mode={journal}; CREATE TABLE rows(n INTEGER PRIMARY KEY, pad); "
                f"WITH c(n) AS (VALUES(1) UNION ALL SELECT n+1 FROM c WHERE n<{ROWS}) "
                "INSERT INTO rows SELECT n, zeroblob(3600) FROM c")
    return path


# What a plain client does to rows that a member reads in the WAL, or in the database.
ANEW = "PRAGMA wal_checkpoint(RESTART); UPDATE rows SET pad='x'"
COPIED = "UPDATE rows SET pad='x'; PRAGMA wal_checkpoint(TRUNCATE)"


def in_a_snapshot(lane, where, change, setup=(), lose=poison, arguments=("--no-checkpointer",)):
    """A member in a snapshot, with the rows in the WAL or in the database; the gate goes and a plain client comes."""
    with Broker(*arguments) as broker:
        path = filled(broker)
        with Member(broker, lane, path) as member:
            member.run("PRAGMA cache_size=2", "PRAGMA wal_autocheckpoint=0", *setup)
            if where == "wal":
                member.run("VACUUM")  # of all pages
            member.run("BEGIN", "SELECT count(*) FROM rows WHERE n=1")
            assert member.run(SUM) == [[TRUE]]
            lose(broker, path)
            plain(path, change, busy_ms=5000)
            said = member.ask(SUM)
            assert said.get("code", 0) & 0xff == IOERR, f"{lane}: the member believed {said}"
            member.ask("COMMIT")
            again = member.ask("UPDATE rows SET pad='member'")
            assert "rows" not in again, f"{lane}: it goes on: {again}"
        assert plain(path, SUM + "; PRAGMA integrity_check") == [[str(ROWS)], ["ok"]]


@fails_without("frame-believed,lane-frame-believed")
def test_a_frame_is_not_believed():
    for lane in "vfs", "libc":
        in_a_snapshot(lane, "wal", ANEW)


@fails_without("lane-frame-believed")
def test_a_frame_is_not_believed_by_sqlite_that_is_linked_in():
    in_a_snapshot("libc", "wal", ANEW)


@fails_without("page-believed")
def test_a_page_is_not_believed():
    in_a_snapshot("vfs", "database", COPIED)


@fails_without("lane-page-believed")
def test_a_page_is_not_believed_by_sqlite_that_is_linked_in():
    in_a_snapshot("libc", "database", COPIED)


@fails_without("pages-mapped")
def test_a_page_is_not_mapped():
    in_a_snapshot("vfs", "database", COPIED, setup=["PRAGMA mmap_size=268435456"])


def test_no_member_maps_the_database_on_either_lane():
    with Broker() as broker:
        path = filled(broker)
        for lane in "vfs", "libc":
            with Member(broker, lane, path) as member:
                member.run("PRAGMA mmap_size=268435456")
                assert member.run(SUM) == [[TRUE]]
                with open(f"/proc/{member.process.pid}/maps") as f:
                    assert not [line for line in f if path in line], lane
        with PlainShell(path) as shell:  # a guest beside it has the kernel's locks, and may
            shell.run("PRAGMA busy_timeout=5000")  # the last one was not closed, but has ended
            shell.run("SELECT count(*) FROM rows")
            with Member(broker, "vfs", path) as guest:
                guest.run("PRAGMA mmap_size=268435456", SUM)
                with open(f"/proc/{guest.process.pid}/maps") as f:
                    assert [line for line in f if path in line], "a guest's pages are not mapped either"


def unseen(broker, path):
    """The gate goes, and there is nobody who looks at it: neither a broker nor its keeper."""
    gate = gate_of(broker, path)
    broker.kill()
    unlock(gate)
    os.close(gate)


@fails_without("gate-left-to-the-broker")
def test_a_member_looks_at_the_gate_itself():
    for lane in "vfs", "libc":
        for where, change in ("wal", ANEW), ("database", COPIED):
            in_a_snapshot(lane, where, change, lose=unseen, arguments=["--no-checkpointer", "--no-keeper"])


@fails_without("gate-left-to-the-broker")
def test_nothing_is_written_beside_a_plain_client_where_nobody_watches_the_gate():
    for lane in "vfs", "libc":
        for journal in "wal", "delete":
            with Broker("--no-keeper") as broker:
                path = create(broker.path("app.db"), journal)
                with Member(broker, lane, path) as member:
                    member.run("INSERT INTO rows VALUES('m', 1)")
                    unseen(broker, path)
                    with PlainShell(path) as shell:
                        shell.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('p', 1)")
                        said = member.ask("INSERT INTO rows VALUES('m', 2)")
                        assert said.get("code", 0) & 0xff == IOERR, f"{lane}: {said}"
                        shell.run("COMMIT")
                assert plain(path, "SELECT count(*) FROM rows; PRAGMA integrity_check") == [["2"], ["ok"]]


@fails_without("frame-believed,page-believed")
def test_a_member_that_may_only_read_believes_nothing_after_its_group():
    """It holds no gate up. Everybody else gone, and nobody there to poison its segment, the kernel lets plain clients in."""
    with Broker("--no-checkpointer", "--no-keeper") as broker:
        path = filled(broker)
        os.chmod(path, 0o644)
        os.mkdir(broker.path("ext"))
        shutil.copy(lib(), broker.path("ext"))
        reader = ("import os; os.setgid(54321); os.setuid(54321)\n"
                  f"EXTENSION = {broker.path('ext/libturnstile.so')!r}" + VFS + LOOP)
        with Member(broker, "vfs", path) as writer:
            writer.run("PRAGMA wal_autocheckpoint=0", "UPDATE rows SET pad=zeroblob(3600)")
            process = subprocess.Popen([PYTHON, "-c", reader], env={**broker.env, "HOME": "/"}, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE)
            member = Member.__new__(Member)
            member.process = process
            with member:
                member._write(f"file:{path}?mode=ro")
                assert member.answer() == {"rows": []}
                status = json.loads(member.run("PRAGMA turnstile_status")[0][0])
                assert status["role"] == "read-only" and status["mode"] == "gated", status
                member.run("PRAGMA cache_size=2", "BEGIN")
                assert member.run(SUM) == [[TRUE]]
                broker.kill()
                writer.process.kill()
                writer.process.wait(20)
                plain(path, ANEW, busy_ms=5000)
                said = member.ask(SUM)
                assert said.get("code", 0) & 0xff == IOERR, said


# --- read first, looked after ---------------------------------------------------------------------------------------

def held(lane, call, journal, prepare, sql, expected, setup=("PRAGMA cache_size=2",)):
    """The gate goes while the member is in that call, which the kernel has answered: the answer is not believed."""
    with Broker("--no-checkpointer") as broker:
        path = filled(broker, journal)
        hold = broker.path("hold")
        os.mkdir(hold)
        with connect(path, broker=broker, mode="gated") as anchor, \
                Member(broker, lane, path, preload=shim(broker), hold=hold) as member:
            member.run(*setup)
            prepare(broker, path, member)
            with open(os.path.join(hold, "new"), "w") as f:
                f.write(call)
            os.rename(os.path.join(hold, "new"), os.path.join(hold, "arm"))
            member.send(sql)
            wait_until(lambda: os.path.exists(os.path.join(hold, "held")), what=f"the call {call!r} on the {lane} lane")
            poison(broker, path)
            open(os.path.join(hold, "go"), "w").close()
            said = member.answer()
            assert said.get("code") == expected, f"{lane}, {call}: {said}"
        anchor.close()


def snapshot(rows_in_the_wal):
    def prepare(broker, path, member):
        if rows_in_the_wal:
            member.run("VACUUM")
        member.run("BEGIN", "SELECT count(*) FROM rows WHERE n=1")
    return prepare


def a_hot_journal(broker, path, member):
    """A member dies over a transaction that has written to the database."""
    member.run("SELECT 1 FROM rows")
    with Member(broker, "vfs", path) as writer:
        writer.run("PRAGMA cache_size=2", "BEGIN", "UPDATE rows SET pad=zeroblob(3599)")
        os.kill(writer.process.pid, signal.SIGKILL)
    wait_until(lambda: len(broker.members(path)) == 2, what="the dead member to be cleared")
    assert os.path.getsize(path + "-journal")


@fails_without("frame-believed,lane-frame-believed")
def test_a_frame_is_looked_after_not_before():
    for lane in "vfs", "libc":
        held(lane, "pread -wal", "wal", snapshot(True), SUM, IOERR_READ)


@fails_without("page-believed,lane-page-believed")
def test_a_page_is_looked_after_not_before():
    for lane in "vfs", "libc":
        held(lane, "pread app.db", "wal", snapshot(False), "SELECT length(pad) FROM rows WHERE n=399", IOERR_READ)


@fails_without("journal-believed")
def test_a_journal_is_not_believed():
    held("vfs", "pread -journal", "delete", a_hot_journal, SUM, IOERR_READ)


@fails_without("lane-journal-believed")
def test_a_journal_is_not_believed_by_sqlite_that_is_linked_in():
    held("libc", "pread -journal", "delete", a_hot_journal, SUM, IOERR_READ)


@fails_without("size-believed")
def test_a_size_is_not_believed():
    held("vfs", "fstat app.db", "delete", a_hot_journal, SUM, IOERR_FSTAT)


@fails_without("reserved-believed")
def test_that_nobody_writes_is_not_believed():
    """SQLite has seen a journal and asks whether its writer lives: a plain client's would be taken for a dead member's."""
    held("vfs", "stat -journal", "delete", a_hot_journal, SUM, IOERR_CHECKRESERVEDLOCK)


@fails_without("lane-reserved-believed")
def test_that_nobody_writes_is_not_believed_by_sqlite_that_is_linked_in():
    held("libc", "stat -journal", "delete", a_hot_journal, SUM, IOERR_CHECKRESERVEDLOCK)


# --- a journal that is somebody else's by now -----------------------------------------------------------------------

def plain_clients_journal(lane):
    with Broker() as broker:
        path = filled(broker, "delete")
        with Member(broker, lane, path) as member:
            member.run("BEGIN", "UPDATE rows SET pad='member' WHERE n=1")
            assert os.path.exists(path + "-journal")
            poison(broker, path)
            with PlainShell(path) as shell:
                shell.run("PRAGMA cache_size=2")
                shell.run("BEGIN IMMEDIATE; UPDATE rows SET pad='x'")
                journal = os.stat(path + "-journal")
                member.ask("ROLLBACK")
                assert os.path.exists(path + "-journal"), f"{lane}: the plain client's journal is gone"
                assert os.stat(path + "-journal").st_ino == journal.st_ino
                shell.kill()
        assert plain(path, SUM + "; PRAGMA integrity_check") == [[str(TRUE)], ["ok"]]


@fails_without("companion-deleted-blindly,journal-believed,size-believed")
def test_a_plain_clients_journal_is_not_deleted():
    plain_clients_journal("vfs")


@fails_without("lane-journal-deleted-blindly,lane-journal-believed")
def test_a_plain_clients_journal_is_not_deleted_by_sqlite_that_is_linked_in():
    plain_clients_journal("libc")


# --- locks that are waited for ----------------------------------------------------------------------------------------

def waits_in_vain(env=None):
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with Member(broker, "vfs", path, env=env) as holder, Member(broker, "vfs", path, env=env) as waiter:
            waiter.run("SELECT * FROM rows")
            holder.run("BEGIN IMMEDIATE")
            waiter.send("BEGIN IMMEDIATE")
            wait_until(lambda: broker.database(path)["line"],
                       what="the second one to wait")
            poison(broker, path)
            said = waiter.answer(15)  # and not at its limit
            assert said.get("code", 0) & 0xff == IOERR, said


@waits
@fails_without("waits-on-after-poison")
def test_nobody_waits_for_a_lock_of_a_lost_segment():
    waits_in_vain()


@waits
@timeout(60)
def test_nobody_waits_by_messages_for_a_lock_of_a_lost_segment():
    with planted_build():
        waits_in_vain({"TURNSTILE_PLANTED": "no-fast-lane"})
