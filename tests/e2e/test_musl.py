"""musl, Alpine's C library: `libturnstile-musl.so` in programs of a root that knows no other C library, the static program
there and as a broker, and both C libraries' programs on one database at once.

`make musl TARGET=target-musl/release` builds what is tested (tests/run does). The root filesystem is tests/musl/build's.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import harness
from harness import (CACHE, CLIENTS, PYTHON, ROOT, SHELL, Broker, PlainShell, Programs, Skip, check_rows,
                     create, plain, plain_env, run, wait_until, waits)

from test_autostart import NOBODY, World, brokers, database

sys.path.insert(0, os.path.join(ROOT, "tests", "containers"))
from engine import SOCKET, HostBroker  # noqa: E402

MUSL = os.environ.get("TURNSTILE_MUSL_TARGET") or os.path.join(ROOT, "target-musl", "release")
PLACE = os.path.join(CACHE, "musl")
LINKER = (glob.glob("/lib/ld-musl-*.so.1") or [""])[0]
STATUS = "PRAGMA turnstile_status"
SHELL_OPTIONS = ["-batch", "-noheader", "-separator", "\x1f"]


def newest(pattern, what):
    found = glob.glob(pattern)
    if not found:
        raise Skip(f"{what} is missing")
    return max(found, key=os.path.getmtime)


def built():
    """What tests/musl/build makes; its directory."""
    reason = os.path.join(CACHE, "missing", "musl")
    if os.path.exists(reason):
        with open(reason) as f:
            raise Skip(f.read().strip())
    for program in ("musl-gcc", "tclsh"):
        if not shutil.which(program):
            raise Skip(f"{program} is missing: run tests/install")
    for name in ("libturnstile-musl.so", "turnstile-static"):
        if not os.path.exists(os.path.join(MUSL, name)):
            raise Skip(f"there is no build for musl: make musl TARGET={MUSL}")
    triple = os.path.join(os.path.dirname(MUSL), "*-linux-musl", "release")
    archive = newest(os.path.join(triple, "build", "libsqlite3-sys-*", "out", "libsqlite3.a"), "the build's libsqlite3.a")
    with open(os.path.join(os.path.dirname(os.path.dirname(archive)), "output")) as f:  # where its header is, for cargo
        headers = re.search("^cargo:+include=(.*)", f.read(), re.M).group(1)
    source = os.path.join(CACHE, "sqlite")
    if not os.path.exists(os.path.join(source, "tool", "mkshellc.tcl")):
        raise Skip("SQLite's source is missing: run tests/install")
    run([os.path.join(ROOT, "tests/musl/build"), PLACE, archive, headers, source], timeout=100)
    return PLACE


@contextlib.contextmanager
def target(program="turnstile", libraries=("libturnstile.so", "libturnstile-musl.so"), both=True):
    """A directory of a build to test: this program as `turnstile`, these libraries, and the names for both."""
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        from_both = {"turnstile": harness.bin(), "libturnstile.so": harness.lib(),
                     **{n: os.path.join(MUSL, n) for n in ("turnstile-static", "libturnstile-musl.so")}}
        for name, source in [("turnstile", program), *((n, n) for n in libraries)]:
            shutil.copy(from_both[source], os.path.join(place, name))
        if both:
            shutil.copytree(os.path.join(MUSL, "libturnstile.both"), os.path.join(place, "libturnstile.both"), symlinks=True)
        with mock.patch.dict(os.environ, {"TURNSTILE_TARGET": place}):
            yield place


def here(program):
    """A program on musl as this machine runs it, where musl is installed beside glibc."""
    return os.path.join(built(), "bin", program)


def env_here(broker=None):
    env = dict(broker.env) if broker else plain_env()
    env.pop("TURNSTILE_LIB", None)
    return {**env, "LD_LIBRARY_PATH": os.path.join(built(), "lib")}


def inside(broker, words, more=(), env=()):
    """How a program is started in the root filesystem, which has the static program and musl's library and nothing that
    is glibc's. `more`: what else is mounted, from where by where to."""
    if not shutil.which("bwrap"):
        raise Skip("bubblewrap is missing")
    root = os.path.join(built(), "root")
    try:
        run(["bwrap", "--ro-bind", root, "/", "--proc", "/proc", "--unshare-pid", "/usr/bin/sqlite3", "-version"])
    except AssertionError as e:
        raise Skip(f"bubblewrap does not run: {harness.tail(str(e), 1)}") from None
    library = os.path.join(MUSL, "libturnstile-musl.so")
    mounts = {"/usr/local/bin/turnstile": os.path.join(MUSL, "turnstile-static"),
              "/usr/local/lib/libturnstile-musl.so": library, "/usr/local/lib/libturnstile.so": library, **dict(more)}
    settings = {"PATH": "/usr/local/bin:/usr/bin", "HOME": "/tmp", "TURNSTILE_SOCKET": SOCKET, **dict(env)}
    return ["bwrap", "--ro-bind", root, "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
            *(x for to, source in mounts.items() for x in ("--ro-bind", source, to)),
            "--bind", broker.sockets, "/run/turnstile", "--bind", broker.data, "/data",
            "--clearenv", *(x for k, v in settings.items() for x in ("--setenv", k, v)),
            "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--as-pid-1", "--die-with-parent", *words]


def gated(text):
    return json.loads(text.splitlines()[-1])["mode"] == "gated"


# --- what is built ------------------------------------------------------------------------------------------------

def test_the_library_needs_nothing_but_musl_and_the_program_nothing_at_all():
    """A name that this musl does not have would stop every program that the library is preloaded into."""
    built()
    library, program = os.path.join(MUSL, "libturnstile-musl.so"), os.path.join(MUSL, "turnstile-static")

    def names(file, *options):
        lines = [line.split() for line in run(["nm", "-D", *options, file]).stdout.splitlines()]
        return {words[-1] for words in lines if words and words[-2] not in ("w", "v")}

    missing = names(library, "--undefined-only") - names(LINKER, "--defined-only")
    assert not missing, f"musl has no {missing}"
    exported = names(library, "--defined-only")
    assert {"sqlite3_turnstile_init", "sqlite3_turnstilemusl_init", "sqlite3_open_v2", "open", "fcntl", "open64"} <= exported
    from test_artifact import EXPORTS
    assert exported <= EXPORTS | {"sqlite3_turnstilemusl_init"}, exported - EXPORTS
    dynamic = run(["readelf", "-d", library]).stdout
    assert [line.split("[")[1] for line in dynamic.splitlines() if "NEEDED" in line] == ["libc.so]"], dynamic
    assert "NODELETE" in dynamic
    headers = run(["readelf", "-ld", program]).stdout
    assert "INTERP" not in headers and "NEEDED" not in headers, headers


# --- in a root that knows no other C library ------------------------------------------------------------------------

def test_the_shell_loads_it():
    with HostBroker() as broker:
        broker.database_for_all()
        for name in ("libturnstile", "/usr/local/lib/libturnstile-musl", "/usr/local/lib/libturnstile.so"):
            done = run(inside(broker, ["sqlite3", "/data/app.db"]), input=f".load {name}\n{STATUS};\n")
            assert gated(done.stdout) and not done.stderr, (name, done)


def test_run_reaches_unchanged_programs_also_by_a_script():
    with HostBroker() as broker:
        db = broker.database_for_all()
        done = run(inside(broker, ["turnstile", "run", "--", "sqlite3", "/data/app.db", STATUS]))
        assert gated(done.stdout) and not done.stderr, done
        script = broker.path("script")
        with open(script, "w") as f:
            f.write("#!/usr/bin/lines\n/usr/bin/sqlite3 /data/app.db INSERT/**/INTO/**/rows/**/VALUES('s',1)\n"
                    f"/usr/bin/sqlite3 /data/app.db {STATUS.replace(' ', '/**/')}\n")
        os.chmod(script, 0o755)
        done = run(inside(broker, ["turnstile", "run", "-v", "--", "/tmp/script"], more={"/tmp/script": script}))
        assert gated(done.stdout) and "/usr/lib/libsqlite3.so.0" in done.stderr, done
        assert plain(db, "SELECT * FROM rows", retry=10) == [["s", "1"]]


def test_doctor_says_what_a_program_on_musl_is():
    with HostBroker() as broker:
        broker.database_for_all()
        done = run(inside(broker, ["turnstile", "doctor", "/data/app.db", "--", "sqlite3"]), check=False)
        assert "dynamic, musl" in done.stdout and "`turnstile run` reaches its SQLite" in done.stdout, done
        assert "(/usr/lib/libsqlite3.so.0)" in done.stdout, done
        assert "/usr/local/lib/libturnstile.so, of the same version" in done.stdout, done


def test_sqlite_linked_into_a_program_is_brokered_through_musl():
    """The libc lane. It is dynamic in its C library alone."""
    with HostBroker() as broker:
        db = broker.database_for_all()
        command = inside(broker, ["turnstile", "run", "-v", "--", "worker-linked", "/data/app.db", "w", "50", "/data/acknowledged"])
        with Programs({"w": command}, plain_env()) as programs:
            result, = programs.go().wait()
            said = programs._stderr("w")
        assert result["committed"] == 50 and result["busy"] == 0, result
        assert "app.db is brokered through the C library" in said, said
        assert "opened" in broker.log(), broker.log()
        check_rows(db, broker.record)


def test_threads_with_small_stacks():
    """musl gives a thread 128 KiB, for SQLite and turnstile together; these have less."""
    for program in ("threads", "threads-linked"):
        with HostBroker() as broker:
            db = broker.database_for_all()
            run(inside(broker, ["turnstile", "run", "--", program, "/data/app.db", "8", "20"]))
            assert plain(db, "SELECT count(*), count(DISTINCT worker) FROM rows", retry=10) == [["160", "8"]], program


@waits  # SQLite's hundred tries of a lock on -shm, in the child that has it linked in
def test_a_child_that_is_forked_in_a_transaction_changes_nothing():
    for program in ("forked", "forked-linked"):
        with HostBroker() as broker:
            db = broker.database_for_all()
            done = run(inside(broker, ["turnstile", "run", "--", program, "/data/app.db"]), timeout=100)
            assert done.stdout == "refused read\n", (program, done)
            assert plain(db, "SELECT * FROM rows", retry=10) == [["parent", "1"], ["parent", "2"]], program


# --- with the other C library ---------------------------------------------------------------------------------------

def writers(broker, db, rows):
    """Clients of both C libraries, by name: in the musl root and out here."""
    arguments = ["/data/app.db", None, str(rows), "/data/acknowledged"]

    def musl(name, words, env=()):
        return inside(broker, [*words, *(a or name for a in arguments)], env=env)

    commands = {
        "musl-run": musl("musl-run", ["turnstile", "run", "--", "worker"]),
        "musl-extension": musl("musl-extension", ["worker"], {"TURNSTILE_EXTENSION": "libturnstile"}),
        "musl-linked": musl("musl-linked", ["turnstile", "run", "--", "worker-linked"], {"WORKER_TIMEOUT": "20000"}),
        "glibc-python": [harness.bin(), "run", "--", PYTHON, os.path.join(CLIENTS, "worker.py"), db, "glibc-python",
                         str(rows), broker.record],
    }
    native = os.path.join(CACHE, "bin", "worker-c")
    if os.path.exists(native):
        commands["glibc-c"] = [harness.bin(), "run", "--", native, db, "glibc-c", str(rows), broker.record]
    return commands


def write_together(broker, rows=150):
    db = broker.database_for_all()
    with Programs(writers(broker, db, rows), broker.env, 60) as programs:
        results = programs.go().wait()
    assert all(r["committed"] == rows and r["busy"] == 0 for r in results), results
    assert check_rows(db, broker.record) == rows * len(results)


def test_members_of_both_on_one_database_lose_nothing():
    """One segment, laid out alike by both builds; nobody sees BUSY. The first broker is glibc's, the second the static
    one, and a third takes over from that: what they keep for each other is alike, too."""
    with target():
        with HostBroker() as broker:
            write_together(broker)
    with target("turnstile-static"):
        with HostBroker() as broker:
            write_together(broker)


def test_a_broker_of_one_build_takes_over_from_the_other():
    with contextlib.ExitStack() as stack:
        glibc = stack.enter_context(target())
        static = stack.enter_context(target("turnstile-static"))
        with HostBroker() as broker:  # the static one
            db = broker.database_for_all()
            command = inside(broker, ["sqlite3", *SHELL_OPTIONS, "/data/app.db"])
            with PlainShell(db, command=command) as musl, PlainShell(db, env=broker.env) as other:
                for shell, library in ((musl, "libturnstile"), (other, harness.lib())):
                    shell.run(f".load {library}")
                for place, seq in ((glibc, 1), (static, 2)):
                    other.run("BEGIN IMMEDIATE")
                    old = broker.process
                    os.environ["TURNSTILE_TARGET"] = place
                    broker.kill()
                    broker.start()
                    assert broker.process is not old and len(broker.members(db)) == 2, broker.status()
                    musl.send(f"INSERT INTO rows VALUES('m', {seq})")
                    other.run(f"INSERT INTO rows VALUES('o', {seq})")
                    other.run("COMMIT")
                    musl.answer()
                assert musl.run("SELECT count(*) FROM rows") == [["4"]]
            assert plain(db, "SELECT worker, seq FROM rows ORDER BY 1, 2", retry=10) == [
                ["m", "1"], ["m", "2"], ["o", "1"], ["o", "2"]]


def test_a_writer_that_is_killed_in_its_turn_holds_nobody_up():
    for shell in ("sqlite3", "sqlite3-linked"):
        with HostBroker() as broker:
            db = broker.database_for_all()
            command = inside(broker, ["turnstile", "run", "--", shell, *SHELL_OPTIONS, "/data/app.db"])
            with PlainShell(db, command=command) as musl, PlainShell(db, env=broker.env) as other:
                other.run(f".load {harness.lib()}")
                musl.run("INSERT INTO rows VALUES('m', 1)")
                musl.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('m', 2)")
                holder, = (m["pid"] for m in broker.members(db) if m["pid"] != other.pid)
                other.send("INSERT INTO rows VALUES('o', 1)")
                wait_until(lambda: broker.database(db)["line"], 20, "the other to stand in the line")
                os.kill(holder, signal.SIGKILL)
                other.answer()
                assert other.run("SELECT worker, seq FROM rows") == [["m", "1"], ["o", "1"]], shell
            assert plain(db, "PRAGMA integrity_check", retry=10) == [["ok"]], shell


def test_a_program_on_musl_starts_the_broker():
    """The extension does, in the program's process: by a raw clone(2), of which musl knows nothing."""
    with target("turnstile-static", libraries=["libturnstile-musl.so"], both=False) as build:
        shutil.copy(os.path.join(build, "libturnstile-musl.so"), os.path.join(build, "libturnstile.so"))
        programs = {os.path.basename(path): path for path in (here("worker"), os.path.join(built(), "lib/libsqlite3.so.0"))}
        contents = {name: open(path, "rb").read() for name, path in programs.items()}
        with World() as world:  # in which nothing of the outer /tmp is seen
            env, home = world.user()
            for name, content in contents.items():
                with open(os.path.join(world.dir, name), "wb") as f:
                    f.write(content)
                os.chmod(f.name, 0o755)
            env = {**env, "LD_LIBRARY_PATH": world.dir, "TURNSTILE_EXTENSION": os.path.join(world.dir, "libturnstile.so")}
            db = database(home)
            words = [os.path.join(world.dir, "worker"), db, "w", "20", f"{home}/acknowledged"]
            done = run(words, env=env, user=NOBODY, group=NOBODY, extra_groups=[], input="\n", cwd="/")
            result = json.loads(done.stdout.splitlines()[-1])
            states = [json.loads(text) for text in result["status"]]
            assert result["committed"] == 20 and {s["mode"] for s in states} == {"gated"} and not done.stderr, done
            assert {s["broker_pid"] for s in states} == set(brokers()), (states, brokers())
            check_rows(db, f"{home}/acknowledged")


# --- which library is taken -----------------------------------------------------------------------------------------

def test_a_missing_library_is_named():
    """Not run as a plain program, nor with the other C library's."""
    with target(libraries=["libturnstile.so"], both=False), Broker() as broker:
        db = create(broker.path("app.db"))
        command = [here("sqlite3"), db, "SELECT 'started'"]
        done = run([harness.bin(), "run", "--", *command], env=env_here(broker), check=False)
        assert (done.returncode, done.stdout) == (125, ""), done
        for word in ("runs on musl", "no libturnstile-musl.so", "make musl", "TURNSTILE_LIB"):
            assert word in done.stderr, done.stderr
        named = {**env_here(broker), "TURNSTILE_LIB": harness.lib()}
        done = run([harness.bin(), "run", "--", *command], env=named, check=False)
        assert done.returncode == 125 and "musl" in done.stderr and "glibc" in done.stderr, done
        done = run([harness.bin(), "doctor", db, "--", here("sqlite3")], env=env_here(broker), check=False)
        assert "no libturnstile-musl.so" in done.stdout and done.returncode == 1, done


def test_each_program_gets_its_own_also_as_a_child_of_the_other():
    """One LD_PRELOAD for both dynamic linkers. Without the names for both, the child does not even start."""
    for both in (True, False):
        with target(both=both), Broker() as broker:
            db = create(broker.path("app.db"))
            # Debian's own shell would be given musl's libsqlite3 by LD_LIBRARY_PATH.
            script = os.path.join(broker.dir, "script")
            with open(script, "w") as f:
                f.write(f"#!{here('lines')}\n/usr/bin/env -u LD_LIBRARY_PATH {SHELL} {db} {STATUS.replace(' ', '/**/')}\n")
            os.chmod(script, 0o755)
            for words in ([script], ["/bin/sh", "-c", f'{here("sqlite3")} "$1" "$2"', "sh", db, STATUS]):
                done = run([harness.bin(), "run", "--", *words], env=env_here(broker), check=False)
                if both:
                    assert gated(done.stdout) and not done.stderr, done
                else:
                    assert done.returncode == 127 and not done.stdout, done


def test_what_is_installed_serves_both():
    make = shutil.which("make")
    if not make:
        raise Skip("make is missing")
    built()
    with tempfile.TemporaryDirectory(prefix="ts-") as place, target() as build:
        shutil.copy(os.path.join(MUSL, "turnstile-static"), build)
        root, musl = os.path.join(place, "root"), os.path.join(place, "musl")

        def goal(name, into):
            run([make, "-C", ROOT, name, "BUILD=no", f"TARGET={build}", f"DESTDIR={into}", "SYSTEMD=no"], timeout=60)
        goal("install", root)
        local = os.path.join(root, "usr/local")
        with Broker() as broker:
            db = create(broker.path("app.db"))
            for program in ("turnstile", "turnstile-static"):
                for shell, env in ((SHELL, broker.env), (here("sqlite3"), env_here(broker))):
                    done = run([os.path.join(local, "bin", program), "run", "--", shell, db, STATUS], env=env)
                    assert gated(done.stdout) and not done.stderr, done
        goal("uninstall", root)
        left = [name for _, _, files in os.walk(root) for name in files]
        assert not left and not os.path.exists(os.path.join(local, "lib/libturnstile.both")), left
        # For an image: what it runs is told by `inside`, which mounts the same names.
        bin, lib = os.path.join(musl, "usr/local/bin"), os.path.join(musl, "usr/local/lib")
        run([make, "-C", ROOT, "install-musl", "BUILD=no", f"TARGET={MUSL}", f"DESTDIR={musl}"], timeout=60)
        assert sorted(os.listdir(lib)) == ["libturnstile-musl.so", "libturnstile.so"]
        assert "serve" in run([os.path.join(bin, "turnstile"), "--help"], env={}).stdout
