"""Containers for end-to-end tests: podman's or, where it cannot run, bubblewrap's, over the same root filesystem.

    with HostBroker() as broker, containers(broker) as engine:
        with Containers(engine, {"writer": engine.writer("writer", 200)}) as c:
            results = c.go().wait()

A container has the two directories that docs/containers.md says it must have, and nothing else of this machine: the
data's at /data, the socket's at /run/turnstile. Its programs and libraries are in its image.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile

import harness
from harness import Broker, Programs, SetupError, Skip, create, run, wait_until

HERE = os.path.dirname(os.path.abspath(__file__))
FILES = os.path.join(harness.CACHE, "containers")
ROOTFS = os.path.join(FILES, "rootfs")
EXTENSION = "/usr/lib/turnstile/libturnstile.so"
SOCKET = "/run/turnstile/broker.sock"
DATABASE, RECORD = "/data/app.db", "/data/acknowledged"

# A podman of the tests' own: its own storage, and nothing that needs systemd or a network. The limits are given because
# a test machine may be a container itself, which may not raise any.
CONTAINERS_CONF = """
[containers]
netns = "none"
log_driver = "none"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
static_dir = "{storage}/libpod"
tmp_dir = "{state}/libpod"
volume_path = "{storage}/volumes"
[network]
network_backend = "netavark"
network_config_dir = "{storage}/networks"
"""
STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{storage}"
runroot = "{state}/run"
"""


def in_image():
    """What is put into the image beside the root filesystem: where from, by where to."""
    scripts = {f"/opt/{name}": os.path.join(HERE, name) for name in ("writer.py", "reader.py", "hog.py")}
    return {EXTENSION: harness.lib(), "/usr/bin/turnstile": harness.bin(), **scripts}


# --- brokers ----------------------------------------------------------------------------------------------------

class HostBroker(Broker):
    """A broker outside of all containers, with the two directories that containers share."""

    def __init__(self, *arguments, data=None, **options):
        super().__init__(*arguments, **options)
        self.given = data

    def start(self, *limit):
        self.prepare()
        super().start(*limit)

    def prepare(self):
        self.data, self.sockets = self.given or self.path("data"), self.path("run")
        for directory, mode in ((self.data, 0o777), (self.sockets, 0o755)):
            os.makedirs(directory, exist_ok=True)
            os.chmod(directory, mode)
        self.socket = os.path.join(self.sockets, "broker.sock")
        self.record = os.path.join(self.data, "acknowledged")

    def database_for_all(self):
        """A database and a record in the data directory that any user may write; the database's path."""
        path = create(os.path.join(self.data, "app.db"))
        open(self.record, "a").close()
        for file in (path, self.record):
            os.chmod(file, 0o666)
        return path


class Sidecar(HostBroker):
    """A broker in a container, which is given the data read-only. `start` after `stop` makes another container."""

    engine = None
    count = 0

    def start(self, *limit):
        self.prepare()
        self.engine = self.engine or engine_for(self)
        self.count += 1
        self.name = f"broker-{self.count}"
        words = ["turnstile", "serve", "--socket", SOCKET, *self.arguments]
        with open(self.logfile, "ab") as log:
            self.process = subprocess.Popen(self.engine.command(self.name, words, data="ro"), stdin=subprocess.PIPE,
                                            stdout=log, stderr=log, env=self.engine.env)
        wait_until(lambda: self.answers() or self.process.poll() is not None, 30, "the broker's container to listen")
        if self.process.poll() is not None:
            raise SetupError(f"the broker's container ended with {self.process.returncode}\n{self.log()}")

    def stop(self, sig=signal.SIGTERM, timeout=20.0):
        process, self.process = self.process, None
        if process is None:
            return None
        if process.poll() is not None:
            raise AssertionError(f"the broker's container ended by itself: {process.returncode}\n{self.log()}")
        self.engine.kill(self.name, process, sig)
        status = process.wait(timeout)
        process.stdin.close()
        self.engine.remove(self.name)
        if status not in (0, 128 + sig):
            raise AssertionError(f"the broker's container ended with {status}\n{self.log()}")
        return status

    def _clean(self):
        if self.engine:
            self.engine.clean()
        super()._clean()


# --- engines ----------------------------------------------------------------------------------------------------

class Engine:
    """What podman and bubblewrap have in common."""

    why = None  # it is not podman

    def __init__(self, broker):
        self.broker = broker
        self.prefix = f"{os.path.basename(broker.dir).replace('_', 'x')}-"

    def environment(self):
        planted = {k: v for k, v in os.environ.items() if k == "TURNSTILE_PLANTED"}
        return {"TURNSTILE_SOCKET": SOCKET, "TURNSTILE_EXTENSION": EXTENSION, "NO_COLOR": "1", **planted}

    def writer(self, name, rows=0, **options):
        return self.command(name, ["python3", "/opt/writer.py", DATABASE, name, str(rows), RECORD], **options)

    def reader(self, name, rows, **options):
        return self.command(name, ["python3", "/opt/reader.py", DATABASE, str(rows)], **options)


class Podman(Engine):
    name = "podman"

    def __init__(self, broker):
        super().__init__(broker)
        where = hashlib.sha256(os.path.abspath(FILES).encode()).hexdigest()[:12]
        places = {"storage": os.path.join(FILES, "storage"), "state": f"/run/turnstile-tests-{where}"}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("TURNSTILE_", "CONTAINER"))}
        for variable, text in (("CONTAINERS_CONF", CONTAINERS_CONF), ("CONTAINERS_STORAGE_CONF", STORAGE_CONF)):
            self.env[variable] = os.path.join(FILES, variable.lower().replace("_conf", ".conf"))
            with open(self.env[variable], "w") as f:
                f.write(text.format(**places))
        self.image = self._image()

    def podman(self, *words, **options):
        return run(["podman", *words], env=self.env, **options)

    def _image(self):
        """The image with the build under test, made unless it is there; those of other builds are removed."""
        stamps = [(to, source, os.stat(source).st_mtime_ns) for to, source in [*in_image().items(), ("/", ROOTFS)]]
        tag = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
        name = "localhost/turnstile-" + ("planted" if harness.target() == harness.planted_target() else "tested")
        image = f"{name}:{tag}"
        with open(os.path.join(FILES, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.podman("image", "exists", image, check=False).returncode == 0:
                return image
            old = self.podman("images", "--quiet", "--filter", f"reference={name}").stdout.split()
            if old:
                self.podman("rmi", "--force", *old, check=False)
            with tempfile.NamedTemporaryFile(suffix=".tar", dir=FILES) as tar:
                run(["tar", "-C", ROOTFS, *(f"--exclude=.{to}" for to in in_image()), "-cf", tar.name, "."])
                for to, source in in_image().items():
                    directory, file = os.path.split(source)
                    run(["tar", "-C", directory, "-rf", tar.name, "--owner=0", "--group=0", "--mode=755",
                         f"--transform=s|^{file}$|.{to}|", file])
                self.podman("import", "--quiet", tar.name, image, timeout=120)
            try:
                self.podman("run", "--rm", "--pull=never", image, "true")
            except AssertionError:
                self.podman("rmi", "--force", image, check=False)  # so that this is tried again
                raise
        return image

    def command(self, name, words, data="rw", user=None, subuids=None, memory=None, pid_of=None, sockets=True):
        """How a container is started. `user`: its uid. `subuids`: where the uids of its user namespace begin out here.
        `pid_of`: the container whose pid namespace it shares. `sockets`: whether it gets the socket's directory."""
        options = [x for k, v in self.environment().items() for x in ("--env", f"{k}={v}")]
        for option, value in (("--user", user and f"{user}:{user}"), ("--uidmap", subuids and f"0:{subuids}:65536"),
                              ("--gidmap", subuids and f"0:{subuids}:65536"), ("--memory", memory),
                              ("--pid", pid_of and f"container:{self.prefix}{pid_of}")):
            options += [option, value] if value else []
        options += ["--volume", f"{self.broker.sockets}:/run/turnstile"] if sockets else []
        return ["podman", "run", "--interactive", "--name", self.prefix + name, "--pull=never", *options,
                "--volume", f"{self.broker.data}:/data:{data}", self.image, *words]

    def kill(self, name, process, sig=signal.SIGKILL):
        self.podman("kill", "--signal", str(int(sig)), self.prefix + name)

    def remove(self, *names):
        self.podman("rm", "--force", "--time", "0", *(self.prefix + n for n in names), check=False)

    def clean(self):
        mine = self.podman("ps", "--all", "--quiet", "--filter", f"name=^{self.prefix}").stdout.split()
        if mine:
            self.podman("rm", "--force", "--time", "0", *mine)


class Bubblewrap(Engine):
    """Namespaces without a container runtime: pids, mounts, network and, for other users, users."""

    name = "bubblewrap"
    env = None
    why = "TURNSTILE_CONTAINERS asks for them"

    def __init__(self, broker):
        super().__init__(broker)
        run(["bwrap", "--ro-bind", ROOTFS, "/", "--proc", "/proc", "--unshare-pid", "true"])

    def command(self, name, words, data="rw", user=None, subuids=None, memory=None, pid_of=None, sockets=True):
        for what, asked in (("a range of uids", subuids), ("a limit of memory", memory), ("a pid namespace", pid_of)):
            if asked:
                raise Skip(f"containers are bubblewrap's here and cannot be given {what}; {self.why}")
        options = ["--clearenv", "--setenv", "PATH", "/usr/bin"]
        for variable, value in self.environment().items():
            options += ["--setenv", variable, value]
        for to, source in in_image().items():
            options += ["--ro-bind", source, to]
        options += ["--bind", self.broker.sockets, "/run/turnstile"] if sockets else []
        change = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return [*change, "bwrap", "--ro-bind", ROOTFS, "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
                *options, "--ro-bind" if data == "ro" else "--bind", self.broker.data, "/data",
                "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--as-pid-1", "--die-with-parent",
                *words]

    def kill(self, name, process, sig=signal.SIGKILL):
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
            for pid in children.read().split():
                os.kill(int(pid), sig)

    def remove(self, *names):
        pass

    def clean(self):
        pass


def engine_for(broker):
    """Podman where it runs, else bubblewrap, else the test is skipped. TURNSTILE_CONTAINERS names the one to use."""
    if os.geteuid() != 0:
        raise Skip("containers need root")
    if not os.path.exists(os.path.join(ROOTFS, "usr/bin/python3")):
        raise Skip(f"{ROOTFS} is missing: run tests/install")
    os.chdir(broker.dir)  # where conmon leaves a file about a container that was killed for its memory
    wanted, why = os.environ.get("TURNSTILE_CONTAINERS"), []
    for kind in (Podman, Bubblewrap):
        if wanted in (None, kind.name):
            try:
                engine = kind(broker)
            except (AssertionError, OSError) as e:
                why.append(f"{kind.name} does not run: {harness.tail(str(e), 1)}")
                print(f"{kind.name} does not run: {e}", file=sys.stderr)
                continue
            print(f"containers: {kind.name}", file=sys.stderr)
            engine.why = "; ".join(why) or engine.why
            return engine
    raise Skip("; ".join(why))


@contextlib.contextmanager
def containers(broker):
    """The engine for this broker's clients. Nothing is left of their containers in the end."""
    if isinstance(broker, Sidecar):
        yield broker.engine  # which cleans up after the broker's own container, too
        return
    engine = engine_for(broker)
    try:
        yield engine
    finally:
        engine.clean()


class Containers(Programs):
    """Programs in containers. Those that were told no number of rows go on until `end`."""

    def __init__(self, engine, commands, seconds=0.0):
        self.engine = engine
        super().__init__(commands, engine.env, seconds)

    def __exit__(self, *error):
        super().__exit__(*error)
        self.engine.remove(*self.processes)

    def end(self, timeout=60.0):
        """Tells all that were not killed to end, and returns their results."""
        for i, process in self.processes.items():
            if i not in self.killed:
                self._say(i, process)
        return self.wait(timeout)

    def kill(self, i):
        self.killed.add(i)
        self.engine.kill(i, self.processes[i])
        self.processes[i].wait(20)
