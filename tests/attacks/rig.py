"""A broker of root's, victims of one user at work, and attacks of another: how long the victims wait.

A victim notes each wait on a board, a file that the runner reads. What is noted is how long an operation took, less how
long its thread and the broker's stood in line for a processor: the machine may be busy, and whoever keeps it busy need not be
an attacker.
"""

import contextlib
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "e2e"))

import harness  # noqa: E402
from harness import PYTHON, Broker, create, plain, wait_until  # noqa: E402

# Of each run: they are ended by it. The first is the victims'; each try of an attack is another one's, because a user that was
# found out is let in no more.
USERS = 512
# What a victim does: each kind is a process of its own.
KINDS = ("works", "opens", "arrives")
# How much longer than its own a victim's worst wait may be, in seconds.
ALLOWANCE = 0.1
# So long without a break in state D is a wait that nothing ends.
UNINTERRUPTIBLE = 0.2
# An attack that seems to have kept a victim waiting is tried again: one that does so does it again, noise does not.
TRIES = 4

SLOT = struct.Struct("=QQQQQ200s")  # window, begun (ns), worst (ns), count, errors, the last of them


class Board:
    """One slot a kind. Written by that victim alone, but for the window's number, which is the runner's."""

    def __init__(self, path, make=False):
        if make:
            with open(path, "wb") as f:
                f.write(bytes(SLOT.size * len(KINDS) + 8))
        self.file = open(path, "r+b")
        self.map = mmap.mmap(self.file.fileno(), SLOT.size * len(KINDS) + 8)

    def word(self, kind, n, value=None):
        at = KINDS.index(kind) * SLOT.size + 8 * n
        if value is None:
            return int.from_bytes(self.map[at:at + 8], "little")
        self.map[at:at + 8] = int(value).to_bytes(8, "little")

    def broker(self, pid=None):
        """Its pid, which the runner writes."""
        if pid is None:
            return int.from_bytes(self.map[-8:], "little")
        self.map[-8:] = pid.to_bytes(8, "little")

    def new_window(self):
        for kind in KINDS:
            for n in (2, 3, 4):
                self.word(kind, n, 0)
            self.word(kind, 0, self.word(kind, 0) + 1)

    def begin(self, kind):
        self.word(kind, 1, time.monotonic_ns())

    def end(self, kind, net):
        self.word(kind, 1, 0)
        self.word(kind, 2, max(self.word(kind, 2), net))
        self.word(kind, 3, self.word(kind, 3) + 1)

    def failed(self, kind, error):
        at = KINDS.index(kind) * SLOT.size + 40
        self.map[at:at + 200] = str(error).encode(errors="replace")[:200].ljust(200, b"\0")
        self.word(kind, 1, 0)
        self.word(kind, 4, self.word(kind, 4) + 1)

    def error(self, kind):
        at = KINDS.index(kind) * SLOT.size + 40
        return self.map[at:at + 200].rstrip(b"\0").decode(errors="replace")

    def worst(self, kind):
        """Seconds; also of what has not ended."""
        begun = self.word(kind, 1)
        under_way = time.monotonic_ns() - begun if begun else 0
        return max(self.word(kind, 2), under_way) / 1e9


def run_delay(of="thread-self"):
    """Nanoseconds that this thread, or a process's first one, has stood in line for a processor (/proc/PID/schedstat)."""
    try:
        with open(f"/proc/{of}/schedstat") as f:
            return int(f.read().split()[1])
    except OSError:
        return 0  # a broker that has just been replaced


class Watch(threading.Thread):
    """Looks whether a process is in state D, and for how long without a break."""

    def __init__(self, pids):
        super().__init__(daemon=True)
        self.pids = pids
        self.longest = {}
        self.over = threading.Event()

    def run(self):
        since = {}
        while not self.over.wait(0.005):
            for name, pid in self.pids().items():
                now = time.monotonic()
                if state(pid) == "D":
                    began = since.setdefault((name, pid), now)
                    self.longest[name] = max(self.longest.get(name, 0), now - began)
                else:
                    since.pop((name, pid), None)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def lives(pid):
    """Some thread of it does; the first may have ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(state(f"{pid}/task/{t}") not in ("Z", "X", "gone") for t in threads)


def end_processes_of(uids):
    """All of them: these users are the suite's own, and a process that an attack has left is another attack."""
    def left():
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}").st_uid in uids and lives(pid):
                    found.append(int(pid))
        return found
    end = time.monotonic() + 10
    while left() and time.monotonic() < end:
        for pid in left():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Rig:
    """Everything on tmpfs: what others write to the disk is no attack of ours."""

    def __init__(self, *arguments):
        self.broker = Broker("--everyone", "yes", *arguments)
        self.victims = {}
        first = 100_000 + os.getpid() % 4000 * USERS
        self.users = range(first, first + USERS)
        self.victim, self.attackers = first, iter(self.users[1:])

    def __enter__(self):
        self.home = tempfile.mkdtemp(prefix="ts-attacks-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        os.chmod(self.home, 0o755)
        self.before = tempfile.tempdir
        tempfile.tempdir = self.home
        self.end = contextlib.ExitStack()
        try:
            self.build = os.path.join(self.home, "build")
            os.mkdir(self.build)
            for path in (harness.lib(), harness.bin()):
                shutil.copy(path, self.build)
            self.data = self.directory("data", self.victim)
            self.make_databases()
            self.end.enter_context(self.broker)
            self.board = Board(os.path.join(self.home, "board"), make=True)
            self.board.broker(self.broker.pid)
            os.chown(os.path.join(self.home, "board"), self.victim, self.victim)
            for kind in KINDS:
                self.start_victim(kind)
            self.settle()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exception):
        for process in self.victims.values():
            process.kill()
            process.wait(10)
        end_processes_of(self.users)
        try:
            self.end.__exit__(*exception)
        finally:
            tempfile.tempdir = self.before
            shutil.rmtree(self.home, ignore_errors=True)

    def directory(self, name, uid):
        path = os.path.join(self.home, name)
        os.mkdir(path)
        os.chown(path, uid, uid)
        os.chmod(path, 0o755)
        return path

    def make_databases(self):
        """`main.db`, which the victims alone may open; `read.db`, which everybody may read; and some to be opened and
        closed."""
        names = ["main.db", "read.db", *(f"{i}.db" for i in range(24))]
        for name in names:
            path = create(os.path.join(self.data, name))
            os.chmod(path, 0o644 if name == "read.db" else 0o600)
            os.chown(path, self.victim, self.victim)

    def start_victim(self, kind):
        env = {**self.broker.env, "VICTIM": kind, "LIBRARY": os.path.join(self.build, "libturnstile.so")}
        self.victims[kind] = subprocess.Popen(
            [PYTHON, os.path.join(HERE, "victim.py"), self.home], env=env, user=self.victim, group=self.victim, extra_groups=[],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/")

    def settle(self):
        """Waits until every victim works."""
        self.board.broker(self.broker.pid)
        self.board.new_window()
        for kind, process in self.victims.items():
            wait_until(lambda: self.board.word(kind, 3) > 3 or process.poll() is not None, 30, f"the victim that {kind}")
            assert process.poll() is None, f"the victim that {kind} has ended"
        self.board.new_window()

    def pids(self):
        pid = self.broker.pid
        found = {"broker": pid}
        with contextlib.suppress(OSError):
            for child in os.listdir("/proc"):
                if child.isdigit():
                    with contextlib.suppress(OSError):
                        with open(f"/proc/{child}/comm") as f:
                            comm = f.read().strip()
                        if comm == "turnstile-keep" and self.is_ours(child):
                            found["keeper"] = int(child)
        return found

    def is_ours(self, pid):
        with open(f"/proc/{pid}/environ", "rb") as f:
            return f"TURNSTILE_SOCKET={self.broker.socket}".encode() in f.read().split(b"\0")

    # --- an attack ----------------------------------------------------------------------------------------------

    def window(self, seconds, attack=None):
        """The victims' worst waits, and what went wrong, over `seconds` with an attack or without."""
        pids = self.pids()
        self.board.new_window()
        with Watch(lambda: pids) as watch:
            said, more = None, []
            if attack is None:
                time.sleep(seconds)
            else:
                try:
                    said = self.attacked(attack, seconds)
                except AssertionError as e:
                    said, more = {"blows": 0}, [str(e)]
            # What an attack has left behind counts, too.
            time.sleep(0.1)
            worst = {kind: self.board.worst(kind) for kind in KINDS}
        faults = [f"{name} was {longest:.2f} s in state D" for name, longest in watch.longest.items()
                  if longest > UNINTERRUPTIBLE]
        faults += more
        for kind in KINDS:
            if self.board.word(kind, 4):
                faults.append(f"who {kind} failed {self.board.word(kind, 4)} times: {self.board.error(kind)}")
        if not self.broker.alive():
            faults.append("the broker has ended")
        return worst, faults, said

    def attacked(self, name, seconds):
        uid = next(self.attackers)
        place = self.directory(f"place-{uid}", uid)
        env = {**harness.plain_env(), "SOCKET": self.broker.socket, "PLACE": place, "DATA": self.data,
               "FUSE": self.fuse_device(), "LIBRARY": os.path.join(self.build, "libturnstile.so"),
               "TURNSTILE_SOCKET": self.broker.socket, "BROKER": str(self.broker.pid)}
        errors = tempfile.TemporaryFile()
        process = subprocess.Popen(["nice", PYTHON, os.path.join(HERE, "attacker.py"), name, str(seconds)], env=env,
                                   user=uid, group=uid, extra_groups=[], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True, cwd="/")
        try:
            line = process.stdout.readline() if select_for(process.stdout, seconds + 15) else b""
        finally:
            end_processes_of([uid])
            process.kill()
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            shutil.rmtree(place, ignore_errors=True)
        if not line:
            errors.seek(0)
            raise AssertionError(f"{name} was no attack:\n{errors.read().decode(errors='replace')}")
        return json.loads(line)

    def fuse_device(self):
        """As everybody has it on most machines."""
        path = f"/tmp/turnstile-attacks-{os.getpid()}"
        if not os.path.exists(path):
            with contextlib.suppress(OSError):
                os.mknod(path, 0o20666, os.makedev(10, 229))
                os.chmod(path, 0o666)
        self.end.callback(lambda: os.path.exists(path) and os.unlink(path))
        return path

    def try_attack(self, name, seconds):
        """A result: the worst wait of each kind with the attack and without, what is wrong with it, and what the attacker
        said. The best of a few tries."""
        best = None
        for _ in range(TRIES):
            alone, faults, _ = self.window(max(0.3, seconds / 2))
            worst, more, said = self.window(seconds, name)
            late = [f"who {kind} waited {worst[kind] * 1000:.0f} ms, without the attack {alone[kind] * 1000:.0f} ms"
                    for kind in KINDS if worst[kind] > alone[kind] + ALLOWANCE]
            result = {"name": name, "alone": alone, "worst": worst, "faults": more + late, "said": said}
            if best is None or len(result["faults"]) < len(best["faults"]):
                best = result
            if not best["faults"] or said.get("skipped"):
                break
            self.settle()
        return best

    # --- the broker's other duties ------------------------------------------------------------------------------

    def replace(self):
        """`serve --replace`, which nobody notices."""
        self.board.new_window()
        old = self.broker.process
        arguments = self.broker.arguments
        self.broker.arguments = [*arguments, "--replace"]
        try:
            self.broker.start()
        finally:
            self.broker.arguments = arguments
        old.wait(15)
        self.settle()
        return [f"while the broker was replaced who {kind} failed: {self.board.error(kind)}" for kind in KINDS
                if self.board.word(kind, 4)]

    def restart(self):
        """A stop and a start: open connections end with an error, and are opened again."""
        self.broker.stop(timeout=20)
        self.broker.start()
        self.settle()
        return []

    def check(self):
        """What the victims have acknowledged is there."""
        for process in self.victims.values():
            process.send_signal(signal.SIGTERM)
        counts = {}
        for kind, process in self.victims.items():
            counts[kind] = int(process.stdout.readline() or b"-1")
            process.stdout.close()
            process.wait(10)
        self.victims = {}
        for name in sorted(n for n in os.listdir(self.data) if n.endswith(".db")):
            rows = plain(os.path.join(self.data, name), "SELECT count(*) FROM rows; PRAGMA integrity_check", retry=10)
            assert rows[1] == ["ok"], f"{name}: {rows}"
            if name == "main.db":
                assert int(rows[0][0]) == counts["works"], f"{rows[0][0]} rows, {counts['works']} acknowledged"
        return counts


def select_for(file, seconds):
    import select
    return bool(select.select([file], [], [], seconds)[0])


def listed():
    """Attacks by name: the module each is in, and what it tries."""
    command = [PYTHON, os.path.join(HERE, "attacker.py"), "--list"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def campaign(names, seconds, say=lambda result: None, turn=1):
    """Every attack in `names`. After each `turn` of them the broker is replaced, or stopped and started, by turns."""
    results = []
    with Rig() as r:
        for n, name in enumerate(names):
            result = r.try_attack(name, seconds)
            if n % turn == turn - 1:
                duty = r.restart if n // turn % 2 else r.replace
                try:
                    result["faults"] += duty()
                except (AssertionError, harness.SetupError) as e:
                    result["faults"].append(f"{duty.__name__}: {e}")
            results.append(result)
            say(result)
        r.check()
    return results
