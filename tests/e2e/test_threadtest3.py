"""SQLite's own test with many threads in one process, threadtest3, unchanged under `turnstile run`: WAL and rollback, shared
cache, a schema that changes. Each of its tests judges itself.

`tests/sqlite/threads` runs all of them for as long as SQLite does, and on plain SQLite beside it.
"""

import os
import re

import harness
from harness import CACHE, Broker, Skip

PROGRAM = os.path.join(CACHE, "bin", "threadtest3")
# All of its tests take three minutes.
SPEED = 40


def threadtest3(directory, env, speed, tests=(), command=(), limit=100):
    """Runs it; returns how many of its tests there were, and its output. AssertionError if one of them fails."""
    note = os.path.join(CACHE, "missing", "threadtest3")
    if os.path.exists(note) or not os.path.exists(PROGRAM):
        raise Skip(open(note).read().strip() if os.path.exists(note) else "threadtest3 is missing: run tests/install")
    done = harness.run([*command, PROGRAM, *tests], timeout=limit, check=False, cwd=directory,
                       env={**env, "THREADTEST3_SPEED": str(speed)})
    output = done.stdout + done.stderr
    errors, test = [], None
    for line in output.splitlines():
        test = line.split()[1] if line.startswith("Running ") else test
        if line.startswith("Error: "):
            errors.append(f"{test}: {line}")
    summary = re.search(r"^(\d+) errors out of (\d+) tests", output, re.M)
    assert summary and summary[1] == "0" and not errors, \
        f"threadtest3: {harness.ending(done.returncode)}, {errors}\n{harness.tail(output)}"
    return int(summary[2]), output


@harness.timeout(150)
def test_threadtest3():
    # Left out: checkpoint_starvation_*, which count frames of a WAL that somebody else checkpoints here.
    tests = ["walthread[^2]*", "cgt_pager_1", "dynamic_triggers", "create_drop_index_1", "lookaside1", "vacuum1", "stress1"]
    # By itself: it looks for files, and a database of that name before it may leave its WAL, ended (`--reuse-wal`).
    for these, expected in (tests, 10), (["walthread2"], 1):
        with Broker() as broker:
            count, _ = threadtest3(broker.dir, broker.env, SPEED, these, (harness.bin(), "run", "--"))
            assert count == expected, count
            assert 'mode="gated"' in broker.log() and 'mode="guest"' not in broker.log(), "not in gated mode"


@harness.fails_without("pdb-asks-the-note", attempts=3)
@harness.timeout(150)
def test_threads_share_a_cache():
    """Connections are opened on a b-tree while other threads are in calls of its file."""
    with Broker() as broker:
        count, _ = threadtest3(broker.dir, broker.env, SPEED, ["stress2", "shared1"], (harness.bin(), "run", "--"))
        assert count == 2, count


@harness.fails_without("newcomers-beside-last-close", attempts=3, message="database is locked")
@harness.timeout(150)
def test_a_cache_is_opened_while_the_last_one_is_closed():
    """Whoever then asks for the file for itself (`PRAGMA journal_mode=delete`) is alone, as on plain SQLite."""
    with Broker() as broker:
        threadtest3(broker.dir, broker.env, SPEED, ["stress2"], (harness.bin(), "run", "--"))
