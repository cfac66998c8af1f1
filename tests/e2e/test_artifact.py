"""What the extension is: what it exports, what it contains, what it leaves alone."""

import ctypes
import os
import shutil
import subprocess

from harness import PYTHON, Broker, connect, create, fails_without, lib, plain, run

EXPORTS = {"sqlite3_turnstile_init", "turnstile_auto_init", "sqlite3_open", "sqlite3_open_v2", "sqlite3_open16",
           "dlopen", "dlmopen", "turnstile_files",
           "open", "open64", "close", "dup2", "dup3", "close_range", "closefrom", "fcntl",
           "fcntl64", "read", "write", "pread", "pread64", "pwrite", "pwrite64", "ftruncate",
           "ftruncate64", "posix_fallocate", "posix_fallocate64", "fchown", "fchmod", "unlink",
           "mmap", "mmap64", "munmap", "usleep", "nanosleep"}


def symbols(*options):
    lines = run(["nm", "-D", *options, lib()]).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def test_it_exports_only_what_it_must():
    assert symbols("--defined-only") <= EXPORTS, symbols("--defined-only") - EXPORTS


def test_it_holds_no_second_sqlite_and_needs_none():
    assert not {s for s in symbols("--undefined-only") if s.startswith("sqlite3")}
    with open(lib(), "rb") as f:
        assert b"CREATE TABLE x(type text,name text" not in f.read(), "SQLite's schema text is in the extension"


def test_it_stays_loaded():
    """SQLite closes an extension whose entry point fails; its VFS would be gone under open connections."""
    assert "NODELETE" in run(["readelf", "-d", lib()]).stdout


HOST = """
import os, sqlite3, sys
before = dict(os.environ)
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.enable_load_extension(True)
c.load_extension(sys.argv[2])
for i in range(50):
    c.execute("INSERT INTO rows VALUES('h', ?)", (i,))
assert len(os.listdir("/proc/self/task")) == 1, "a thread was started in the host"
assert dict(os.environ) == before
c.close()
left = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")]
assert not [x for x in left if "app.db" in x], left
"""


def test_no_thread_no_output_no_environment_no_descriptor_of_the_database_left():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run([PYTHON, "-c", HOST, db, lib()], env=broker.env)
        assert done.stdout == "" and done.stderr == "", (done.stdout, done.stderr)


class Library:
    """A SQLite library by ctypes: a second one in this process."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        for f in ("sqlite3_errmsg",):
            getattr(self.lib, f).restype = ctypes.c_char_p

    def open(self, path):
        db = ctypes.c_void_p()
        assert self.lib.sqlite3_open(path.encode(), ctypes.byref(db)) == 0
        return db

    def load(self, db):
        message = ctypes.c_char_p()
        self.lib.sqlite3_enable_load_extension(db, 1)
        rc = self.lib.sqlite3_load_extension(db, lib().encode(), None, ctypes.byref(message))
        return rc, (message.value or b"").decode()

    def execute(self, db, sql):
        rows = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p)
        def row(_, n, values, __):
            rows.append([values[i].decode() for i in range(n)])
            return 0

        rc = self.lib.sqlite3_exec(db, sql.encode(), row, None, None)
        assert rc == 0, (rc, self.lib.sqlite3_errmsg(db))
        return rows

    def close(self, db):
        assert self.lib.sqlite3_close(db) == 0


def system_library():
    lines = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.splitlines()
    return next(line.split("=> ")[1] for line in lines if "libsqlite3.so.0" in line)


def second_library(broker):
    """A copy of the system's library: another file, so another library with its own state in this process."""
    copy = broker.path("libsqlite3-copy.so")
    shutil.copy(os.path.realpath(system_library()), copy)
    return Library(copy)


def test_loading_again_after_auto_extensions_were_reset():
    """As sqlite3_shutdown does. Only a traced connection has its automatic checkpoints taken over by the broker."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        library = Library(system_library())
        library.lib.sqlite3_wal_hook.restype = ctypes.c_void_p
        for round in range(2):
            memory = library.open(":memory:")
            assert library.load(memory) == (0, "")
            library.close(memory)
            db = library.open(path)
            library.execute(db, f"INSERT INTO rows VALUES('w', {round})")
            frames = library.lib.sqlite3_wal_hook(db, None, None)
            assert frames > 1000, f"round {round}: it checkpoints by itself after {frames} frames"
            library.close(db)
            library.lib.sqlite3_reset_auto_extension()


def test_a_sqlite_that_is_too_old_is_refused_with_the_reason():
    """The system's library, with the version 3.33.0 in the routine table that it hands over."""
    library = Library(system_library())
    number = ctypes.cast(library.lib.sqlite3_libversion_number, ctypes.c_void_p).value
    entry = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p)
    older = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3033000)
    refused = []

    @entry
    def auto_extension(db, message, routines):
        words = (ctypes.c_void_p * 256).from_buffer_copy(ctypes.string_at(routines, 256 * 8))
        words[list(words).index(number)] = ctypes.cast(older, ctypes.c_void_p).value
        said = ctypes.c_char_p()
        rc = entry(("sqlite3_turnstile_init", ctypes.CDLL(lib())))(db, ctypes.byref(said), ctypes.addressof(words))
        refused.append((rc, said.value))
        return 0

    library.lib.sqlite3_auto_extension(auto_extension)
    library.close(library.open(":memory:"))
    assert refused == [(1, b"turnstile: SQLite 3.33.0 is too old: turnstile needs 3.34 or later")], refused


def test_two_sqlite_libraries_in_one_process():
    """Both load the same extension; each has its own VFS and its own seat, on one file."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        one = connect(path, broker=broker, mode="gated")
        library = second_library(broker)
        two = library.open(path)
        assert library.load(two)[0] == 0
        assert '"gated"' in library.execute(two, "PRAGMA turnstile_status")[0][0]
        for i in range(50):
            one.execute("INSERT INTO rows VALUES('one', ?)", (i,))
            library.execute(two, f"INSERT INTO rows VALUES('two', {i})")
        assert library.execute(two, "SELECT count(*) FROM rows") == [["100"]]
        assert len(broker.members(path)) == 2
        three = library.open(path)  # by the second library's default VFS
        assert library.execute(three, "SELECT count(*) FROM rows") == [["100"]]
        library.close(three)
        one.close()
        library.execute(two, "INSERT INTO rows VALUES('two', 99)")
        library.close(two)
        assert plain(path, "SELECT count(*) FROM rows") == [["101"]]


@fails_without("two-libraries-guest")
def test_two_sqlite_libraries_in_guest_mode_are_not_let_onto_one_file():
    """Each would drop the other's POSIX locks, as they do without turnstile."""
    os.environ["TURNSTILE_MODE"] = "guest"
    with Broker() as broker:
        path = create(broker.path("app.db"))
        one = connect(path, broker=broker, mode="guest")
        library = second_library(broker)
        two = library.open(path)
        rc, message = library.load(two)
        assert rc != 0 and "two SQLite libraries" in message, (rc, message)
        library.close(two)
        one.execute("INSERT INTO rows VALUES('one', 1)")
        one.close()
