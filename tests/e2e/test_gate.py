"""The gate: plain clients wait, they cannot corrupt; joining proves access."""

import array
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess

from harness import (PYTHON, ROOT, Broker, PlainError, PlainShell, Skip, Workers, check_rows, connect, create,
                     fails_without, lib, plain, plain_env, run, run_workers, status_of, timeout, wait_until)


def refused(path, broker, **options):
    """Opens and loads, which must fail; returns the message, and the broker's log, which has the reason too
    (SQLite has its own text for a failed open; the extension can only say more when it is being loaded)."""
    try:
        connect(path, broker=broker, **options)
    except sqlite3.OperationalError as e:
        return f"{e}\n{broker.log()}"
    raise AssertionError("the load was not refused")


# --- plain clients ---------------------------------------------------------------------------------------------

def test_a_plain_client_gets_busy_while_members_are_in_and_gets_in_after():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            member = connect(db, broker=broker, mode="gated")
            member.execute("INSERT INTO rows VALUES('m', 1)")
            for sql in ("SELECT count(*) FROM rows", "INSERT INTO rows VALUES('p', 1)", "PRAGMA integrity_check",
                        "PRAGMA journal_mode=delete"):
                try:
                    plain(db, sql)
                    raise AssertionError(f"a plain client got in: {sql}")
                except PlainError as e:
                    assert "locked" in str(e), e
            member.execute("INSERT INTO rows VALUES('m', 2)")
            member.close()
            assert plain(db, "SELECT count(*) FROM rows") == [["2"]]
            plain(db, "INSERT INTO rows VALUES('p', 1)")


def test_a_plain_connection_of_a_members_own_process_gets_busy():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        earlier = sqlite3.connect(db, timeout=0, isolation_level=None)
        earlier.execute("SELECT count(*) FROM rows").fetchone()
        member = connect(db, broker=broker, mode="gated")
        for _ in range(3):
            try:
                earlier.execute("INSERT INTO rows VALUES('p', 1)")
                raise AssertionError("a plain connection got in")
            except sqlite3.OperationalError as e:
                assert "locked" in str(e)
        member.execute("INSERT INTO rows VALUES('m', 1)")
        member.close()
        earlier.execute("INSERT INTO rows VALUES('p', 2)")
        assert earlier.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        earlier.close()


@fails_without("late-close-of-gate")
def test_leaving_does_not_drop_a_plain_connections_locks():
    """The last member of a process closes its copy of the gate before it says that it left. Closed later, a
    plain connection of the same process that got in meanwhile would lose its POSIX locks."""
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        # Which of the two comes first is a race that a test cannot win, so the order is looked at: strace.
        strace = shutil.which("strace")
        if not strace:
            raise Skip("strace is missing (apt-get install strace)")
        script = (f"import sqlite3; c=sqlite3.connect({db!r}, isolation_level=None); c.enable_load_extension(True); "
                  f"c.load_extension({lib()!r}); c.execute('INSERT INTO rows VALUES(1,1)'); c.close()")
        trace = broker.path("trace")
        run([strace, "-f", "-yy", "-e", "trace=close,sendmsg,recvmsg", "-o", trace, PYTHON, "-c", script],
            env=broker.env)
        lines = open(trace).read().splitlines()
        closes = [i for i, x in enumerate(lines) if "close(" in x and "app.db>" in x]
        sends = [i for i, x in enumerate(lines) if "sendmsg(" in x and "UNIX" in x]
        assert closes and sends
        assert max(closes) < max(sends), "a descriptor of the database was closed after the last message"


def test_plain_first_means_guest_mode_and_both_write():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            with PlainShell(db) as shell:
                shell.run(".timeout 20000")
                shell.run("BEGIN; SELECT count(*) FROM rows" if journal == "delete" else "SELECT count(*) FROM rows")
                with Workers(3, "insert", 2.0, db, broker, options={"setup": "PRAGMA busy_timeout=10000"},
                             record=broker.path(journal)) as w:
                    w.ready()
                    assert broker.database(db)["mode"] == "guest"
                    if journal == "delete":
                        shell.run("COMMIT")
                    w.go()
                    for i in range(50):
                        shell.run(f"INSERT INTO rows VALUES('plain', {i})")
                        with open(broker.path(journal), "a") as f:
                            f.write(f"plain {i}\n")
                    results = w.wait()
            assert sum(r["committed"] for r in results) > 30, results
            check_rows(db, broker.path(journal))


@fails_without("removed-shm-kept")
def test_a_guest_beside_plain_clients_that_come_and_go_keeps_no_descriptors():
    """Plain clients remove `-shm` at their last close, and make another. The descriptor by which a guest looked at the
    last one was kept, for the sake of locks that nobody has there any more."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with PlainShell(db) as shell:
            shell.run("SELECT count(*) FROM rows")
            connect(db, broker=broker, mode="guest").close()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with PlainShell(db) as shell:
                shell.run("SELECT count(*) FROM rows")
                connect(db, mode="guest").close()
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_guest_mode_can_be_asked_for():
    with Broker(env={"TURNSTILE_MODE": "guest"}) as broker:
        os.environ["TURNSTILE_MODE"] = "guest"
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="guest")
        results = run_workers(4, "insert", 1.0, db, broker, record=broker.path("r"))
        assert not sum(r["busy"] for r in results), results
        plain(db, "INSERT INTO rows VALUES('p', 1)", busy_ms=5000)
        assert member.execute("SELECT count(*) FROM rows WHERE worker='p'").fetchone() == (1,)
        member.close()


HALF_PLAIN = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
db.execute("SELECT count(*) FROM rows").fetchone()
os.close(os.open(sys.argv[1], os.O_RDONLY))   # the process's POSIX locks on the database are gone
print("ready", flush=True)
sys.stdin.readline()
"""


@fails_without("no-shm-gate")
def test_a_plain_client_that_lost_its_lock_is_still_seen():
    """It opened and closed its own database file once, which drops its locks there, and goes on through -shm."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        child = subprocess.Popen([PYTHON, "-c", HALF_PLAIN, db], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 env=plain_env())
        try:
            assert child.stdout.readline() == b"ready\n"
            member = connect(db, broker=broker)
            assert status_of(member)["mode"] == "guest", status_of(member)
            member.close()
        finally:
            child.communicate(b"\n", timeout=20)


def test_a_killed_broker_leaves_the_gate_to_its_members():
    """Without a keeper. With one: test_broker_death.py."""
    with Broker("--no-keeper") as broker:
        db = create(broker.path("app.db"))
        with Workers(1, "insert", 60.0, db, broker) as w:
            w.ready()  # joined, idle
            broker.kill()
            try:
                plain(db, "SELECT count(*) FROM rows")
                raise AssertionError("a plain client got in while an orphaned member has the segment mapped")
            except PlainError as e:
                assert "locked" in str(e)
            broker.start()
            connect(db, broker=broker, mode="gated").close()  # it finds that member: test_left_alone.py
            assert [m["pid"] for m in broker.members(db) if m["pid"] != os.getpid()] == [w.pid(0)]
            w.kill(0)
        member = connect(db, broker=broker, mode="gated")
        member.close()


@fails_without("other-gate-is-plain")
def test_two_brokers_on_one_database_are_told_apart_from_a_plain_client():
    with Broker() as one, Broker() as two:
        db = create(one.path("app.db"))
        with Workers(1, "insert", 60.0, db, one) as w:
            w.ready()
            message = refused(db, two)
            assert "another broker" in message, message
            w.kill(0)


@contextlib.contextmanager
def read_locked(path, start=0x4000_0002, length=1):
    """An open file description's read lock (F_OFD_SETLK) of somebody who may only read the file."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, start, length, 0))
    try:
        yield
    finally:
        os.close(fd)


@fails_without("any-lock-is-a-gate", message="another broker")
def test_a_readers_lock_is_a_plain_clients_and_no_gate():
    """Of one byte, of all of SQLite's, of the whole file, of `-shm`: members are guests beside it."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        kept = sqlite3.connect(db)  # so that there is a -shm
        kept.execute("SELECT count(*) FROM rows").fetchall()
        kept.execute("BEGIN")
        shm = db + "-shm"
        places = [(db, 0x4000_0002, 1), (db, 0x4000_0002, 510), (shm, 128, 1), (db, 0x4000_0000, 512), (db, 0, 0)]
        kept.close()
        open(shm, "ab").close()
        for n, place in enumerate(places):
            with read_locked(*place):
                member = connect(db, broker=broker, mode="guest")
                # PENDING is what a writer's SHARED would take for a moment: there plain SQLite has to give up, too.
                if place[1] > 0x4000_0000 or place[0] == shm:
                    member.execute("INSERT INTO rows VALUES('m', ?)", (n,))
                member.close()
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 9)")
        member.close()


def test_a_stopped_broker_leaves_nothing_locked():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(1, "insert", 60.0, db, broker) as w:
            w.ready()
            broker.stop()
            plain(db, "INSERT INTO rows VALUES('p', 1)")  # an idle member does not keep it shut
            broker.start()
            w.kill(0)
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        member.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["2"]]


def test_a_stopping_broker_waits_for_the_open_transaction():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker)
        member.execute("BEGIN IMMEDIATE")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        broker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "waiting for open transactions" in broker.log())
        member.execute("INSERT INTO rows VALUES('m', 2)")
        member.execute("COMMIT")
        wait_until(lambda: not broker.alive(), timeout=8)
        assert plain(db, "SELECT count(*) FROM rows") == [["2"]]
        try:
            member.execute("SELECT count(*) FROM rows").fetchone()
            raise AssertionError("a member went on with a poisoned segment")
        except sqlite3.OperationalError:
            pass
        member.close()
        broker.process = None


# --- joining ---------------------------------------------------------------------------------------------------

with open(os.path.join(ROOT, "src", "wire", "message.rs")) as source:
    PROTOCOL_VERSION = int(re.search(r"PROTOCOL_VERSION: u32 = (\d+);", source.read())[1])


class Wire:
    """A client that speaks the protocol by hand (postcard: varints, enum variants by number)."""

    def __init__(self, broker):
        self.s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.s.settimeout(10)
        self.s.connect(broker.socket)
        self.send(varint(0x74575253) + varint(PROTOCOL_VERSION))
        self.s.recv(4096)
        memfd = os.memfd_create("liveness", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memfd, 4096)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        fcntl.lockf(memfd, fcntl.LOCK_EX, 1)
        self.liveness = memfd
        self.send(varint(0) + text("test") + varint(2 * os.getpid()) + b"\0", [memfd])
        self.s.recv(4096)

    def send(self, data, fds=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.s.sendmsg([data], rights)

    def join(self, name, *fds):
        self.send(varint(1) + varint(7) + b"\1" + text(name) + bytes([len(fds) > 2, 0, 0]) + text("3.40.1") + varint(1),
                  fds)
        answer, rights, _, _ = self.s.recvmsg(65536, socket.CMSG_SPACE(16))
        received = array.array("i")
        for _, _, data in rights:
            received.frombytes(data[:len(data) - len(data) % 4])
        return answer, list(received)


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def text(s):
    return varint(len(s)) + s.encode()


JOINED, REFUSED = 1, 2


def join_by_hand(broker, path, flags, name=None, directory=None):
    fd = os.open(path, flags)
    dirfd = os.open(directory or os.path.dirname(path), os.O_PATH)
    wire = Wire(broker)
    answer, fds = wire.join(name or os.path.basename(path), fd, dirfd)
    return answer, fds, wire


@fails_without("o-path-is-access")
def test_only_a_readable_descriptor_proves_access():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        answer, fds, _ = join_by_hand(broker, db, os.O_PATH)
        assert answer[0] == REFUSED and not fds, answer
        for flags in (os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_DIRECT):
            answer, fds, _ = join_by_hand(broker, db, flags)
            assert answer[0] == REFUSED and not fds, (flags, answer)
        for path in ("/dev/null", broker.dir):
            answer, fds, _ = join_by_hand(broker, path, os.O_RDONLY)
            assert answer[0] == REFUSED and not fds, (path, answer)


@fails_without("claim-follows-links")
def test_a_directory_claim_through_a_link_is_not_believed():
    """Whoever says that the file is called otherwise, elsewhere, would have its -wal looked for there."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.mkdir(broker.path("else"))
        os.symlink(db, broker.path("else/app.db"))
        answer, fds, _ = join_by_hand(broker, db, os.O_RDWR, directory=broker.path("else"))
        assert answer[0] == REFUSED and not fds, answer
        answer, _, _ = join_by_hand(broker, db, os.O_RDWR)
        assert answer[0] == JOINED, answer


def test_a_hard_link_of_a_database_in_use_is_refused():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.mkdir(broker.path("else"))
        os.link(db, broker.path("else/other.db"))
        member = connect(db, broker=broker)
        message = refused(broker.path("else/other.db"), broker)
        assert "another name" in message, message
        member.close()


@fails_without("read-only-gets-writable")
def test_a_read_only_client_gets_nothing_that_it_could_write_through():
    """Neither the gate nor a writable memfd; and it cannot reopen one as another user."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o644)
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        answer, fds, _ = join_by_hand(broker, db, os.O_RDONLY)
        assert answer[0] == JOINED and len(fds) == 2, (answer, fds)
        for fd in fds:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        child = os.fork()
        if child == 0:
            os.setgid(54321)
            os.setuid(54321)
            writable = 0
            for fd in fds:
                try:
                    os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                    writable += 1
                except OSError:
                    pass
            os._exit(writable)
        assert os.waitpid(child, 0)[1] == 0
        member.close()


def test_a_truly_read_only_member_reads_beside_writers():
    """Another user without write permission: socket lane, read-only wal-index, no gate."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o644)
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        script = f"""
import os, sqlite3, sys
os.setgid(54321); os.setuid(54321)
c = sqlite3.connect("file:{db}?mode=ro", uri=True, timeout=0, isolation_level=None)
c.enable_load_extension(True); c.load_extension({broker.path('ext/libturnstile.so')!r})
print(c.execute("PRAGMA turnstile_status").fetchone()[0])
for line in sys.stdin:
    print(c.execute("SELECT count(*) FROM rows").fetchone()[0], flush=True)
"""
        os.mkdir(broker.path("ext"))
        shutil.copy(lib(), broker.path("ext"))
        child = subprocess.Popen([PYTHON, "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                 env={**broker.env, "HOME": "/"})
        try:
            status = child.stdout.readline()
            assert '"role":"read-only"' in status and '"gated"' in status, status
            for n in range(1, 30):
                child.stdin.write("\n")
                child.stdin.flush()
                assert int(child.stdout.readline()) == n
                member.execute("INSERT INTO rows VALUES('m', ?)", (n + 1,))
        finally:
            child.stdin.close()
            child.wait(20)
        member.close()


def test_a_reader_that_starts_first_does_not_force_guest_mode():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        reader = connect(f"file:{db}?mode=ro", uri=True, broker=broker, mode="gated")
        assert reader.execute("SELECT count(*) FROM rows").fetchone() == (0,)
        writer = connect(db, mode="gated")
        writer.execute("INSERT INTO rows VALUES('m', 1)")
        assert reader.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        writer.close()
        reader.close()


@fails_without("peers-by-number")
@timeout(60)
def test_a_broker_in_another_pid_namespace_sees_its_clients_die():
    """A sidecar: it learns of a client's death by SO_PEERPIDFD, not by a number that means another process."""
    with Broker() as broker:
        broker.stop()
        from harness import bin
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if run([*unshare, "true"], check=False).returncode:
            raise Skip("cannot unshare the pid namespace here")
        sidecar = subprocess.Popen([*unshare, bin(), "serve", "--socket", broker.socket], stdin=subprocess.DEVNULL,
                                   stderr=open(broker.logfile, "ab"), env=broker.env)
        try:
            wait_until(broker.answers)
            db = create(broker.path("app.db"))
            with Workers(2, "insert", 60.0, db, broker) as w:
                w.go()
                wait_until(lambda: os.path.exists(broker.record) and os.path.getsize(broker.record) > 400)
                w.kill(0)
                size = os.path.getsize(broker.record)
                wait_until(lambda: os.path.getsize(broker.record) > size + 400, what="the other writer to go on")
                w.kill(1)
            check_rows(db, broker.record, killed=(0, 1))
        finally:
            sidecar.kill()
            sidecar.wait(10)
