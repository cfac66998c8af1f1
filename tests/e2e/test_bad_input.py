"""Bad input and bad luck: whatever is wrong, there is a clear error, nothing is lost, nobody waits for ever, and
the host process stays as it was: its output, threads, children, signals, environment and descriptors."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import tempfile
import textwrap
import threading

from harness import (PYTHON, SHELL, Broker, Skip, connect, create, ending, fails_without, lib, plain, plain_env, run,
                     timeout, waits)
from test_gate import PROTOCOL_VERSION as VERSION

BUSY, CANTOPEN, NOTADB, READONLY, CORRUPT = 5, 14, 26, 8, 11
NOBODY = 54321  # a uid that has no user

# --- a host process --------------------------------------------------------------------------------------------

HOST = r'''
import ctypes, json, os, signal, sys
LOG = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
def _log(_, code, text):
    LOG.append([code, text.decode(errors="replace")])
_library = ctypes.CDLL("libsqlite3.so.0")
assert _library.sqlite3_config(16, _log, None) == 0  # SQLITE_CONFIG_LOG, before the first sqlite3_initialize
import sqlite3
LIB, RESULT, PATH, *MORE = sys.argv[1:]
_sigchld = []
signal.signal(signal.SIGCHLD, lambda *_: _sigchld.append(1))
_said = {}

def opened(path, **options):
    return sqlite3.connect(path, isolation_level=None, timeout=0, **options)

def load(db):
    db.enable_load_extension(True)
    db.load_extension(LIB)
    return db

def status(db):
    row = db.execute("PRAGMA turnstile_status").fetchone()
    return json.loads(row[0]) if row else None

def rows(db, sql="SELECT count(*) FROM rows"):
    return db.execute(sql).fetchall()

def insert(db, seq, worker="host", table="rows"):
    return db.execute(f"INSERT INTO {table} VALUES(?, ?)", (worker, seq)).rowcount

def attempt(what, *args, **options):
    """{"ok": …} or the error's code and text."""
    try:
        value = what(*args, **options)
    except sqlite3.Error as e:
        return {"code": getattr(e, "sqlite_errorcode", 1) & 255, "text": str(e)}
    return {"ok": value if isinstance(value, (int, str, list, dict)) else True}

def say(**what):
    _said.update(what)

def _environment():
    strings = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    out = []
    while strings[len(out)] is not None:
        out.append(strings[len(out)].decode(errors="replace"))
    return sorted(out)

def _world():
    """What belongs to the host: whatever the extension does, this stays."""
    umask = os.umask(0o022)
    os.umask(umask)
    with open("/proc/self/status") as f:
        signals = [line for line in f if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
    try:
        children = str(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        children = "none"
    return {"environment": _environment(), "threads": len(os.listdir("/proc/self/task")), "umask": umask,
            "directory": os.getcwd(), "signals": signals, "children": children, "sigchld": len(_sigchld)}
_before = _world()

def report():
    _said["log"] = "\n".join(text for _, text in LOG)
    now = _world()
    _said["world"] = {k: [v, now[k]] for k, v in _before.items() if v != now[k]}
    out = os.open(RESULT, os.O_WRONLY | os.O_TRUNC)
    os.write(out, json.dumps(_said).encode())
    os.close(out)
'''


def host(body, path="", *more, env=None, user=None, limit=60.0, same_world=True, **options):
    """Runs `body` in a host process of its own and returns what it said. Whatever happened, the extension must
    have printed nothing, and must have left the process's own things alone."""
    script = HOST + textwrap.dedent(body) + "\nreport()\n"
    if user is not None:
        options |= {"user": user, "group": user, "extra_groups": []}
    with tempfile.NamedTemporaryFile(prefix="ts-said-") as result:
        os.chmod(result.name, 0o666)
        done = run([PYTHON, "-c", script, lib(), result.name, path, *map(str, more)], check=False, timeout=limit,
                   cwd="/", env=os.environ if env is None else env, **options)
        if done.returncode:
            raise AssertionError(f"the host process: {ending(done.returncode)}\n{done.stdout}{done.stderr}")
        said = json.loads(result.read())
    printed = (done.stdout + done.stderr)[:2000]
    assert not printed, f"printed in the host's output: {printed!r}"
    assert not same_world or not said["world"], f"changed in the host: {said['world']}"
    return said


def environment(**settings):
    """The environment without any broker of it, with `settings`; None takes a variable away."""
    env = {k: v for k, v in plain_env().items() if not k.startswith("TURNSTILE_") or k == "TURNSTILE_PLANTED"}
    if "TURNSTILE_PLANTED" in os.environ:
        env["TURNSTILE_PLANTED"] = os.environ["TURNSTILE_PLANTED"]
    for key, value in settings.items():
        env.pop(key, None)
        if value is not None:
            env[key] = str(value)
    return env


def root_only():
    if os.geteuid() != 0:
        raise Skip("needs root, to be another user")


@contextlib.contextmanager
def directory():
    """A directory that everyone can enter."""
    path = tempfile.mkdtemp(prefix="ts-")
    os.chmod(path, 0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def owned_by(user, path):
    """Hands a directory and what is in it to a user."""
    os.chown(path, user, user)
    for name in os.listdir(path):
        os.chown(os.path.join(path, name), user, user)


def says(said, *words):
    """An error that names all of `words`."""
    assert "ok" not in said, f"no error: {said}"
    for word in words:
        assert word in said["text"], f"{word!r} is not in the error {said}"


BOTH_WAYS = """
first = opened(PATH)
say(load=attempt(load, first))
say(still=attempt(insert, first, 1, "plain"))
first.close()
say(open=attempt(opened, PATH))
"""


def refused(db, env, *words, user=None, limit=60.0):
    """Refused when the extension is loaded, with the reason in its message, and refused when a database is opened
    after that, with the reason in SQLite's error log. The connection that could not be adopted stays a plain one."""
    before = int(plain(db, "SELECT count(*) FROM rows")[0][0])
    said = host(BOTH_WAYS, db, env=env, user=user, limit=limit)
    says(said["load"], *words)
    says(said["open"])
    assert said["open"]["code"] == CANTOPEN, said
    for word in words:
        assert word in said["log"], f"{word!r} is not in the log: {said['log']}"
    assert said["still"] == {"ok": 1}, said
    assert plain(db, "SELECT count(*) FROM rows; PRAGMA integrity_check") == [[str(before + 1)], ["ok"]]
    return said


# --- no broker -------------------------------------------------------------------------------------------------

def no_host_broker():
    """Tests of a machine without a broker cannot run beside one that everybody finds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, contextlib.suppress(OSError):
        s.settimeout(5)
        s.connect("/run/turnstile/broker.sock")
        raise Skip("a broker of this host is running")


def test_a_socket_that_leads_nowhere():
    with directory() as d:
        db = create(f"{d}/app.db")
        nowhere = f"{d}/nowhere/s"
        refused(db, environment(TURNSTILE_SOCKET=nowhere), "no broker listens on", nowhere, "TURNSTILE_SOCKET")
        # A file that is no socket, and a socket that nobody listens on any more.
        stale = f"{d}/stale"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.bind(stale)
        refused(db, environment(TURNSTILE_SOCKET=stale), "no broker listens on", stale)
        refused(db, environment(TURNSTILE_SOCKET=db), db)
        assert not os.path.exists(f"{d}/nowhere"), "made a directory for a socket that it may not make"


def test_no_broker_and_none_may_be_started():
    no_host_broker()
    root_only()
    with directory() as d:
        db = create(f"{d}/app.db")
        owned_by(NOBODY, d)
        refused(db, environment(TURNSTILE_FALLBACK="refuse", XDG_RUNTIME_DIR=d), "no broker", "TURNSTILE_FALLBACK",
                user=NOBODY)


def test_plain_fallback_works_and_says_so():
    """Asked for, so it is no error; but it is said, in the status and in SQLite's error log."""
    with directory() as d:
        db = create(f"{d}/app.db")
        env = environment(TURNSTILE_SOCKET=f"{d}/nowhere", TURNSTILE_FALLBACK="plain")
        said = host("""
            db = load(opened(PATH))
            insert(db, 1)
            say(adopted=status(db), rows=rows(db))
            later = opened(PATH)
            insert(later, 2)
            say(opened=status(later), both=rows(db))
            later.close()
            db.close()
        """, db, env=env)
        assert said["rows"] == [[1]] and said["both"] == [[2]], said
        for seen in (said["adopted"], said["opened"]):
            assert seen["mode"] == "plain", seen
            assert "no broker listens on" in seen["reason"] and "TURNSTILE_FALLBACK" in seen["reason"], seen
        assert "plain" in said["log"] and "no broker" in said["log"], said
        assert plain(db, "SELECT count(*) FROM rows") == [["2"]]


def test_a_socket_that_others_may_not_connect_to():
    root_only()
    with Broker("--everyone", "no") as broker:
        db = create(broker.path("app.db"))
        os.chown(db, NOBODY, NOBODY)
        os.chmod(broker.dir, 0o777)
        refused(db, environment(TURNSTILE_SOCKET=broker.socket), "may not connect", broker.socket, user=NOBODY)
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        os.chown(db, NOBODY, NOBODY)
        os.chmod(broker.dir, 0o777)
        said = host("db = load(opened(PATH)); insert(db, 1); say(status=status(db)); db.close()", db,
                    env=broker.env, user=NOBODY)
        assert said["status"]["mode"] == "gated", said


# --- strangers -------------------------------------------------------------------------------------------------

MAGIC = 0x74575253


def varint(n):
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def hello_answer(magic=MAGIC, version=VERSION, refused=None):
    """HelloAnswer in postcard: two varints, and an optional string."""
    text = b"\0" if refused is None else b"\1" + varint(len(refused)) + refused.encode()
    return varint(magic) + varint(version) + text


def welcome():
    """FromBroker::Welcome: the session, two pids (zigzag), and the token."""
    return varint(0) + varint(1) + varint(2 * os.getpid()) + varint(2 * os.getpid()) + bytes(16)


class Stranger:
    """Something that is no broker: each connection gets the packets of `answers`, one for each packet that it has
    sent, and silence after that. None hangs up."""

    def __init__(self, path, answers=(), kind=socket.SOCK_SEQPACKET, unasked=None, accepts=True):
        self.answers, self.unasked = answers, unasked
        self.connections = []
        self.listener = socket.socket(socket.AF_UNIX, kind)
        self.listener.bind(path)
        os.chmod(path, 0o666)
        self.listener.listen(0 if not accepts else 64)
        self.accepting = threading.Thread(target=self._accept, daemon=True)
        if accepts:
            self.accepting.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError):
            if self.unasked is not None:
                connection.send(self.unasked)
            for answer in self.answers:
                if not connection.recv(70000):
                    return
                if answer is None:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                connection.send(answer)

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        for s in (self.listener, *self.connections):
            s.close()


def test_another_version_of_the_protocol():
    with directory() as d:
        db = create(f"{d}/app.db")
        cases = {"newer": (hello_answer(version=VERSION + 1), f"protocol {VERSION + 1}"),
                 "newest": (hello_answer(version=0xFFFFFFFF), "protocol 4294967295"),
                 "says": (hello_answer(version=VERSION + 1, refused="come back with version 9"), "version 9"),
                 "magic": (hello_answer(magic=MAGIC + 1), "not a turnstile broker"),
                 "text": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a turnstile broker"),
                 "rest": (hello_answer() + b"more", "not a turnstile broker")}
        for name, (answer, words) in cases.items():
            stranger = Stranger(f"{d}/{name}", [answer])
            try:
                refused(db, environment(TURNSTILE_SOCKET=f"{d}/{name}"), f"{d}/{name}", words)
            finally:
                stranger.close()


@waits
def test_something_else_listens_on_the_socket():
    """Nothing that a stranger does may hang the host for ever, or bring it down."""
    with directory() as d, contextlib.ExitStack() as strangers:
        def stranger(name, *args, **options):
            s = Stranger(f"{d}/{name}", *args, **options)
            strangers.callback(s.close)

        stranger("stream", kind=socket.SOCK_STREAM)
        stranger("datagram-like", [None])
        stranger("silent")
        stranger("garbage", unasked=os.urandom(300))
        stranger("huge", unasked=bytes(70000))
        stranger("empty", unasked=b"")
        stranger("hello-and-silence", [hello_answer()])
        stranger("hello-and-garbage", [hello_answer(), b"\xff" * 50])
        stranger("hello-and-gone", [hello_answer(), None])
        stranger("welcome-and-silence", [hello_answer(), welcome()])
        stranger("welcome-and-garbage", [hello_answer(), welcome(), b"\xff" * 50])
        stranger("welcome-twice", [hello_answer(), welcome(), welcome()])
        stranger("full", accepts=False)
        backlog = []
        with contextlib.suppress(BlockingIOError):
            while len(backlog) < 100:
                s = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                s.setblocking(False)
                s.connect(f"{d}/full")
                backlog.append(s)
        names = sorted(os.listdir(d))
        dbs = {name: create(f"{d}/{name}.db") for name in names}

        def one(name):
            # Only the load: each of these may take its whole limit.
            said = host("first = opened(PATH); say(load=attempt(load, first)); say(still=attempt(insert, first, 1))",
                        dbs[name], env=environment(TURNSTILE_SOCKET=f"{d}/{name}"), limit=90)
            says(said["load"], "turnstile:")
            assert said["still"] == {"ok": 1}, (name, said)
            return name, said["load"]["text"]

        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            texts = dict(pool.map(one, names))
        for name in ("stream", "silent", "garbage", "hello-and-silence"):
            assert f"{d}/{name}" in texts[name], texts
        for name in names:
            assert plain(dbs[name], "SELECT count(*) FROM rows") == [["1"]]


# --- settings --------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "TURNSTILE_WAIT": ["soon", "", "30", "-1s", "1.5s", "99999999999999999999s", "2000m", "30 s", "１s"],
    "TURNSTILE_MODE": ["x", "", "GUEST", "gated"],
    "TURNSTILE_FALLBACK": ["maybe", ""],
    "TURNSTILE_ALLOW_UNSAFE": ["yes", ""],
    "TURNSTILE_SOCKET": [""],
}


def test_malformed_environment_values_are_named():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        body = """
            for name, value in json.loads(MORE[0]):
                before = os.environ.get(name)
                os.environ[name] = value
                db = opened(":memory:")
                said = attempt(load, db)
                db.close()
                LOG.clear()
                later = attempt(opened, PATH)
                say(**{f"{name}={value}": [said, later, str(LOG)]})
                if before is None:
                    del os.environ[name]
                else:
                    os.environ[name] = before
            db = opened(PATH)
            insert(db, 1)
            say(after=status(db)["mode"])
            db.close()
        """
        cases = [[name, value] for name, values in BAD_SETTINGS.items() for value in values]
        said = host(body, db, json.dumps(cases), env=broker.env)
        for name, value in cases:
            load, later, log = said[f"{name}={value}"]
            says(load, name, "expected")
            says(later)
            assert name in log, (name, value, log)
        # Once the setting is right, the same process works.
        assert said["after"] == "gated", said
        check_count(db, 1)


def check_count(db, count):
    assert plain(db, "SELECT count(*) FROM rows; PRAGMA integrity_check", retry=5.0) == [[str(count)], ["ok"]]


def test_malformed_parameters_of_a_uri_are_named():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        other = create(broker.path("other.db"), "delete")
        body = """
            main = load(opened(MORE[0]))
            for text in MORE[1:]:
                uri = f"file:{PATH}?{text}"
                LOG.clear()
                attached = attempt(main.execute, "ATTACH ? AS a", (uri,))
                log = str(LOG)
                LOG.clear()
                direct = attempt(opened, uri, uri=True)
                say(**{text: [attached, log, direct, str(LOG)]})
            insert(main, 1)
            main.close()
        """
        cases = ["turnstile_wait=abc", "turnstile_wait=", "turnstile_mode=x", "turnstile_fallback=perhaps",
                 "turnstile_durable_reads=no"]
        said = host(body, db, other, *cases, env=broker.env)
        for case in cases:
            attached, log, direct, direct_log = said[case]
            name = case.partition("=")[0]
            for error, text in ((attached, log), (direct, direct_log)):
                assert error.get("code") == CANTOPEN, (case, error)
                assert name in text.lower() and "expected" in text, (case, text)
        for case in cases:
            adopted = host("db = opened(f'file:{PATH}?{MORE[0]}', uri=True); say(load=attempt(load, db)); "
                           "say(still=attempt(insert, db, 1))", db, case, env=broker.env)
            assert case.partition("=")[0] in adopted["load"]["text"].lower(), adopted
            assert adopted["still"] == {"ok": 1}, adopted
        check_count(db, len(cases))
        check_count(other, 1)


def test_parameters_of_a_uri_count():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        said = host("""
            db = load(opened(f"file:{PATH}?turnstile_wait=700ms", uri=True))
            insert(db, 1)
            say(adopted=status(db))
            db.close()
            db = opened(f"file:{PATH}?turnstile_wait=2m&turnstile_mode=guest", uri=True)
            insert(db, 2)
            say(opened=status(db))
            db.close()
        """, db, env=environment(TURNSTILE_SOCKET=broker.socket, TURNSTILE_WAIT="5s"))
        assert (said["adopted"]["wait_ms"], said["adopted"]["mode"]) == (700, "gated"), said
        assert (said["opened"]["wait_ms"], said["opened"]["mode"]) == (120_000, "guest"), said
        check_count(db, 2)


# --- odd databases ---------------------------------------------------------------------------------------------

def test_what_is_no_database():
    """Each fails as it does without turnstile, and is left as it was."""
    with Broker() as broker:
        os.mkdir(broker.path("directory"))
        random = os.urandom(8192)
        with open(broker.path("random"), "wb") as f:
            f.write(random)
        os.mkfifo(broker.path("fifo"))
        os.symlink(broker.path("loop"), broker.path("loop"))
        os.symlink(broker.path("gone"), broker.path("dangling"))
        body = """
            def use(uri):
                db = opened(uri, uri=True)
                try:
                    if MORE[0] == "adopted":
                        load(db)
                    return rows(db, "SELECT * FROM sqlite_schema")
                finally:
                    db.close()
            if MORE[0] == "opened":
                load(opened(":memory:"))
            for name in MORE[1:]:
                say(**{name: attempt(use, f"file:{PATH}/{name}")})
        """
        cases = {"directory": CANTOPEN, "missing?mode=rw": CANTOPEN, "missing?mode=ro": CANTOPEN, "random": NOTADB,
                 "loop": CANTOPEN, "directory/../app/app.db?mode=rw": CANTOPEN}
        for way in ("plain", "opened", "adopted"):
            said = host(body, broker.dir, way, *cases, env=broker.env)
            for name, code in cases.items():
                assert said[name].get("code") == code, (way, name, said[name])
        with open(broker.path("random"), "rb") as f:
            assert f.read() == random
        left = sorted(os.listdir(broker.dir))
        assert left == sorted(["s", "s.keeper", "s.lock", "broker.log", "directory", "random", "fifo", "loop", "dangling"]), left
        assert broker.status()["databases"] == [], "a database that could not be used still has members"


def test_an_empty_file_and_a_missing_one_become_databases():
    with Broker() as broker:
        for name in ("empty", "missing"):
            for way in ("adopted", "opened"):
                db = broker.path(f"{name}-{way}")
                if name == "empty":
                    open(db, "wb").close()
                said = host("""
                    load(opened(":memory:")) if MORE[0] == "opened" else None
                    db = opened(PATH)
                    load(db) if MORE[0] == "adopted" else None
                    say(mode=db.execute("PRAGMA journal_mode=wal").fetchone()[0], status=status(db)["mode"])
                    db.execute("CREATE TABLE rows(worker TEXT, seq INTEGER)")
                    insert(db, 1)
                    db.close()
                """, db, way, env=broker.env)
                assert said["mode"] == "wal" and said["status"] == "gated", said
                check_count(db, 1)


def test_a_symlink_and_the_real_path_are_one_group():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.mkdir(broker.path("elsewhere"))
        link = broker.path("elsewhere/link.db")
        os.symlink("../app.db", link)
        os.symlink("elsewhere", broker.path("way"))
        first = connect(db, broker=broker, mode="gated")
        first.execute("INSERT INTO rows VALUES('real', 1)")
        for path in (link, broker.path("way/link.db")):
            said = host("""
                db = load(opened(PATH))
                insert(db, 1, "link")
                say(rows=rows(db), status=status(db))
                later = opened(PATH)
                insert(later, 2, "link")
                later.close()
                db.close()
            """, path, env=broker.env)
            assert said["status"]["mode"] == "gated", said
            assert len(broker.status()["databases"]) == 1
        assert sorted(os.listdir(broker.path("elsewhere"))) == ["link.db"], "a WAL of its own beside the link"
        assert first.execute("SELECT count(*) FROM rows").fetchone() == (5,)
        first.close()
        check_count(db, 5)


def test_long_paths_end_where_sqlites_do():
    """SQLite's own limit is 504 characters and room for "-journal"."""
    with Broker() as broker:
        for length in (300, 503, 504, 505, 511, 512, 513, 600):
            path = broker.dir
            while length - len(path) > 202:
                path = os.path.join(path, "d" * 100)
            path = os.path.join(path, "d" * ((length - len(path)) // 2 - 1))
            os.makedirs(path, exist_ok=True)
            path = os.path.join(path, "f" * (length - len(path) - 1))
            assert len(path) == length, (length, len(path))
            body = """
                load(opened(":memory:")) if MORE[0] == "opened" else None
                def use():
                    db = opened(PATH)
                    load(db) if MORE[0] == "adopted" else None
                    db.execute("PRAGMA journal_mode=wal")
                    db.execute("CREATE TABLE IF NOT EXISTS rows(worker TEXT, seq INTEGER)")
                    insert(db, 1)
                    seen = status(db)
                    db.close()
                    return seen["mode"] if seen else "none"
                say(done=attempt(use))
            """
            ways = [host(body, path, way, env=broker.env)["done"] for way in ("plain", "opened", "adopted")]
            if length <= 504:
                assert [w.get("ok") for w in ways] == ["none", "gated", "gated"], (length, ways)
                check_count(path, 3)
            else:
                assert [w.get("code") for w in ways] == [CANTOPEN] * 3, (length, ways)


def test_odd_names():
    """Quotes, spaces, control characters, bytes that are no UTF-8."""
    with Broker() as broker:
        for name in ("a b'c\"d;e", "percent%20", "new\nline", "ünï", "-journal", "x-wal", "?mode=ro", "#hash"):
            db = create(broker.path(name))
            said = host("db = load(opened(PATH)); insert(db, 1); say(mode=status(db)['mode']); db.close(); "
                        "db = opened(PATH); insert(db, 2); db.close()", db, env=broker.env)
            assert said["mode"] == "gated", (name, said)
            check_count(db, 2)


def test_a_name_that_is_no_utf_8():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        odd = os.fsencode(broker.path("")) + b"\xff\xfe.db"
        os.rename(db, odd)
        said = host("""
            db = load(opened(os.fsencode(PATH) + bytes.fromhex(MORE[0])))
            insert(db, 1)
            say(rows=rows(db), mode=status(db)["mode"])
            db.close()
        """, broker.path(""), b"\xff\xfe.db".hex(), env=broker.env)
        assert said["rows"] == [[1]] and said["mode"] == "gated", said
        os.rename(odd, db)
        check_count(db, 1)


def test_databases_without_a_file_are_not_brokered():
    with Broker() as broker:
        said = host("""
            def use(name, **options):
                db = load(opened(name, **options))
                db.execute("PRAGMA temp_store=file")
                db.execute("PRAGMA cache_size=2")
                db.execute("CREATE TABLE t(x)")
                db.execute("CREATE TEMP TABLE u(x)")
                for table in "tu":
                    db.execute(f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<2000) "
                               f"INSERT INTO {table} SELECT printf('%.100c', 'x') FROM n")
                seen = [rows(db, "SELECT count(*) FROM t JOIN (SELECT count(*) FROM u)"), status(db)]
                db.close()
                return seen
            for name in (":memory:", "", "file::memory:?cache=shared", "file:m?mode=memory"):
                say(**{name: attempt(use, name, uri=name.startswith("file:"))})
        """, env=broker.env)
        for name in (":memory:", "", "file::memory:?cache=shared", "file:m?mode=memory"):
            assert said[name].get("ok") == [[[2000]], None], (name, said[name])
        assert broker.status()["databases"] == []


# --- read-only -------------------------------------------------------------------------------------------------

def test_mode_ro_of_a_process_that_may_write_is_gated():
    """The usual reader container: alone, beside a writer, and first."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            plain(db, "INSERT INTO rows VALUES('before', 0)")
            reader = connect(f"file:{db}?mode=ro", uri=True, broker=broker, mode="gated")
            assert reader.execute("SELECT count(*) FROM rows").fetchone() == (1,)
            said = host("""
                db = load(opened(PATH))
                insert(db, 1)
                say(mode=status(db)["mode"])
                ro = opened(f"file:{PATH}?mode=ro", uri=True)
                insert(db, 2)
                say(rows=rows(ro), ro=status(ro), write=attempt(insert, ro, 3))
                ro.close()
                insert(db, 3)
                db.close()
            """, db, env=broker.env)
            assert said["mode"] == said["ro"]["mode"] == "gated", said
            assert said["rows"] == [[3]] and said["write"]["code"] == READONLY, said
            assert reader.execute("SELECT count(*) FROM rows").fetchone() == (4,)
            reader.close()
            check_count(db, 4)


def test_a_file_that_may_only_be_read():
    """Another user's database, mode 0444: readable beside a writer and alone, never written, and no harm."""
    root_only()
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            plain(db, "INSERT INTO rows VALUES('before', 0)")
            os.chmod(db, 0o444)
            body = """
                db = load(opened(PATH))
                say(rows=attempt(rows, db), status=status(db), write=attempt(insert, db, 9))
                db.close()
                db = opened(f"file:{PATH}?mode=ro", uri=True)
                say(again=attempt(rows, db))
                db.close()
            """
            with connect(db, broker=broker, mode="gated") as writer:
                writer.execute("INSERT INTO rows VALUES('writer', 1)")
                said = host(body, db, env=broker.env, user=NOBODY)
                assert said["rows"] == said["again"] == {"ok": [[2]]}, (journal, said)
                assert said["status"]["mode"] == "gated" and said["status"]["role"] == "read-only", said
                assert said["write"]["code"] == READONLY, said
                writer.execute("INSERT INTO rows VALUES('writer', 2)")
            writer.close()
            # Alone. A WAL cannot be read where no -shm can be made: as without turnstile.
            expected = host("db = opened(PATH); say(rows=attempt(rows, db)); db.close()", db, env=broker.env,
                            user=NOBODY)["rows"]
            said = host(body, db, env=broker.env, user=NOBODY)
            assert said["rows"].keys() == expected.keys(), (journal, said, expected)
            assert said["write"]["code"] in (READONLY, CANTOPEN), said
            os.chmod(db, 0o644)
            check_count(db, 3)


def test_immutable_and_nolock_are_not_brokered():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        plain(db, "INSERT INTO rows VALUES('before', 0)")
        member = connect(db, broker=broker, mode="gated")
        for parameter in ("immutable=1", "nolock=1"):
            said = host("""
                db = load(opened(f"file:{PATH}?{MORE[0]}", uri=True))
                say(rows=rows(db), adopted=status(db))
                db.close()
                db = opened(f"file:{PATH}?{MORE[0]}", uri=True)
                say(again=rows(db), opened=status(db))
                db.close()
            """, db, parameter, env=broker.env)
            assert said["rows"] == said["again"] == [[1]], said
            for seen in (said["adopted"], said["opened"]):
                assert seen["mode"] == "plain" and parameter in seen["reason"], seen
            assert len(broker.members(db)) == 1
        member.execute("INSERT INTO rows VALUES('member', 1)")
        member.close()
        check_count(db, 2)
        # Not even a broker is needed.
        said = host("db = load(opened(f'file:{PATH}?immutable=1', uri=True)); say(rows=rows(db))", db,
                    env=environment(TURNSTILE_SOCKET="/nowhere"))
        assert said["rows"] == [[2]], said


# --- locking_mode=EXCLUSIVE ------------------------------------------------------------------------------------

SECOND = """
db = opened(PATH)
say(load=attempt(load, db))
say(read=attempt(rows, db), write=attempt(insert, db, 9, "second"), immediate=attempt(db.execute, "BEGIN IMMEDIATE"))
db.close()
"""


@timeout(180)
def test_locking_mode_exclusive_keeps_others_out_and_lets_go():
    """Before the first access (WAL then needs no shared memory) and after it. A second member gets BUSY after its
    limit; once the mode is left or the connection is closed, it works again."""
    with Broker(env={"TURNSTILE_WAIT": "500ms"}) as broker:
        os.environ["TURNSTILE_WAIT"] = "500ms"
        for journal in ("wal", "delete"):
            for first_reads in (False, True):
                db = create(broker.path(f"{journal}-{first_reads}.db"), journal)
                first = connect(db, broker=broker)
                if first_reads:
                    first.execute("SELECT count(*) FROM rows").fetchone()
                assert first.execute("PRAGMA locking_mode=EXCLUSIVE").fetchone() == ("exclusive",)
                for i in range(3):
                    first.execute("INSERT INTO rows VALUES('first', ?)", (i,))
                said = host(SECOND, db, env=broker.env)
                assert said["load"] == {"ok": True}, said
                for what in ("read", "write", "immediate"):
                    assert said[what].get("code") == BUSY, (journal, first_reads, what, said)
                first.execute("INSERT INTO rows VALUES('first', 3)")
                # A connection that has begun without shared memory keeps the file until it closes: SQLite's rule.
                stays = journal == "wal" and not first_reads
                assert first.execute("PRAGMA locking_mode=NORMAL").fetchone() == ("exclusive" if stays else "normal",)
                assert first.execute("SELECT count(*) FROM rows").fetchone() == (4,)
                said = host(SECOND, db, env=broker.env)
                if not stays:
                    assert said["read"] == {"ok": [[4]]} and said["write"] == {"ok": 1}, (journal, first_reads, said)
                first.close()
                said = host(SECOND, db, env=broker.env)
                assert said["write"] == {"ok": 1} and said["immediate"] == {"ok": True}, (journal, first_reads, said)
                left = plain(db, "SELECT count(*) FROM rows WHERE worker='first'; PRAGMA integrity_check", retry=5.0)
                assert left == [["4"], ["ok"]], left


def test_locking_mode_exclusive_is_busy_while_others_are_in():
    with Broker(env={"TURNSTILE_WAIT": "500ms"}) as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            other = connect(db, broker=broker, mode="gated")
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM rows").fetchone() == (0,)
            said = host("""
                db = load(opened(PATH))
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
                say(write=attempt(insert, db, 1))
                db.execute("PRAGMA locking_mode=NORMAL")
                say(read=attempt(rows, db))
                db.close()
            """, db, env=broker.env)
            assert said["write"].get("code") == BUSY, (journal, said)
            other.execute("COMMIT")
            other.execute("INSERT INTO rows VALUES('other', 1)")
            other.close()
            check_count(db, 1)


# --- ATTACH ----------------------------------------------------------------------------------------------------

def test_attach():
    """Of a brokered database to a brokered one, of an immutable one, and before the extension is loaded (where a WAL
    has been read by it)."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            a, b = (create(broker.path(f"{journal}-{n}.db"), journal) for n in "ab")
            still = create(broker.path(f"{journal}-still.db"), "delete")
            plain(still, "INSERT INTO rows VALUES('still', 1)")
            said = host("""
                db = opened(PATH, uri=True)
                db.execute("ATTACH ? AS early", (MORE[0],)) if MORE[2] == "before" else None
                load(db)
                db.execute("ATTACH ? AS early", (MORE[0],)) if MORE[2] == "after" else None
                db.execute("ATTACH ? AS still", (f"file:{MORE[1]}?immutable=1",))
                db.execute("BEGIN")
                insert(db, 1)
                insert(db, 2, table="early.rows")
                db.execute("INSERT INTO rows SELECT * FROM still.rows")
                db.execute("COMMIT")
                say(early=json.loads(db.execute("PRAGMA early.turnstile_status").fetchone()[0])["mode"],
                    still=json.loads(db.execute("PRAGMA still.turnstile_status").fetchone()[0])["mode"])
                say(write=attempt(insert, db, 3, table="still.rows"))
                db.execute("DETACH still")
                db.execute("DETACH early")
                insert(db, 4)
                db.close()
            """, f"file:{a}", b, still, "after" if journal == "wal" else "before", env=broker.env)
            assert (said["early"], said["still"]) == ("gated", "plain"), said
            assert said["write"]["code"] == READONLY, said
            check_count(a, 3)
            check_count(b, 1)
            check_count(still, 1)


def test_attaching_what_is_refused_leaves_the_connection_working():
    with Broker() as broker:
        a, b = create(broker.path("a.db")), create(broker.path("b.db"), "delete")
        os.link(b, broker.path("hard.db"))
        holder = connect(b, broker=broker, mode="gated")
        holder.execute("INSERT INTO rows VALUES('holder', 1)")
        said = host("""
            db = load(opened(PATH))
            for name in MORE:
                say(**{name: attempt(db.execute, "ATTACH ? AS x", (name,))})
            insert(db, 1)
            db.close()
        """, a, broker.path("hard.db"), broker.dir, "/nowhere/x.db", env=broker.env)
        for name in (broker.path("hard.db"), broker.dir, "/nowhere/x.db"):
            assert said[name].get("code") == CANTOPEN, (name, said)
        assert "hard link" in said["log"], said["log"]
        holder.close()
        check_count(a, 1)
        check_count(b, 1)


# --- loading ---------------------------------------------------------------------------------------------------

def test_loaded_twice_and_loaded_on_memory_first():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        said = host("""
            memory = load(load(opened(":memory:")))
            db = opened(PATH)
            say(first=status(db)["mode"], vfs=None)
            load(db)
            load(db)
            insert(db, 1)
            load(db)
            say(again=status(db)["mode"])
            other = load(opened(PATH))
            insert(other, 2)
            say(rows=rows(db))
            other.close()
            db.close()
            memory.close()
        """, db, env=broker.env)
        assert said["first"] == said["again"] == "gated" and said["rows"] == [[2]], said
        check_count(db, 2)


def test_a_connection_that_has_read_cannot_be_adopted():
    """A WAL connection keeps its lock while it is open; a rollback one only in a transaction."""
    with Broker() as broker:
        wal, rollback = create(broker.path("wal.db")), create(broker.path("rollback.db"), "delete")
        said = host("""
            db = opened(PATH)
            rows(db)
            say(load=attempt(load, db))
            insert(db, 1)
            say(mode=status(db))
            db.close()
            db = load(opened(PATH))
            say(later=status(db)["mode"])
            db.close()
        """, wal, env=broker.env)
        says(said["load"], "already been read", "first thing after opening")
        assert said["mode"] is None and said["later"] == "gated", said
        check_count(wal, 1)
        said = host("""
            db = opened(PATH)
            rows(db)
            db.execute("BEGIN")
            rows(db)
            say(inside=attempt(load, db))
            db.execute("COMMIT")
            say(after=attempt(load, db))
            insert(db, 1)
            say(mode=status(db)["mode"])
            db.close()
        """, rollback, env=broker.env)
        says(said["inside"], "transaction")
        assert said["after"] == {"ok": True} and said["mode"] == "gated", said
        check_count(rollback, 1)


def test_another_vfs_is_refused_with_the_reason():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        for vfs in ("unix-dotfile", "unix-excl", "unix-none"):
            said = host("""
                db = opened(f"file:{PATH}?vfs={MORE[0]}", uri=True)
                say(load=attempt(load, db))
                say(still=attempt(insert, db, 1))
                db.close()
                db = opened(PATH)
                insert(db, 2)
                say(mode=status(db)["mode"])
                db.close()
            """, db, vfs, env=broker.env)
            says(said["load"], "another VFS", "without vfs=")
            assert said["still"] == {"ok": 1} and said["mode"] == "gated", said
        check_count(db, 6)


def test_vfs_unix_after_loading_is_brokered():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        said = host("""
            load(opened(":memory:"))
            for vfs in ("unix", "turnstile"):
                db = opened(f"file:{PATH}?vfs={vfs}", uri=True)
                insert(db, 1)
                say(**{vfs: status(db)["mode"]})
                db.close()
        """, db, env=broker.env)
        assert said["unix"] == said["turnstile"] == "gated", said
        check_count(db, 2)


# --- descriptors -----------------------------------------------------------------------------------------------

@timeout(180)
def test_out_of_descriptors():
    """Whatever number of descriptors is missing, the host gets an error or success, never a crash; it recovers, and
    nothing of the failed attempt stays behind at the broker."""
    with Broker() as broker:
        body = """
            import resource, subprocess
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            acknowledged = 0
            db = opened(PATH)
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(MORE[0]), hard))
            loaded = attempt(load, db)
            wrote = attempt(insert, db, 1) if "ok" in loaded else {"code": 0}
            db.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            acknowledged += "ok" in wrote
            # Nobody is in it now, so plain SQLite gets in. This process is still alive.
            shell = subprocess.run([MORE[1], "-cmd", ".timeout 5000", PATH, "INSERT INTO rows VALUES('plain', 1)"],
                                   capture_output=True, text=True, timeout=30)
            say(shell=shell.stderr, loaded=loaded, wrote=wrote)
            acknowledged += not shell.returncode
            db = opened(PATH)
            load(db)
            acknowledged += insert(db, 2)
            say(acknowledged=acknowledged, mode=status(db)["mode"])
            db.close()
        """
        failed = 0
        for journal in ("wal", "delete"):
            for limit in range(4, 18):
                db = create(broker.path(f"{journal}-{limit}.db"), journal)
                said = host(body, db, limit, SHELL, env=broker.env, same_world=False)
                assert said["mode"] == "gated", (limit, said)
                assert said["shell"] == "", f"with {limit} descriptors, something stayed locked: {said}"
                check_count(db, said["acknowledged"])
                failed += "ok" not in said["loaded"]
        assert 4 <= failed <= 24, f"{failed} of 28 loads failed: the limits do not cover the interesting ones"


@timeout(180)
def test_out_of_descriptors_with_a_session():
    """The same when the process has a session already: the segment's descriptors do not fit in."""
    with Broker() as broker:
        first = create(broker.path("first.db"))
        body = """
            import resource, subprocess
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            first = load(opened(PATH))
            insert(first, 1)
            acknowledged = {PATH: 1}
            used, failed = len(os.listdir("/proc/self/fd")), 0
            for extra in range(0, 10):
                for path in MORE[1:]:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1 + extra, hard))
                    try:
                        db = opened(path)
                    except sqlite3.Error:
                        failed += 1
                    else:
                        wrote = attempt(insert, db, extra)
                        acknowledged[path] = acknowledged.get(path, 0) + ("ok" in wrote)
                        db.close()
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    shell = subprocess.run([MORE[0], "-cmd", ".timeout 5000", path,
                                            "INSERT INTO rows VALUES('plain', 1)"],
                                           capture_output=True, text=True, timeout=30)
                    if shell.returncode:
                        say(stuck=[extra, path, shell.stderr])
                    else:
                        acknowledged[path] = acknowledged.get(path, 0) + 1
            # The first connection may have lost its session, and says so; a new one works.
            wrote = attempt(insert, first, 2)
            acknowledged[PATH] += "ok" in wrote
            say(first=wrote)
            first.close()
            again = opened(PATH)
            acknowledged[PATH] += insert(again, 3)
            again.close()
            say(acknowledged=acknowledged, failed=failed)
        """
        others = [create(broker.path(f"{journal}.db"), journal) for journal in ("wal", "delete")]
        said = host(body, first, SHELL, *others, env=broker.env, same_world=False)
        assert "stuck" not in said, f"a failed open keeps the database: {said}"
        assert 4 <= said["failed"] <= 18, "the limits do not cover the interesting ones"
        assert said["first"] == {"ok": 1}, f"another database's connection paid for it: {said['first']}"
        for path, count in said["acknowledged"].items():
            check_count(path, count)


CLOSED_OUTPUT = """
db = opened(MORE[2], uri=True)
# Only now: SQLite fills 0 to 2 with /dev/null when it gets one of them.
for closed in json.loads(MORE[0]):
    os.close(closed)

def warn():
    # As C code prints a warning: to the number.
    for number in json.loads(MORE[0]):
        try:
            os.write(number, b"warning: something that nobody will read " * 200)
        except OSError:
            pass

def use():
    global db
    load(db)
    say(mode=status(db)["mode"])
    warn()
    insert(db, 1) if MORE[1] == "rw" else rows(db)
    warn()
    again = opened(PATH)
    insert(again, 2)
    warn()
    rows(again)
    again.close()
    db.close()
    warn()
say(use=attempt(use))
"""


def printing_host(broker, name, journal, closed, first):
    db = create(broker.path(name), journal)
    plain(db, "INSERT INTO rows VALUES('before', 0)")
    uri = f"file:{db}?mode={first}"
    said = host(CLOSED_OUTPUT, db, json.dumps(closed), first, uri, env=broker.env, same_world=False)
    with open(db, "rb") as f:
        whole = f.read(16) == b"SQLite format 3\0" and os.path.getsize(db) < 100_000
    assert whole, f"{name}: it printed into the database"
    assert said["use"] == {"ok": True}, f"{name}: it printed into what turnstile holds: {said['use']}"
    assert said["mode"] == "gated", said
    check_count(db, 3 if first == "rw" else 2)


@fails_without("low-descriptors-free", message="it printed into")
def test_a_host_without_standard_output_cannot_write_into_the_database():
    """A process that has closed descriptors 0 to 2 and still prints to them writes into whatever got the number."""
    with Broker() as broker:
        # The descriptor that a reader joins with, kept while the gate stands.
        printing_host(broker, "reader.db", "delete", [1, 2], "ro")
        for journal in ("wal", "delete"):
            for closed in ([2], [1, 2], [0, 1, 2], [0, 2]):
                for first in ("rw", "ro"):
                    name = f"{journal}-{''.join(map(str, closed))}-{first}.db"
                    printing_host(broker, name, journal, closed, first)


CLOSE_ALL = """
def numbers():
    out = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            out[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass
    return out
db = opened(PATH)
sqlites = set(numbers())
load(db)
insert(db, 1)
rows(db)
# What is not SQLite's own: it closes its numbers without looking, with turnstile and without.
ours = {n for n, to in numbers().items() if n not in sqlites and not to.endswith(("-wal", "-shm", "-journal"))}
say(ours=len(ours))
os.closerange(3, 1000)
files = {}
while not ours <= files.keys():
    path = f"{PATH}.host{len(files)}"
    n = os.open(path, os.O_RDWR | os.O_CREAT)
    files[n] = path
    os.write(n, b"the host's own data")

def damaged():
    out = []
    for n in ours:
        try:
            same = os.path.samestat(os.fstat(n), os.stat(files[n]))
        except OSError as e:
            same = str(e)
        with open(files[n], "rb") as f:
            content = f.read()
        if same is not True or content != b"the host's own data":
            out.append([n, str(same), content.decode(errors="replace")])
    return out
say(untouched=damaged())
"""


@fails_without("close-unchecked", message="host's files were touched")
def test_a_host_that_closes_every_descriptor():
    """As a daemon does. The numbers come back as the host's own files, which must not be closed or written; a new
    connection works."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            said = host(CLOSE_ALL + """
                say(write=attempt(insert, db, 2))
                say(used=damaged())
                db.close()
                say(closed=damaged())
                db = opened(PATH)
                insert(db, 3)
                say(mode=status(db)["mode"], rows=rows(db), again=damaged())
                db.close()
                say(end=damaged())
            """.replace("\n                ", "\n"), db, env=broker.env)
            assert said["ours"] >= 4, said
            assert "ok" not in said["write"], "a connection without descriptors has written"
            for when in ("untouched", "used", "closed", "again", "end"):
                assert said[when] == [], f"{journal}: {when}: the host's files were touched: {said[when]}"
            assert said["mode"] == "gated", said
            check_count(db, 2)


def test_a_fork_after_closing_every_descriptor():
    """The child's copies of turnstile's descriptors are closed at the fork: but only what is still turnstile's."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        said = host(CLOSE_ALL + """
            ready, go = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(go, json.dumps(damaged()).encode())
                os._exit(0)
            os.waitpid(child, 0)
            say(child=json.loads(os.read(ready, 65536)), parent=damaged())
            attempt(db.close)
        """.replace("\n            ", "\n"), db, env=broker.env, same_world=False)
        assert said["parent"] == [], said
        assert said["child"] == [], f"the fork closed the host's own files in the child: {said['child']}"


def test_a_host_that_reopens_the_database_on_the_same_numbers():
    """Closed all, then the database is opened again: one of its descriptors gets the gate's old number. Letting the
    old connection go must not close it. (The gate still stands, for another member: its inode tells nothing.)"""
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        member = connect(db, broker=broker, mode="gated")
        said = host("""
            db = opened(PATH)
            before = set(map(int, os.listdir("/proc/self/fd")))
            load(db)
            insert(db, 1)
            ours = set(map(int, os.listdir("/proc/self/fd"))) - before
            os.closerange(3, 1000)
            same = set()
            while not ours <= same:
                same.add(os.open(PATH, os.O_RDONLY))
            db.close()
            closed = []
            for n in ours:
                try:
                    os.fstat(n)
                except OSError:
                    closed.append(n)
            say(ours=len(ours), closed=closed)
        """, db, env=broker.env)
        assert said["ours"] >= 3 and said["closed"] == [], f"the host's descriptors were closed: {said}"
        member.close()


# --- quiet -----------------------------------------------------------------------------------------------------

def test_nothing_is_printed_whatever_fails():
    """`host` looks at the output, threads, children, signals and environment of every process here; this one runs
    through many failures in one process, and counts the threads while the connections are open."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.mkdir(broker.path("directory"))
        with open(broker.path("random"), "wb") as f:
            f.write(os.urandom(4096))
        said = host("""
            def threads():
                return len(os.listdir("/proc/self/task"))
            out = []
            for name, value in (("TURNSTILE_WAIT", "soon"), ("TURNSTILE_MODE", "x"), ("TURNSTILE_SOCKET", "/nowhere"),
                                ("TURNSTILE_SOCKET", PATH)):
                kept = os.environ.get(name)
                os.environ[name] = value
                out.append(attempt(opened, PATH))
                out.append(attempt(lambda: load(opened(":memory:"))))
                os.environ.pop(name)
                if kept is not None:
                    os.environ[name] = kept
            for path in MORE:
                out.append(attempt(lambda: rows(opened(path))))
            db = load(opened(PATH))
            other = opened(PATH)
            db.execute("BEGIN IMMEDIATE")
            other.execute("PRAGMA busy_timeout=50")
            out.append(attempt(other.execute, "BEGIN IMMEDIATE"))
            insert(db, 1)
            say(threads=threads(), failed=sum("ok" not in o for o in out))
            db.execute("COMMIT")
            other.close()
            db.close()
        """,
            db, broker.path("directory"), broker.path("random"), "/nowhere/x", env=broker.env)
        assert said["threads"] == 1, f"{said['threads']} threads in the host"
        assert said["failed"] >= 8, said
        check_count(db, 1)
