"""The turn: who gets it, when it ends, what it must not wait for. Each rule's test fails where it is missing."""

import mmap
import os
import sqlite3
import threading
import time

from harness import (Broker, PlainShell, Workers, check_rows, connect, create, fails_without, is_busy, lib, plain,
                     run_workers, status_of, timeout, wait_until, waits)
from test_checkpoint import traced


def filled(broker, name="app.db", journal="wal", rows=200_000):
    db = create(broker.path(name), journal)
    plain(db, f"CREATE TABLE big(x); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{rows}) "
              "INSERT INTO big SELECT i FROM n")
    return db


def fill_temp_table(w):
    """A statement that writes, but not this file: for about a second."""
    db = w.connect()
    w.ready()
    while w.running():
        started = time.monotonic()
        w.measure(lambda: db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS t AS SELECT a.x FROM big a, (SELECT x FROM big LIMIT 12) b"))
        w.more["seconds"] = max(w.more.get("seconds", 0), time.monotonic() - started)
        db.execute("DROP TABLE temp.t")
    db.close()


@fails_without("unused-turn-kept")
def test_a_temp_table_fill_does_not_hold_the_turn():
    """It is given the turn, because its statement writes; no write lock follows, and it is taken back while the
    statement runs. The status counts it."""
    with Broker() as broker:
        db = filled(broker)
        with Workers(1, fill_temp_table, 3.0, db, broker) as filler, Workers(1, "insert", 3.0, db, broker, first=1) as w:
            filler.ready()
            w.ready()
            filler.go()
            w.go()
            [fill] = filler.wait()
            [writer] = w.wait()
        assert writer["busy"] == 0
        assert writer["worst_wait"] < fill["seconds"] / 2, (writer, fill)
        check_rows(db, broker.record)


def mirrored(w):
    """INSERT INTO b.t SELECT FROM main.t, with main and b swapped in every other process."""
    own, other = (w.path, w.path + "2") if w.id % 2 == 0 else (w.path + "2", w.path)
    db = w.connect() if own == w.path else None
    if db is None:
        w.path = own
        db = w.connect()
    db.execute("ATTACH ? AS b", (other,))
    w.ready()
    seq = 0
    while w.running():
        done = w.measure(lambda: db.execute(
            "INSERT INTO b.rows SELECT ?, ? FROM main.one", (f"{w.id}", seq)))
        seq += done
    db.close()


@fails_without("turn-kept-elsewhere", attempts=3)
def test_mirrored_attach_neither_fails_nor_stalls():
    with Broker() as broker:
        for name in ("app.db", "app.db2"):
            create(broker.path(name))
            plain(broker.path(name), "CREATE TABLE one(x); INSERT INTO one VALUES(1)")
        results = run_workers(4, mirrored, 2.0, broker.path("app.db"), broker)
        assert not sum(r["busy"] for r in results), results
        # A stall is a wait for the other's unused turn; those are taken back only after some 20 ms.
        assert broker.status() is not None
        revoked = run_workers(2, mirrored, 1.0, broker.path("app.db"), broker)
        assert not sum(r["busy"] for r in revoked)
        holder = connect(broker.path("app.db"), broker=broker)
        other = connect(broker.path("app.db2"))
        counts = [broker.database(broker.path(n))["turns_revoked"] for n in ("app.db", "app.db2")]
        holder.close()
        other.close()
        assert min(r["committed"] for r in results) > 100, results
        assert max(counts) == 0, counts


def test_nobody_reads_a_half_written_file():
    """Readers that open one after the other over a hot journal: none takes the file for clean."""
    with Broker() as broker:
        db = hot_database(broker)
        readers = run_workers(6, read_consistently, 1.5, db, broker, rows=None)
        assert sum(r["committed"] for r in readers) > 0
        assert not any(r["more_wrong"] for r in readers), readers


def hot_database(broker, name="hot.db"):
    """A database whose writer was killed after it had changed pages in the file, with a hot journal beside it."""
    db = create(broker.path(name), "delete")
    plain(db, "CREATE TABLE pairs(a INTEGER, b INTEGER, pad TEXT); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL "
              "SELECT i+1 FROM n WHERE i<2000) INSERT INTO pairs SELECT i, i, printf('%.200c','x') FROM n")
    with PlainShell(db) as shell:
        # A small cache spills to the file inside the transaction: then the journal is synced, and hot.
        shell.run("PRAGMA cache_size=5")
        shell.run("BEGIN IMMEDIATE")
        shell.run("UPDATE pairs SET a = a + 1, pad = printf('%.200c','y')")
        shell.kill()
    return db


def read_consistently(w):
    db = None
    w.more["more_wrong"] = 0
    w.ready()
    while w.running():
        # A new connection each time: each looks for a hot journal.
        if db is not None:
            db.close()
        db = w.connect()

        def read():
            wrong = db.execute("SELECT count(*) FROM pairs WHERE a <> b").fetchone()[0]
            w.more["more_wrong"] += wrong != 0

        w.measure(read)
    db.close()


@fails_without("no-probation,no-fast-lane", attempts=3)
def test_nobody_meets_busy_over_a_hot_journal():
    """Many open a database with a hot journal at once: one rolls it back, the others wait."""
    with Broker() as broker:
        for n in range(5):
            db = hot_database(broker, f"hot{n}.db")
            readers = run_workers(8, read_once, 5.0, db, broker, rows=1)
            assert not sum(r["busy"] for r in readers), readers
            assert plain(db, "SELECT count(*) FROM pairs WHERE a <> b", retry=5) == [["0"]]


def read_once(w):
    w.ready()
    db = w.connect()
    w.measure(lambda: db.execute("SELECT count(*) FROM pairs WHERE a <> b").fetchone())
    db.close()


def test_a_wait_ahead_never_fails():
    """When its limit ends, READ is granted without the turn; BUSY comes from WRITE. BUSY out of READ would be a
    hundred retries of wal.c and then "locking protocol" after ten seconds."""
    os.environ["TURNSTILE_WAIT"] = "200ms"
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker)
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("INSERT INTO rows VALUES('h', 1)")
        results = run_workers(1, "insert", 0.1, db, broker, timeout=8)
        assert results[0]["busy"] >= 1 and results[0]["worst_wait"] < 3, results
        holder.execute("COMMIT")
        holder.close()


@timeout(60)
def test_exclusive_from_shared_does_not_wait():
    """locking_mode=EXCLUSIVE asks for EXCLUSIVE straight from SHARED. With another reader there the answer is
    BUSY at once, not a wait for a reader that may stay for hours."""
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            reader = connect(db, broker=broker)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM rows").fetchone()
            other = connect(db)
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            started = time.monotonic()
            try:
                other.execute("SELECT count(*) FROM rows").fetchone()
                if journal == "wal":
                    raise AssertionError("EXCLUSIVE was granted beside a reader")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            assert time.monotonic() - started < 5, "it waited"
            reader.execute("COMMIT")
            other.close()
            reader.close()


def test_exclusive_mode_waits_only_for_its_limit_and_writes_after():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        owner = connect(db, broker=broker)
        owner.execute("PRAGMA locking_mode=EXCLUSIVE")
        owner.execute("INSERT INTO rows VALUES('o', 1)")
        other = connect(db)
        other.execute("PRAGMA busy_timeout=100")
        try:
            other.execute("INSERT INTO rows VALUES('x', 1)")
            raise AssertionError("two writers at once")
        except sqlite3.OperationalError as e:
            assert is_busy(e)
        owner.close()
        other.execute("INSERT INTO rows VALUES('x', 2)")
        other.close()
        assert plain(db, "SELECT * FROM rows ORDER BY 1", retry=5) == [["o", "1"], ["x", "2"]]


@fails_without("stale-wal-index")
def test_an_index_that_nobody_has_open_is_not_believed():
    """A connection in EXCLUSIVE mode keeps its wal-index in its own memory; what the segment still holds from
    before must not be read by the next one (the unix VFS truncates `-shm` when nobody has it open)."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        anchor = connect(db, broker=broker)  # a member that has not read anything keeps the segment alive
        with Workers(1, "insert", 30.0, db, broker) as w:
            w.go()
            wait_until(lambda: (broker.database(db) or {}).get("members") and len(broker.members(db)) > 1)
            wait_until(lambda: __import__("os").path.getsize(broker.record) > 200, what="some rows")
            w.kill(0)  # the WAL stays, and the index in the segment describes it
        wait_until(lambda: len(broker.members(db)) == 1, what="the dead member to be cleared")
        exclusive = connect(db)
        exclusive.execute("PRAGMA locking_mode=EXCLUSIVE")
        for i in range(50):
            exclusive.execute("INSERT INTO rows VALUES('e', ?)", (i,))
        before = exclusive.execute("SELECT count(*) FROM rows").fetchone()
        exclusive.close()
        assert anchor.execute("SELECT count(*) FROM rows").fetchone() == before
        assert anchor.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        anchor.close()


@waits
@fails_without("torn-header-queues,no-fast-lane")
@timeout(60)
def test_a_torn_header_read_does_not_queue_as_a_writer():
    """A reader that meets a header just being written asks for WRITE outside any transaction. It looks again as
    soon as the header is whole; waiting for the writer's transaction would make readers wait for writers."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        writer = connect(db, broker=broker, mode="gated")
        writer.execute("INSERT INTO rows VALUES('w', 1)")
        index = next(f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")
                     if os.path.lexists(f"/proc/self/fd/{n}")
                     and "turnstile-wal-index" in os.readlink(f"/proc/self/fd/{n}"))
        fd = os.open(index, os.O_RDWR)
        with PlainShell(db, env=broker.env) as reader, mmap.mmap(fd, 4096) as header:
            reader.run(f".load {lib()[:-3]}")
            assert reader.run("SELECT count(*) FROM rows") == [["1"]]
            writer.execute("BEGIN IMMEDIATE")
            second_copy = header[48:96]
            header[48:96] = bytes(48)
            reader.send("SELECT count(*) FROM rows")
            wait_until(lambda: any(w["waits_for"] == "the WAL write lock" for w in broker.database(db)["line"]))
            header[48:96] = second_copy
            assert reader.answer(timeout=8) == [["1"]]
            writer.execute("COMMIT")
        writer.close()
        os.close(fd)


@fails_without("cycles-wait")
@timeout(60)
def test_a_cycle_of_waits_ends_at_once():
    """Two connections with two attached databases in opposite order."""
    with Broker() as broker:
        a, b = create(broker.path("a.db")), create(broker.path("b.db"))
        outcome = []

        def worker(first, second, meet):
            db = connect(first, broker=broker, check_same_thread=False)
            db.execute("ATTACH ? AS other", (second,))
            db.execute("BEGIN")
            db.execute("INSERT INTO main.rows VALUES('w', 1)")
            meet.wait(10)
            try:
                db.execute("INSERT INTO other.rows VALUES('w', 2)")
                db.execute("COMMIT")
                outcome.append("committed")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
                outcome.append("busy")
                db.execute("ROLLBACK")
            db.close()

        meet = threading.Barrier(2)
        started = time.monotonic()
        threads = [threading.Thread(target=worker, args=args) for args in ((a, b, meet), (b, a, meet))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(40)
        assert sorted(outcome) == ["busy", "committed"], outcome
        assert time.monotonic() - started < 4, "it was waited out"
        assert "deadlock" in broker.log()


@timeout(60)
def test_a_thread_that_waits_for_itself_goes_on():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        one = connect(db, broker=broker)
        two = connect(db)
        one.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        try:
            two.execute("INSERT INTO rows VALUES('x', 1)")
            raise AssertionError("two writers at once")
        except sqlite3.OperationalError as e:
            assert is_busy(e)
        assert time.monotonic() - started < 4, "it was waited out"
        one.execute("COMMIT")
        two.execute("INSERT INTO rows VALUES('x', 2)")
        one.close()
        two.close()


@fails_without("stale-note-trusted", attempts=3)
def test_a_note_does_not_outlive_its_statement():
    """`SELECT 1` is noted and reads no file, so nothing ends the note but the next statement; and the one that a blob
    is opened by is not traced."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        plain(db, "CREATE TABLE blobs(data BLOB); INSERT INTO blobs VALUES(zeroblob(1000))")
        mine = traced(db, broker)
        with PlainShell(db, env=broker.env) as other:
            other.run(f".load {lib()}")
            other.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('o', 1)")
            mine.execute("SELECT count(*) FROM blobs").fetchone()  # the schema, which would end a note
            mine.execute("SELECT 1").fetchone()
            end = threading.Timer(0.3, other.run, ["COMMIT"])
            end.start()
            try:
                with mine.blobopen("blobs", "data", 1) as blob:  # waits for its turn
                    blob.write(b"x")
            finally:
                end.join()
        assert mine.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        mine.close()


def test_blob_writes_and_backups_get_through():
    """Neither is a statement that can be seen to write; both meet a busy writer and go through."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        plain(db, "CREATE TABLE blobs(data BLOB); INSERT INTO blobs VALUES(zeroblob(100000))")
        with Workers(3, "insert", 2.0, db, broker) as w:
            w.go()
            mine = connect(db, broker=broker)
            for i in range(50):
                mine.execute("SELECT 1").fetchone()
                with mine.blobopen("blobs", "data", 1) as blob:
                    blob.write(bytes([i]) * 1000)
            source = sqlite3.connect(":memory:")
            source.execute("CREATE TABLE copied(x)")
            source.execute("INSERT INTO copied VALUES(42)")
            source.commit()
            target = create(broker.path("target.db"))
            to = connect(target)
            source.backup(to)
            assert to.execute("SELECT x FROM copied").fetchone() == (42,)
            to.close()
            mine.close()
            assert not sum(r["busy"] for r in w.wait())


def test_the_limit_is_busy_timeout_when_it_was_given():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker)
        holder.execute("BEGIN IMMEDIATE")
        with PlainShell(db, env=broker.env) as other:
            other.run(f".load {lib()[:-3]}")
            other.run("PRAGMA busy_timeout=300")
            started = time.monotonic()
            try:
                other.run("INSERT INTO rows VALUES('x', 1)")
                raise AssertionError("two writers at once")
            except Exception as e:
                assert "locked" in str(e), e
            assert 0.25 < time.monotonic() - started < 5
            holder.execute("COMMIT")
            other.run("INSERT INTO rows VALUES('x', 2)")
        assert status_of(holder)["mode"] == "gated"
        holder.close()


@fails_without("own-guess-stays", message="locked")
def test_a_connection_that_only_reads_is_in_nobodys_way():
    """Two connections on one thread: a transaction took its turn with its first read, because one before it was refused its
    write. The other connection writes meanwhile, as it may on plain SQLite."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        first, second = connect(db, broker=broker, mode="gated"), connect(db, mode="gated")
        for seq in range(4):
            second.execute("BEGIN")
            before = second.execute("SELECT count(*) FROM rows").fetchall()
            first.execute("INSERT INTO rows VALUES('first', ?)", (seq,))
            assert second.execute("SELECT count(*) FROM rows").fetchall() == before == [(seq,)]
            try:
                second.execute("INSERT INTO rows VALUES('second', ?)", (seq,))
                raise AssertionError("its snapshot was stale")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            second.execute("ROLLBACK")
        first.close()
        second.close()


@fails_without("turn-noted-for-good", message="locked")
def test_a_connection_that_has_written_is_in_nobodys_way():
    """Two connections on one thread: the one that wrote a while ago is not what the other one waits for, and no
    deadlock is to be seen in it."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        first, second = connect(db, broker=broker, mode="gated"), connect(db, mode="gated")
        with PlainShell(db, env=broker.env) as other:
            other.run(f".load {lib()}")
            for writes in ("INSERT INTO rows VALUES('first', 0)", "BEGIN; INSERT INTO rows VALUES('first', 1); COMMIT"):
                first.executescript(writes)
                other.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('other', 0)")
                end = threading.Timer(0.4, other.send, ("COMMIT",))
                end.start()
                second.execute("INSERT INTO rows VALUES('second', 0)")
                end.join()
                other.answer()
        first.close()
        second.close()
