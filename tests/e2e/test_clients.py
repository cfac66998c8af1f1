"""Every kind of client can use a database, alone and all together, each coming to turnstile in its own way.

What is found of each is what `docs/clients.md` says of it.
"""

import os
import tempfile

from client_table import WORKS, alone, cells, check_member, check_result, claimed, page, table_of
from clients import KINDS, RUN, Clients, record_of
from harness import Broker, Skip, check_rows, create, timeout


def available(kinds=KINDS):
    return [k for k in kinds if not KINDS[k].missing()]


def define(kind, way):
    def test():
        reason = KINDS[kind].missing()
        if reason:
            raise Skip(reason)
        found, result = alone(kind, way)
        print(f"{result['client']}, SQLite {result['sqlite']}: {found}")
        said = claimed(kind, way)
        assert found == said, (f"docs/clients.md says {said!r}, found: {found!r}; "
                               "tests/e2e/client_table.py --write writes what is found")
    test.__name__ = f"test_{kind}_by_{way}"
    return test


for _kind, _client in KINDS.items():
    for _way in _client.ways:
        globals()[f"test_{_kind}_by_{_way}"] = define(_kind, _way)


def test_the_page_has_a_line_for_every_client():
    """What is run above are the clients that the page names, and the code it shows is theirs."""
    table = table_of(page())
    assert list(table) == [client.title for client in KINDS.values()], list(table)
    for kind, client in KINDS.items():
        found = {way: claimed(kind, way) for way in client.ways}
        assert table[client.title][2:] == cells(kind, found), table[client.title]
        assert WORKS in found.values(), f"{client.title}: no way works"


def mixed(journal, processes, rows):
    """So many processes of each kind, by all the ways that work for it, on one database at once."""
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        jobs = []
        for kind in available():
            ways = [way for way in KINDS[kind].ways if claimed(kind, way) == WORKS]
            jobs += [(f"{kind}-{i}", kind, ways[i % len(ways)], db) for i in range(processes)]
        with Clients(jobs, rows, broker) as clients:
            clients.ready(150)
            results = clients.go().wait()
        for (_, kind, way, _), result in zip(jobs, results):
            check_result(result, rows)
            # Without the extension nobody answers the pragma; who is no member is refused here, and noticed by that.
            if not KINDS[kind].linked or way != RUN or result["status"] != [None, None]:
                check_member(result)
        busy = {r["worker"]: r["busy"] for r in results if r["busy"]}
        assert not busy, f"BUSY, though nobody has to see it: {busy}"
        assert check_rows(db, record_of(db)) == rows * len(jobs)
    print(f"{len(jobs)} processes, {rows * len(jobs)} rows")
    left_out = [f"{k} ({KINDS[k].missing()})" for k in KINDS if KINDS[k].missing()]
    if left_out:
        print("left out: " + ", ".join(left_out))


@timeout(300)
def test_four_processes_of_each_kind_at_once():
    mixed("wal", 4, 100)


@timeout(300)
def test_two_processes_of_each_kind_at_once_with_a_rollback_journal():
    mixed("delete", 2, 40)


def plain(kinds, rows, db_of):
    """The same programs on plain SQLite, all at once."""
    jobs = [(kind, kind, None, db_of(kind)) for kind in kinds]
    with Clients(jobs, rows, None) as clients:
        clients.ready(100)
        results = clients.go().wait()
    return jobs, results


def test_without_turnstile_the_same_programs_are_plain_clients():
    """What the tests above take for proof (the pragma's answer) is not there on plain SQLite."""
    with tempfile.TemporaryDirectory(prefix="ts-") as d:
        jobs, results = plain(available(), 20, lambda kind: create(os.path.join(d, f"{kind}.db")))
        for (_, _, _, db), result in zip(jobs, results):
            assert result["status"] == [None, None], result
            check_result(result, 20)
            assert check_rows(db, record_of(db)) == 20


def test_on_plain_sqlite_all_kinds_at_once_get_busy():
    """The load of the tests above is one that plain SQLite does refuse."""
    with tempfile.TemporaryDirectory(prefix="ts-") as d:
        db = create(os.path.join(d, "app.db"))
        _, results = plain(available(["shell", "python", "node_sqlite", "better_sqlite3", "go", "c", "rust"]), 100,
                           lambda kind: db)
        assert sum(r["busy"] for r in results) > 0, f"no competition: {results}"
        check_rows(db, record_of(db))
