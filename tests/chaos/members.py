"""Starting, finding and ending the members' processes."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time

import decks
import harness

HERE = os.path.dirname(os.path.abspath(__file__))
CLONE_NEWTIME = 0x80
JUMP = os.path.join(harness.CACHE, "bin", "chaos-jump.so")
LIBC = ctypes.CDLL(None, use_errno=True)


def programs():
    """{kind: command}, and {kind: why there is none}."""
    built = os.path.join(harness.CACHE, "bin", "chaos-c")
    # No build of turnstile is in it: the usual one serves builds with planted faults, too.
    builds = (harness.target(), os.path.join(harness.ROOT, "target", "release"))
    rust = next((p for p in (os.path.join(b, "examples", "chaos") for b in builds) if os.path.exists(p)), "examples/chaos")
    worker, shell = (os.path.join(HERE, name) for name in ("worker.py", "shell.py"))
    there = {"python": [harness.PYTHON, worker], "python-run": [harness.PYTHON, worker]}
    missing = {}
    for kind, path, command, how in (
            ("c", built, [built], "tests/install"),
            ("rust", rust, [rust], "cargo build --release --example chaos"),
            ("shell", harness.SHELL, [harness.PYTHON, shell], "tests/install")):
        if os.path.exists(path):
            there[kind] = command
        else:
            missing[kind] = f"{path} is missing: {how}"
    return there, missing


def in_later_clock(seconds):
    """A preexec_fn: what the process executes has a monotonic clock that is so much ahead (time_namespaces(7))."""
    def enter():
        if LIBC.unshare(CLONE_NEWTIME):
            raise OSError(ctypes.get_errno(), "unshare")
        with open("/proc/self/timens_offsets", "w") as f:
            f.write(f"monotonic {seconds} 0\n")
    return enter


def why_no_time_namespace():
    """None, if a process can be given another monotonic clock here."""
    probe = "import time; print(time.monotonic())"
    try:
        done = subprocess.run([harness.PYTHON, "-c", probe], preexec_fn=in_later_clock(1_000_000), capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as e:
        return f"no time namespace: {e}"
    ahead = float(done.stdout or 0) - time.monotonic()
    return None if ahead > 900_000 else "this kernel does not enter a time namespace at exec"


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return [int(p) for p in f.read().split()]
    except OSError:
        return []


def keepers():
    """Processes that keep databases for the next broker, and checkpointers: a broker's children, also a dead one's."""
    return {pid for pid in descendants(os.getpid()) if name(pid) in ("turnstile-keep", "turnstile-ckpt")}


def name(pid):
    try:
        with open(f"/proc/{pid}/comm") as f:
            return f.read().strip()
    except OSError:
        return None


def descendants(pid):
    for child in children(pid):
        yield child
        yield from descendants(child)


class Process:
    """One member's process, or what starts and feeds it. Each start of a slot is a member of its own."""

    def __init__(self, slot, index, generation, round):
        self.slot, self.worker = slot, (index + 1) * 1000 + generation
        self.log = os.path.join(round.logs, f"{index:02}-{self.worker}")
        self.errors = os.path.join(round.logs, f"errors-{index:02}-{self.worker}")
        self.started = time.monotonic()
        self.killed = self.leaving = False
        self.stopped = None
        deck = os.path.join(round.decks, f"{index:02}")
        if not os.path.exists(deck):
            decks.write(round.placed(slot.deck), deck)
        command = [*round.programs[slot.kind], deck, self.log, str(self.worker), "0", str(generation * 17)]
        env = harness.plain_env()
        before = None
        if slot.how != "plain":
            env.update(round.env, **slot.env)
            if slot.how == "load":
                env["TURNSTILE_EXTENSION"] = harness.lib()
            elif slot.kind == "shell":
                command += ["--", harness.bin(), "run", "--", harness.SHELL]
            else:
                command = [harness.bin(), "run", "--", *command]
        # CHAOS_PRELOAD: what the build under test needs (tests/sanitize).
        preloaded = [os.environ.get("CHAOS_PRELOAD"), JUMP if slot.clock == "jumps" and os.path.exists(JUMP) else None]
        if any(preloaded):
            env["LD_PRELOAD"] = " ".join(filter(None, preloaded))
        if slot.clock and slot.clock != "jumps" and round.time_namespace:
            env["CHAOS_CLOCK_OFFSET"] = str(slot.clock)
            before = in_later_clock(slot.clock)
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=env,
                                            preexec_fn=before)

    def member(self):
        """The process that has the database open; None if it is not there yet, or no more."""
        pid = self.process.pid
        for _ in range({"python-run": 1, "shell": 2}.get(self.slot.kind, 0)):
            below = children(pid)
            if not below:
                return None
            pid = below[0]
        return pid

    def send(self, sig):
        pid = self.member()
        if self.process.poll() is not None or pid is None:
            return None
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            return None
        return pid

    def go_on(self):
        """SIGCONT to the member, and to `turnstile run`, which has stopped itself with it, as a shell would see it."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass

    def kill(self):
        """SIGKILL to the member. What fed it ends by itself."""
        self.killed = True
        if self.send(signal.SIGKILL) is None and self.process.poll() is None:
            # Not that far yet: what starts it.
            for pid in [*descendants(self.process.pid), self.process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def leave(self):
        """Tells it to close and end."""
        self.leaving = True
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def end(self):
        """Gone for good, whatever it takes."""
        if self.process.poll() is None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        self.process.wait(20)
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def said(self):
        with open(self.errors, errors="replace") as f:
            return f.read()

    def progress(self):
        """When it has last finished a work: seconds of the monotonic clock, 0 if never."""
        last = 0.0
        try:
            with open(self.log, "rb") as f:
                begin = max(0, os.fstat(f.fileno()).st_size - 65536)
                f.seek(begin)
                # What lies before the first whole line may look like one: the end of "schema has changed".
                for line in itertools.islice(f, begin > 0, None):
                    words = line.split()
                    if words[:1] and words[0] in (b"a", b"r") and line.endswith(b"\n") and len(words) > 2:
                        last = float(words[1])
        except (OSError, ValueError):
            pass
        return last


def adopt_orphans():
    """Makes this process the parent of all that is left behind (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    LIBC.prctl(36, 1, 0, 0, 0)


def reap_orphans(known):
    """Waits for ended processes that nobody else here waits for."""
    for pid in children(os.getpid()):
        if pid not in known:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


if sys.version_info < (3, 9):
    sys.exit("tests/chaos needs Python 3.9 or later")
