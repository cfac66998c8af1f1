"""Every kind of client can use a database, alone and all together, each loading the extension in its own way.

The programs are in `tests/clients`; its README says what they do.
"""

import json
import os
import tempfile

import harness
from harness import Broker, CACHE, CLIENTS, PYTHON, Programs, Skip, check_rows, create, plain_env

NODE = os.path.join(CACHE, "bin", "node")
LIMIT = 60  # seconds that a client may take for its rows


def program(*words):
    """A client that is given the extension by TURNSTILE_EXTENSION."""
    return lambda: list(words)


def wrapped(*words):
    """A client that loads nothing: `turnstile run` brings the extension."""
    return lambda: [harness.bin(), "run", "--", *words]


# The name, the command, does it load the extension by itself, what of tests/install it needs.
KINDS = {
    "shell": (program(os.path.join(CLIENTS, "worker.sh")), True, "shell"),
    "python": (program(PYTHON, os.path.join(CLIENTS, "worker.py")), True, None),
    "python_run": (wrapped(PYTHON, os.path.join(CLIENTS, "worker.py")), False, None),
    "node_sqlite": (program(NODE, os.path.join(CLIENTS, "node_sqlite.mjs")), True, "node"),
    "better_sqlite3": (program(NODE, os.path.join(CLIENTS, "better_sqlite3.mjs")), True, "better-sqlite3"),
    "go": (program(os.path.join(CACHE, "bin", "worker-go")), True, "go"),
    "c": (program(os.path.join(CACHE, "bin", "worker-c")), True, "c"),
    "rust": (lambda: [os.path.join(harness.target(), "examples", "worker")], True, "rust"),
}


def missing(kind):
    """Why this kind of client cannot be run here, or None."""
    need = KINDS[kind][2]
    note = os.path.join(CACHE, "missing", need or "-")
    if os.path.exists(note):
        with open(note) as f:
            return f.read().strip()
    command = KINDS[kind][0]()[0]
    how = "cargo build --release --example worker" if kind == "rust" else "tests/install"
    return None if os.path.exists(command) else f"{command} is missing: run {how}"


def environment(broker, loads):
    env = dict(broker.env) if broker else plain_env()
    env.pop("TURNSTILE_EXTENSION", None)
    env["NODE_MODULES"] = os.path.join(CACHE, "node", "node_modules")
    env["NODE_NO_WARNINGS"] = "1"
    env["WORKER_SECONDS"] = str(LIMIT)
    if broker and loads:
        env["TURNSTILE_EXTENSION"] = harness.lib()
    return env


class Clients(Programs):
    """Clients of the given kinds on one database, named after their kind."""

    def __init__(self, kinds, db, rows, record, broker):
        super().__init__({}, None, LIMIT)
        for kind in kinds:
            command, loads, _ = KINDS[kind]
            words = command() if broker or loads else command()[3:]  # on plain SQLite, without `turnstile run --`
            self._start(kind, [*words, db, kind, str(rows), record], environment(broker, loads))


def check_member(result):
    """Both connections of a client are turnstile's, in gated mode."""
    for which, text in zip(("first", "second"), result["status"]):
        assert text is not None, f"{result['worker']}: its {which} connection is not turnstile's"
        assert json.loads(text)["mode"] == "gated", f"{result['worker']}: its {which} connection says {text}"


def check_result(result, rows):
    assert result["committed"] == rows, f"only {result['committed']} of {rows} rows: {result}"
    assert result["seen"] == rows, f"wrote {rows} rows, reads {result['seen']}: {result}"


def alone(kind):
    reason = missing(kind)
    if reason:
        raise Skip(reason)
    rows = 200
    for journal in ("wal", "delete"):
        with Broker() as broker:
            db = create(broker.path("app.db"), journal)
            with Clients([kind], db, rows, broker.record, broker) as clients:
                clients.ready()
                assert broker.members(db), f"{journal}: the broker knows no member of the client's database"
                result, = clients.go().wait()
            check_member(result)
            check_result(result, rows)
            assert result["busy"] == 0, f"{journal}: BUSY without a competitor: {result}"
            assert check_rows(db, broker.record) == rows
            print(f"{kind}, SQLite {result['sqlite']}, {journal}: {result['committed']} rows")


def together(journal):
    kinds = [k for k in KINDS if not missing(k)]
    left_out = [f"{k} ({missing(k)})" for k in KINDS if k not in kinds]
    rows = 400
    with Broker() as broker:
        db = create(broker.path("app.db"), journal)
        with Clients(kinds, db, rows, broker.record, broker) as clients:
            clients.ready()
            results = clients.go().wait()
        for result in results:
            check_member(result)
            check_result(result, rows)
        busy = {r["worker"]: r["busy"] for r in results if r["busy"]}
        assert not busy, f"BUSY, though nobody has to see it: {busy}"
        assert check_rows(db, broker.record) == rows * len(kinds)
    if left_out:
        print("left out: " + ", ".join(left_out))


def define(kind):
    def test():
        alone(kind)
    test.__name__ = f"test_{kind}_alone"
    return test


for _kind in KINDS:
    globals()[f"test_{_kind}_alone"] = define(_kind)


def test_all_kinds_at_once_wal():
    together("wal")


def test_all_kinds_at_once_delete():
    together("delete")


def test_without_the_extension_the_same_programs_are_plain_clients():
    """What the tests above take for proof (the pragma's answer) is not there on plain SQLite."""
    kinds = [k for k in KINDS if KINDS[k][1] and not missing(k)]
    with tempfile.TemporaryDirectory(prefix="ts-") as d:
        for kind in kinds:
            db = create(os.path.join(d, f"{kind}.db"))
            with Clients([kind], db, 20, os.path.join(d, kind), None) as clients:
                result, = clients.go().wait()
            assert result["status"] == [None, None], result
            check_result(result, 20)
            assert check_rows(db, os.path.join(d, kind)) == 20


def test_on_plain_sqlite_all_kinds_at_once_get_busy():
    """The load of the tests above is one that plain SQLite does refuse."""
    kinds = [k for k in KINDS if KINDS[k][1] and not missing(k)]
    with tempfile.TemporaryDirectory(prefix="ts-") as d:
        db = create(os.path.join(d, "app.db"))
        record = os.path.join(d, "acknowledged")
        with Clients(kinds, db, 100, record, None) as clients:
            clients.ready()
            results = clients.go().wait()
        assert sum(r["busy"] for r in results) > 0, f"no competition: {results}"
        check_rows(db, record)
