"""Whom a program sends its descriptors: the broker that its owner's environment names, of a user who is believed. SQL text
chooses neither that nor anything else that others rely on."""

import contextlib
import os
import shutil
import subprocess

from harness import PYTHON, Broker, Skip, bin, connect, create, ending, fails_without, lib, run, wait_until, waits
from test_autostart import OTHER, World, brokers, database
from test_bad_input import (CANTOPEN, NOBODY, check_count, directory, environment, host, owned_by, refused, root_only,
                            says)

# A process of another user that listens at a path, and says what came: a connection, and descriptors with what it sends.
IMPOSTOR = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind(path)
os.chmod(path, 0o666)
s.listen(16)
print("ready", flush=True)
while True:
    c = s.accept()[0]
    print("connected", flush=True)
    c.settimeout(2)
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(c, 65536, 8)
            if not data:
                break
            print(f"received {len(data)} bytes and {len(fds)} descriptors", flush=True)
            c.send(b"no broker")
    except OSError:
        pass
    c.close()
"""


class Impostor:
    def __init__(self, path, uid=NOBODY):
        self.process = subprocess.Popen([PYTHON, "-c", IMPOSTOR, path, str(uid)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.end()
        self.process.stdout.close()

    def end(self):
        """Ends it, and returns what it has heard."""
        assert self.process.poll() is None, f"it ended: {ending(self.process.returncode)}"
        self.process.kill()
        self.process.wait(10)
        return self.process.stdout.read()


def hears_nothing(impostor):
    heard = impostor.end()
    assert "received" not in heard, f"another user was sent: {heard}"


# --- what SQL text may choose --------------------------------------------------------------------------------------

@fails_without("uri-chooses-all")
def test_sql_text_does_not_choose_the_broker():
    """Whoever can have it run an ATTACH got a descriptor of any file that the program may open."""
    with Broker() as broker, Broker() as other:
        db, secret = create(broker.path("app.db")), create(broker.path("secret.db"))
        said = host("""
            db = load(opened(PATH))
            uri = f"file:{MORE[0]}?turnstile_socket={MORE[1]}"
            say(attached=attempt(db.execute, "ATTACH ? AS x", (uri,)), opened=attempt(opened, uri, uri=True))
            say(unsafe=attempt(db.execute, "ATTACH ? AS y", (f"file:{MORE[0]}?turnstile_allow_unsafe=1",)))
            say(program=attempt(db.execute, "ATTACH ? AS z", (f"file:{MORE[0]}?turnstile_bin=/bin/true",)))
            say(user=attempt(db.execute, "ATTACH ? AS u", (f"file:{MORE[0]}?turnstile_broker_uid=54321",)))
            insert(db, 1)
        """, db, secret, other.socket, env=broker.env)
        for what in ("attached", "opened", "unsafe", "program", "user"):
            assert said[what].get("code") == CANTOPEN, (what, said)
        assert said["log"].count("only the environment sets it") == 5, said["log"]
        assert "session" not in other.log().replace("sessions", ""), "the other broker was spoken to"
        check_count(db, 1)


@fails_without("uri-chooses-all")
def test_sql_text_loosens_nothing_that_the_environment_has_set():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        strict = dict(TURNSTILE_FALLBACK="refuse", TURNSTILE_MODE="auto", TURNSTILE_DURABLE_READS="1")
        cases = ["turnstile_fallback=plain", "turnstile_fallback=autostart", "turnstile_mode=guest",
                 "turnstile_durable_reads=0"]
        for case in cases:
            said = host("say(load=attempt(load, opened(f'file:{PATH}?{MORE[0]}', uri=True)))", db, case,
                        env=environment(TURNSTILE_SOCKET=broker.path("nobody"), **strict))
            says(said["load"], case.partition("=")[0].upper(), "the environment is stricter")
        # What it has not set, the program's own names of databases may say.
        said = host("""
            db = load(opened(f"file:{PATH}?turnstile_mode=guest&turnstile_fallback=refuse", uri=True))
            insert(db, 1)
            say(mode=status(db)["mode"])
        """, db, env=environment(TURNSTILE_SOCKET=broker.socket, TURNSTILE_FALLBACK="plain"))
        assert said["mode"] == "guest", said
        check_count(db, 1)


# --- whose broker is believed --------------------------------------------------------------------------------------

@contextlib.contextmanager
def broker_of(uid, place):
    """A real broker of another user, open to everyone."""
    build = os.path.join(place, "build")
    if not os.path.exists(build):
        os.mkdir(build)
        for path in (lib(), bin()):
            shutil.copy(path, build)
    path = os.path.join(place, "theirs")
    os.mkdir(path)
    owned_by(uid, path)
    socket_ = os.path.join(path, "s")
    process = subprocess.Popen([os.path.join(build, "turnstile"), "serve", "--socket", socket_, "--everyone", "yes"],
                               user=uid, group=uid, extra_groups=[], stderr=subprocess.PIPE, text=True, cwd="/",
                               env=environment())
    try:
        wait_until(lambda: os.path.exists(socket_), what="another user's broker")
        yield socket_, process
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


@fails_without("any-broker-is-believed")
def test_another_users_broker_gets_no_descriptor_unless_it_is_named():
    """Also root's programs do not trust a user's broker: it could hand on what it is sent."""
    root_only()
    with directory() as place, broker_of(NOBODY, place) as (theirs, _):
        os.mkdir(f"{place}/data")
        db = create(f"{place}/data/app.db")
        os.chmod(db, 0o600)
        refused(db, environment(TURNSTILE_SOCKET=theirs), theirs, f"user {NOBODY}", "TURNSTILE_BROKER_UID")
        with_plain = environment(TURNSTILE_SOCKET=theirs, TURNSTILE_FALLBACK="plain")
        said = host("db = load(opened(PATH)); insert(db, 1); say(status=status(db)); db.close()", db, env=with_plain)
        assert said["status"]["mode"] == "plain", said
        named = environment(TURNSTILE_SOCKET=theirs, TURNSTILE_BROKER_UID=f"1, {NOBODY}")
        said = host("db = load(opened(PATH)); insert(db, 1); say(status=status(db)); db.close()", db, env=named)
        assert said["status"]["mode"] == "gated", said
        check_count(db, 3)
        # Its own user's programs need nothing, and what looks at it asks likewise.
        own = create(f"{place}/data/own.db")
        owned_by(NOBODY, f"{place}/data")
        said = host("db = load(opened(PATH)); say(status=status(db)); db.close()", own, user=NOBODY,
                    env=environment(TURNSTILE_SOCKET=theirs))
        assert said["status"]["mode"] == "gated", said
        for command in (["status", "--socket", theirs], ["doctor", "--socket", theirs, db]):
            done = run([bin(), *command], env=environment(), check=False)
            assert f"user {NOBODY} listens there" in done.stdout + done.stderr, done
        assert run([bin(), "status", "--socket", theirs], env=named).returncode == 0


@waits
@fails_without("hosts-place-is-anyones")
def test_the_hosts_place_is_believed_only_where_root_alone_can_give_it_away():
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        os.mkdir("/run/turnstile")
        os.chown("/run/turnstile", OTHER, OTHER)
        os.chmod("/run/turnstile", 0o777)
        with Impostor("/run/turnstile/broker.sock", OTHER) as impostor:
            # A program of the user passes it by, and starts the user's own.
            said = host("db = load(opened(PATH)); insert(db, 1); say(status=status(db)); db.close()", db, env=env,
                        user=NOBODY)
            assert said["status"]["socket"] == f"/tmp/turnstile-{NOBODY}/broker.sock", said
            # One of root's has no other.
            rooted = create("/tmp/rooted.db")
            said = host("say(load=attempt(load, opened(PATH)))", rooted, env=environment())
            says(said["load"], f"user {OTHER}", "TURNSTILE_BROKER_UID")
            hears_nothing(impostor)
        check_count(db, 1)


@waits
@fails_without("any-broker-is-believed")
def test_nobody_else_is_believed_in_a_users_own_place():
    """In /tmp, where somebody else may have made it before."""
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        own = f"/tmp/turnstile-{NOBODY}"
        for kind in ("another's directory", "a link", "open to others", "another's socket"):
            if kind == "another's directory":
                os.mkdir(own, 0o700)
                os.chown(own, OTHER, OTHER)
            elif kind == "a link":
                os.mkdir("/tmp/elsewhere", 0o700)
                os.chown("/tmp/elsewhere", NOBODY, NOBODY)
                os.symlink("/tmp/elsewhere", own)
                os.chown(own, OTHER, OTHER, follow_symlinks=False)
            else:
                os.mkdir(own)
                os.chown(own, NOBODY, NOBODY)
                os.chmod(own, 0o777 if kind == "open to others" else 0o700)
            at = f"{own}/broker.sock"
            with Impostor(at, OTHER) if kind == "open to others" else contextlib.nullcontext() as impostor:
                if kind == "another's socket":
                    os.chmod(own, 0o777)
                    impostor = Impostor(at, OTHER)
                    os.chmod(own, 0o700)
                said = host("say(load=attempt(load, opened(PATH)))", db, env=env, user=NOBODY)
                says(said["load"], own)
                if impostor:
                    hears_nothing(impostor)
            assert brokers() == [], kind
            os.unlink(own) if os.path.islink(own) else shutil.rmtree(own)


@waits
@fails_without("any-broker-is-believed")
def test_nobody_else_is_believed_after_a_brokers_death():
    """A member says who it is to whoever listens where its broker was. In a directory that others may write in, that
    may be anybody."""
    root_only()
    with Broker("--no-keeper") as broker:
        db, later = create(broker.path("app.db")), create(broker.path("later.db"))
        os.chmod(broker.dir, 0o777)
        member = connect(db, broker=broker, mode="gated")
        broker.kill()
        os.unlink(broker.socket)
        with Impostor(broker.socket) as impostor:
            member.execute("INSERT INTO rows VALUES('m', 1)")
            with contextlib.suppress(Exception):
                connect(later).close()
            hears_nothing(impostor)
        os.unlink(broker.socket)
        broker.start()
        member.execute("INSERT INTO rows VALUES('m', 2)")
        with contextlib.closing(connect(db, mode="gated")) as another:
            assert another.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        member.close()


def test_whom_root_has_given_the_hosts_place_is_believed_there():
    """A broker with its own user, as systemd starts it; no program needs a setting."""
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        os.mkdir("/run/turnstile")
        owned_by(OTHER, "/run/turnstile")
        broker = subprocess.Popen([bin(), "serve", "--everyone", "yes", "--socket", "/run/turnstile/broker.sock"],
                                  env=environment(), user=OTHER, group=OTHER, extra_groups=[], cwd="/",
                                  stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: os.path.exists("/run/turnstile/broker.sock"), what="the broker")
            for user in (None, NOBODY):
                said = host("db = load(opened(PATH)); insert(db, 1); say(status=status(db)); db.close()", db, env=env,
                            user=user)
                assert said["status"]["mode"] == "gated" and said["status"]["broker_pid"] == broker.pid, said
        finally:
            broker.terminate()
            broker.wait(20)
        check_count(db, 2)


@fails_without("replaced-is-anyone")
def test_a_process_of_another_user_is_not_replaced():
    """`serve --replace` sends a signal to whoever listens."""
    root_only()
    with directory() as place:
        os.chmod(place, 0o777)
        with Impostor(f"{place}/s") as impostor:
            command = [bin(), "serve", "--replace", "--socket", f"{place}/s", "--idle-exit", "1s"]
            done = run(command, env=environment(), check=False)
            assert impostor.process.poll() is None, "it was sent a signal"
            assert done.returncode and f"user {NOBODY} listens on" in done.stderr, done


# --- programs with another's rights --------------------------------------------------------------------------------

@waits
@fails_without("anothers-environment")
def test_a_set_uid_program_believes_nothing_of_the_environment():
    """Its user could name a broker, and, with a path, the program that it would start as somebody else."""
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        os.mkdir("/tmp/ext")
        shutil.copy(lib(), "/tmp/ext/libturnstile.so")  # with no program beside it
        shutil.copy(os.path.realpath(PYTHON), "/tmp/ext/python")
        os.chown("/tmp/ext/python", NOBODY, NOBODY)
        os.chmod("/tmp/ext/python", 0o4755)
        os.mkdir("/tmp/evil")
        with open("/tmp/evil/turnstile", "w") as f:
            f.write("#!/bin/sh\nid -u > /tmp/evil/ran\n")
        os.chmod("/tmp/evil/turnstile", 0o755)
        os.chmod("/tmp/evil", 0o777)
        script = ("import os, sqlite3, sys\n"
                  "assert os.geteuid() != os.getuid()\n"
                  "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
                  "db.enable_load_extension(True)\n"
                  "try:\n    db.load_extension('/tmp/ext/libturnstile')\n"
                  "except sqlite3.Error as e:\n    print(e)\n")

        def attempt(**more):
            done = run(["/tmp/ext/python", "-I", "-c", script, db], check=False, user=OTHER, group=OTHER, extra_groups=[],
                       env=environment(**more), cwd="/")
            if "AssertionError" in done.stderr:
                raise Skip("set-uid programs do not run as such here")
            assert not done.returncode, done
            return done.stdout

        said = attempt(PATH="/tmp/evil:/usr/bin:/bin")
        assert not os.path.exists("/tmp/evil/ran"), "its user's program has run as somebody else"
        assert "no broker is running" in said, said
        attempt(TURNSTILE_BIN="/tmp/evil/turnstile")
        assert not os.path.exists("/tmp/evil/ran"), "its user's program has run as somebody else"
        with Impostor("/tmp/evil/s", OTHER) as impostor:
            attempt(TURNSTILE_SOCKET="/tmp/evil/s", TURNSTILE_BROKER_UID=str(OTHER))
            hears_nothing(impostor)
