"""What the end-to-end tests share: a broker to test against, connections, workers, and the record of what was
acknowledged, which is compared with what the database holds.

A test is a function `test_*` in a file `test_*.py`. `run.py` runs each in a process of its own, because the
extension stays loaded in the process that loaded it. Every wait here has a limit; nothing sleeps to be on the
safe side.

    from harness import Broker, connect, create, check_rows, run_workers

    def test_two_writers_lose_nothing():
        with Broker() as broker:
            db = create(broker.path("app.db"))
            results = run_workers(2, "insert", 1.0, path=db, broker=broker)
            assert not sum(r["busy"] for r in results)
            check_rows(db, broker.record)
"""

import collections
import contextlib
import functools
import importlib.util
import inspect
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CACHE = os.environ.get("TURNSTILE_CACHE", os.path.join(ROOT, ".cache"))
CLIENTS = os.path.join(ROOT, "tests", "clients")
PYTHON = "/usr/bin/python3"
SHELL = "/usr/bin/sqlite3"

Skip = unittest.SkipTest
START_LIMIT = 20.0


class SetupError(RuntimeError):
    """The test could not be set up: never the failure that a test is looking for."""


# --- what is tested -------------------------------------------------------------------------------------------

def target():
    """The directory of the build under test. Read at every call: `fails_without` changes it."""
    return os.environ.get("TURNSTILE_TARGET") or os.path.join(ROOT, "target", "release")


def planted_target():
    return os.environ.get("TURNSTILE_PLANTED_TARGET") or os.path.join(ROOT, "target-planted", "release")


def bin():  # noqa: A001 (the program is called so everywhere here)
    return os.path.join(target(), "turnstile")


def lib():
    return os.path.join(target(), "libturnstile.so")


def __getattr__(name):
    # `harness.BIN` and `harness.LIB` follow the environment too.
    if name == "BIN":
        return bin()
    if name == "LIB":
        return lib()
    raise AttributeError(name)


# --- waiting --------------------------------------------------------------------------------------------------

def wait_until(condition, timeout=10.0, what="the condition"):
    """Polls until `condition()` is true and returns its value; AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.005)


def run(command, timeout=60.0, check=True, **options):
    """subprocess.run with a limit, captured text, and an AssertionError that shows the output."""
    options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
    if options["stdin"] is None:
        del options["stdin"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired as e:
        def text(part):
            return part.decode(errors="replace") if isinstance(part, bytes) else part or ""
        raise AssertionError(
            f"still running after {timeout:g} s: {command}\n{text(e.stdout)}{text(e.stderr)}") from None
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


# --- the broker -----------------------------------------------------------------------------------------------

class Broker:
    """A broker of its own, with a directory for databases. Use it as a context manager.

    At the end it is stopped, and the test fails if it had died by itself or logged a panic.
    """

    def __init__(self, *arguments, env=None, log="turnstile=info"):
        self.arguments = list(arguments)
        self.extra = dict(env or {})
        self.level = log
        self.process = None
        self.dir = None

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="ts-")
        os.chmod(self.dir, 0o755)
        self.socket = os.path.join(self.dir, "s")
        self.logfile = os.path.join(self.dir, "broker.log")
        self.record = os.path.join(self.dir, "acknowledged")
        try:
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind, value, trace):
        try:
            self._end(failed=kind is not None)
        finally:
            if kind is not None and not issubclass(kind, unittest.SkipTest):
                sys.stderr.write(f"--- broker's log ({self.logfile})\n{tail(self.log())}\n---\n")
            self._clean()

    @property
    def env(self):
        """The environment of this broker's clients."""
        return {**os.environ, "TURNSTILE_SOCKET": self.socket, **self.extra}

    @property
    def pid(self):
        return self.process.pid

    def path(self, name):
        return os.path.join(self.dir, name)

    def start(self, timeout=START_LIMIT):
        """Starts it, also again after `stop` or `kill`, and waits until it answers."""
        if not os.path.exists(bin()):
            raise SetupError(f"{bin()} is missing: run `cargo build --release`")
        env = {"RUST_LOG": self.level, "RUST_BACKTRACE": "1", "NO_COLOR": "1", **self.env}
        with open(self.logfile, "ab") as log:
            self.process = subprocess.Popen([bin(), "serve", "--socket", self.socket, *self.arguments],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        end = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None:
                raise SetupError(f"the broker ended with {self.process.returncode} at start\n{self.log()}")
            if time.monotonic() > end:
                self.process.kill()
                self.process.wait(10)
                raise SetupError(f"the broker did not listen within {timeout:g} s\n{self.log()}")
            time.sleep(0.005)

    def answers(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            try:
                s.settimeout(1)
                s.connect(self.socket)
            except OSError:
                return False
        return True

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def status(self):
        """`turnstile status --json`, parsed."""
        done = run([bin(), "status", "--json"], env=self.env, timeout=20)
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"status --json is not JSON: {done.stdout!r}") from None

    def database(self, path):
        """The status entry of the database at `path`, or None when it has no members."""
        s = os.stat(path)
        for d in self.status()["databases"]:
            if (d["device"], d["inode"]) == (s.st_dev, s.st_ino):
                return d
        return None

    def members(self, path, pid=None):
        entry = self.database(path)
        return [m for m in (entry["members"] if entry else []) if pid in (None, m["pid"])]

    def log(self):
        try:
            with open(self.logfile, errors="replace") as f:
                return f.read()
        except OSError:
            return ""

    def stop(self, sig=signal.SIGTERM, timeout=20.0):
        """Ends it and returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        if process.poll() is not None:
            raise AssertionError(f"the broker had died by itself: {ending(process.returncode)}\n{tail(self.log())}")
        process.send_signal(sig)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise AssertionError(f"the broker did not end within {timeout:g} s of {sig!r}\n{tail(self.log())}") from None
        if process.returncode not in (0, -sig):
            raise AssertionError(f"the broker ended with {ending(process.returncode)}\n{tail(self.log())}")
        return process.returncode

    def kill(self):
        """SIGKILL, and waits until it is gone. `start()` may follow."""
        return self.stop(signal.SIGKILL)

    def _end(self, failed):
        try:
            self.stop()
        except AssertionError:
            if not failed:
                raise
            sys.stderr.write("and the broker did not end well either\n")
        panics = [line for line in self.log().splitlines() if "panicked at" in line or "PANIC" in line]
        if panics and not failed:
            raise AssertionError("the broker logged a panic:\n" + tail(self.log()))

    def _clean(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if os.environ.get("TURNSTILE_KEEP"):
            sys.stderr.write(f"kept: {self.dir}\n")
        else:
            shutil.rmtree(self.dir, ignore_errors=True)


def tail(text, lines=40):
    return "\n".join(text.splitlines()[-lines:])


def ending(status):
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


# --- connections ----------------------------------------------------------------------------------------------

def create(path, journal="wal", table="rows", synchronous=None):
    """Makes a database with the workers' table by plain SQLite, in another process, and returns its path."""
    plain(path, f"PRAGMA journal_mode={journal}; CREATE TABLE {table}(worker TEXT, seq INTEGER)")
    return path


def connect(path, load=True, timeout=0, isolation_level=None, broker=None, mode=None, **options):
    """Opens `path` by Debian Python's sqlite3, loads the extension and checks that the connection was adopted.

    `broker` (a Broker, or the environment of one) is needed once per process; a worker's process has it already.
    `mode` ("gated", "guest") is asserted if given.
    """
    if broker is not None:
        os.environ["TURNSTILE_SOCKET"] = broker.socket if isinstance(broker, Broker) else broker["TURNSTILE_SOCKET"]
    db = sqlite3.connect(path, timeout=timeout, isolation_level=isolation_level, **options)
    try:
        if load:
            db.enable_load_extension(True)
            db.load_extension(lib())
            db.enable_load_extension(False)
            seen = status_of(db)
            if mode is not None and seen.get("mode") != mode:
                raise AssertionError(f"mode {mode} expected, PRAGMA turnstile_status says {seen}")
    except BaseException:
        db.close()
        raise
    return db


def status_of(db):
    """`PRAGMA turnstile_status` of a connection, parsed. AssertionError where turnstile is not in charge."""
    row = db.execute("PRAGMA turnstile_status").fetchone()
    if row is None:
        raise AssertionError("PRAGMA turnstile_status says nothing: the connection is not turnstile's")
    try:
        return json.loads(row[0])
    except (TypeError, ValueError):
        raise AssertionError(f"PRAGMA turnstile_status is not JSON: {row!r}") from None


def is_busy(error):
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


# --- plain SQLite, always in another process ------------------------------------------------------------------

class PlainError(AssertionError):
    """Plain SQLite said no."""


def plain_env():
    dropped = ("LD_PRELOAD", "TURNSTILE_SOCKET", "TURNSTILE_MODE", "TURNSTILE_PLANTED")
    return {k: v for k, v in os.environ.items() if k not in dropped}


def plain(path, sql, timeout=30.0, busy_ms=0, retry=0.0, options=()):
    """Runs `sql` in the sqlite3 shell, without turnstile, and returns its rows as lists of strings.

    `retry`: for so many seconds "database is locked" is tried again (the broker may just be letting go).
    """
    end = time.monotonic() + retry
    while True:
        done = run([SHELL, "-batch", "-bail", "-noheader", "-separator", "\x1f", *options, "-cmd",
                    f".timeout {busy_ms}", path], input=sql.rstrip("; \n") + ";\n",
                   check=False, timeout=timeout, env=plain_env())
        if not done.returncode:
            return [line.split("\x1f") for line in done.stdout.splitlines()]
        if "is locked" not in done.stderr or time.monotonic() > end:
            raise PlainError(f"plain sqlite3 {path}: {done.stderr.strip() or ending(done.returncode)}")
        time.sleep(0.01)


class PlainShell:
    """A plain sqlite3 shell that stays open: it can hold a transaction while the test goes on.

        with PlainShell(db) as shell:
            shell.run("BEGIN; SELECT count(*) FROM rows")
    """

    def __init__(self, path, env=None, command=None):
        """`command`: another shell than Debian's, in batch mode and with its separator, on another path, maybe."""
        self.process = subprocess.Popen(command or [SHELL, "-batch", "-noheader", "-separator", "\x1f", path],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env=plain_env() if env is None else env)
        self.count = 0
        self.left = b""

    @property
    def pid(self):
        return self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def run(self, sql, timeout=20.0):
        """Sends SQL (or a dot command), returns its rows; PlainError with the shell's message."""
        self.send(sql)
        return self.answer(timeout)

    def send(self, sql):
        """Sends SQL without waiting; `answer` must follow."""
        self.count += 1
        end = "\n" if sql.startswith(".") else ";\n"
        self.process.stdin.write(f"{sql.rstrip('; ')}{end}.print \x1e{self.count}\n".encode())
        self.process.stdin.flush()

    def answer(self, timeout=20.0):
        mark = f"\x1e{self.count}\n".encode()
        end = time.monotonic() + timeout
        while mark not in self.left:
            left = end - time.monotonic()
            if left <= 0:
                raise AssertionError(f"the shell did not answer within {timeout:g} s; so far: {self.left!r}")
            if select.select([self.process.stdout], [], [], left)[0]:
                part = os.read(self.process.stdout.fileno(), 65536)
                if not part:
                    raise AssertionError(f"the shell ended: {self.left!r}")
                self.left += part
        text, _, self.left = self.left.partition(mark)
        lines = text.decode(errors="replace").splitlines()
        errors = [x for x in lines if re.match(r"(Runtime|Parse) error|Error:", x)]
        if errors:
            raise PlainError("; ".join(errors))
        return [x.split("\x1f") for x in lines]

    def kill(self):
        self.process.kill()
        self.close()

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process.stdout.close()


# --- the record of acknowledged writes ------------------------------------------------------------------------


@contextlib.contextmanager
def empty_again(prefix):
    """A directory in which nothing may be left at the end, nor a process whose command line names something in it."""
    directory = tempfile.mkdtemp(prefix=prefix)
    try:
        yield directory
        left = os.listdir(directory)
        assert not left, f"left behind: {left}"
        assert not processes_in(directory), f"still running: {processes_in(directory)}"
    finally:
        for pid in processes_in(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def processes_in(directory):
    """Processes whose command line names something in `directory`, with that command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command = f.read().replace(b"\0", b" ").decode(errors="replace")
            if directory in command:
                found[int(pid)] = command
    return found


class Record:
    """An append-only file outside the database: one line `worker seq` after each COMMIT that returned."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def add(self, worker, seq):
        os.write(self.fd, f"{worker} {seq}\n".encode())

    def close(self):
        os.close(self.fd)


def acknowledged(*paths):
    """What was acknowledged, as a Counter of (worker, seq), both strings. A torn last line is not one."""
    seen = collections.Counter()
    for path in paths:
        if not os.path.exists(path):
            continue
        with open(path, "rb") as f:
            for line in f:
                if line.endswith(b"\n"):
                    worker, seq = line.decode().split()
                    seen[worker, seq] += 1
    return seen


def check_rows(db, records, killed=(), table="rows", retry=10.0):
    """Compares the table with the record(s): nothing lost, nothing twice, and nothing that was never
    acknowledged except one row at most of each worker in `killed`. Returns the number of rows.

    `db` is a connection, or a path to be read by plain SQLite in another process, which also shows that plain
    SQLite can read it (it waits up to `retry` seconds for the gate to open).
    """
    records = [records] if isinstance(records, str) else list(records)
    expected = acknowledged(*records)
    sql = f"SELECT worker, seq FROM {table}"
    if isinstance(db, sqlite3.Connection):
        rows = [(str(w), str(s)) for w, s in db.execute(sql)]
        integrity = db.execute("PRAGMA integrity_check").fetchone()[0]
    else:
        rows = [(w, s) for w, s in plain(db, sql, retry=retry, timeout=60)]
        integrity = plain(db, "PRAGMA integrity_check", retry=retry, timeout=60)[0][0]
    found = collections.Counter(rows)
    killed = {str(k) for k in killed}

    lost = sorted(k for k in expected if k not in found)
    twice = sorted(k for k, n in found.items() if n > 1)
    acknowledged_twice = sorted(k for k, n in expected.items() if n > 1)
    extra = sorted(k for k in found if k not in expected)
    by_worker = collections.Counter(w for w, _ in extra)
    wrong = [(w, n) for w, n in sorted(by_worker.items()) if n > (1 if w in killed else 0)]

    faults = []
    if lost:
        faults.append(f"{len(lost)} acknowledged rows lost, such as {lost[:5]}")
    if twice:
        faults.append(f"{len(twice)} rows more than once, such as {twice[:5]}")
    if acknowledged_twice:
        faults.append(f"{len(acknowledged_twice)} writes acknowledged more than once: {acknowledged_twice[:5]}")
    if wrong:
        faults.append(f"rows that nobody acknowledged, by worker: {wrong[:10]}, such as {extra[:5]}")
    if integrity != "ok":
        faults.append(f"integrity_check: {integrity}")
    if faults:
        raise AssertionError(f"{len(rows)} rows, {sum(expected.values())} acknowledged: " + "; ".join(faults))
    return len(rows)


# --- workers --------------------------------------------------------------------------------------------------

class Worker:
    """One worker, inside its own process. A target is a function that takes it, such as `insert` below."""

    def __init__(self, task):
        self.id = task["id"]
        self.path = task["path"]
        self.seconds = task["seconds"]
        self.rows = task["rows"]
        self.options = task["options"]
        self.record = Record(task["record"]) if task["record"] else None
        self.attempts = self.committed = self.busy = 0
        self.worst_wait = 0.0
        self.more = {}
        self.end = self.since = None

    def connect(self, **options):
        return connect(self.path, **{"load": self.options.get("load", True), **options})

    def running(self):
        """True until the time is up, or the rows are written."""
        return (self.rows is None or self.committed < self.rows) and time.monotonic() < self.end

    def measure(self, write, seq=None):
        """Calls `write()`, which ends with a commit, and counts it. BUSY is counted and returns False; the wait
        goes on until the next success."""
        self.attempts += 1
        self.since = self.since or time.monotonic()
        try:
            write()
        except sqlite3.OperationalError as e:
            if not is_busy(e):
                raise
            self.busy += 1
            return False
        finally:
            self.worst_wait = max(self.worst_wait, time.monotonic() - self.since)
        self.since = None
        if self.record and seq is not None:
            self.record.add(self.id, seq)
        self.committed += 1
        return True

    def result(self):
        return {"worker": self.id, "attempts": self.attempts, "committed": self.committed, "busy": self.busy,
                "worst_wait": self.worst_wait, **self.more}


def insert(w):
    """The usual target: one row a commit. Options: load, setup (SQL at open), begin ("", "BEGIN", "BEGIN IMMEDIATE")."""
    db = w.connect()
    db.executescript(w.options.get("setup", ""))
    begin = w.options.get("begin", "")
    w.ready()
    seq = 0

    def write():
        if not begin:
            db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            return
        try:
            db.execute(begin)
            db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    while w.running():
        if w.measure(write, seq):
            seq += 1
    db.close()


class Programs:
    """Programs that print `ready`, wait for a line, work, and print their result as one line of JSON."""

    def __init__(self, commands, env, seconds=0.0):
        """`commands`: arguments by name. `seconds`: how long they work, for the limit of `wait`."""
        self.seconds = seconds
        self.killed = set()
        self.waiting = set()
        self.processes = {}
        self.buffers = {}
        self.errors = {}
        for name, command in commands.items():
            self._start(name, command, env)

    def _start(self, i, command, env):
        self.errors[i] = tempfile.TemporaryFile()
        self.processes[i] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self.errors[i], env=env)
        self.buffers[i] = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for p in self.processes.values():
            if p.poll() is None:
                p.kill()
                p.wait(20)
            for f in (p.stdin, p.stdout):
                with contextlib.suppress(OSError):
                    f.close()

    def go(self, timeout=60.0):
        """Waits until all are ready, then lets them run."""
        self.ready(timeout)
        for i, p in self.processes.items():
            self._say(i, p)
        return self

    def ready(self, timeout=60.0):
        """Waits until all are ready. `go` does it too, if this has not been called."""
        end = time.monotonic() + timeout
        for i in self.processes:
            if i in self.waiting:
                continue
            line = self._line(i, end, "to be ready")
            if line != b"ready":
                raise AssertionError(f"worker {i} said {line!r} instead of being ready")
            self.waiting.add(i)
        return self

    def _say(self, i, p):
        try:
            p.stdin.write(b"go\n")
            p.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"worker {i} is gone: {self._stderr(i)}") from None

    def pid(self, i):
        return self.processes[i].pid

    def signal(self, i, sig):
        self.processes[i].send_signal(sig)

    def kill(self, i):
        """SIGKILL; the worker counts as killed from now on and has no result."""
        self.killed.add(i)
        self.processes[i].kill()
        self.processes[i].wait(20)

    def wait(self, timeout=None):
        """The results of all that were not killed, in the order of their numbers."""
        end = time.monotonic() + (self.seconds + 90.0 if timeout is None else timeout)
        results = []
        for i, p in self.processes.items():
            if i in self.killed:
                continue
            line = self._line(i, end, "to end")
            try:
                p.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"worker {i} is done but does not exit: {self._stderr(i)}") from None
            if p.returncode:
                raise AssertionError(f"worker {i}: {ending(p.returncode)}: {self._stderr(i)}")
            results.append(json.loads(line))
        return results

    def _line(self, i, end, what):
        p = self.processes[i]
        while b"\n" not in self.buffers[i]:
            left = end - time.monotonic()
            if left <= 0:
                raise AssertionError(f"waited in vain for worker {i} (pid {p.pid}) {what}: {self._stderr(i)}")
            if select.select([p.stdout], [], [], left)[0]:
                part = os.read(p.stdout.fileno(), 65536)
                if not part:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        p.wait(5)
                    status = "running" if p.returncode is None else ending(p.returncode)
                    raise AssertionError(f"worker {i} ended ({status}) before it was {what}: {self._stderr(i)}")
                self.buffers[i] += part
        line, _, self.buffers[i] = self.buffers[i].partition(b"\n")
        return line

    def _stderr(self, i):
        self.errors[i].seek(0)
        lines = self.errors[i].read().decode(errors="replace").splitlines()
        return "\n".join(lines if len(lines) < 60 else [*lines[:30], "...", *lines[-25:]])


class Workers(Programs):
    """Started workers. All begin together, once every one of them has said that it is ready."""

    def __init__(self, n, target, seconds, path, broker=None, rows=None, record=None, options=None, env=None,
                 first=0, python=PYTHON):
        """`broker=None` runs the workers on plain SQLite; `seconds` bounds the work even where `rows` is given."""
        super().__init__({}, None, seconds)
        if broker is not None and record is None:
            record = broker.record
        env = dict(env if env is not None else broker.env if broker else plain_env())
        env["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        options = {"load": broker is not None, **(options or {})}
        for i in range(first, first + n):
            task = {"id": i, "target": target_name(target), "path": path, "seconds": seconds, "rows": rows,
                    "record": record, "options": options}
            self._start(i, [python, os.path.join(HERE, "harness.py"), "worker"], env)
            self.processes[i].stdin.write(json.dumps(task).encode() + b"\n")
            self.processes[i].stdin.flush()


def run_workers(n, target, seconds, path, broker=None, timeout=None, **options):
    """Starts `n` worker processes, lets them begin together and returns their results: a list of dicts with
    worker, attempts, committed, busy and worst_wait (seconds), and whatever the target put into `more`.

    `target` is "insert" or a module-level function of the test that takes a `Worker`, prepares itself, calls
    `w.ready()` and works while `w.running()`.
    """
    with Workers(n, target, seconds, path, broker, **options) as workers:
        return workers.go().wait(timeout)


def fairness(results):
    """The least commits of a worker by the most: 1 is fair, 0 is one worker doing nothing."""
    counts = [r["committed"] for r in results]
    return min(counts) / max(counts) if max(counts) else 0.0


def target_name(target):
    if isinstance(target, str):
        return {"file": os.path.join(HERE, "harness.py"), "name": target}
    return {"file": inspect.getsourcefile(target), "name": target.__name__}


def load_module(path):
    """Imports a test's file under its own name, once."""
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:
        return sys.modules[name]
    if os.path.dirname(path) not in sys.path:
        sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def worker_main():
    task = json.loads(sys.stdin.readline())
    w = Worker(task)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever the target prints is no answer

    def ready():
        os.write(out, b"ready\n")
        if sys.stdin.readline() != "go\n":
            sys.exit("the test has gone")
        w.end = time.monotonic() + w.seconds

    w.ready = ready
    function = getattr(load_module(task["target"]["file"]), task["target"]["name"])
    function(w)
    os.write(out, json.dumps(w.result()).encode() + b"\n")


# --- tests that must fail without a rule ----------------------------------------------------------------------

NOTICED, BROKEN = 10, 11


def timeout(seconds):
    """Gives a test another hard limit than the runner's default of 120 s."""
    def mark(function):
        function.limit = seconds
        return function
    return mark


def slow(function):
    """Leaves a test out of `--quick` runs."""
    function.slow = True
    return function


def waits(function):
    """Of a test that mostly waits: it is run beside the others."""
    function.waits = True
    return function


def fails_without(rule, attempts=1, message=None):
    """The test must pass, and it must fail in the build where `rule` is switched off (see `src/planted.rs`).

    The second run is a process of its own. It has to end in an AssertionError, an error of SQLite or a wait in
    vain (`message`: with a text that matches); where the fault shows only by chance, `attempts` may be more.
    """
    def decorate(body):
        @functools.wraps(body)
        def test():
            body()
            planted_run(body, rule, attempts, message, getattr(test, "limit", 120))
        test.body = body
        test.rule = rule
        test.planted_attempts = attempts
        return test
    return decorate


@contextlib.contextmanager
def planted_build():
    """In the build in which rules can be taken away (`TURNSTILE_PLANTED`)."""
    if not os.path.exists(os.path.join(planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    with mock.patch.dict(os.environ, {"TURNSTILE_TARGET": planted_target()}):
        yield


def planted_run(body, rule, attempts, message, limit):
    there = planted_target()
    if not os.path.exists(os.path.join(there, "libturnstile.so")):
        print(f"no planted build in {there}: not checked that this fails without {rule}", file=sys.stderr)
        return
    env = {**os.environ, "TURNSTILE_TARGET": there, "TURNSTILE_PLANTED": rule}
    command = [PYTHON, os.path.join(HERE, "harness.py"), "body", inspect.getsourcefile(body), body.__name__]
    for _ in range(attempts):
        child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            output, _ = child.communicate(timeout=limit)
            status = child.returncode
        except subprocess.TimeoutExpired:
            output, status = f"the test hangs (more than {limit} s)", NOTICED
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)
        if status == NOTICED:
            if message and not re.search(message, output):
                raise AssertionError(f"without {rule} it fails, but not with {message!r}:\n{tail(output)}")
            return
        if status:
            raise AssertionError(f"the run without {rule} broke down ({ending(status)}):\n{tail(output)}")
    stale = os.stat(os.path.join(there, "libturnstile.so")).st_mtime < os.stat(lib()).st_mtime - 600
    raise AssertionError(f"does not notice that rule {rule} is missing" +
                         (f" (but {there} is much older than {target()}: build it again)" if stale else ""))


def body_main(path, name):
    """The second run of a test: the exit status says whether it failed as a test fails."""
    import traceback
    function = getattr(load_module(os.path.abspath(path)), name)
    try:
        getattr(function, "body", function)()
    except (AssertionError, sqlite3.Error, TimeoutError, subprocess.SubprocessError):
        traceback.print_exc()
        return NOTICED
    except BaseException:
        traceback.print_exc()
        return BROKEN
    return 0


if __name__ == "__main__":
    # Under its own name, so that the tests' `import harness` finds this very module.
    module = load_module(os.path.join(HERE, "harness.py"))
    if sys.argv[1:] == ["worker"]:
        module.worker_main()
    elif len(sys.argv) == 4 and sys.argv[1] == "body":
        sys.exit(module.body_main(*sys.argv[2:]))
    else:
        sys.exit("usage: harness.py worker | body FILE NAME")
