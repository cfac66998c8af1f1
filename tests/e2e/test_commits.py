"""Commits that share a sync: what a reader may see, what a death in between leaves, and what a failed sync does."""

import contextlib
import errno
import os
import shutil
import signal
import sqlite3
import sys
import time

import harness
from harness import Broker, Workers, check_rows, create, fails_without, plain

sys.path.insert(0, os.path.join(harness.ROOT, "tests", "power"))
import recording  # noqa: E402


def under(record, broker, n, target, seconds=10.0, env=None, **options):
    env = {**broker.env, **record.env, **(env or {})}
    return Workers(n, target, seconds, record.path("app.db"), broker=broker, env=env, **{"rows": None, **options})


def insert_full(w):
    """Inserts; `more`: when each was acknowledged."""
    db = w.connect()
    db.execute("PRAGMA synchronous=FULL")
    w.ready()
    done = w.more["done"] = []
    seq = w.options.get("from", 0)
    while w.running():
        w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq)
        done.append(time.monotonic())
        seq += 1
    db.close()


def hold(w):
    """Keeps the database open, with a WAL whose first commit is made: that one is not shared."""
    db = w.connect()
    db.execute("CREATE TABLE IF NOT EXISTS other(n)")
    db.execute("INSERT INTO other VALUES(1)")
    w.ready()
    while w.running():
        time.sleep(0.01)


@contextlib.contextmanager
def held(record, broker, suffix=""):
    path = record.path("app.db") + suffix
    with Workers(1, hold, 60.0, path, broker=broker, env={**broker.env, **record.env}, first=100) as holder:
        holder.go()
        yield
        holder.kill(100)


def test_eight_writers_share_their_syncs():
    """A sync takes 20 ms here, so a second has 50 of them: more commits than that were made by sharing. Fails where
    SQLite does not release WRITE before COMMIT_PHASETWO, which all of this relies on."""
    with recording.Recording(sync_usec=20_000) as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"))
        with under(record, broker, 8, insert_full, 2.0) as workers:
            results = workers.go().wait()
        committed = sum(r["committed"] for r in results)
        assert committed > 2 * 2.0 / 0.02, results
        assert harness.fairness(results) >= 0.5, results
        check_rows(db, broker.record)
        assert "COMMIT_PHASETWO" not in broker.log()


def watch(w):
    """When the first row was seen."""
    db = w.connect()
    w.ready()
    while w.running():
        [(n,)] = db.execute("SELECT count(*) FROM rows").fetchall()
        if n:
            w.more["seen"] = time.monotonic()
            break
    db.close()


def seen_before_durable(env):
    """Seconds between a reader's seeing a row and its being acknowledged, where a sync takes nearly one."""
    with recording.Recording(sync_usec=900_000) as record, Broker(env=record.env) as broker:
        create(record.path("app.db"))
        with held(record, broker), under(record, broker, 1, watch, env=env, first=1) as readers:
            readers.ready()
            with under(record, broker, 1, insert_full, rows=1) as writers:
                writers.ready()
                readers.go()
                [writer] = writers.go().wait()
            [reader] = readers.wait()
        return writer["done"][0] - reader["seen"]


@fails_without("reads-before-sync")
def test_a_reader_does_not_see_what_is_not_durable():
    assert seen_before_durable({}) < 0.5


def test_a_reader_may_be_told_to_see_it():
    assert seen_before_durable({"TURNSTILE_DURABLE_READS": "0"}) > 0.5


def count(w):
    db = w.connect()
    w.ready()
    w.more["rows"] = db.execute("SELECT count(*) FROM rows").fetchone()[0]
    db.close()


@fails_without("leader-waited-for")
def test_a_writer_killed_before_its_sync_leaves_no_reader_waiting():
    with recording.Recording() as record, Broker(env=record.env) as broker:
        create(record.path("app.db"))
        with held(record, broker):
            with under(record, broker, 1, insert_full) as workers:
                workers.ready()
                record.order(recording.SYNC, "-wal", recording.KILL_BEFORE, skip=10, pid=workers.pid(0))
                workers.go()
                harness.wait_until(lambda: workers.processes[0].poll() is not None, what="the writer's death")
            with under(record, broker, 1, count, first=1) as readers:
                [result] = readers.go().wait(timeout=10.0)
            assert result["rows"] >= 10, result


def insert_and_stop(w):
    """In the planted build: the process stops when it leads a sync."""
    os.environ["TURNSTILE_PLANTED"] = "stopped-while-leading"
    insert_full(w)


@fails_without("leader-waited-for")
def test_a_stopped_leader_is_overtaken():
    with harness.planted_build():
        with recording.Recording() as record, Broker(env=record.env) as broker:
            db = create(record.path("app.db"))
            with held(record, broker), under(record, broker, 1, insert_and_stop, rows=1) as stopped:
                stopped.go()
                stat = f"/proc/{stopped.pid(0)}/stat"
                harness.wait_until(lambda: open(stat).read().rsplit(")", 1)[1].split()[0] == "T", what="the stop")
                with under(record, broker, 3, insert_full, rows=50, first=1) as workers:
                    results = workers.go(15.0).wait(timeout=20.0)
                assert [r["committed"] for r in results] == [50] * 3, results
                stopped.signal(0, signal.SIGCONT)
                stopped.wait()
            check_rows(db, broker.record)


def insert_again(w):
    """Inserts; what failed is tried again."""
    db = w.connect()
    db.execute("PRAGMA synchronous=FULL")
    w.ready()
    failed = w.more["failed"] = []
    seq = 0
    while w.running():
        try:
            w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq)
            seq += 1
        except sqlite3.OperationalError as e:
            failed.append(e.sqlite_errorname)
    db.close()


@fails_without("wal-not-cut")
def test_what_failed_and_was_tried_again_is_there_once():
    with recording.Recording() as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"))
        orders = [record.order(recording.SYNC, "-wal", errno.EIO, skip=n) for n in (20, 40, 41, 60)]
        with held(record, broker):
            with under(record, broker, 4, insert_again, rows=100) as workers:
                results = workers.go().wait()
            failed = [name for r in results for name in r["failed"]]
            # One that was just writing, or reading what is cut off, fails with the code of the sync too.
            assert set(failed) == {"SQLITE_IOERR_FSYNC"}, failed
            assert all(recording.fired(o) == 1 for o in orders)
            assert len(failed) <= 4 * len(orders), failed
            # What a recovery makes of the WAL as it lies there.
            copy = broker.path("copy.db")
            for suffix in ("", "-wal"):
                shutil.copyfile(db + suffix, copy + suffix)
        rows = "SELECT count(*), count(DISTINCT worker || ':' || seq) FROM rows"
        assert plain(copy, rows) == [["400", "400"]], plain(copy, rows)
        check_rows(db, broker.record)


def write_three_files(w):
    """One transaction over two rollback databases and a WAL one."""
    db = w.connect()
    db.execute(f"ATTACH '{w.path}-b' AS b")
    db.execute(f"ATTACH '{w.path}-c' AS c")
    w.ready()
    results = w.more["results"] = []
    for _ in range(3):
        db.execute("BEGIN")
        for schema in ("main", "b", "c"):
            db.execute(f"INSERT INTO {schema}.rows VALUES('w', 1)")
        try:
            db.execute("COMMIT")
            results.append("ok")
        except sqlite3.OperationalError as e:
            results.append(e.sqlite_errorname)
            if db.in_transaction:
                db.execute("ROLLBACK")
    db.close()


@fails_without("several-files-share")
def test_a_commit_over_several_files_reports_its_failed_sync():
    """With a super-journal SQLite does not look at what COMMIT_PHASETWO says."""
    with recording.Recording() as record, Broker(env=record.env) as broker:
        db = create(record.path("app.db"), "delete")
        create(db + "-b", "delete")
        create(db + "-c", "wal")
        with held(record, broker, "-c"):
            with under(record, broker, 1, write_three_files) as workers:
                workers.ready()
                order = record.order(recording.SYNC, "-wal", errno.EIO, pid=workers.pid(0), skip=1)
                [result] = workers.go().wait()
            assert recording.fired(order) == 1
            assert result["results"] == ["ok", "SQLITE_IOERR_FSYNC", "ok"], result
