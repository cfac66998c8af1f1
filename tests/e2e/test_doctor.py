"""`turnstile doctor`: each finding provoked, and that the doctor changes nothing."""

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile

import harness
from harness import CACHE, PYTHON, SHELL, Broker, PlainShell, Skip, connect, create, fails_without, plain, run, \
    wait_until


def environment(broker=None, **settings):
    """Without settings of the tests' own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TURNSTILE_") or k == "TURNSTILE_PLANTED"}
    if broker is not None:
        env["TURNSTILE_SOCKET"] = broker.socket
    return {**env, **settings}


def examine(path, *command, env=None, broker=None, options=()):
    """(exit status, {code: finding}, the whole report)"""
    command = ["--", *command] if command else []
    done = run([harness.bin(), "doctor", "--json", *options, str(path), *command], check=False, timeout=40,
               env=environment(broker) if env is None else env)
    assert not done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0), (done.returncode, report)
    assert report["problems"] == sum(f["level"] == "problem" for f in report["findings"])
    for finding in report["findings"]:
        assert finding["level"] == "ok" or finding["advice"], finding
    return done.returncode, {f["code"]: f for f in report["findings"]}, report


def expect(found, code, level, *words):
    assert code in found, f"no finding {code}: {sorted(found)}"
    finding = found[code]
    assert finding["level"] == level, finding
    for word in words:
        assert str(word) in finding["what"] + (finding["advice"] or ""), (word, finding)
    return finding


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        os.chmod(place, 0o755)
        yield place


def states(path):
    """What a change of the database would change: content, sizes, times, names beside it."""
    found = {}
    for name in sorted(glob.glob(f"{path}*")):
        meta = os.stat(name)
        with open(name, "rb") as f:
            found[name] = (meta.st_ino, meta.st_size, meta.st_mtime_ns, f.read())
    return found


# --- a healthy one ------------------------------------------------------------------------------------------------

def test_a_healthy_database_has_no_problems():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        status, found, report = examine(db, broker=broker)
        assert status == 0 and report["problems"] == 0, report
        expect(found, "place", "ok")
        expect(found, "format", "ok", "WAL", "4096 bytes")
        expect(found, "broker", "ok", broker.pid, broker.socket)
        expect(found, "holders", "ok")
        expect(found, "version", "ok", "protocol")
        expect(found, "extension", "ok", "libturnstile.so")
        settings = {s["name"]: s for s in report["settings"]}
        assert settings["TURNSTILE_SOCKET"] == {
            "name": "TURNSTILE_SOCKET", "value": broker.socket, "from": "environment"}
        assert settings["TURNSTILE_BEGIN"]["from"] == "default"
        text = run([harness.bin(), "doctor", db], env=environment(broker)).stdout
        assert "0 problems" in text and "TURNSTILE_WAIT" in text, text


@fails_without("doctor-asks-sqlite")
def test_nothing_is_changed():
    """Neither the files nor who is in: a WAL that waits for recovery stays so, a hot journal too."""
    with Broker() as broker:
        # What a killed writer leaves behind: a WAL that has not been recovered, and no -shm.
        live = create(broker.path("live.db"))
        db = sqlite3.connect(live, isolation_level=None)
        db.execute("INSERT INTO rows VALUES('a', 1)")
        left = broker.path("left.db")
        for suffix in ("", "-wal"):
            shutil.copy(live + suffix, left + suffix)
        db.close()
        hot = create(broker.path("hot.db"), "delete")
        with open(hot + "-journal", "wb") as f:
            f.write(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))
        member = connect(broker.path("live.db"), broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('a', 2)")
        before = {path: states(path) for path in (live, left, hot)}
        assert left + "-wal" in before[left]
        in_before = broker.members(live)
        for path in (live, left, hot):
            examine(path, broker=broker)
        assert {path: states(path) for path in (live, left, hot)} == before
        assert broker.members(live) == in_before
        member.execute("INSERT INTO rows VALUES('a', 3)")
        member.close()


def test_plain_locks_of_others_stand():
    """It takes none and frees none, and a plain client of the same file does not notice."""
    with directory() as place:
        db = create(os.path.join(place, "app.db"), "delete")
        with PlainShell(db) as shell:
            shell.run("BEGIN EXCLUSIVE")
            examine(db, env=environment(TURNSTILE_FALLBACK="plain"))
            try:
                plain(db, "SELECT count(*) FROM rows")
                raise AssertionError("the lock is gone")
            except harness.PlainError as e:
                assert "locked" in str(e)
            shell.run("COMMIT")


# --- the place ----------------------------------------------------------------------------------------------------

def test_a_missing_and_an_unreadable_file():
    with Broker() as broker:
        status, found, _ = examine(broker.path("none.db"), broker=broker)
        assert status == 1
        expect(found, "file-missing", "problem")
        os.mkdir(broker.path("a directory"))
        status, found, _ = examine(broker.path("a directory"), broker=broker)
        assert status == 1
        expect(found, "place-refused", "problem", "not a regular file")
        if os.getuid() != 0:
            return
        db = create(broker.path("app.db"))
        os.chmod(db, 0o600)
        done = run(["setpriv", "--reuid=65534", "--clear-groups", harness.bin(), "doctor", "--json", db], check=False,
                   env=environment(broker))
        found = {f["code"]: f for f in json.loads(done.stdout)["findings"]}
        assert done.returncode == 1
        expect(found, "file-forbidden", "problem")


def test_who_may_only_read_is_told():
    if os.getuid() != 0:
        raise Skip("needs root, to become another user")
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))

        def as_nobody():
            done = run(["setpriv", "--reuid=65534", "--clear-groups", harness.bin(), "doctor", "--json", db],
                       check=False, env=environment(broker))
            return {f["code"]: f for f in json.loads(done.stdout)["findings"]}
        os.chmod(db, 0o644)
        expect(as_nobody(), "file-read-only", "warning")
        os.chmod(db, 0o666)
        found = as_nobody()
        expect(found, "directory-read-only", "warning", broker.dir)
        expect(found, "hidden", "ok", "root")


def test_hard_links_and_bind_mounts_of_a_file():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.link(db, broker.path("other.db"))
        _, found, _ = examine(db, broker=broker)
        expect(found, "place-links", "warning", "2 names")
        os.unlink(broker.path("other.db"))
        if not shutil.which("bwrap"):
            raise Skip("bwrap is missing")
        other = broker.path("mounted.db")
        open(other, "w").close()
        command = ["bwrap", "--dev-bind", "/", "/", "--bind", db, other, harness.bin(), "doctor", "--json", other]
        done = run(command, check=False, env=environment(broker))
        if "findings" not in done.stdout:
            raise Skip(f"bwrap cannot mount here: {done.stderr.strip()}")
        found = {f["code"]: f for f in json.loads(done.stdout)["findings"]}
        assert done.returncode == 1
        expect(found, "place-refused", "problem", "single file", "mount the directory")


def test_fuse_is_refused_and_the_override_is_told():
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        raise Skip("bindfs or /dev/fuse is missing")
    with Broker() as broker:
        create(broker.path("app.db"))
        mount = broker.path("mount")
        os.mkdir(mount)
        if run(["bindfs", "--no-allow-other", broker.dir, mount], check=False).returncode:
            raise Skip("bindfs cannot mount here")
        try:
            status, found, _ = examine(os.path.join(mount, "app.db"), broker=broker)
            assert status == 1
            expect(found, "place-unsafe", "problem", "FUSE", "local filesystem")
            env = environment(broker, TURNSTILE_ALLOW_UNSAFE="1")
            status, found, _ = examine(os.path.join(mount, "app.db"), env=env)
            assert status == 0
            expect(found, "place-unsafe", "warning", "TURNSTILE_ALLOW_UNSAFE")
        finally:
            run(["umount", mount])


# --- the file -----------------------------------------------------------------------------------------------------

def test_formats():
    with Broker() as broker:
        def of(name, sql, options=()):
            plain(broker.path(name), sql, options=options)
            return examine(broker.path(name), broker=broker)[1]
        found = of("delete.db", "PRAGMA page_size=8192; CREATE TABLE t(x)")
        expect(found, "format", "ok", "rollback journal", "8192 bytes", sqlite3.sqlite_version)
        expect(found, "format-rollback", "warning", "journal_mode=wal")
        with open(broker.path("delete.db-journal"), "wb") as f:
            f.write(b"x" * 600)
        expect(examine(broker.path("delete.db"), broker=broker)[1], "journal", "warning", "never remove it")
        open(broker.path("empty.db"), "w").close()
        expect(examine(broker.path("empty.db"), broker=broker)[1], "format", "ok", "empty")
        with open(broker.path("other.db"), "wb") as f:
            f.write(b"something else " * 100)
        expect(examine(broker.path("other.db"), broker=broker)[1], "format-unknown", "warning", "encrypted")
        found = of("reserved.db", "CREATE TABLE t(x); VACUUM", options=["-cmd", ".filectrl reserve_bytes 32"])
        expect(found, "format-reserved", "warning", "32 bytes")
        db = create(broker.path("large.db"))
        with open(db + "-wal", "wb") as f:
            f.truncate(50 << 20)
        expect(examine(db, broker=broker)[1], "wal-large", "warning", "50 MiB")


# --- the broker ---------------------------------------------------------------------------------------------------

def test_no_broker():
    with directory() as place:
        db = create(os.path.join(place, "app.db"))
        status, found, _ = examine(db, env=environment(TURNSTILE_SOCKET=os.path.join(place, "none")))
        assert status == 1
        expect(found, "broker-absent", "problem", "TURNSTILE_SOCKET")
        away = {"XDG_RUNTIME_DIR": place} if os.getuid() else {}
        if not os.getuid() and os.path.exists("/run/turnstile/broker.sock"):
            raise Skip("a broker of the host runs")
        status, found, _ = examine(db, env=environment(TURNSTILE_FALLBACK="refuse", **away))
        assert status == 1
        expect(found, "broker-absent", "problem", "TURNSTILE_FALLBACK=refuse")
        status, found, _ = examine(db, env=environment(TURNSTILE_FALLBACK="plain", **away))
        assert status == 0
        expect(found, "broker-absent", "warning", "plain SQLite")
        contained = os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")
        status, found, _ = examine(db, env=environment(**away))
        if contained:
            expect(found, "broker-absent", "problem", "container")
        else:
            expect(found, "broker-absent", "ok", "starts it")


@harness.waits
def test_something_else_listens_or_nobody_answers():
    with directory() as place:
        db = create(os.path.join(place, "app.db"))
        path = os.path.join(place, "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.bind(path)
            s.listen()
            _, found, _ = examine(db, env=environment(TURNSTILE_SOCKET=path))
        expect(found, "broker-unusable", "problem", "something else")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            _, found, _ = examine(db, broker=broker)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        expect(found, "broker-unusable", "problem", "does not answer")


# --- who holds it -------------------------------------------------------------------------------------------------

def test_members_are_named_with_their_sqlite():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        status, found, _ = examine(db, broker=broker)
        assert status == 0
        expect(found, "members", "ok", f"pid {os.getpid()}", sqlite3.sqlite_version)
        assert "plain-clients" not in found and "gate-orphaned" not in found, found
        # What is known of its SQLite.
        version = sqlite3.sqlite_version_info
        assert ("sqlite-savepoint" in found) == (version < SAVEPOINT_MENDED), found
        if version < (3, 44):
            expect(found, "sqlite-wal-reset", "ok", "cannot happen among members", f"pid {os.getpid()}")
        member.close()


def test_a_plain_client_is_found_before_members_come_and_beside_them():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with PlainShell(db) as shell:
            shell.run("SELECT count(*) FROM rows")
            _, found, _ = examine(db, broker=broker)
            expect(found, "plain-clients", "warning", "sqlite3", f"pid {shell.pid}", "locked", "turnstile run")
            member = connect(db, broker=broker, mode="guest")
            _, found, _ = examine(db, broker=broker)
            expect(found, "mode-guest", "warning")
            if sqlite3.sqlite_version_info < (3, 44):
                expect(found, "sqlite-wal-reset", "warning", "plain client", "3.51.3", f"pid {os.getpid()}")
            expect(found, "plain-clients", "warning", f"pid {shell.pid}")
            expect(found, "members", "ok", f"pid {os.getpid()}")
            member.close()


def test_a_plain_client_that_is_shut_out_is_found():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        with PlainShell(db) as shell:
            shell.run("SELECT count(*) FROM rows")
            member = connect(db, broker=broker, mode="gated")
            _, found, _ = examine(db, broker=broker)
            expect(found, "plain-shut-out", "warning", f"pid {shell.pid}", "turnstile run")
            member.close()


def test_a_stopped_holder_of_the_turn_is_a_problem():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = "import sys; sys.path.insert(0, sys.argv[1]); import harness; db = harness.connect(sys.argv[2]); " \
                 "db.execute('BEGIN IMMEDIATE'); print('in', flush=True); sys.stdin.read()"
        process = subprocess.Popen([PYTHON, "-c", holder, harness.HERE, db], env=broker.env, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"in\n"
            process.send_signal(signal.SIGSTOP)
            status, found, _ = examine(db, broker=broker)
            assert status == 1
            expect(found, "turn-stopped", "problem", f"pid {process.pid}", "kill -CONT")
        finally:
            process.kill()
            process.wait(10)
            process.stdin.close()
            process.stdout.close()


def test_an_orphaned_gate_and_another_broker():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        with Broker() as second:
            status, found, _ = examine(db, broker=second)
            assert status == 1
            expect(found, "other-broker", "problem", f"pid {broker.pid}")
        keeper = broker.status()["broker"]["keeper"]
        broker.kill()
        status, found, _ = examine(db, broker=broker)
        assert status == 1
        expect(found, "gate-orphaned", "problem", f"pid {os.getpid()}", "turnstile serve")
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{keeper}/fd/0"), what="the keeper's end")
        _, found, _ = examine(db, broker=broker)
        expect(found, "gate-orphaned", "problem", f"pid {os.getpid()}")
        broker.start()
        member.execute("INSERT INTO rows VALUES('a', 1)")
        member.close()


# --- settings and versions ----------------------------------------------------------------------------------------

def test_settings_are_told_with_where_they_come_from():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        env = environment(broker, TURNSTILE_WAIT="2s", TURNSTILE_BEGIN="sometimes", TURNSTILE_WIAT="3s")
        status, found, report = examine(f"file:{db}?turnstile_wait=500ms&turnstile_durable_reads=0", env=env)
        assert status == 1
        expect(found, "setting-invalid", "problem", "TURNSTILE_BEGIN", "learn")
        expect(found, "setting-unknown", "warning", "TURNSTILE_WIAT")
        settings = {s["name"]: (s["value"], s["from"]) for s in report["settings"]}
        assert settings["TURNSTILE_WAIT"] == ("500ms", "URI"), settings
        assert settings["TURNSTILE_DURABLE_READS"] == ("0", "URI"), settings
        assert settings["TURNSTILE_FALLBACK"] == ("autostart", "default"), settings


def test_another_build_of_the_extension_is_noticed():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        own = open(harness.lib(), "rb").read()
        at = own.index(b"turnstile build\n") + 16
        changed = broker.path("libturnstile.so")
        with open(changed, "wb") as f:
            f.write(own[:at] + b"\x09" + own[at + 1:])
        status, found, _ = examine(db, env=environment(broker, TURNSTILE_LIB=changed))
        assert status == 1
        expect(found, "extension-version", "problem", "protocol 9")
        status, found, _ = examine(db, env=environment(broker, TURNSTILE_LIB=SHELL))
        assert status == 1
        expect(found, "extension-unknown", "problem")
        status, found, _ = examine(db, env=environment(broker, TURNSTILE_LIB=broker.path("none.so")))
        assert status == 1
        expect(found, "extension-missing", "problem")


# --- commands -----------------------------------------------------------------------------------------------------

def script(place, name, text):
    path = os.path.join(place, name)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o755)
    return path


def test_commands():
    with Broker() as broker:
        db = create(broker.path("app.db"))

        def of(*command):
            return examine(db, *command, broker=broker)[1]
        found = of(SHELL, db)
        expect(found, "command", "ok", "glibc")
        expect(found, "command-reached", "ok")
        expect(found, "command-sqlite", "ok", sqlite3.sqlite_version, "libsqlite3.so")
        found = of(PYTHON, "app.py")
        expect(found, "command-reached", "ok")
        expect(found, "command-sqlite", "ok", sqlite3.sqlite_version, "libsqlite3.so")
        found = of(script(broker.dir, "app", f"#!{PYTHON}\n"))
        expect(found, "command", "ok", PYTHON)
        expect(found, "command-sqlite", "ok", sqlite3.sqlite_version)
        expect(of("/bin/true"), "command-reached", "ok", "no SQLite is seen")
        status, found, _ = examine(db, "no-such-program", broker=broker)
        assert status == 1
        expect(found, "command-missing", "problem")
        found = of(os.path.join(harness.target(), "examples", "worker"))
        expect(found, "command-linked-in", "warning", "extension")
        node = os.path.join(CACHE, "bin", "node")
        if os.path.exists(node):
            found = of(node, "app.js")
            expect(found, "command-linked-in", "warning", "load the extension")
            expect(found, "command-sqlite", "ok", "linked in")


def test_commands_that_cannot_be_reached():
    if not shutil.which("gcc"):
        raise Skip("gcc is missing")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with open(broker.path("main.c"), "w") as f:
            f.write("int main(void){ return 0; }\n")
        static, setuid = broker.path("static"), broker.path("setuid")
        run(["gcc", "-static", "-o", static, broker.path("main.c")])
        status, found, _ = examine(db, static, broker=broker)
        assert status == 1
        expect(found, "command", "ok", "static")
        expect(found, "command-unreached", "problem", "statically linked", "extension")
        run(["gcc", "-o", setuid, broker.path("main.c")])
        if os.getuid() == 0:
            os.chown(setuid, 65534, 65534)
            os.chmod(setuid, 0o6755)
            status, found, _ = examine(db, setuid, broker=broker)
            assert status == 1
            expect(found, "command-unreached", "problem", "setuid")


def test_a_python_that_cannot_load_extensions_is_told():
    """Such as pyenv builds: here one that looks like it."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        found = examine(db, PYTHON, broker=broker)[1]
        assert "command-no-extensions" not in found
        candidates = [p for p in glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3")) +
                      ["/usr/local/bin/python3"] if os.path.exists(p)]
        for other in candidates:
            probe = "import sqlite3; print(hasattr(sqlite3.Connection, 'enable_load_extension'))"
            if run([other, "-c", probe], check=False).stdout == "False\n":
                found = examine(db, other, broker=broker)[1]
                expect(found, "command-no-extensions", "warning", "turnstile run")
                return
        raise Skip("every Python here can load extensions")


# The version from which ROLLBACK TO leaves no wrong checksums (test_chaos: test_what_is_left_out_plain_sqlite_loses_too).
SAVEPOINT_MENDED = (3, 50, 2)
