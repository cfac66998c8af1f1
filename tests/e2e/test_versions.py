"""Members with different versions of SQLite: the oldest that is supported, the system's, and the newest, which the rust
client has linked in. They write the same words of a wal-index and the same WAL.
"""

import os

import harness
from client_table import check_member, check_result
from clients import EXTENSION, environment
from harness import CACHE, Broker, Programs, Skip, check_rows, create, fails_without

OLD = os.path.join(CACHE, "sqlite-3.34")
CLIENT = os.path.join(CACHE, "bin", "worker-c")
RUST = os.path.join(harness.target(), "examples", "worker")


class Versions(Programs):
    """So many clients of each version on one database."""

    def __init__(self, kinds, db, rows, broker):
        super().__init__({}, None, 90)
        for number, kind in enumerate(kinds):
            env = environment(broker, EXTENSION)
            if kind == "old":
                env["LD_LIBRARY_PATH"] = OLD
            program = RUST if kind == "newest" else CLIENT
            self._start(f"{kind}{number}", [program, db, f"{kind}{number}", str(rows), broker.record], env)


def needs_old():
    for missing in (os.path.join(CACHE, "missing", "sqlite-3.34"), os.path.join(CACHE, "missing", "c")):
        if os.path.exists(missing):
            with open(missing) as f:
                raise Skip(f.read().strip())
    if not os.path.exists(OLD) or not os.path.exists(CLIENT):
        raise Skip("SQLite 3.34 or the C client is missing: run tests/install")


def write_together(kinds, journal, rows):
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        with Versions(kinds, db, rows, broker) as clients:
            clients.ready()
            results = clients.go().wait()
        for result in results:
            check_member(result)
            check_result(result, rows)
            assert not result["busy"], f"BUSY, though nobody has to see it: {result}"
        assert check_rows(db, broker.record) == rows * len(kinds)
        versions = {tuple(int(x) for x in r["sqlite"].split(".")) for r in results}
        print(f"{journal}: {sorted(versions)}, {rows} rows each")
        return versions


@fails_without("list-before-main")
def test_the_oldest_sqlite_alone():
    """Its `PRAGMA database_list` reads the schema: a database in WAL mode could not be adopted after it."""
    needs_old()
    for journal in ("wal", "delete"):
        assert {v[:2] for v in write_together(["old"], journal, 200)} == {(3, 34)}


def test_three_versions_write_one_wal():
    needs_old()
    assert len(write_together(["old", "system", "newest"] * 2, "wal", 500)) == 3


def test_three_versions_write_one_file_with_a_rollback_journal():
    needs_old()
    assert len(write_together(["old", "system", "newest"] * 2, "delete", 150)) == 3
