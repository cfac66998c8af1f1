"""`packaging/Dockerfile`, `Dockerfile.musl`, and `packaging/compose.yaml` with its example of an application, as people would use them; but made
of images of this machine's files, without a network.
"""

import contextlib
import os
import shutil
import sys
import tempfile

import harness
from harness import ROOT, Broker, Skip, connect, create, plain, run, slow, timeout, wait_until, waits

sys.path.insert(0, os.path.join(ROOT, "tests", "containers"))
from engine import FILES, ROOTFS, Podman, containers  # noqa: E402

WAITS = True

PACKAGING = os.path.join(ROOT, "packaging")
# What the Dockerfile runs beside what the tests' containers have.
TOOLS = ("make", "install", "sed", "strip", "rm", "mv", "mkdir", "ldconfig", "ln", "uname", "tr")
# Those that a test machine which is a container itself may not do without.
LIMITS = ("--isolation=chroot", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
NAMES = ("turnstile", "turnstile-example", "turnstile-musl", "turnstile-base")


def base(engine, place):
    """An image of this machine's files in the place of Debian's and Rust's."""
    root = os.path.join(place, "base")
    shutil.copytree(ROOTFS, root, symlinks=True)
    for name in ("usr/bin/turnstile", "usr/lib/turnstile"):
        path = os.path.join(root, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.unlink(path)
    for tool in TOOLS:
        program = shutil.which(tool, path="/usr/bin:/bin:/usr/sbin:/sbin") or ""
        if not program:
            raise Skip(f"{tool} is missing")
        listed = run(["ldd", program], check=False).stdout.split()
        for file in [program, *(word for word in listed if word.startswith("/"))]:
            os.makedirs(os.path.join(root, os.path.dirname(file)[1:]), exist_ok=True)
            shutil.copy(os.path.realpath(file), os.path.join(root, file[1:]))
    archive = os.path.join(place, "base.tar")
    run(["tar", "-C", root, "-cf", archive, "."])
    engine.podman("import", "--quiet", archive, "turnstile-base", timeout=60)


def context(place, build):
    """The checkout, with the build under test in it: where from, by where to in `target`."""
    there = os.path.join(place, "context")
    os.mkdir(there)
    for name in ("Makefile", "README.md", "LICENSE-MIT", "LICENSE-APACHE"):
        shutil.copy(os.path.join(ROOT, name), there)
    for name in ("docs", "packaging"):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(there, name))
    for to, source in build.items():
        os.makedirs(os.path.dirname(os.path.join(there, "target", to)), exist_ok=True)
        shutil.copy(source, os.path.join(there, "target", to))
    return there


@contextlib.contextmanager
def podman(broker):
    """A place for what images are made of, and podman, in which there is one of this machine's files. `broker` is only
    what the engine is given: its own end."""
    broker.stop()
    broker.sockets = broker.data = broker.dir
    within = FILES if os.path.isdir(FILES) else None
    with tempfile.TemporaryDirectory(prefix="ts-", dir=within) as place, containers(broker) as engine:
        if not isinstance(engine, Podman):
            raise Skip("podman is missing")
        base(engine, place)
        try:
            yield engine, place
        finally:
            engine.podman("rmi", "--force", *NAMES, check=False)


@waits
@slow
@timeout(180)
def test_the_image_and_the_compose_file():
    if not shutil.which("podman-compose"):
        raise Skip("podman-compose is missing")
    with Broker() as broker, podman(broker) as (engine, place):
        there = context(place, {"release/turnstile": harness.bin(), "release/libturnstile.so": harness.lib()})
        engine.podman("build", *LIMITS, "-t", "turnstile", "-f", os.path.join(there, "packaging/Dockerfile"),
                      "--build-arg", "BUILDER=turnstile-base", "--build-arg", "BASE=turnstile-base",
                      "--build-arg", "MAKE_ARGS=BUILD=no", there, timeout=100)
        engine.podman("build", *LIMITS, "-t", "turnstile-example", "--build-arg", "BASE=turnstile-base",
                      os.path.join(PACKAGING, "example"), timeout=60)
        project = f"{engine.prefix}image"
        compose = ["podman-compose", "--podman-path", os.path.join(ROOT, "tests/containers/podman"), "--project-name",
                   project, "--file", os.path.join(PACKAGING, "compose.yaml")]
        try:
            # podman-compose does not wait for a healthy broker, as Docker's does.
            run([*compose, "up", "--detach", "broker"], env=engine.env)
            health = ("podman", "healthcheck", "run", f"{project}_broker_1")
            wait_until(lambda: not run(health, env=engine.env, check=False).returncode, 30, "a healthy broker")
            run([*compose, "up", "--detach"], env=engine.env, timeout=60)
            for service in ("writer-1", "writer-2", "reader"):
                status = engine.podman("wait", f"{project}_{service}_1", timeout=90).stdout.strip()
                assert status == "0", f"{service} ended with {status}"
            mounted = engine.podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{project}_data").stdout
            db = os.path.join(mounted.strip(), "app.db")
            counts = plain(db, "SELECT count(*) FROM visits GROUP BY host", retry=10)
            assert counts == [["1000"], ["1000"]], counts
        finally:
            run([*compose, "down", "--volumes"], env=engine.env, timeout=60, check=False)


@waits
@slow
@timeout(120)
def test_the_image_for_musl():
    """A broker with nothing else in its image serves members of both C libraries."""
    import test_musl
    test_musl.built()
    with Broker() as broker, podman(broker) as (engine, place):
        there = context(place, {f"release/{name}": os.path.join(test_musl.MUSL, name)
                                for name in ("turnstile-static", "libturnstile-musl.so")})
        engine.podman("build", *LIMITS, "-t", "turnstile-musl", "-f", os.path.join(there, "packaging/Dockerfile.musl"),
                      "--build-arg", "BUILDER=turnstile-base", "--build-arg", "PREPARE=no",
                      "--build-arg", "MAKE_ARGS=BUILD=no", there, timeout=60)
        broker.sockets, broker.data = (broker.path(name) for name in ("run", "data"))
        for directory in (broker.sockets, broker.data):
            os.mkdir(directory)
        broker.socket = os.path.join(broker.sockets, "broker.sock")
        db = create(os.path.join(broker.data, "app.db"))
        engine.podman("run", "--detach", "--name", f"{engine.prefix}musl", "--volume", f"{broker.sockets}:/run/turnstile",
                      "--volume", f"{broker.data}:/data:ro", "turnstile-musl")
        wait_until(broker.answers, 20, "the broker in the image")
        with contextlib.closing(connect(db, broker=broker, mode="gated")) as glibc:
            glibc.execute("INSERT INTO rows VALUES('glibc', 1)")
            musl = ["turnstile", "run", "--", "sqlite3", "/data/app.db", "INSERT INTO rows VALUES('musl', 1) RETURNING 2"]
            assert run(test_musl.inside(broker, musl)).stdout == "2\n"
            assert len(broker.members(db)) == 1
        assert plain(db, "SELECT worker FROM rows ORDER BY 1", retry=10) == [["glibc"], ["musl"]]
