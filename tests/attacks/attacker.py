"""Runs one attack, as the user that this process is of: `attacker.py NAME SECONDS`. Prints one line of JSON: how many blows it
struck, or why it cannot be tried here.

An attack is a function of one of the modules below, marked with `@attack`: its docstring says what it tries. It is given an
`Attack`, strikes while `going()`, and counts with `blow()`. What the broker does to its sessions is no error of its own.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import sqlite3
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "e2e"))

from test_hostile import Hostile  # noqa: E402

libc = ctypes.CDLL(None, use_errno=True)
ATTACKS = {}
MODULES = ("messages", "descriptors", "memory", "processes", "namespaces")


class CannotHere(Exception):
    """What the attack needs is not there: said, and no success."""


def attack(function):
    assert function.__doc__, f"{function.__name__} does not say what it tries"
    ATTACKS[function.__name__] = function
    return function


@contextlib.contextmanager
def regardless():
    """The broker ends sessions, refuses, and does not answer everything."""
    with contextlib.suppress(OSError, AssertionError, IndexError):
        yield


class Attack:
    def __init__(self, seconds):
        self.socket = os.environ["SOCKET"]
        self.place = os.environ["PLACE"]
        self.data = os.environ["DATA"]
        self.seconds = seconds
        self.end = None
        self.blows = 0
        self.kept = []
        self.made = 0

    def going(self):
        """The time begins when this is asked first: preparing takes what it takes."""
        self.end = self.end or time.monotonic() + self.seconds
        return time.monotonic() < self.end

    def blow(self, times=1):
        self.blows += times

    def keep(self, *what):
        """Not let go before the end."""
        self.kept.extend(what)
        return what[0] if what else None

    def connected(self, blocking=False):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.settimeout(2) if blocking else s.setblocking(False)
        s.connect(self.socket)
        return s

    def session(self, **options):
        """A session that is waited for no longer than a second."""
        hostile = Hostile(self, **options)
        hostile.s.settimeout(1)
        return hostile

    def member(self, path=None, **options):
        """A session with a seat in a database of one's own, and control, wal-index and what holds the gate."""
        hostile = self.session(**options)
        fds = hostile.joined(path or self.database())
        return hostile, fds

    def database(self, name=None):
        """A new one, by plain SQLite, in WAL mode."""
        self.made += 1
        path = os.path.join(self.place, name or f"{os.getpid()}-{self.made}.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript("PRAGMA journal_mode=wal; CREATE TABLE rows(worker TEXT, seq INTEGER)")
        return path

    def connection(self, path):
        """By the extension."""
        db = sqlite3.connect(path, isolation_level=None, timeout=1)
        db.enable_load_extension(True)
        db.load_extension(os.environ["LIBRARY"])
        return db

    def say(self, hostile, data, fds=()):
        """Without waiting for room, and without believing that the session still stands."""
        hostile.s.setblocking(False)
        with regardless():
            hostile.send(data, fds)
            return True
        return False

    def hear(self, hostile):
        """Whatever has come, thrown away."""
        hostile.s.setblocking(False)
        with regardless():
            while hostile.s.recv(65536):
                pass

    def spawn(self, function, *arguments):
        """A child that runs `function` and ends."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                function(*arguments)
            os._exit(0)
        return child


def sealed(name, size, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, flags=0):
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def main():
    for module in MODULES:
        __import__(module)
    if sys.argv[1:] == ["--list"]:
        print(json.dumps({name: [f.__module__, " ".join(f.__doc__.split())] for name, f in ATTACKS.items()}))
        return
    name, seconds = sys.argv[1], float(sys.argv[2])
    current = Attack(seconds)
    # An attack may outstay its time in a system call.
    try:
        try:
            ATTACKS[name](current)
        except (ConnectionError, BlockingIOError, TimeoutError):
            pass  # thrown out, perhaps
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETOOMANYREFS):
                raise
        while current.going() and current.blows:
            time.sleep(0.01)
        assert current.blows, "it has struck no blow"
        said = {"blows": current.blows}
    except CannotHere as e:
        said = {"skipped": str(e)}
    print(json.dumps(said), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.modules["attacker"] = sys.modules["__main__"]
    main()
