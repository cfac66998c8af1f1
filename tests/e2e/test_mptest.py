"""SQLite's own multi-process test, mptester: five processes that work on one file, and one that crashes with a hot
journal (`crash01` runs `crash02`). First on plain SQLite, where it must pass too, then through the extension.
"""

import os
import re
import shutil

import harness
from harness import Broker, CACHE, Skip, plain_env

PROGRAM = os.path.join(CACHE, "bin", "mptester")
SCRIPTS = os.path.join(CACHE, "sqlite", "mptest")
# Seconds; plain SQLite takes 1 to 8. mptester itself gives up on a silent client after minutes.
LIMIT = 100


def rewrite(path, old, new):
    with open(path) as f:
        text = f.read()
    with open(path, "w") as f:
        f.write(text.replace(old, new))


def mptester(script, journal, path, env, vfs):
    note = os.path.join(CACHE, "missing", "mptester")
    if os.path.exists(note) or not os.path.exists(PROGRAM):
        raise Skip(open(note).read().strip() if os.path.exists(note) else "mptester is missing: run tests/install")
    scripts = shutil.copytree(SCRIPTS, os.path.join(os.path.dirname(path), f"scripts-{vfs}"), dirs_exist_ok=True)
    # One script is for the unix VFS alone, by its name; ours calls itself turnstile/unix.
    rewrite(os.path.join(scripts, "config01.test"), "GLOB 'unix'", "GLOB '*unix'")
    done = harness.run([PROGRAM, path, "--vfs", vfs, "--journalmode", journal, os.path.join(scripts, script)],
                       timeout=LIMIT, check=False, env=env, cwd=os.path.dirname(path))
    output = done.stdout + done.stderr
    summary = re.search(r"Summary: (\d+) errors out of (\d+) tests", output)
    errors = "\n".join(x for x in output.splitlines() if "ERROR" in x or "FATAL" in x or "errcode" in x)
    what = f"{script}, journal_mode={journal}, VFS {vfs}"
    assert summary, f"{what}: no summary, {harness.ending(done.returncode)}\n{errors}\n{harness.tail(output)}"
    assert summary[1] == "0" and not done.returncode, f"{what}: {summary[0]}\n{errors}\n{harness.tail(output)}"
    if script == "crash01.test":
        assert "Task one crashing an incomplete transaction" in output, f"{what}: nothing has crashed\n{output}"
    return int(summary[2])


def passes(script, *journals):
    for journal in journals:
        with Broker() as broker:
            expected = mptester(script, journal, broker.path("plain.db"), plain_env(), "unix")
            env = {**broker.env, "TURNSTILE_EXTENSION": harness.lib()}
            done = mptester(script, journal, broker.path("app.db"), env, "turnstile")
            assert 'mode="gated"' in broker.log() and 'mode="guest"' not in broker.log(), "not in gated mode"
            assert done == expected, f"{script}, {journal}: {done} tests instead of {expected}"
            print(f"{script}, {journal}: {done} tests")


@harness.timeout(5 * LIMIT)
def test_multiwrite01():
    passes("multiwrite01.test", "delete", "wal")


@harness.timeout(5 * LIMIT)
def test_crash01_and_crash02():
    passes("crash01.test", "delete", "wal")


@harness.timeout(5 * LIMIT)
def test_other_page_sizes_and_mmap():
    # Page sizes do not change in WAL mode, so plain SQLite too fails these two there.
    passes("config01.test", "delete")
    passes("config02.test", "delete")
