"""The kinds of clients that `docs/clients.md` has a line for: how each is started, and the ways to turnstile.

The programs are in `tests/clients`; its README says what they do.
"""

import dataclasses
import functools
import glob
import os
import shutil
import subprocess
import typing

import harness
from harness import CACHE, CLIENTS, PYTHON, Programs, plain_env

EXTENSION, RUN = WAYS = ("extension", "run")
LIMIT = 90  # seconds that a client may take for its rows

NODE = os.path.join(CACHE, "bin", "node")
VENV = os.path.join(CACHE, "venv", "bin", "python")


@functools.cache
def python_without_extensions():
    """A Python interpreter whose sqlite3 cannot load extensions, as pyenv builds them, or None."""
    probe = "import sqlite3, sys; hasattr(sqlite3.Connection, 'enable_load_extension') or print(sys.executable)"
    found = [shutil.which("python3", path=p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    found += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3")), reverse=True)
    for python in filter(None, found):
        try:
            done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout:
            return done.stdout.strip()
    return None


def source(name):
    return os.path.join(CLIENTS, name)


def built(name):
    return os.path.join(CACHE, "bin", name)


@dataclasses.dataclass(frozen=True)
class Client:
    """`command()` is its program and first arguments, whose first may be None where there is none; `line`, what one
    writes to load the extension; `cannot`, why that is impossible; `needs`, the step of tests/install."""
    title: str
    command: typing.Callable
    line: str = ""
    cannot: str = ""
    needs: str = ""
    linked: bool = False  # its SQLite is linked in: whether its calls can be interposed is its linker's choice

    @property
    def ways(self):
        return WAYS if self.line else (RUN,)

    def missing(self):
        """Why it cannot be run here, or None."""
        note = os.path.join(CACHE, "missing", self.needs or "-")
        if os.path.exists(note):
            with open(note) as f:
                return f.read().strip()
        program = self.command()[0]
        if program is None:
            return f"no {self.title} on this machine"
        if shutil.which(program) is None:
            return f"{program} is missing: run tests/install (and cargo build --release --examples)"
        return None


def python(title, name, line, linked=False):
    """A package of Python's, in the environment that tests/install makes."""
    return Client(title, lambda: [VENV, source(name)], line, needs="python-packages", linked=linked)


def php(name):
    def command():
        # The only directory that PHP's loadExtension() takes extensions from.
        return ["php", "-d", f"sqlite3.extension_dir={os.path.dirname(harness.lib())}", source(name)]
    return command


def java():
    jar = "/usr/share/java/sqlite-jdbc.jar"
    small = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", "-Xmx64m"]
    return ["java", *small, "-cp", f"{os.path.join(CACHE, 'java')}:{jar}", "Worker"]


CONNECTION_LINE = "`conn.enable_load_extension(True); conn.load_extension(path)`"
KINDS = {
    "shell": Client("sqlite3 shell", lambda: [source("worker.sh")], "`.load PATH`", needs="shell"),
    "python": Client("Debian's Python, `sqlite3`", lambda: [PYTHON, source("worker.py")], CONNECTION_LINE),
    "pyenv": Client("pyenv's Python, `sqlite3`", lambda: [python_without_extensions(), source("worker.py")],
                    cannot="it is built without loading of extensions"),
    "apsw": python("APSW", "python_apsw.py", CONNECTION_LINE, linked=True),
    "pysqlite3": python("pysqlite3-binary", "python_pysqlite3.py", CONNECTION_LINE, linked=True),
    "sqlalchemy": python("SQLAlchemy", "python_sqlalchemy.py", "the same in a listener to the event `connect`"),
    "django": python("Django", "python_django.py", "the same in a receiver of the signal `connection_created`"),
    "peewee": python("peewee", "python_peewee.py", "`db.load_extension(path)`"),
    "aiosqlite": python("aiosqlite", "python_aiosqlite.py",
                        "`await db.enable_load_extension(True); await db.load_extension(path)`"),
    "node_sqlite": Client("Node, `node:sqlite`", lambda: [NODE, source("node_sqlite.mjs")],
                          "`allowExtension: true`, `db.loadExtension(path)`", needs="node", linked=True),
    "better_sqlite3": Client("Node, better-sqlite3", lambda: [NODE, source("better_sqlite3.mjs")],
                             "`db.loadExtension(path)`", needs="better-sqlite3", linked=True),
    "npm_sqlite3": Client("Node, sqlite3", lambda: [NODE, source("npm_sqlite3.mjs")],
                          "`db.loadExtension(path, callback)`", needs="npm-sqlite3", linked=True),
    "go": Client("Go, mattn/go-sqlite3, `-tags libsqlite3`", lambda: [built("worker-go")],
                 "a driver with `Extensions`, opened once on `:memory:`", needs="go"),
    "go_linked": Client("Go, mattn/go-sqlite3, SQLite linked in", lambda: [built("worker-go-linked")],
                        "a driver with `Extensions`, opened once on `:memory:`", needs="go-linked", linked=True),
    "php_sqlite3": Client("PHP, SQLite3", php("php_sqlite3.php"),
                          "`sqlite3.extension_dir` in php.ini, `$db->loadExtension(name)`", needs="php"),
    "php_pdo": Client("PHP, PDO", php("php_pdo.php"), cannot="PDO loads none before PHP 8.4",
                      needs="php"),
    "ruby": Client("Ruby, sqlite3", lambda: ["ruby", source("worker.rb")],
                   "`db.enable_load_extension(true); db.load_extension(path)`", needs="ruby"),
    "perl": Client("Perl, DBD::SQLite", lambda: ["perl", source("worker.pl")],
                   "`$db->sqlite_enable_load_extension(1); $db->sqlite_load_extension($path)`", needs="perl"),
    "java": Client("Java, JDBC (Debian's)", java,
                   "`config.enableLoadExtension(true)`, `SELECT load_extension(path)`", needs="java"),
    "tcl": Client("Tcl, sqlite3", lambda: ["tclsh", source("worker.tcl")],
                  "`db enable_load_extension 1; db eval {SELECT load_extension($path)}`", needs="tcl"),
    "c": Client("C, libsqlite3", lambda: [built("worker-c")], "`sqlite3_load_extension(db, path, 0, 0)`", needs="c"),
    "rust": Client("Rust, rusqlite `bundled`", lambda: [os.path.join(harness.target(), "examples", "worker")],
                   "`db.load_extension(path, None)`", linked=True),
}


def environment(broker, way):
    env = dict(broker.env) if broker else plain_env()
    env.pop("TURNSTILE_EXTENSION", None)
    env["NODE_MODULES"] = os.path.join(CACHE, "node", "node_modules")
    env["NODE_NO_WARNINGS"] = "1"
    env["WORKER_SECONDS"] = str(LIMIT)
    if way == EXTENSION:
        env["TURNSTILE_EXTENSION"] = harness.lib()
    return env


class Clients(Programs):
    """Clients at work. `jobs`: (name of the process, kind, way, database); a way of None is plain SQLite."""

    def __init__(self, jobs, rows, broker):
        super().__init__({}, None, LIMIT)
        for name, kind, way, db in jobs:
            wrapper = [harness.bin(), "run", "--"] if way == RUN else []
            command = [*wrapper, *KINDS[kind].command(), db, name, str(rows), record_of(db)]
            # Without a busy handler there is no sleep in which such a one could wait.
            waits = {"WORKER_TIMEOUT": "20000"} if KINDS[kind].linked and way == RUN else {}
            self._start(name, command, {**environment(broker, way), **waits})

    def said(self, name):
        """What the client, or the wrapper, said on its standard error."""
        return self._stderr(name)


def record_of(db):
    """Where what was acknowledged is written down."""
    return db + ".acknowledged"
