"""A broker that nobody has started: by whoever comes first, one of it, where it belongs, and without a trace in the
process that starts it."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time

from harness import (PYTHON, Broker, Skip, bin, connect, create, ending, lib, plain, run, slow, tail,
                     timeout, wait_until, waits)
from test_bad_input import (BUSY, HOST, NOBODY, check_count, directory, environment, host, owned_by, refused,
                            root_only, says)

OTHER = 54322  # another uid that has no user


# --- a world without a broker ----------------------------------------------------------------------------------

class World:
    """The test's own process moves into a mount namespace with an empty /run and /tmp, and without what marks a
    container: no broker of the machine is found, and none is left behind. Root only.

    `dir` holds a copy of the build, for users who may not read the checkout.
    """

    def __enter__(self):
        root_only()
        if os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC:
            raise Skip("in a container (a pid namespace) no broker is started")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) != 0:  # CLONE_NEWNS
            raise Skip(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
        self.mount("--make-rprivate", "/")
        self.mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")
        for name in os.listdir("/"):
            old, new = f"/{name}", f"/mnt/{name}"
            if os.path.islink(old):
                os.symlink(os.readlink(old), new)
            elif name in ("tmp", "run", "mnt"):
                os.mkdir(new)
            elif os.path.isdir(old):
                os.mkdir(new)
                self.mount("--rbind", old, new)
        os.chmod("/mnt/tmp", 0o1777)
        self.dir = "/tmp/build"
        os.mkdir(f"/mnt{self.dir}")
        for path in (lib(), bin()):
            shutil.copy(path, f"/mnt{self.dir}")
        os.chroot("/mnt")
        os.chdir("/")
        os.environ["TURNSTILE_TARGET"] = self.dir
        return self

    def __exit__(self, *_):
        end_all(brokers())

    @staticmethod
    def mount(*arguments):
        done = run(["mount", *arguments], check=False)
        if done.returncode:
            raise Skip(f"cannot mount here: {done.stderr.strip()}")

    def user(self, uid=NOBODY, runtime=True):
        """A user's environment and a directory of databases."""
        home = f"/tmp/home-{uid}"
        os.makedirs(home, exist_ok=True)
        os.chown(home, uid, uid)
        run_dir = f"/run/user/{uid}"
        if runtime:
            os.makedirs(run_dir, exist_ok=True)
            os.chown(run_dir, uid, uid)
            os.chmod(run_dir, 0o700)
        return environment(XDG_RUNTIME_DIR=run_dir if runtime else None, HOME=home), home


def brokers():
    """The brokers of this test: in its mount namespace."""
    here = os.readlink("/proc/self/ns/mnt")
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.readlink(f"/proc/{name}/ns/mnt") == here:
                with open(f"/proc/{name}/cmdline", "rb") as f:
                    if f.read().split(b"\0")[1:2] == [b"serve"]:
                        found.append(int(name))
    return found


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def end_all(pids, sig=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)
    for pid in pids:
        wait_until(lambda: gone(pid), 20, f"the end of broker {pid}")


def database(home, name="app.db", uid=NOBODY, journal="wal"):
    db = create(f"{home}/{name}", journal)
    owned_by(uid, home)
    return db


WRITE = """
db = load(opened(PATH))
insert(db, int(MORE[0]) if MORE else 1)
say(status=status(db))
db.close()
"""


# --- starting --------------------------------------------------------------------------------------------------

@timeout(240)
def test_fifty_processes_at_once_start_one_broker():
    with World() as world:
        env, home = world.user()
        db = database(home)
        script = HOST + "sys.stdin.read()\n" + WRITE + "db = opened(PATH); insert(db, 1000); db.close()\nreport()\n"
        barrier, go = os.pipe()
        children, results = [], []
        for i in range(50):
            results.append(f"{home}/said-{i}")
            os.close(os.open(results[-1], os.O_WRONLY | os.O_CREAT))
            os.chown(results[-1], NOBODY, NOBODY)
            children.append(subprocess.Popen([PYTHON, "-c", script, lib(), results[-1], db, str(i)], env=env,
                                             stdin=barrier, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                             user=NOBODY, group=NOBODY, extra_groups=[], text=True, cwd="/"))
        os.close(barrier)
        os.close(go)
        end = time.monotonic() + 120
        try:
            for child in children:
                output, _ = child.communicate(timeout=max(1, end - time.monotonic()))
                assert child.returncode == 0 and not output, f"{ending(child.returncode)}\n{output}"
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait(20)
        said = [json.load(open(r)) for r in results]
        for s in said:
            assert not s["world"], f"changed in the host: {s['world']}"
            assert s["status"]["mode"] == "gated", s
        pids = {s["status"]["broker_pid"] for s in said}
        assert len(pids) == 1, f"members of {len(pids)} brokers: {pids}"
        wait_until(lambda: set(brokers()) == pids, 20, "the other started brokers to give way")
        check_count(db, 100)
        assert sorted(int(r[0]) for r in plain(db, "SELECT seq FROM rows WHERE seq<1000")) == list(range(50))
        mode = os.stat(f"/run/user/{NOBODY}/turnstile/broker.sock").st_mode
        assert stat.S_ISSOCK(mode) and not mode & 0o077, "a user's broker is open to others"


def test_a_killed_broker_is_replaced_and_its_socket_file_too():
    with World() as world:
        env, home = world.user()
        db = database(home)
        pids = []
        for i in range(4):
            said = host(WRITE, db, i, env=env, user=NOBODY)
            pids.append(said["status"]["broker_pid"])
            assert os.path.exists(said["status"]["socket"])
            # And what a broker that was killed at a bad moment leaves.
            if i == 2:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
                    s.bind(said["status"]["socket"] + ".new")
                owned_by(NOBODY, os.path.dirname(said["status"]["socket"]))
            end_all(brokers())
            # Its keeper leaves none; one that was killed too would.
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, contextlib.suppress(OSError):
                s.bind(said["status"]["socket"])
                owned_by(NOBODY, os.path.dirname(said["status"]["socket"]))
        assert len(set(pids)) == 4, pids
        check_count(db, 4)


def test_a_broker_that_is_there_is_used():
    with World() as world:
        env, home = world.user()
        db = database(home)
        first = host(WRITE, db, env=env, user=NOBODY)["status"]["broker_pid"]
        for i in range(3):
            assert host(WRITE, db, i, env=env, user=NOBODY)["status"]["broker_pid"] == first
        assert brokers() == [first]
        check_count(db, 4)


def test_the_starting_process_is_left_alone():
    """`host` compares threads, children, SIGCHLD, signals, environment; the broker in turn has nothing of the host's:
    its descriptors, signal settings, session, directory, and no extension loaded into it."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        said = host("""
            secret = os.open("/etc/passwd", os.O_RDONLY)
            os.set_inheritable(secret, True)
            os.chdir("/tmp")
            _before["directory"] = "/tmp"
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
            os.umask(0)
            _before.update(_world())
            db = load(opened(PATH))
            insert(db, 1)
            say(status=status(db), session=os.getsid(0))
            db.close()
        """, db, env=env | {"LD_PRELOAD": ""}, user=NOBODY)
        pid = said["status"]["broker_pid"]
        links = []
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        assert "/etc/passwd" not in links and links.count("/dev/null") == 3, links
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) == pid != said["session"]
        with open(f"/proc/{pid}/status") as f:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
        blocked, ignored = int(fields["SigBlk"], 16), int(fields["SigIgn"], 16)
        assert not blocked & 1 << signal.SIGHUP - 1, "the host's signal mask"
        assert not ignored & 1 << signal.SIGUSR1 - 1, "the host's ignored signals"
        assert fields["PPid"].strip() != "0" and fields["Uid"].split()[1] == str(NOBODY)
        with open(f"/proc/{pid}/environ") as f:
            assert "LD_PRELOAD" not in f.read()
        # It can be told to end.
        end_all([pid], signal.SIGTERM)
        assert not os.path.exists(said["status"]["socket"])
        check_count(db, 1)


def test_a_host_that_ignores_sigchld_starts_one_too():
    with World() as world:
        env, home = world.user()
        db = database(home)
        said = host("signal.signal(signal.SIGCHLD, signal.SIG_IGN); _before.update(_world())" + WRITE, db, env=env,
                    user=NOBODY)
        assert said["status"]["mode"] == "gated", said
        check_count(db, 1)


def test_a_long_runtime_directory():
    """A socket's name has room for 107 characters."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        run_dir = f"/run/user/{NOBODY}/" + "/".join("d" * 60 for _ in range(4))
        os.makedirs(run_dir)
        for path in (run_dir, *(run_dir.rsplit("/", n)[0] for n in range(1, 4))):
            os.chown(path, NOBODY, NOBODY)
        said = host(WRITE, db, env=env | {"XDG_RUNTIME_DIR": run_dir}, user=NOBODY)
        assert said["status"]["socket"].startswith(run_dir), said
        again = host(WRITE, db, env=env | {"XDG_RUNTIME_DIR": run_dir}, user=NOBODY)
        assert again["status"]["broker_pid"] == said["status"]["broker_pid"]
        check_count(db, 2)


@waits
def test_a_program_that_does_not_become_a_broker():
    """An error within its time, and the connection stays as it was."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        for name, text in (("fails", "#!/bin/sh\nexit 3\n"), ("not-a-program", "no interpreter\n")):
            with open(f"/tmp/{name}", "w") as f:
                f.write(text)
            os.chmod(f"/tmp/{name}", 0o755)
        for name in ("fails", "not-a-program", "missing", "build"):
            said = host("""
                db = opened(PATH)
                say(load=attempt(load, db))
                say(still=attempt(insert, db, 1))
                db.close()
            """, db, env=env | {"TURNSTILE_BIN": f"/tmp/{name}"}, user=NOBODY)
            says(said["load"], f"/tmp/{name}" if name in ("fails", "not-a-program") else "TURNSTILE_BIN")
            assert said["still"] == {"ok": 1}, said
        assert brokers() == []
        check_count(db, 4)


def test_no_program_to_start_a_broker_with():
    """Neither given, nor beside the extension, nor on PATH, and no home either."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        os.mkdir("/tmp/alone")
        shutil.copy(lib(), "/tmp/alone")
        os.environ["TURNSTILE_TARGET"] = "/tmp/alone"
        env = {k: v for k, v in env.items() if k not in ("PATH", "HOME")}
        for more in ({}, {"TURNSTILE_BIN": "/tmp/nowhere"}, {"TURNSTILE_BIN": ""}, {"PATH": "/tmp:relative::"}):
            refused(db, env | more, "no broker", "TURNSTILE_BIN", user=NOBODY)
        assert brokers() == []
        # Found on PATH.
        said = host(WRITE, db, env=env | {"PATH": f"/tmp/alone:{world.dir}"}, user=NOBODY)
        assert said["status"]["mode"] == "gated", said
        with open(f"/proc/{said['status']['broker_pid']}/cmdline") as f:
            assert f.read().startswith(f"{world.dir}/turnstile\0"), "another program"


@slow
@timeout(240)
def test_clients_that_come_while_brokers_go():
    """Brokers that exit as soon as nobody is there, and clients that come all the time: each finds one, or starts one,
    whatever the moment."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        with open("/tmp/impatient", "w") as f:
            f.write(f'#!/bin/sh\nexec {bin()} serve --socket "$3" --idle-exit 10ms\n')
        os.chmod("/tmp/impatient", 0o755)
        body = HOST + """
            import time
            def alive(pid):
                try:
                    with open(f"/proc/{pid}/stat") as f:
                        return ") Z" not in f.read()
                except OSError:
                    return False
            worker, count, brokers = MORE[0], 0, []
            for i in range(60):
                db = opened(PATH)
                if not i:
                    load(db)
                db.execute("PRAGMA busy_timeout=20000")
                count += insert(db, i, worker)
                brokers.append(status(db)["broker_pid"])
                db.close()
                # Every tenth time the others get to the end too: the next finds no broker, or one that is going.
                if i % 10 == 9:
                    pause = time.monotonic() + 2
                    while alive(brokers[-1]) and time.monotonic() < pause:
                        pass
            say(count=count, brokers=brokers)
            report()
        """.replace("\n            ", "\n")
        children = {}
        for i in range(2):
            result = f"{home}/said-{i}"
            os.close(os.open(result, os.O_WRONLY | os.O_CREAT))
            os.chown(result, NOBODY, NOBODY)
            children[result] = subprocess.Popen(
                [PYTHON, "-c", body, lib(), result, db, str(i)], env=env | {"TURNSTILE_BIN": "/tmp/impatient"},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
                user=NOBODY, group=NOBODY, extra_groups=[])
        served = set()
        try:
            for result, child in children.items():
                output, _ = child.communicate(timeout=150)
                assert child.returncode == 0, f"{ending(child.returncode)}\n{tail(output)}"
                said = json.load(open(result))
                assert said["count"] == 60, said
                served |= set(said["brokers"])
        finally:
            for child in children.values():
                if child.poll() is None:
                    child.kill()
                    child.wait(20)
        assert len(served) > 1, "no broker has gone: nothing was tested"
        check_count(db, 120)


# --- where -----------------------------------------------------------------------------------------------------

def test_roots_broker_serves_the_host():
    with World() as world:
        env, home = world.user()
        db = database(home)
        roots = create("/tmp/root.db")
        said = host(WRITE, roots, env=environment())
        assert said["status"]["socket"] == "/run/turnstile/broker.sock", said
        assert stat.S_IMODE(os.stat("/run/turnstile").st_mode) == 0o755
        assert stat.S_IMODE(os.stat("/run/turnstile/broker.sock").st_mode) == 0o666
        # A user's program finds it, and starts none of its own.
        users = host(WRITE, db, env=env, user=NOBODY)
        assert users["status"]["broker_pid"] == said["status"]["broker_pid"] and len(brokers()) == 1
        end_all(brokers(), signal.SIGTERM)
        assert not os.path.exists("/run/turnstile/broker.sock")
        # Gone: the user's own.
        users = host(WRITE, db, env=env, user=NOBODY)
        assert users["status"]["socket"] == f"/run/user/{NOBODY}/turnstile/broker.sock", users
        check_count(roots, 1)
        check_count(db, 2)


def test_without_a_runtime_directory_a_private_one_in_tmp():
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        for value in (None, "", "relative", "/run/user/missing"):
            said = host(WRITE, db, env=env if value is None else env | {"XDG_RUNTIME_DIR": value}, user=NOBODY)
            assert said["status"]["socket"] == f"/tmp/turnstile-{NOBODY}/broker.sock", (value, said)
        meta = os.stat(f"/tmp/turnstile-{NOBODY}")
        assert (stat.S_IMODE(meta.st_mode), meta.st_uid) == (0o700, NOBODY), meta
        assert len(brokers()) == 1
        check_count(db, 4)


def somebody_elses_directory(path):
    """What another user could have put there first, or this one carelessly."""
    def remove():
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        else:
            shutil.rmtree(path, ignore_errors=True)

    def made(uid, mode):
        os.mkdir(path)
        os.chmod(path, mode)
        os.chown(path, uid, uid)

    os.makedirs("/tmp/elsewhere", exist_ok=True)
    os.chmod("/tmp/elsewhere", 0o700)
    os.chown("/tmp/elsewhere", NOBODY, NOBODY)
    for name, make in {
        "of another user": lambda: made(OTHER, 0o700),
        "of another user, open": lambda: made(OTHER, 0o777),
        "of root": lambda: made(0, 0o755),
        "open to all": lambda: made(NOBODY, 0o777),
        "open to the group": lambda: made(NOBODY, 0o750),
        "a link": lambda: os.symlink("/tmp/elsewhere", path),
        "a dangling link": lambda: os.symlink("/tmp/nowhere", path),
        "a file": lambda: open(path, "w").close(),
    }.items():
        remove()
        make()
        yield name
    remove()


def test_a_directory_that_is_not_private_is_refused():
    """Whoever owns the directory could put a broker of his own there."""
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        path = f"/tmp/turnstile-{NOBODY}"
        count = 0
        for name in somebody_elses_directory(path):
            said = host("""
                db = opened(PATH)
                say(load=attempt(load, db))
                say(still=attempt(insert, db, 1))
                db.close()
            """, db, env=env, user=NOBODY)
            says(said["load"], path, "not a private directory")
            count += said["still"]["ok"]
            assert brokers() == [], name
        assert not os.path.exists("/tmp/nowhere") and os.listdir("/tmp/elsewhere") == []
        said = host(WRITE, db, env=env, user=NOBODY)
        assert said["status"]["mode"] == "gated", said
        check_count(db, count + 1)


def test_the_hosts_broker_is_found_whatever_stands_in_tmp():
    """Anyone can make a directory in /tmp: that must not keep a user from the broker of the host."""
    with World() as world:
        env, home = world.user(runtime=False)
        db = database(home)
        first = host(WRITE, create("/tmp/root.db"), env=environment())["status"]["broker_pid"]
        said = host(WRITE, db, env=env, user=NOBODY)
        assert said["status"]["broker_pid"] == first, said
        assert not os.path.exists(f"/tmp/turnstile-{NOBODY}"), "made a directory that nobody needs"
        count = 1
        for name in somebody_elses_directory(f"/tmp/turnstile-{NOBODY}"):
            said = host("db = opened(PATH); say(load=attempt(load, db)); insert(db, 1); say(status=status(db)); "
                        "db.close()", db, env=env, user=NOBODY)
            count += 1
            assert said["load"] == {"ok": True}, (name, said)
            assert said["status"]["broker_pid"] == first, (name, said)
        check_count(db, count)


def test_a_runtime_directory_that_cannot_be_written():
    with World() as world:
        env, home = world.user()
        db = database(home)
        run_dir = f"/run/user/{NOBODY}"
        os.chown(run_dir, 0, 0)
        os.chmod(run_dir, 0o755)
        body = "db = opened(PATH); say(load=attempt(load, db)); say(still=attempt(insert, db, 1)); db.close()"
        said = host(body, db, env=env, user=NOBODY)
        says(said["load"], run_dir)
        # With plain SQLite allowed, no directory is needed.
        said = host(WRITE, db, env=env | {"TURNSTILE_FALLBACK": "plain"}, user=NOBODY)
        assert said["status"]["mode"] == "plain", said
        check_count(db, 2)


# --- where not -------------------------------------------------------------------------------------------------

def test_a_given_socket_starts_nothing():
    with World() as world:
        env, home = world.user()
        db = database(home)
        for path in (f"/run/user/{NOBODY}/turnstile/broker.sock", "/run/turnstile/broker.sock", f"{home}/s"):
            said = host("db = opened(PATH); say(load=attempt(load, db)); say(still=attempt(insert, db, 1)); db.close()",
                        db, env=env | {"TURNSTILE_SOCKET": path}, user=NOBODY)
            says(said["load"], path, "TURNSTILE_SOCKET", "none is started", "turnstile serve")
            assert brokers() == [] and not os.path.exists(path)
        assert not os.path.exists(f"/run/user/{NOBODY}/turnstile")
        check_count(db, 3)


def test_no_broker_is_started_in_a_container():
    """Other containers would not find it. Told by the pid namespace, or by what Docker and Podman leave in the root."""
    with World():
        os.mkdir("/tmp/data")
        db = create("/tmp/data/app.db")
        body = "db = opened(PATH); say(load=attempt(load, db)); say(still=attempt(insert, db, 1)); db.close()"

        def refuses(said):
            says(said["load"], "in a container", "on the host", "turnstile serve", "TURNSTILE_SOCKET")
            assert said["still"] == {"ok": 1}, said
            assert brokers() == []
            assert not os.path.exists("/run/turnstile/broker.sock")

        result = "/tmp/said"
        open(result, "w").close()
        inside = ["unshare", "--pid", "--fork", "--mount-proc"]
        if run([*inside, "true"], check=False).returncode:
            raise Skip("no pid namespace here")
        done = run([*inside, PYTHON, "-c", f"{HOST}\n{body}\nreport()", lib(), result, db], env=environment())
        assert not done.stdout + done.stderr
        refuses(json.load(open(result)))
        os.makedirs("/run", exist_ok=True)
        for marker in ("/.dockerenv", "/run/.containerenv"):
            open(marker, "w").close()
            refuses(host(body, db, env=environment()))
            os.unlink(marker)
        # Plain SQLite may be allowed there.
        done = run([*inside, PYTHON, "-c", f"{HOST}\n{WRITE}\nreport()", lib(), result, db],
                   env=environment(TURNSTILE_FALLBACK="plain"))
        said = json.load(open(result))
        assert said["status"]["mode"] == "plain" and "no broker" in said["status"]["reason"], said
        check_count(db, 4)


# --- leaving ---------------------------------------------------------------------------------------------------

def test_an_idle_broker_exits_and_leaves_no_socket():
    with Broker("--idle-exit", "200ms") as broker:
        process = broker.process
        db = create(broker.path("app.db"))
        # Whether it was quick enough or not: while somebody is in, it stays.
        if process.poll() is not None:
            broker.process = None
            broker.start()
            process = broker.process
        member = connect(db, broker=broker, mode="gated")
        end = time.monotonic() + 1.0
        count = 0
        while time.monotonic() < end:
            member.execute("INSERT INTO rows VALUES('m', ?)", (count,))
            count += 1
        assert process.poll() is None, "it left its members"
        member.close()
        assert process.wait(20) == 0
        broker.process = None
        assert not os.path.exists(broker.socket)
        assert "panicked" not in broker.log()
        check_count(db, count)


def test_an_idle_broker_that_never_had_a_member_exits():
    with directory() as d:
        log = open(f"{d}/log", "w+")
        process = subprocess.Popen([bin(), "serve", "--socket", f"{d}/s", "--idle-exit", "200ms"], stdout=log,
                                   stderr=log, stdin=subprocess.DEVNULL)
        try:
            assert process.wait(20) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            log.close()
        assert not os.path.exists(f"{d}/s") and not os.path.exists(f"{d}/s.new"), os.listdir(d)


def test_a_second_broker_on_one_socket_gives_way():
    with Broker() as broker:
        done = run([bin(), "serve", "--socket", broker.socket], check=False, env=broker.env)
        assert done.returncode == 1 and "another broker already serves" in done.stderr, done
        assert broker.answers()
        with open(broker.path("file"), "w") as f:
            f.write("mine")
        done = run([bin(), "serve", "--socket", broker.path("file")], check=False, env=broker.env)
        assert done.returncode == 1 and "not a socket" in done.stderr, done
        assert open(broker.path("file")).read() == "mine"


# --- two brokers -----------------------------------------------------------------------------------------------

def test_two_brokers_on_one_database():
    """The second broker's clients get SQLITE_BUSY and the reason, never a second segment; when the first's members
    are gone, they get in."""
    with Broker() as first, Broker() as second:
        for journal in ("wal", "delete"):
            db = create(first.path(f"{journal}.db"), journal)
            member = connect(db, broker=first, mode="gated")
            member.execute("INSERT INTO rows VALUES('first', 1)")
            said = host("""
                db = opened(PATH)
                say(load=attempt(load, db))
                say(plain=attempt(insert, db, 1))
                db.close()
                say(open=attempt(opened, PATH))
            """, db, env=second.env)
            says(said["load"], "another broker has it")
            assert said["open"].get("code") == BUSY, said
            assert said["plain"].get("code") == BUSY, f"a plain connection got in: {said}"
            assert "another broker has it" in said["log"], said["log"]
            assert second.database(db) is None, "the second broker has it too"
            member.execute("INSERT INTO rows VALUES('first', 2)")
            member.close()
            said = host(WRITE, db, env=second.env)
            assert said["status"]["mode"] == "gated" and said["status"]["socket"] == second.socket, said
            check_count(db, 3)


def test_one_process_with_two_brokers():
    with Broker() as first, Broker() as second:
        db, other = create(first.path("app.db")), create(second.path("other.db"))
        said = host("""
            db = load(opened(PATH))
            insert(db, 1)
            os.environ["TURNSTILE_SOCKET"] = MORE[1]  # by the process's own code, which may
            other = opened(MORE[0])
            insert(other, 1)
            say(first=status(db)["socket"], second=status(other)["socket"])
            say(wrong=attempt(opened, PATH))
            db.execute("ATTACH ? AS x", (MORE[0],))
            insert(db, 2, table="x.rows")
            db.close()
            other.close()
        """, db, other, second.socket, env=first.env, same_world=False)
        assert (said["first"], said["second"]) == (first.socket, second.socket), said
        assert said["wrong"].get("code") == BUSY and "another broker has it" in said["log"], said
        check_count(db, 1)
        check_count(other, 2)


def test_a_users_broker_beside_the_hosts_that_came_later():
    """A user's own broker serves the database when the host's is started: the user's programs go on at their own,
    and get on with the host's once nobody is left there."""
    with World() as world:
        env, home = world.user()
        db = database(home)
        body = """
            import subprocess
            db = load(opened(PATH))
            insert(db, 1)
            own = status(db)["broker_pid"]
            # The host's broker starts, and another program of this user comes.
            open(MORE[0] + ".go", "w").close()
            while not os.path.exists(MORE[0] + ".started"):
                os.stat("/")
            done = subprocess.run([sys.executable, "-c", MORE[1], LIB, PATH], capture_output=True, text=True,
                                  timeout=60)
            say(own=own, other=done.stdout.strip(), error=done.stderr)
            insert(db, 2)
            db.close()
        """
        newcomer = ("import sqlite3, sys, json; db = sqlite3.connect(sys.argv[2], isolation_level=None); "
                    "db.enable_load_extension(True); db.load_extension(sys.argv[1]); "
                    "db.execute(\"INSERT INTO rows VALUES('newcomer', 1)\"); "
                    "print(json.loads(db.execute('PRAGMA turnstile_status').fetchone()[0])['broker_pid']); db.close()")

        def start_hosts():
            wait_until(lambda: os.path.exists(f"{home}/flag.go"), 30, "the first member")
            host(WRITE, create("/tmp/root.db"), env=environment())
            open(f"{home}/flag.started", "w").close()

        starter = threading.Thread(target=start_hosts)
        starter.start()
        said = host(body, db, f"{home}/flag", newcomer, env=env, user=NOBODY, same_world=False)
        starter.join(30)
        assert said["error"] == "", said
        assert said["other"] == str(said["own"]), "it went to the host's broker, which does not have the database"
        later = host(WRITE, db, env=env, user=NOBODY)
        assert later["status"]["socket"] == "/run/turnstile/broker.sock", later
        check_count(db, 4)
