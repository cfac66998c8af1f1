"""Every writer gets through: no SQLITE_BUSY at a busy timeout of zero, nothing lost, first come first served."""

import subprocess

from harness import (SHELL, Broker, check_rows, create, fails_without, fairness, lib, plain, run_workers,
                     timeout)

PROCESSES = 8
SECONDS = 5.0


def insert_and_update(w):
    """BEGIN; INSERT; UPDATE; COMMIT: a deferred transaction that writes first."""
    db = w.connect()
    w.ready()
    seq = 0

    def write():
        try:
            db.execute("BEGIN")
            db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            db.execute("UPDATE counter SET n = n + 1")
            db.execute("COMMIT")
        except Exception:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    while w.running():
        if w.measure(write, seq):
            seq += 1
    db.close()


def everybody_writes(journal, target, seconds=SECONDS, processes=PROCESSES, least_fairness=0.8, **options):
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        plain(db, "CREATE TABLE counter(n); INSERT INTO counter VALUES(0)")
        results = run_workers(processes, target, seconds, db, broker, options=options)
        refused = sum(r["busy"] for r in results)
        assert refused == 0, f"{refused} attempts met SQLITE_BUSY: {results}"
        committed = check_rows(db, broker.record)
        assert committed == sum(r["committed"] for r in results) > 0
        if target is insert_and_update:
            assert plain(db, "SELECT n FROM counter", retry=5) == [[str(committed)]]
        assert fairness(results) >= least_fairness, [r["committed"] for r in results]


def test_wal_single_inserts():
    everybody_writes("wal", "insert")


def test_wal_begin_immediate():
    everybody_writes("wal", "insert", begin="BEGIN IMMEDIATE")


def test_wal_insert_then_update():
    everybody_writes("wal", insert_and_update)


def test_delete_single_inserts():
    everybody_writes("delete", "insert")


def test_delete_begin_immediate():
    everybody_writes("delete", "insert", begin="BEGIN IMMEDIATE")


def test_delete_insert_then_update():
    everybody_writes("delete", insert_and_update)


def test_truncate_and_persist_journals():
    everybody_writes("truncate", "insert", seconds=1.5)
    everybody_writes("persist", "insert", seconds=1.5, setup="PRAGMA journal_mode=persist")


def test_thirty_two_processes():
    everybody_writes("wal", "insert", processes=32, seconds=3.0, least_fairness=0.5)


def write_with_checkpoints(w):
    db = w.connect()
    db.execute("PRAGMA wal_autocheckpoint=20")
    w.ready()
    seq = 0
    while w.running():
        if w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq):
            seq += 1
        if seq % 50 == 0:
            db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    db.close()


def test_the_turn_outlives_the_retry_of_a_stale_header():
    """After a wait the header has changed, so SQLite drops the read lock it has just got and asks again. A turn
    that ends there is lost between READ and WRITE."""
    everybody_writes("wal", "insert", seconds=1.5, setup="PRAGMA synchronous=NORMAL", least_fairness=0.3)


@fails_without("turn-ends-at-restart", attempts=3)
def test_the_turn_outlives_a_wal_restart():
    """walRestartLog drops READ(0) and takes it again while it holds WRITE."""
    everybody_writes("wal", write_with_checkpoints, seconds=2.0, least_fairness=0.3)


@fails_without("no-turn-ahead", attempts=3)
def test_the_turn_comes_before_the_snapshot():
    everybody_writes("wal", "insert", seconds=1.0)


def start_race(rounds, journal="wal"):
    """Sixteen shells start at once on a new file; each switches to WAL, creates the table, inserts."""
    with Broker() as broker:
        for n in range(rounds):
            db = broker.path(f"race{n}.db")
            shells = [
                subprocess.Popen(
                    [SHELL, "-batch", "-bail", db, f".load {lib()[:-3]}", f"PRAGMA journal_mode={journal}",
                     "CREATE TABLE IF NOT EXISTS rows(worker TEXT, seq INTEGER)",
                     f"INSERT INTO rows VALUES('{i}', {n})"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=broker.env)
                for i in range(16)]
            outputs = [shell.communicate(timeout=60)[0] for shell in shells]
            failed = [o for s, o in zip(shells, outputs) if s.returncode or o.split() != [journal.encode()]]
            assert not failed, f"round {n}: {len(failed)} of 16 failed: {failed}"
            rows = plain(db, "SELECT count(*), count(DISTINCT worker) FROM rows", retry=5)
            assert rows == [["16", "16"]], f"round {n}: {rows}"


@fails_without("no-turn-ahead")
@timeout(240)
def test_sixteen_shells_start_at_once_fifty_times():
    start_race(50)


def test_sixteen_shells_start_at_once_in_delete_mode():
    start_race(5, "delete")
