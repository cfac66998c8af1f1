"""What outlives what: forked children, closed connections, stopped brokers, lost sessions, threads, statements
that look like earlier ones. In each of these something once ended too early or was remembered too long."""

import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import threading
import time

from harness import (PYTHON, Broker, PlainShell, connect, create, is_busy, lib, plain, run, status_of, timeout,
                     wait_until)
from test_fork import in_child

NOBODY = 54321  # a uid that has no user


def count(db):
    return db.execute("SELECT count(*) FROM rows").fetchone()[0]


def member_shell(db, broker):
    """A member in another process: a shell that has loaded the extension."""
    shell = PlainShell(db, env=broker.env)
    shell.run(f".load {lib()}")
    return shell


def waiting_ms(broker, db):
    """How long the first in line has waited; -1: nobody waits."""
    return max((w["waited_ms"] for w in broker.database(db)["line"]), default=-1)


# --- fork --------------------------------------------------------------------------------------------------------

def test_a_childs_own_commits_survive_once_it_has_closed_the_inherited_connection():
    """The child's journal has its name at the address that the inherited connection's name had. Taken for the
    parent's, its deletion was skipped, and the next to open the database rolled the child's commits back."""
    with Broker() as broker:
        for journal in ("delete", "wal"):
            db = create(broker.path(f"{journal}.db"), journal)
            parent = connect(db, broker=broker, mode="gated")
            parent.execute("INSERT INTO rows VALUES('p', 0)")

            def child():
                parent.close()
                mine = connect(db, mode="gated")
                for i in range(5):
                    mine.execute("INSERT INTO rows VALUES('c', ?)", (i,))
                    assert not os.path.exists(db + "-journal"), "the journal of a commit is still there"
                mine.close()

            assert in_child(child) == 0, journal
            assert count(parent) == 6, journal
            parent.execute("INSERT INTO rows VALUES('p', 1)")
            parent.close()
            assert plain(db, "SELECT count(*) FROM rows") == [["7"]], journal
            assert plain(db, "PRAGMA integrity_check") == [["ok"]], journal


DAEMON = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.enable_load_extension(True)
db.load_extension(sys.argv[2])
db.execute("SELECT count(*) FROM rows").fetchone()
os.closerange(3, 64)  # as a program that becomes a daemon does
mine = [*os.pipe(), *(os.open(f"{sys.argv[3]}{i}", os.O_RDWR | os.O_CREAT) for i in range(16))]
child = os.fork()
if child == 0:
    closed = 0
    for fd in mine:
        try:
            os.fstat(fd)
        except OSError:
            closed += 1
    os._exit(closed)
print("closed in the child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def test_a_child_keeps_descriptors_that_took_the_numbers_of_closed_ones():
    """The host closes everything and opens its logs, which get the extension's old numbers. The fork handler
    closed those numbers in the child."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run([PYTHON, "-c", DAEMON, db, lib(), broker.path("log")], env=broker.env)
        assert done.stdout == "closed in the child: 0\n", done


GUEST_FORK = """
import ctypes, os, signal, sys
LOG = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
def log(_, code, text):
    LOG.append(text.decode(errors="replace"))
assert ctypes.CDLL("libsqlite3.so.0").sqlite3_config(16, log, None) == 0  # SQLITE_CONFIG_LOG, before its first use
import sqlite3
path, library = sys.argv[1:]
parent = sqlite3.connect(path, isolation_level=None)
parent.enable_load_extension(True)
parent.load_extension(library)
assert '"guest"' in parent.execute("PRAGMA turnstile_status").fetchone()[0]
parent.execute("INSERT INTO rows VALUES('p', 1)")
child = os.fork()
if child == 0:
    signal.alarm(30)
    status = 1
    try:
        try:
            sqlite3.connect(path).execute("SELECT count(*) FROM rows")
            print("the child was let in beside its inherited connection", LOG, flush=True)
        except sqlite3.OperationalError:
            if not any("inherited" in line for line in LOG):
                print("refused without a reason", LOG, flush=True)
        parent.close()
        mine = sqlite3.connect(path, isolation_level=None)
        assert '"guest"' in mine.execute("PRAGMA turnstile_status").fetchone()[0]
        for i in range(5):
            mine.execute("INSERT INTO rows VALUES('c', ?)", (i,))
        mine.close()
        status = 0
    finally:
        os._exit(status)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
parent.execute("INSERT INTO rows VALUES('p', 2)")
parent.close()
"""


def test_in_guest_mode_a_child_is_refused_until_it_has_closed_the_inherited_connection():
    """SQLite finds the parent's locks in its own memory and takes none for the child's connection: another client
    could be the last one out and delete the WAL under it."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            with PlainShell(db) as shell:
                shell.run("BEGIN; SELECT count(*) FROM rows")
                child = subprocess.Popen([PYTHON, "-c", GUEST_FORK, db, lib()], stdout=subprocess.PIPE, text=True,
                                         env=broker.env)
                try:
                    # In rollback mode the member's commit must wait for the shell's read to end.
                    wait_until(lambda: broker.members(db, child.pid) or child.poll() is not None, what="the member")
                    shell.run("COMMIT")
                    assert child.communicate(timeout=60)[0] == "child 0\n", journal
                finally:
                    child.kill()
                    child.wait(10)
                shell.run("INSERT INTO rows VALUES('s', 1)")
            assert plain(db, "SELECT count(*) FROM rows") == [["8"]], journal
            assert plain(db, "PRAGMA integrity_check") == [["ok"]], journal


# --- a broker or a session that ends -----------------------------------------------------------------------------

def own_locks(db):
    """This process's POSIX locks on the file, from /proc/locks, without the numbers of the lines there."""
    owner, file = f" {os.getpid()} ", f":{os.stat(db).st_ino} "
    with open("/proc/locks") as f:
        return [line.split()[1:] for line in f if "POSIX" in line and owner in line and file in line]


def test_closing_an_orphaned_member_leaves_a_plain_connections_locks():
    """The broker stops and opens the gate; a plain connection of the same process takes its POSIX locks. When the
    idle member then closed, its copy of the gate closed too, and with it went those locks."""
    for journal in ("wal", "delete"):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            member = connect(db, broker=broker, mode="gated")
            member.execute("INSERT INTO rows VALUES('m', 1)")
            broker.stop()
            other = sqlite3.connect(f"file:{db}?turnstile_fallback=plain", uri=True, isolation_level=None)
            assert status_of(other)["mode"] == "plain", status_of(other)
            other.execute("BEGIN")
            assert count(other) == 1
            held = own_locks(db)
            assert held, "the plain connection holds no lock"
            member.close()
            assert own_locks(db) == held, (journal, held, own_locks(db))
            other.execute("COMMIT")
            if journal == "wal":
                # The last one out would delete the WAL; with its lock gone the other would write into the void.
                plain(db, "INSERT INTO rows VALUES('p', 1)")
                assert os.path.exists(db + "-wal")
            other.execute("INSERT INTO rows VALUES('o', 1)")
            rows = 3 if journal == "wal" else 2
            assert plain(db, "SELECT count(*) FROM rows") == [[str(rows)]], journal
            other.close()


def cut_session(broker):
    """Ends this process's session as a broken connection would."""
    cut = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                peer, _, _ = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                # Not the stream socket that holds the gate.
                if peer == broker.pid and s.type == socket.SOCK_SEQPACKET:
                    s.shutdown(socket.SHUT_RDWR)
                    cut += 1
        except OSError:
            continue  # listdir's own descriptor, or a socket of another kind
    assert cut == 1, f"{cut} sockets to the broker"


def test_a_lost_sessions_seats_come_back_when_its_connections_close():
    """The process lives on, and its connections go on in the segment. When they had closed, the session was kept for
    ever, so its liveness byte stayed locked and the broker kept its turn: nobody could write any more."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            member = connect(db, broker=broker, mode="gated")
            idle = connect(db, mode="gated")
            member.execute("BEGIN IMMEDIATE")
            member.execute("INSERT INTO rows VALUES('half', 1)")
            cut_session(broker)
            wait_until(lambda: broker.status()["broker"]["sessions"])
            member.execute("COMMIT")
            idle.execute("INSERT INTO rows VALUES('i', 1)")
            member.execute("BEGIN IMMEDIATE")
            for c in (member, idle):
                c.close()
            with member_shell(db, broker) as shell:
                shell.run("INSERT INTO rows VALUES('s', 1)")
                wait_until(lambda: len(broker.members(db)) == 1, what="the seats of the lost session")
                assert shell.run("SELECT count(*) FROM rows") == [["3"]]
            again = connect(db, mode="gated")
            again.execute("INSERT INTO rows VALUES('again', 1)")
            again.close()
            assert plain(db, "PRAGMA integrity_check", retry=5) == [["ok"]]


def test_a_connection_opened_after_the_session_was_lost_goes_on_when_the_old_ones_close():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        old = connect(db, broker=broker, mode="gated")
        old.execute("BEGIN IMMEDIATE")
        old.execute("INSERT INTO rows VALUES('half', 1)")
        cut_session(broker)
        new = connect(db, mode="gated")
        assert count(new) == 0
        old.close()
        for i in range(3):
            new.execute("INSERT INTO rows VALUES('n', ?)", (i,))
        wait_until(lambda: len(broker.members(db)) == 1, what="the lost session's seat")
        new.close()
        assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["3"]]


# --- waits that are remembered -----------------------------------------------------------------------------------

def in_thread(body):
    """Runs `body` in a thread; the returned function waits for it and raises what it raised."""
    raised = []

    def guarded():
        try:
            body()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()

    def join(limit=30):
        thread.join(limit)
        assert not thread.is_alive(), "the thread does not end"
        if raised:
            raise raised[0]
    return join


def commit_when_waited_for(holder, broker, db):
    wait_until(lambda: waiting_ms(broker, db) >= 0, what="somebody to stand in line")
    holder.run("COMMIT")


def test_a_statement_that_looks_like_an_earlier_one_has_a_wait_of_its_own():
    """Without a statement cache the INSERT is made where the SELECT was, and is in its first run too. The time of
    the SELECT's wait was taken for the INSERT's, which then had none left."""
    limit = 2.0
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with member_shell(db, broker) as holder:
            holder.run("SELECT count(*) FROM rows")  # else the SELECT below recovers the wal-index
            member = connect(f"file:{db}?turnstile_wait={limit:g}s", uri=True, broker=broker, mode="gated",
                             cached_statements=0)
            member.execute("SELECT count(*) FROM rows").fetchall()
            time.sleep(limit * 1.1)  # the very thing: the SELECT was longer ago than a wait may last
            holder.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('h', 1)")
            join = in_thread(lambda: commit_when_waited_for(holder, broker, db))
            member.execute("INSERT INTO rows VALUES('m', 1)")
            join()
            assert holder.run("SELECT count(*) FROM rows") == [["2"]]
            member.close()


def test_an_application_that_tries_again_waits_again():
    """Its next attempt is prepared anew where the last one was, in its first run too. Taken for a retry of SQLite's
    busy handler, it never stood in line again as long as it came within a second of the last."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with member_shell(db, broker) as holder:
            holder.run("SELECT count(*) FROM rows")
            member = connect(f"file:{db}?turnstile_wait=1s", uri=True, broker=broker, mode="gated",
                             cached_statements=0)
            member.execute("SELECT count(*) FROM rows").fetchall()
            holder.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('h', 1)")
            try:
                member.execute("INSERT INTO rows VALUES('m', 1)")
                raise AssertionError("two writers")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            join = in_thread(lambda: commit_when_waited_for(holder, broker, db))
            time.sleep(0.01)  # what comes within 2 ms is taken for a busy handler that spins
            member.execute("INSERT INTO rows VALUES('m', 2)")
            join()
            assert holder.run("SELECT count(*) FROM rows") == [["2"]]
            member.close()


def test_in_guest_mode_a_read_behind_a_plain_writer_ends_at_its_limit():
    """Each retry of SQLite's busy handler began a wait anew: the limit was multiplied by the number of retries."""
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        with PlainShell(db) as shell:
            shell.run("BEGIN; SELECT count(*) FROM rows")
            member = connect(f"file:{db}?turnstile_wait=500ms", uri=True, broker=broker, mode="guest", timeout=1)
            shell.run("COMMIT")
            shell.run("BEGIN EXCLUSIVE")
            begin = time.monotonic()
            try:
                count(member)
                raise AssertionError("read beside a plain EXCLUSIVE lock")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            took = time.monotonic() - begin
            assert 0.4 < took < 5, f"{took:.1f} s for a limit of 0.5 s and a busy timeout of 1 s"
            shell.run("COMMIT")
            assert count(member) == 0
        member.close()


def test_a_refused_upgrade_does_not_make_later_reads_wait():
    """The next transaction takes its turn first, whatever it does: that one. It was every later one."""
    limit = 3.0
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(f"file:{db}?turnstile_wait={limit:g}s", uri=True, broker=broker, mode="gated")
        with member_shell(db, broker) as writer:
            writer.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('w', 1)")
            member.execute("BEGIN")
            assert count(member) == 0
            try:
                member.execute("INSERT INTO rows VALUES('m', 1)")
                raise AssertionError("two writers")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            member.execute("ROLLBACK")
            assert count(member) == 0  # may take its turn
            begin = time.monotonic()
            for _ in range(5):
                assert count(member) == 0
            took = time.monotonic() - begin
            assert took < limit, f"{took:.1f} s for five reads beside a writer"
            writer.run("COMMIT")
        assert count(member) == 1
        member.close()


# --- threads -----------------------------------------------------------------------------------------------------

def test_a_transaction_driven_by_another_thread_is_not_taken_for_idle():
    """Begun by this thread, handed to another one (a task pool), while this thread waits on another connection: the
    holder was taken for one that only this thread could end, and the wait given up."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker, mode="gated", check_same_thread=False)
        waiter = connect(db, mode="gated")
        holder.execute("BEGIN IMMEDIATE")
        handed = threading.Event()

        def drive():
            rows = 0
            while rows == 0 or waiting_ms(broker, db) < 400:
                holder.execute("INSERT INTO rows VALUES('h', ?)", (rows,))
                rows += 1
                handed.set()
                assert rows < 10000
            holder.execute("COMMIT")

        join = in_thread(drive)
        assert handed.wait(20)
        waiter.execute("INSERT INTO rows VALUES('w', 1)")
        join()
        assert count(waiter) > 1
        holder.close()
        waiter.close()


def test_a_writer_waits_for_another_threads_long_statement():
    """A statement that computes does nothing that the VFS sees, and was taken for an idle transaction."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker, mode="gated", check_same_thread=False)
        waiter = connect(db, mode="gated")
        computing = threading.Event()

        def compute():
            computing.set()
            wait_until(lambda: waiting_ms(broker, db) >= 1500, 20, "the other writer to wait for 1.5 s")
            return 1

        holder.create_function("compute", 0, compute)
        join = in_thread(lambda: holder.execute("INSERT INTO rows SELECT 'h', compute()"))
        assert computing.wait(20)
        waiter.execute("INSERT INTO rows VALUES('w', 1)")
        join()
        assert count(waiter) == 2
        holder.close()
        waiter.close()


# --- shared cache ------------------------------------------------------------------------------------------------

def shared_cache(db):
    return sqlite3.connect(f"file:{db}?cache=shared", uri=True, timeout=5, isolation_level=None)


def test_a_shared_cache_that_is_open_already_is_refused():
    """Its pager belongs to several connections; adopted, it was bound to the one that loaded the extension, and used
    it after that one was closed."""
    with Broker() as broker:
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        db = create(broker.path("app.db"))
        one, two = shared_cache(db), shared_cache(db)
        for c in (one, two):
            c.enable_load_extension(True)
            try:
                c.load_extension(lib())
                raise AssertionError("a shared cache was adopted")
            except sqlite3.OperationalError as e:
                assert "cache=shared" in str(e), e
        one.close()
        two.execute("INSERT INTO rows VALUES('plain', 1)")
        two.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["1"]]


def test_a_shared_cache_opened_later_survives_its_first_connection():
    with Broker() as broker:
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        loader = sqlite3.connect(":memory:")
        loader.enable_load_extension(True)
        loader.load_extension(lib())
        loader.close()
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            one, two = shared_cache(db), shared_cache(db)
            assert status_of(one)["mode"] == status_of(two)["mode"] == "gated"
            one.execute("INSERT INTO rows VALUES('one', 1)")
            one.close()
            for i in range(20):
                two.execute("INSERT INTO rows VALUES('two', ?)", (i,))
            three = shared_cache(db)
            two.close()
            three.execute("INSERT INTO rows VALUES('three', 1)")
            assert count(three) == 22
            three.close()
            assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["22"]]


# --- read-only clients -------------------------------------------------------------------------------------------

READER = """
import os, sqlite3, sys
path, library, uid = sys.argv[1:]
os.setgid(int(uid)); os.setuid(int(uid))
open_ = {}
print("ready", flush=True)
for line in sys.stdin:
    what, name = line.split()
    try:
        if what == "open":
            c = open_[name] = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0, isolation_level=None)
            c.enable_load_extension(True)
            c.load_extension(library)
            print(c.execute("PRAGMA turnstile_status").fetchone()[0], flush=True)
        elif what == "close":
            open_.pop(name).close()
            print("closed", flush=True)
        else:
            print(open_[name].execute("SELECT count(*) FROM rows").fetchone()[0], flush=True)
    except sqlite3.Error as e:
        print("failed:", e, flush=True)
"""


class Reader:
    """A process of another user, that may read the file and no more."""

    def __init__(self, broker, db):
        os.makedirs(broker.path("ext"), exist_ok=True)
        library = shutil.copy(lib(), broker.path("ext"))
        for name in (db, db + "-wal"):
            if os.path.exists(name):
                os.chmod(name, 0o644)
        self.process = subprocess.Popen([PYTHON, "-u", "-c", READER, db, library, str(NOBODY)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**broker.env, "HOME": "/"})
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait(10)

    def do(self, what, name):
        self.process.stdin.write(f"{what} {name}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@timeout(60)
def test_one_of_two_read_only_connections_closes_and_the_other_reads_on():
    """Leaving, the first one unmapped what both used."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            member = connect(db, broker=broker, mode="gated")
            member.execute("INSERT INTO rows VALUES('m', 1)")
            with Reader(broker, db) as reader:
                for name in "ab":
                    status = reader.do("open", name)
                    assert '"role":"read-only"' in status and '"gated"' in status, (journal, status)
                    assert reader.do("read", name) == "1", journal
                assert reader.do("close", "a") == "closed"
                for n in range(1, 10):
                    assert reader.do("read", "b") == str(n), journal
                    member.execute("INSERT INTO rows VALUES('m', 1)")
                assert '"gated"' in reader.do("open", "a")
                assert reader.do("read", "a") == "10", journal
            member.close()


@timeout(60)
def test_a_read_only_client_reads_before_any_writer_has():
    """A writer has joined and has not looked at the database, so the wal-index is empty, and a read-only client
    cannot fill it. Beside it lies the WAL of a killed process, with a committed row."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        shell = PlainShell(db)
        shell.run("INSERT INTO rows VALUES('dead', 1)")
        shell.kill()
        assert os.path.getsize(db + "-wal")
        member = connect(db, broker=broker, mode="gated")
        with Reader(broker, db) as reader:
            status = reader.do("open", "a")
            assert '"role":"read-only"' in status and '"gated"' in status, status
            assert reader.do("read", "a") == "1"
            member.execute("INSERT INTO rows VALUES('m', 1)")
            assert reader.do("read", "a") == "2"
        member.close()
