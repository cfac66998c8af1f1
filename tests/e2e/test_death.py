"""A member that dies: the next writer proceeds at once, nothing acknowledged is missing, nothing half is there."""

import os
import resource
import signal
import statistics
import time

from harness import (Broker, Workers, check_rows, connect, create, fails_without, plain, plain_env, run_workers, timeout,
                     wait_until)


def transaction_of_two(w):
    """Two rows a transaction, which must never be seen one without the other."""
    db = w.connect()
    w.ready()
    seq = 0
    while w.running():
        def write():
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            db.execute("INSERT INTO pairs VALUES(?, ?)", (w.id, seq))
            db.execute("COMMIT")
        if w.measure(write, seq):
            seq += 1
    db.close()


def hold_the_turn(w):
    """Begins a transaction, writes into it, says so, and stays."""
    ballast = bytearray(w.options.get("megabytes", 0) << 20)
    for i in range(0, len(ballast), 4096):
        ballast[i] = 1
    if w.options.get("core"):
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    db = w.connect()
    db.execute("PRAGMA cache_size=10")
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO rows VALUES('half', 1)")
    db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<500) "
               "INSERT INTO pairs SELECT 'half', printf('%.500c', 'x') FROM n")
    w.ready()
    w.record = None
    signal.pause()


def until_the_next_commit(broker, db, writer, kill=signal.SIGKILL, **options):
    """Seconds from the death of a member with the turn to another's next commit."""
    with Workers(1, hold_the_turn, 60.0, db, broker, options=options, first=7) as w:
        w.ready()
        started = time.monotonic()
        w.signal(7, kill)
        writer.execute("INSERT INTO rows VALUES('next', 1)")
        waited = time.monotonic() - started
        w.killed.add(7)
    return waited


def test_the_next_writer_proceeds_when_a_member_is_killed_with_the_turn():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            plain(db, "CREATE TABLE pairs(worker TEXT, seq)")
            writer = connect(db, broker=broker, mode="gated")
            waits = [until_the_next_commit(broker, db, writer) for _ in range(10)]
            print(f"{journal}: median {statistics.median(waits) * 1000:.1f} ms, worst {max(waits) * 1000:.1f} ms")
            assert writer.execute("SELECT count(*) FROM rows WHERE worker='half'").fetchone() == (0,)
            assert writer.execute("SELECT count(*) FROM pairs").fetchone() == (0,)
            assert writer.execute("SELECT count(*) FROM rows").fetchone() == (10,)
            assert writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            writer.close()


@timeout(180)
def test_killed_at_any_moment_nothing_acknowledged_is_lost():
    for journal in ("wal", "delete"):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            plain(db, "CREATE TABLE pairs(worker TEXT, seq)")
            killed = []
            with Workers(4, transaction_of_two, 20.0, db, broker) as w:
                w.go()
                for victim in range(4):
                    size = os.path.getsize(broker.record) if os.path.exists(broker.record) else 0
                    wait_until(lambda: os.path.exists(broker.record)
                               and os.path.getsize(broker.record) > size + 500, what="progress")
                    w.kill(victim)
                    killed.append(victim)
            check_rows(db, broker.record, killed=killed)
            unpaired = plain(db, "SELECT count(*) FROM (SELECT worker, seq FROM rows EXCEPT SELECT worker, seq FROM "
                                 "pairs UNION ALL SELECT worker, seq FROM pairs EXCEPT SELECT worker, seq FROM rows)")
            assert unpaired == [["0"]], unpaired


def test_the_last_one_killed_leaves_a_database_for_plain_clients():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            plain(db, "CREATE TABLE pairs(worker TEXT, seq)")
            with Workers(1, hold_the_turn, 60.0, db, broker, first=7) as w:
                w.ready()
                w.kill(7)
            wait_until(lambda: broker.database(db) is None, what="the dead member to be cleared")
            assert plain(db, "SELECT count(*) FROM rows", retry=2) == [["0"]]
            assert plain(db, "PRAGMA integrity_check") == [["ok"]]


@fails_without("deaths-unnoticed")
@timeout(180)
def test_a_large_heap_and_a_core_dump_hold_nobody_up_for_long():
    """The kernel takes its time to tear down a large process; its seats are cleared when it says so."""
    os.environ["TURNSTILE_WAIT"] = "8s"
    with Broker() as broker:
        db = create(broker.path("app.db"))
        plain(db, "CREATE TABLE pairs(worker TEXT, seq)")
        os.chdir(broker.dir)
        writer = connect(db, broker=broker)
        large = until_the_next_commit(broker, db, writer, megabytes=1500)
        dumping = until_the_next_commit(broker, db, writer, kill=signal.SIGABRT, megabytes=100, core=True)
        print(f"1.5 GB heap: {large * 1000:.0f} ms; core dump of 100 MB: {dumping * 1000:.0f} ms")
        assert writer.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        writer.close()


def test_a_stopped_member_keeps_its_turn_and_waiters_reach_their_limit():
    os.environ["TURNSTILE_WAIT"] = "300ms"
    with Broker() as broker:
        db = create(broker.path("app.db"))
        plain(db, "CREATE TABLE pairs(worker TEXT, seq)")
        with Workers(1, hold_the_turn, 60.0, db, broker, first=7) as w:
            w.ready()
            w.signal(7, signal.SIGSTOP)
            [result] = run_workers(1, "insert", 0.1, db, broker, record=broker.path("r"))
            assert result["busy"] >= 1 and result["committed"] == 0, result
            turn = broker.database(db)["turn"]
            assert turn["pid"] == w.pid(7), turn
            w.signal(7, signal.SIGCONT)
            w.kill(7)


def test_exec_lets_go():
    """A program that replaces itself has no connection any more, as its POSIX locks would be gone."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(1, turn_then_exec, 60.0, db, broker) as w:
            w.ready()
            writer = connect(db, broker=broker)
            w.go()
            started = time.monotonic()
            writer.execute("INSERT INTO rows VALUES('next', 1)")
            assert time.monotonic() - started < 10
            assert plain_env()
            assert writer.execute("SELECT count(*) FROM rows").fetchone() == (1,)
            writer.close()
            w.kill(0)


def turn_then_exec(w):
    db = w.connect()
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO rows VALUES('half', 1)")
    w.ready()
    os.execv("/bin/sleep", ["sleep", "60"])
