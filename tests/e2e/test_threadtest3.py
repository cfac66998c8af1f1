"""SQLite's own test with many threads in one process, threadtest3, unchanged under `turnstile run`: WAL and rollback,
checkpoints that starve, shared cache, a schema that changes. Each of its tests judges itself.

`tests/sqlite/threads` runs all of them for as long as SQLite does, and on plain SQLite beside it.
"""

import os
import re

import harness
from harness import CACHE, Broker, Skip, plain_env

PROGRAM = os.path.join(CACHE, "bin", "threadtest3")
# All of its tests take three minutes.
SPEED = 40


def threadtest3(directory, env, speed, tests=(), command=(), limit=100):
    """Runs it; returns {test: seconds} and its output. AssertionError if one of its tests fails."""
    note = os.path.join(CACHE, "missing", "threadtest3")
    if os.path.exists(note) or not os.path.exists(PROGRAM):
        raise Skip(open(note).read().strip() if os.path.exists(note) else "threadtest3 is missing: run tests/install")
    done = harness.run([*command, PROGRAM, *tests], timeout=limit, check=False, cwd=directory,
                       env={**env, "THREADTEST3_SPEED": str(speed)})
    output = done.stdout + done.stderr
    summary = re.search(r"^(\d+) errors out of (\d+) tests", output, re.M)
    assert summary and summary[1] == "0" and not done.returncode, \
        f"threadtest3: {harness.ending(done.returncode)}\n{harness.tail(output)}"
    return int(summary[2]), output


@harness.timeout(150)
def test_threadtest3():
    with Broker() as broker:
        tests, _ = threadtest3(broker.dir, broker.env, SPEED, command=(harness.bin(), "run", "--"))
        assert tests == 15, tests
        assert 'mode="gated"' in broker.log() and 'mode="guest"' not in broker.log(), "not in gated mode"


def on_plain_sqlite(directory, speed, **more):
    return threadtest3(directory, plain_env(), speed, **more)
