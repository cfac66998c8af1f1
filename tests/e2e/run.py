"""Runs the end-to-end tests: one at a time, each in a process of its own with a hard limit. Those that mostly wait
(`harness.waits`, or all of a file: `WAITS`) are run beside the others, by another process of this program.

Collects the functions `test_*` (and methods of `unittest.TestCase`s) of `tests/e2e/test_*.py`, prints a line per
test, the output of those that fail, and what was skipped and why. `--summary FILE` writes the counts as JSON.
"""

import argparse
import ctypes
import faulthandler
import fnmatch
import glob
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest

import harness

SKIPPED = 77
LIMIT = 120
OUTPUT_LINES = 150


def tests_of(path):
    """(name, function or (class, method)) of a test file, in the order of the source."""
    module = harness.load_module(path)
    found = []
    for name, value in vars(module).items():
        if inspect.isfunction(value) and name.startswith("test_") and value.__module__ == module.__name__:
            value.waits = getattr(value, "waits", False) or getattr(module, "WAITS", False)
            found.append((name, value))
        elif inspect.isclass(value) and issubclass(value, unittest.TestCase) and value.__module__ == module.__name__:
            for method in unittest.TestLoader().getTestCaseNames(value):
                found.append((f"{name}.{method}", getattr(value, method)))
    return found


def limit_of(function):
    """A test that is also run without its rule may take its limit once more for each of those runs."""
    runs = 1 + (getattr(function, "planted_attempts", 1) if hasattr(function, "rule") else 0)
    return getattr(function, "limit", LIMIT) * runs


def run_one(path, name):
    """Inside the test's own process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    try:
        module = harness.load_module(path)
        if "." in name:
            kind, method = name.split(".")
            result = unittest.TestResult()
            getattr(module, kind)(method).run(result)
            for _, text in result.failures + result.errors:
                print(text, file=sys.stderr)
            if result.skipped:
                raise unittest.SkipTest(result.skipped[0][1])
            return 0 if result.wasSuccessful() else 1
        getattr(module, name)()
        return 0
    except unittest.SkipTest as e:
        print(f"\nskipped: {e}", file=sys.stderr)
        return SKIPPED
    except BaseException:
        traceback.print_exc()
        return 1


def adopt_orphans():
    """Makes this process the parent of what its tests leave behind, so that it can end that (Linux, prctl(2))."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def end_orphans(beside):
    """Ends everything that the last test has left, level by level, and returns how many processes that were.

    `beside`: the process of this program that runs other tests.
    """
    ended = 0
    for _ in range(50):
        with open(f"/proc/self/task/{os.getpid()}/children") as f:
            children = [int(p) for p in f.read().split() if int(p) != beside]
        if not children:
            break
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended += 1
            except (ProcessLookupError, ChildProcessError):
                pass
    return ended


def run_child(path, name, limit, beside):
    """Runs one test and returns (exit status or None for a timeout, its output)."""
    with tempfile.TemporaryFile() as output:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen([harness.PYTHON, os.path.abspath(__file__), "--one", path, name], env=env,
                                 stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGUSR1)  # faulthandler shows where it hangs
            try:
                child.wait(2)
            except subprocess.TimeoutExpired:
                pass
            status = None
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait(20)
        end_orphans(beside)
        output.seek(0)
        return status, output.read().decode(errors="replace")


class Waiting:
    """The tests that mostly wait, in a process of their own."""

    def __init__(self, options):
        self.summary = tempfile.NamedTemporaryFile(prefix="summary-")
        self.output = tempfile.TemporaryFile()
        command = [sys.executable, os.path.abspath(__file__), "--waiting", "only", "--summary", self.summary.name]
        if options.only:
            command += ["--only", options.only]
        if options.quick:
            command.append("--quick")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
                                        start_new_session=True)
        self.pid = self.process.pid

    def add_to(self, counts):
        self.process.wait()
        self.output.seek(0)
        print(self.output.read().decode(errors="replace"), end="", flush=True)
        try:
            with open(self.summary.name) as f:
                for key, value in json.load(f).items():
                    counts[key] += value
        except ValueError:
            counts["failed"] += 1
            counts["failures"].append(f"the tests that wait ended with {self.process.returncode}")


def run_and_count(path, name, function, full, options, counts, waiting):
    if options.quick and getattr(function, "slow", False):
        counts["skipped"].append([full, "slow (--quick)"])
        return
    limit = limit_of(function)
    started = time.monotonic()
    status, output = run_child(path, name, limit, waiting.pid if waiting else None)
    took = f"{time.monotonic() - started:6.1f} s  {full}"
    if status == 0:
        counts["passed"] += 1
        print(f"ok       {took}", flush=True)
    elif status == SKIPPED:
        reason = output.rpartition("\nskipped: ")[2].strip() or "no reason given"
        counts["skipped"].append([full, reason])
        print(f"skipped  {took}: {reason}", flush=True)
    else:
        counts["failed"] += 1
        counts["failures"].append(full)
        why = (f"no end within {limit} s" if status is None
               else harness.ending(status) if status != 1 else "failed")
        print(f"FAILED   {took}: {why}\n{harness.tail(output, OUTPUT_LINES)}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", help="only tests whose `file.name` contains or matches PATTERN")
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--summary", metavar="FILE", help="write the counts to FILE, as JSON")
    parser.add_argument("--waiting", choices=["beside", "only"], default="beside", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.exit(run_one(*options.one))

    if not options.list and not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        print("no planted build: that tests fail without the rule they test is not checked", flush=True)
    adopt_orphans()
    waiting = Waiting(options) if options.waiting == "beside" and not options.list else None
    counts = {"passed": 0, "failed": 0, "skipped": [], "failures": []}
    for path in sorted(glob.glob(os.path.join(harness.HERE, "test_*.py"))):
        label = os.path.basename(path)[:-3]
        try:
            tests = tests_of(path)
        except BaseException:
            if options.waiting != "only":
                counts["failed"] += 1
                counts["failures"].append(label)
                print(f"FAILED   {label} cannot be imported\n{traceback.format_exc()}", flush=True)
            continue
        for name, function in tests:
            full = f"{label}.{name}"
            if options.only and options.only not in full and not fnmatch.fnmatch(full, options.only):
                continue
            if options.list:
                print(full)
            elif getattr(function, "waits", False) == (options.waiting == "only"):
                run_and_count(path, name, function, full, options, counts, waiting)
    if waiting:
        waiting.add_to(counts)
    failures = counts["failures"]
    if failures:
        print("failed:\n" + "\n".join(f"  {f}" for f in failures), flush=True)
    if options.summary:
        with open(options.summary, "w") as f:
            json.dump(counts, f)
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    sys.path.insert(0, harness.HERE)
    main()
