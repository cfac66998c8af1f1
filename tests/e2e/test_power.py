"""What a power loss leaves (docs/power-loss.md), that the check of it notices a missing sync, and what failing disks do.

`tests/run` checks all workloads with many more images; here is what fails without the rule that it is there for.
"""

import errno
import os
import shutil
import sqlite3
import sys
import tempfile

import harness
from harness import Broker, Workers, check_rows, fails_without

sys.path.insert(0, os.path.join(harness.ROOT, "tests", "power"))
import recording  # noqa: E402
import workloads  # noqa: E402


def checked(workload, images=600):
    with tempfile.TemporaryDirectory(prefix="power-", dir=recording.PLACE) as place:
        directories = [d for d, _ in workloads.record_all(place, [workload], seed=1, commits=80)]
        done = workloads.check(directories, images, seed=1, violations=100, capture_output=True)
        print(done.stdout)
        return done


def survives(name):
    [workload] = [w for w in workloads.WORKLOADS if w.name == name]
    done = checked(workload)
    assert not done.returncode, done.stdout + done.stderr


def test_the_check_notices_plain_sqlite_without_syncs():
    done = checked(workloads.Workload("off", False, "wal", "off", 1, 0, durable=True))
    assert done.returncode == 1 and "was acknowledged or seen, but" in done.stdout, done.stdout + done.stderr


def test_the_check_notices_that_a_removed_journal_may_be_back():
    """Plain SQLite syncs the directory after it has removed a journal at EXTRA, not at FULL (its documentation says so)."""
    done = checked(workloads.Workload("delete", False, "delete", "full", 1, 0, durable=True))
    assert done.returncode == 1 and "was acknowledged or seen, but" in done.stdout, done.stdout + done.stderr


def test_the_check_notices_a_journal_that_was_not_emptied():
    """Plain SQLite again: the sync of the truncated journal fails, the next transaction writes over what may be back."""
    fault = (recording.SYNC_EMPTY, "-journal", errno.EIO, 1)
    done = checked(workloads.Workload("truncate", False, "truncate", "full", 1, 0, durable=True, faults=[fault]), 20000)
    assert done.returncode == 1 and "integrity_check" in done.stdout, done.stdout + done.stderr


def checkpoint_in_halves(w):
    """A reader lets a checkpoint come halfway; the sync of the database fails when the second half is copied."""
    db, names = workloads.open_database(w)
    reader, _ = workloads.open_database(w)
    db.execute("PRAGMA wal_autocheckpoint=0")
    w.ready()

    def commit(worker):
        seq, n = workloads.write_all(db, names, worker)
        db.execute("COMMIT")
        recording.note(f"ack {worker} {seq} {n}")

    db.execute("PRAGMA wal_checkpoint").fetchall()
    commit(0)
    reader.execute("BEGIN")
    reader.execute("SELECT n FROM meta").fetchall()
    commit(1)
    halfway = db.execute("PRAGMA wal_checkpoint").fetchone()
    reader.execute("COMMIT")
    assert 0 < halfway[2] < halfway[1], halfway
    recording.order(recording.SYNC, ".db", errno.EIO)
    try:
        db.execute("PRAGMA wal_checkpoint").fetchall()
        raise AssertionError("the checkpoint did not notice the error")
    except sqlite3.OperationalError as e:
        assert e.sqlite_errorname == "SQLITE_IOERR_FSYNC", e.sqlite_errorname
    db.execute("PRAGMA wal_checkpoint").fetchall()
    commit(2)
    db.close()
    reader.close()


def test_the_check_notices_a_checkpoint_that_forgets_its_first_half():
    """Plain SQLite: the sync of a checkpoint fails, the next one does not copy again what the kernel has dropped."""
    workload = workloads.Workload("halves", False, "wal", "full", 1, 0, durable=True)
    with recording.Recording(tempfile.mkdtemp(prefix="power-", dir=recording.PLACE)) as record:
        for target in (workloads.setup, checkpoint_in_halves):
            with Workers(1, target, 10.0, record.path("app.db"), env={**harness.plain_env(), **record.env},
                         options={**workload._asdict(), "load": False}) as one:
                one.go().wait()
        done = workloads.check([record.dir], 2000, seed=1, capture_output=True)
        shutil.rmtree(record.dir)
    assert done.returncode == 1 and "VIOLATION" in done.stdout, done.stdout + done.stderr


@fails_without("ack-before-sync", message="was acknowledged or seen, but")
def test_what_was_acknowledged_survives_a_power_loss():
    survives("wal-full-3")


@fails_without("checkpoint-without-wal-sync", message="VIOLATION")
def test_a_checkpoint_copies_only_what_is_synced():
    survives("wal-normal-3")


@fails_without("ended-before-synced", message="VIOLATION")
def test_a_last_close_ends_the_wal_when_the_database_is_synced():
    survives("wal-full-short-1")


@fails_without("ended-unsynced", message="a WAL that a recovery would read")
def test_a_last_close_returns_when_the_wals_end_is_synced():
    survives("wal-full-short-1")


@fails_without("header-of-any-wal", message="VIOLATION")
def test_a_header_that_is_not_synced_is_the_first_after_a_mark():
    survives("wal-full-anew-1")
    survives("wal-full-short-1")


@fails_without("last-close-copies-unsynced", message="VIOLATION")
def test_a_last_close_copies_only_what_is_synced():
    survives("wal-normal-short-1")


def insert_until_failed(w):
    """Inserts rows; what fails is counted by its name, and not acknowledged."""
    db = w.connect()
    db.execute("PRAGMA synchronous=FULL")
    w.ready()
    seq = 0
    failed = w.more["failed"] = []
    while w.running():
        try:
            w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq)
        except sqlite3.OperationalError as e:
            failed.append(e.sqlite_errorname)
        seq += 1
    db.close()


def prepare(w):
    """Makes the database, under the record."""
    db = w.connect()
    db.execute("PRAGMA journal_mode=wal")
    db.execute("CREATE TABLE rows(worker TEXT, seq INTEGER)")
    w.ready()
    db.close()


def read_and_fail(w):
    """Tries to write some rows, and reads."""
    db = w.connect()
    w.ready()
    failed = w.more["failed"] = []
    for seq in range(5):
        try:
            db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
        except sqlite3.OperationalError as e:
            failed.append(e.sqlite_errorname)
    w.more["read"] = db.execute("SELECT count(*) FROM rows").fetchone()[0]
    db.close()


def run_recorded(record, broker, n, target, **options):
    options = {"rows": None, "first": 0, **options}
    env = {**broker.env, **record.env}
    with Workers(n, target, 10.0, record.path("app.db"), broker=broker, env=env, **options) as workers:
        return workers.go().wait()


def test_a_failed_sync_of_the_wal_fails_its_commit():
    """One sync of three writers' fails: the commits that waited for it fail, with SQLite's own code, and all go on."""
    with recording.Recording() as record, Broker(env=record.env) as broker:
        run_recorded(record, broker, 1, prepare)
        order = record.order(recording.SYNC, "-wal", errno.EIO, skip=20)
        results = run_recorded(record, broker, 3, insert_until_failed, rows=60)
        assert recording.fired(order) == 1
        failed = [name for r in results for name in r["failed"]]
        assert 1 <= len(failed) <= 3 and set(failed) == {"SQLITE_IOERR_FSYNC"}, failed
        assert not sum(r["busy"] for r in results), results
        assert [r["committed"] for r in results] == [60] * 3, results
        check_rows(record.path("app.db"), broker.record)


def fail_twice(w):
    """The WAL is begun anew; the syncs of its first commit fail, and of the one after that."""
    db = w.connect()
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    # Before each there is one of the WAL's header. An order does not count what another one has let fail.
    for skip in (1, 2):
        recording.order(recording.SYNC, "-wal", errno.EIO, skip=skip, pid=os.getpid())
    w.ready()
    failed = w.more["failed"] = []
    for seq in range(3):
        try:
            w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq)
        except sqlite3.OperationalError as e:
            failed.append(e.sqlite_errorname)
    w.more["seen"] = [seq for seq, in db.execute("SELECT seq FROM rows")]
    db.close()


@fails_without("empty-wal-not-cut")
def test_two_failed_syncs_at_the_beginning_of_a_wal():
    """Neither commit comes back: the third would stand behind frames that the kernel has given up."""
    with recording.Recording() as record, Broker(env=record.env) as broker:
        run_recorded(record, broker, 1, prepare)
        [result] = run_recorded(record, broker, 1, fail_twice)
        assert result["failed"] == ["SQLITE_IOERR_FSYNC"] * 2, result["failed"]
        assert result["seen"] == [2], result["seen"]


def test_a_full_disk_fails_writers_and_nobody_else():
    """While no write to the WAL succeeds, writers get SQLITE_FULL at once and read what was there; then all go on."""
    with recording.Recording() as record, Broker(env=record.env) as broker:
        run_recorded(record, broker, 1, prepare)
        run_recorded(record, broker, 2, insert_until_failed, rows=30)
        order = record.order(recording.WRITE, "-wal", errno.ENOSPC, times=-1)
        for result in run_recorded(record, broker, 3, read_and_fail):
            assert result["failed"] == ["SQLITE_FULL"] * 5 and result["read"] == 60, result
        recording.cancel(order)
        results = run_recorded(record, broker, 2, insert_until_failed, rows=30, first=10)
        assert not sum(len(r["failed"]) for r in results), results
        check_rows(record.path("app.db"), broker.record)
