"""SQLite's test program, testfixture, on one test file: on plain SQLite, or with turnstile as its default VFS."""

import dataclasses
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time

import harness

PROGRAM = os.path.join(harness.CACHE, "bin", "testfixture")
SOURCE = os.path.join(harness.CACHE, "sqlite")
PLAIN = os.path.join(harness.CACHE, "testfixture-plain")

# What the tests ask, of connections that nobody else drives, is BUSY: a wait that can only be in vain is cut short.
# `learn` waits longer than a turn may be held by a transaction that only reads, one second.
SETTINGS = {
    "gated": {"TURNSTILE_WAIT": "50ms", "TURNSTILE_BEGIN": "deferred"},
    "guest": {"TURNSTILE_WAIT": "50ms", "TURNSTILE_BEGIN": "deferred", "TURNSTILE_MODE": "guest"},
    "learn": {"TURNSTILE_WAIT": "1500ms"},
}


def missing():
    """Why the tests cannot be run, or None."""
    note = os.path.join(harness.CACHE, "missing", "testfixture")
    if os.path.exists(note):
        with open(note) as f:
            return f.read().strip()
    if not os.path.exists(PROGRAM):
        return "testfixture is missing: run tests/install"
    if not os.path.exists(harness.lib()):
        return f"{harness.lib()} is missing: run cargo build --release"
    return None


def names():
    """SQLite's test files, without those that only run others."""
    runners = {"all", "quick", "veryquick", "full", "extraquick", "permutations", "soak", "memleak", "mallocAll", "fts3",
               "session", "rbu", "async"}
    found = (f.removesuffix(".test") for f in os.listdir(os.path.join(SOURCE, "test")) if f.endswith(".test"))
    return sorted(name for name in found if name not in runners)


@dataclasses.dataclass
class Result:
    cases: int
    """Names of the cases that failed; `at the end`: files left open, memory not freed."""
    failed: list
    """The names of the cases, without the last number: fault injection numbers its steps, and how many there are
    depends on what is beneath SQLite."""
    stems: list
    """How the file ended before its end, or None."""
    stopped: str | None
    took: float
    log: str = ""


CASE = re.compile(r"^(\S+)\.\.\.(?: Ok| Omitted|$)")
SUMMARY = re.compile(r"^(\d+) errors out of (\d+) tests", re.M)
FAILED = re.compile(r"^!Failures on these tests:(.*)$", re.M)


def parse(output, status, took):
    summary = SUMMARY.search(output)
    found = [m[1] for m in map(CASE.match, output.splitlines()) if m]
    stems = sorted({re.sub(r"\d+$", "", name) for name in found})
    if not summary:
        how = "no end in time" if status is None else harness.ending(status)
        return Result(len(found), [], stems, f"{how} after {found[-1] if found else 'nothing'}", took, output)
    names = FAILED.search(output)
    failed = names[1].split() if names else []
    if status != 0 and not failed:
        failed = ["at-the-end"]
    return Result(int(summary[2]), sorted(set(failed)), stems, None, took, output if failed else "")


class Testfixture:
    """Runs files below `place`, each in a directory of its own, as somebody who is not root."""

    def __init__(self, place, broker, limit, again):
        self.place, self.broker, self.limit, self.again = place, broker, limit, again
        os.chmod(place, 0o755)
        self.program = shutil.copy(PROGRAM, place)
        self.extension = shutil.copy(harness.lib(), place)
        self.user = {}
        if os.getuid() == 0:
            user = pwd.getpwnam("nobody")
            self.user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.tests = os.path.join(SOURCE, "test")
        if subprocess.run(["test", "-r", os.path.join(self.tests, "tester.tcl")], **self.user).returncode:
            # The checkout is where only its owner gets.
            self.tests = shutil.copytree(self.tests, os.path.join(place, "sqlite", "test"))
            subprocess.run(["chmod", "-R", "a+rX", os.path.join(place, "sqlite")], check=True)

    def plain(self, name):
        """On plain SQLite. Cached: it is always the same, as long as the program is."""
        s = os.stat(PROGRAM)
        cached = os.path.join(PLAIN, f"{name}.json")
        key = [s.st_size, s.st_mtime_ns]
        if not self.again and os.path.exists(cached):
            with open(cached) as f:
                content = json.load(f)
            if content["program"] == key:
                return Result(**content["result"])
        result = self.run(name, "plain")
        if not result.stopped and not result.failed:
            os.makedirs(PLAIN, exist_ok=True)
            with open(cached, "w") as f:
                json.dump({"program": key, "result": dataclasses.asdict(result)}, f)
        return result

    def run(self, name, mode):
        directory = os.path.join(self.place, f"{name}-{mode}")
        os.mkdir(directory)
        if self.user:
            os.chown(directory, self.user["user"], self.user["group"])
        env = {k: v for k, v in harness.plain_env().items() if not k.startswith("TURNSTILE_")} | {"HOME": directory}
        if mode != "plain":
            env |= {"TURNSTILE_SOCKET": self.broker.socket, "TURNSTILE_EXTENSION": self.extension, **SETTINGS[mode]}
        begun = time.monotonic()
        with open(os.path.join(directory, "output"), "wb+") as output:
            child = subprocess.Popen([self.program, os.path.join(self.tests, f"{name}.test")],
                                     cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                     start_new_session=True, **self.user)
            try:
                status = child.wait(self.limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)  # what the file has started, too
                except ProcessLookupError:
                    pass
                child.wait(20)
            output.seek(0)
            text = output.read().decode(errors="replace")
        result = parse(text, status, time.monotonic() - begun)
        print(f"{result.took:7.1f} s  {name} {mode}: {result.cases} cases"
              + (f", {len(result.failed)} failed" if result.failed else "")
              + (f", stopped: {result.stopped}" if result.stopped else ""), flush=True)
        return result
