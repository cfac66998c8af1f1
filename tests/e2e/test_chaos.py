"""The chaos harness (docs/reliability.md) notices what it is there for: with a rule taken away a short run ends in a
violation, with all rules it does not. `tests/run` runs it for longer, with everything that can happen."""

import concurrent.futures
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile

import harness
from harness import Skip, timeout

RUN = os.path.join(harness.ROOT, "tests", "chaos", "run")
QUIET = "stop,leave,empty,checkpointer,descriptors,exec,exhaust,clock,plain"

# The rule, what must be said without it, and what happens: members on what, doing what, with what else left out.
FAULTS = (
    ("fork-unguarded", "malformed|lost|integrity_check|half a transaction|gets? nothing done|seen|counter",
     ("--databases", "wal,del", "--works", "fork,auto", "--without", QUIET + ",kill", "--members", "6")),
    ("no-turn-ahead", "BUSY after",
     ("--databases", "wal", "--works", "auto,immediate,bulk", "--without", QUIET + ",kill", "--members", "6")),
    ("turn-ends-at-restart", "BUSY after",
     ("--databases", "wal", "--works", "auto,immediate,bulk,checkpoint", "--without", QUIET + ",kill", "--members", "8")),
    ("guest-maps-shared", "malformed|lost|integrity_check|half a transaction|seen|counter",
     ("--databases", "wal", "--works", "fork,bulk,auto", "--without", QUIET + ",kill", "--members", "6", "--guests")),
)
ATTEMPTS = 4


def chaos(*arguments, rule=None, seed=1):
    """A short run, as (exit status, output). Faults are looked for in the planted build."""
    env = dict(os.environ)
    if rule:
        env.update(TURNSTILE_TARGET=harness.planted_target(), TURNSTILE_PLANTED=rule)
    command = [RUN, "--round", "0", "--round-seconds", "1.2", "--wait", "0.4", "--patience", "2.5", "--broker", "none",
               "--seed", str(seed), *arguments]
    run = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)
    try:
        output, _ = run.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=30)
        raise AssertionError(f"the harness itself hangs\n{output}") from None
    return run.returncode, output


def clean(output):
    """Removes the directories that a run has kept."""
    for path in re.findall(r"^kept: (\S+)$", output, re.M):
        subprocess.run(["rm", "-rf", "--", path], check=True, timeout=60)


def noticed(fault):
    rule, message, arguments = fault
    for seed in range(1, ATTEMPTS + 1):
        status, output = chaos(*arguments, rule=rule, seed=seed)
        clean(output)
        if status == 1 and "VIOLATION" in output:
            assert re.search(message, output), f"without {rule}: not {message!r}:\n{harness.tail(output)}"
            return
        assert status == 0, f"without {rule} the harness broke down:\n{harness.tail(output)}"
    raise AssertionError(f"does not notice in {ATTEMPTS} runs that rule {rule} is missing:\n{harness.tail(output)}")


@timeout(180)
def test_what_it_notices_and_what_not():
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        waiting = [both.submit(noticed, fault) for fault in FAULTS]
        status, output = chaos("--databases", "wal,del", "--members", "8")
        assert status == 0, output
        for each in waiting:
            each.result()


def test_what_is_left_out_plain_sqlite_loses_too():
    """ROLLBACK TO a savepoint after frames of the transaction have been written and written again: the WAL that is left
    cannot be recovered. No turnstile here."""
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<200) INSERT INTO bulk SELECT i, " \
           "printf('%.900c', 'x') FROM n"
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        path, copy = os.path.join(place, "app.db"), os.path.join(place, "copy.db")
        db = sqlite3.connect(path, isolation_level=None)
        db.executescript("PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=5; CREATE TABLE rows(n);"
                         "CREATE TABLE bulk(k, text)")
        for sql in ("BEGIN", "INSERT INTO rows VALUES(1)", "SAVEPOINT a", many, "UPDATE bulk SET text=k", "ROLLBACK TO a",
                    "RELEASE a", "COMMIT", "INSERT INTO rows VALUES(2)"):
            db.execute(sql)
        assert db.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        for suffix in ("", "-wal"):  # as a power cut or the death of all would leave them
            shutil.copy(path + suffix, copy + suffix)
        after = sqlite3.connect(copy).execute("SELECT count(*) FROM rows").fetchone()
        db.close()
    if after == (2,):
        raise Skip(f"SQLite {sqlite3.sqlite_version} loses nothing")
    assert sqlite3.sqlite_version_info < (3, 50, 2), "an SQLite that was known to be right"


def test_a_checkpoint_right_after_a_change_to_wal_is_refused_by_plain_sqlite_too():
    """The excuse for SQLITE_LOCKED in tests/chaos/limits.py. No turnstile here."""
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        db = sqlite3.connect(os.path.join(place, "app.db"), isolation_level=None)
        db.executescript("CREATE TABLE rows(n); CREATE TEMP TABLE mine(n)")
        db.execute("PRAGMA journal_mode=wal").fetchall()
        try:
            db.execute("PRAGMA wal_checkpoint").fetchall()
        except sqlite3.OperationalError as e:
            assert str(e) == "database table is locked", e
        else:
            raise Skip(f"SQLite {sqlite3.sqlite_version} does not refuse it")
        finally:
            db.close()
