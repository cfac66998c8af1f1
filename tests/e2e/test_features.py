"""What SQLite does beyond inserting: all of it goes on working, and means the same."""

import os
import sqlite3

from harness import (Broker, PlainError, Workers, check_rows, connect, create, fails_without, is_busy, plain, run_workers, timeout,
                     wait_until)


def busy(connection, sql):
    try:
        connection.execute(sql).fetchall()
    except sqlite3.OperationalError as e:
        assert is_busy(e), e
        return True
    return False


def test_journal_modes_change_back_and_forth():
    with Broker() as broker:
        db = create(broker.path("app.db"), "delete")
        one = connect(db, broker=broker, mode="gated")
        two = connect(db)
        for mode in ("wal", "delete", "truncate", "wal", "persist", "memory", "wal", "delete"):
            assert one.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,), mode
            one.execute("INSERT INTO rows VALUES('one', ?)", (mode,))
            # The other sees it, and what it then holds does not keep the next change from happening.
            assert two.execute("SELECT count(*) FROM rows WHERE seq=?", (mode,)).fetchone()[0] >= 1
            if mode == "wal":
                assert busy(one, "PRAGMA journal_mode=delete"), "WAL was left while another connection was in it"
                two.close()
                two = connect(db)
        assert one.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        one.close()
        two.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["8"]]


@timeout(180)
def test_a_wal_larger_than_one_mapping():
    """The wal-index grows region by region, over the border between two mappings; all members follow."""
    with Broker() as broker:
        path = broker.path("app.db")
        plain(path, "PRAGMA page_size=512; PRAGMA journal_mode=wal; CREATE TABLE big(i INTEGER PRIMARY KEY, pad)")
        writer = connect(path, broker=broker, mode="gated")
        reader = connect(path)
        assert reader.execute("SELECT count(*) FROM big").fetchone() == (0,)
        writer.execute("PRAGMA synchronous=NORMAL")
        writer.execute("PRAGMA wal_autocheckpoint=0")
        total = 0
        for _ in range(3):
            writer.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<50000) "
                           "INSERT INTO big(pad) SELECT printf('%.450c', 'x') FROM n")
            total += 50000
            assert reader.execute("SELECT count(*), max(i) FROM big").fetchone() == (total, total)
        assert os.path.getsize(path + "-wal") > 70 << 20
        third = connect(path)
        assert third.execute("SELECT count(*) FROM big").fetchone() == (total,)
        assert third.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for c in (writer, reader, third):
            c.close()
        assert plain(path, "SELECT count(*) FROM big") == [[str(total)]]


def test_checkpoints_of_every_kind_beside_writers():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(3, "insert", 2.0, db, broker) as w:
            w.ready()
            mine = connect(db, broker=broker)
            w.go()
            for i in range(60):
                kind = ("PASSIVE", "FULL", "RESTART", "TRUNCATE")[i % 4]
                result = mine.execute(f"PRAGMA wal_checkpoint({kind})").fetchone()
                assert len(result) == 3, result
            results = w.wait()
            assert not sum(r["busy"] for r in results), results
            assert mine.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
            assert os.path.getsize(db + "-wal") == 0
            check_rows(mine, broker.record)
            mine.close()


@fails_without("reruns-queue-again,no-fast-lane", attempts=2)  # a streak would do, mostly
def test_vacuum_and_schema_changes_beside_writers():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            record = broker.path(journal)
            with Workers(3, "insert", 2.0, db, broker, record=record) as w:
                w.ready()
                mine = connect(db, broker=broker)
                w.go()
                for i in range(25):
                    mine.execute(f"CREATE TABLE t{i}(x)")
                    mine.execute(f"CREATE INDEX IF NOT EXISTS i{i} ON rows(seq)")
                    mine.execute("VACUUM")
                    mine.execute(f"DROP INDEX i{i}")
                mine.execute("VACUUM INTO ?", (broker.path(f"{journal}-copy.db"),))
                results = w.wait()
                assert not sum(r["busy"] for r in results), results
                check_rows(mine, record)
                mine.close()
            assert plain(broker.path(f"{journal}-copy.db"), "PRAGMA integrity_check") == [["ok"]]


def test_memory_mapped_reads():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            record = broker.path(journal)
            results = run_workers(4, "insert", 1.0, db, broker, record=record,
                                  options={"setup": "PRAGMA mmap_size=268435456"})
            assert not sum(r["busy"] for r in results), results
            check_rows(db, record)


def test_shared_cache_connections():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        anchor = connect(db, broker=broker)
        uri = f"file:{db}?cache=shared"
        one = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0)
        two = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0)
        one.execute("INSERT INTO rows VALUES('one', 1)")
        two.execute("INSERT INTO rows VALUES('two', 1)")
        anchor.execute("INSERT INTO rows VALUES('anchor', 1)")
        for c in (one, two, anchor):
            assert c.execute("SELECT count(*) FROM rows").fetchone() == (3,)
            assert '"gated"' in c.execute("PRAGMA turnstile_status").fetchone()[0]
        for c in (one, two, anchor):
            c.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["3"]]


def test_savepoints_and_rollbacks():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            c = connect(db, broker=broker)
            other = connect(db)
            c.execute("BEGIN")
            c.execute("INSERT INTO rows VALUES('a', 1)")
            c.execute("SAVEPOINT s")
            c.execute("INSERT INTO rows VALUES('a', 2)")
            c.execute("ROLLBACK TO s")
            c.execute("COMMIT")
            assert other.execute("SELECT count(*) FROM rows").fetchone() == (1,)
            c.execute("BEGIN IMMEDIATE")
            c.execute("DELETE FROM rows")
            c.execute("ROLLBACK")
            other.execute("INSERT INTO rows VALUES('b', 1)")
            assert c.execute("SELECT count(*) FROM rows").fetchone() == (2,)
            c.close()
            other.close()


def test_a_long_snapshot_stays_what_it_was():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        reader = connect(db, broker=broker)
        writer = connect(db)
        writer.execute("INSERT INTO rows VALUES('w', 0)")
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        for i in range(2000):
            writer.execute("INSERT INTO rows VALUES('w', ?)", (i,))
        assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 1  # busy: the reader
        assert reader.execute("SELECT count(*) FROM rows").fetchone() == (1,)
        reader.execute("COMMIT")
        assert reader.execute("SELECT count(*) FROM rows").fetchone() == (2001,)
        reader.close()
        writer.close()


def test_a_read_first_transaction_fails_as_in_plain_sqlite_and_can_be_repeated():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        one, two = connect(db, broker=broker), connect(db)
        one.execute("BEGIN")
        one.execute("SELECT count(*) FROM rows").fetchone()
        two.execute("INSERT INTO rows VALUES('two', 1)")
        assert busy(one, "INSERT INTO rows VALUES('one', 1)"), "a stale snapshot was written over"
        one.execute("ROLLBACK")
        one.execute("INSERT INTO rows VALUES('one', 1)")
        assert two.execute("SELECT count(*) FROM rows").fetchone() == (2,)
        one.close()
        two.close()


def test_a_database_that_is_moved_or_deleted_under_its_members():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        old = connect(db, broker=broker, mode="gated")
        old.execute("INSERT INTO rows VALUES('old', 1)")
        for suffix in ("", "-wal"):
            os.unlink(db + suffix)
        create(db)
        new = connect(db, mode="gated")  # another file: another group
        new.execute("INSERT INTO rows VALUES('new', 1)")
        assert new.execute("SELECT worker FROM rows").fetchall() == [("new",)]
        assert old.execute("SELECT worker FROM rows").fetchall() == [("old",)]
        old.close()
        new.close()
        assert plain(db, "SELECT worker FROM rows") == [["new"]]


def test_many_connections_of_one_process():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        connections = [connect(db, broker=broker)] + [connect(db) for _ in range(99)]
        for i, c in enumerate(connections):
            c.execute("INSERT INTO rows VALUES('c', ?)", (i,))
        assert connections[0].execute("SELECT count(*) FROM rows").fetchone() == (100,)
        assert len(broker.members(db)) == 100
        for c in connections:
            c.close()
        wait_until(lambda: broker.database(db) is None)
        try:
            plain(db, "SELECT 1")
        except PlainError as e:
            raise AssertionError(e) from None
