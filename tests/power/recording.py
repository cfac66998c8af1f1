"""A record of what processes do to the files of one directory (log.h), and orders to the processes under it.

    with Recording() as record:
        with Broker(env=record.env) as broker:
            run_workers(..., path=record.path("app.db"), broker=broker)
        # record.log is now what the checker reads

Inside a recorded process `note(text)` puts a text in its place in the order, and `order(...)` lets operations fail.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "e2e"))

# log.h
WRITE, TRUNCATE, SYNC, SYNC_EMPTY = 1 << 1, 1 << 2, 1 << 4, 1 << 20
KILL_AFTER, KILL_BEFORE = -1, -2


def place():
    """Where directories of recordings are made: in memory if there is enough, where nothing waits for a disk and the
    record alone says what is durable."""
    with contextlib.suppress(OSError):
        there = os.statvfs("/dev/shm")
        if os.access("/dev/shm", os.W_OK) and there.f_bavail * there.f_frsize > 1 << 30:
            return "/dev/shm"
    return tempfile.gettempdir()


PLACE = place()


@functools.cache
def recorder():
    """The recorder, compiled for this run of the tests; a process under the record has it already."""
    mine = os.environ.get("LD_PRELOAD", "")
    if os.environ.get("POWER_LOG") and mine:
        return mine
    directory = tempfile.mkdtemp(prefix="power-recorder-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = os.path.join(directory, "recorder.so")
    sources = [os.path.join(HERE, name) for name in ("recorder.c", "log.c")]
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", path, *sources, "-ldl"], check=True)
    return path


@functools.cache
def library():
    loaded = ctypes.CDLL(recorder())
    loaded.power_make.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
    loaded.power_note.argtypes = [ctypes.c_char_p]
    loaded.power_note.restype = None
    loaded.power_attach.argtypes = [ctypes.c_char_p]
    loaded.power_attach.restype = None
    return loaded


def note(text):
    """In a recorded process: `text` happened after everything that this process has seen, and before what it does next."""
    library().power_note(text.encode())


def order(kinds, suffix, what, skip=0, times=1, pid=0):
    """What `kinds` (WRITE | TRUNCATE | SYNC, of a file that is not empty | SYNC_EMPTY) do to files whose name ends in `suffix`, in process `pid` or in any that is
    recorded, passes `skip` times; then `times` times (-1: for ever) it fails with errno `what`, or ends its process
    (KILL_AFTER, KILL_BEFORE). Returns a number for `fired` and `cancel`. In a recorded process, or after `attach`."""
    number = library().power_order(kinds, suffix.encode(), pid, skip, times, what)
    if number < 0:
        raise RuntimeError("no room for an order, or no log attached")
    return number


def attach(log):
    """Lets a process that is not recorded note and order."""
    library().power_attach(log.encode())


def fired(number):
    """How often the order has struck."""
    return library().power_fired(number)


def cancel(number):
    library().power_cancel(number)


class Recording:
    """A directory under record. `env` is what a process needs to be recorded; `log` the log's path.

    `directory`: an empty one to be kept, with the record in it; `sync_usec`: how long a sync takes at least.
    """

    def __init__(self, directory=None, sync_usec=100):
        self.given = directory
        self.sync_usec = sync_usec

    def __enter__(self):
        self.dir = self.given or tempfile.mkdtemp(prefix="power-", dir=PLACE)
        self.files = os.path.join(self.dir, "db")
        self.log = os.path.join(self.dir, "log")
        os.mkdir(self.files)
        failed = library().power_make(self.log.encode(), self.files.encode(), self.sync_usec)
        if failed:
            raise OSError(failed, f"{self.log}: {errno.errorcode[failed]}")
        return self

    def __exit__(self, *_):
        if not self.given:
            shutil.rmtree(self.dir, ignore_errors=True)

    @property
    def env(self):
        return {"LD_PRELOAD": recorder(), "POWER_LOG": self.log}

    def path(self, name):
        return os.path.join(self.files, name)

    def order(self, *arguments, **options):
        """`order`, from a process that is not recorded."""
        attach(self.log)
        return order(*arguments, **options)
