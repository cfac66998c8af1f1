"""What is recorded: programs that write and read databases, and note in the record what was acknowledged to them and
what they have seen. The checker (check/expected.rs, check/judge.rs) knows their tables and notes.

Every transaction counts `meta.n` up and writes all rows of its worker in `slot`, with its own number of that worker, in
a text of changing length; every fifth also replaces `filler`. So the counter alone says what must be in a database.

    workload NAME durable|prefix atomic|separate FILE...
    ready                   the tables are there
    ack WORKER SEQ COUNTER  COMMIT has returned
    saw COUNTER             a read transaction has ended that saw so many
"""

import collections
import os
import random
import sqlite3

import recording

import harness
from harness import Broker, Workers, plain_env

SLOTS = 6
WORKERS = 8

# durable: an acknowledged transaction survives. With journal_mode=DELETE this needs synchronous=EXTRA: at FULL the
# directory is not synced after the journal was removed, it may be back, and the transaction be rolled back.
Workload = collections.namedtuple(
    "Workload", "name brokered journal synchronous writers readers durable files reopen kill page auto_vacuum",
    defaults=("app.db", 0, False, 1024, 0))

WORKLOADS = [
    Workload("plain-wal-full-1", False, "wal", "full", 1, 0, True),
    Workload("plain-wal-full-3", False, "wal", "full", 3, 1, True, reopen=40),
    Workload("plain-wal-normal-3", False, "wal", "normal", 3, 1, False),
    Workload("plain-delete-extra-2", False, "delete", "extra", 2, 1, True),
    Workload("plain-delete-full-1", False, "delete", "full", 1, 0, False),
    Workload("wal-full-1", True, "wal", "full", 1, 0, True, reopen=30, auto_vacuum=1),
    Workload("wal-full-3", True, "wal", "full", 3, 2, True),
    Workload("wal-full-8", True, "wal", "full", 8, 2, True, reopen=25, page=4096),
    Workload("wal-full-kill-3", True, "wal", "full", 3, 1, True, kill=True),
    Workload("wal-full-kill-all", True, "wal", "full", 1, 0, True, kill=True),
    Workload("wal-normal-3", True, "wal", "normal", 3, 1, False, reopen=40),
    Workload("wal-normal-1", True, "wal", "normal", 1, 0, False),
    Workload("wal-full-two-files-2", True, "wal", "full", 2, 1, True, "app.db other.db"),
    Workload("delete-extra-3", True, "delete", "extra", 3, 1, True),
    Workload("delete-extra-kill-3", True, "delete", "extra", 3, 1, True, kill=True),
    Workload("truncate-full-3", True, "truncate", "full", 3, 1, True, reopen=40),
    Workload("persist-full-2", True, "persist", "full", 2, 1, True, auto_vacuum=1),
    Workload("delete-full-two-files-2", True, "delete", "full", 2, 1, True, "app.db other.db"),
]


def pad(text, length):
    return (text * (length // len(text) + 20))[:length + 20]


def open_database(w):
    """A connection as the workload wants it, and the names of its databases."""
    o = w.options
    db = w.connect(timeout=0 if o["load"] else 30)
    names = ["main"]
    for other in o["files"].split()[1:]:
        db.execute("ATTACH ? AS other", (os.path.join(os.path.dirname(w.path), other),))
        names.append("other")
    for name in names:
        db.execute(f"PRAGMA {name}.page_size={o['page']}")
        db.execute(f"PRAGMA {name}.auto_vacuum={o['auto_vacuum']}")
        mode = db.execute(f"PRAGMA {name}.journal_mode={o['journal']}").fetchone()[0]
        assert mode == o["journal"], f"journal_mode is {mode}"
        db.execute(f"PRAGMA {name}.synchronous={o['synchronous']}")
        # Little memory: a large transaction writes pages before it is committed.
        db.execute(f"PRAGMA {name}.cache_size=8")
    db.execute("PRAGMA wal_autocheckpoint=30")
    return db, names


def setup(w):
    o = w.options
    atomic = "atomic" if o["journal"] != "wal" else "separate"
    recording.note(f"workload {o['name']} {'durable' if o['durable'] else 'prefix'} {atomic} {o['files']}")
    db, names = open_database(w)
    w.ready()
    db.execute("BEGIN IMMEDIATE")
    for name in names:
        db.execute(f"CREATE TABLE {name}.meta(id INTEGER PRIMARY KEY, n INTEGER)")
        db.execute(f"CREATE TABLE {name}.slot(worker INTEGER, i INTEGER, seq INTEGER, pad TEXT, PRIMARY KEY(worker, i))")
        db.execute(f"CREATE INDEX {name}.slot_seq ON slot(seq, worker)")
        db.execute(f"CREATE TABLE {name}.filler(id INTEGER PRIMARY KEY, n INTEGER, pad TEXT)")
        db.execute(f"INSERT INTO {name}.meta VALUES(1, 0)")
        db.executemany(f"INSERT INTO {name}.slot VALUES(?, ?, 0, ?)",
                       [(k, i, pad(f"{k}.{i}.0;", (i * 101 + k * 13) % 700)) for k in range(WORKERS) for i in range(SLOTS)])
    db.execute("COMMIT")
    # Whatever the workload promises, the tables are owed from here on.
    db.execute("PRAGMA wal_checkpoint")
    directory = os.open(os.path.dirname(w.path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    recording.note("ready")
    db.close()


def write_all(db, names, worker):
    """One transaction up to its COMMIT: its number of this worker, and the counter."""
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE main.meta SET n = n + 1")
    n = db.execute("SELECT n FROM main.meta").fetchone()[0]
    seq = db.execute("SELECT seq FROM main.slot WHERE worker = ? AND i = 0", (worker,)).fetchone()[0] + 1
    for name in names:
        if name != "main":
            db.execute(f"UPDATE {name}.meta SET n = ?", (n,))
        db.executemany(f"UPDATE {name}.slot SET seq = ?, pad = ? WHERE worker = ? AND i = ?",
                       [(seq, pad(f"{worker}.{i}.{seq};", (seq * 37 + i * 101 + worker * 13) % 700), worker, i)
                        for i in range(SLOTS)])
        if n % 5 == 0:
            db.execute(f"DELETE FROM {name}.filler")
            db.executemany(f"INSERT INTO {name}.filler(n, pad) VALUES(?, ?)",
                           [(n, pad(f"f{n}.{j};", 400)) for j in range(n // 5 % 8 * 3)])
    return seq, n


def abandon(db):
    """A transaction that is rolled back after it has written pages."""
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO main.filler(n, pad) VALUES(-1, ?)", [("abandoned" * 90,)] * 20)
    db.execute("ROLLBACK")


def write(w):
    """Writes and acknowledges. Options: reopen (after so many commits), kill (dies at an operation of chance)."""
    o = w.options
    chance = random.Random(f"{o['seed']}.{w.id}.{o['generation']}")
    db, names = open_database(w)
    w.ready()
    if o["kill"]:
        recording.order(recording.WRITE | recording.TRUNCATE | recording.SYNC, "",
                        chance.choice([recording.KILL_AFTER, recording.KILL_BEFORE]),
                        skip=chance.randrange(20, 700), pid=os.getpid())

    def one():
        try:
            seq, n = write_all(db, names, w.id)
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        recording.note(f"ack {w.id} {seq} {n}")

    while w.running():
        if chance.randrange(12) == 0:
            w.measure(lambda: abandon(db))
            continue
        w.measure(one)
        if o["reopen"] and chance.randrange(o["reopen"]) == 0:
            db.close()
            db, names = open_database(w)
    db.close()


def read(w):
    """Reads and notes what it has seen."""
    db, _ = open_database(w)
    w.ready()
    last = 0

    def one():
        nonlocal last
        db.execute("BEGIN")
        try:
            n = db.execute("SELECT n FROM main.meta").fetchone()[0]
            seen = db.execute("SELECT sum(seq) FROM main.slot").fetchone()[0]
        finally:
            db.execute("COMMIT")
        assert seen == n * SLOTS, f"a reader sees {seen} rows' numbers where {n * SLOTS} belong"
        assert n >= last, f"a reader has seen {last} transactions and now sees {n}"
        if n > last:
            recording.note(f"saw {n}")
        last = n

    while w.running():
        w.measure(one)
    db.close()


def kill_some(workers, ids):
    """Waits until the workers `ids` have died by their orders, or ended."""
    for i in ids:
        process = workers.processes[i]
        process.wait(60)
        if process.returncode < 0:
            workers.killed.add(i)


def run(workload, record, seed, rows, seconds):
    """Records `workload`. `record`: a Recording."""
    base = plain_env() if not workload.brokered else {}
    options = {**workload._asdict(), "seed": seed, "load": workload.brokered, "generation": 0}
    path = record.path(workload.files.split()[0])

    def start(n, target, broker, generation=0, **more):
        env = {**(broker.env if broker else base), **record.env}
        return Workers(n, target, seconds, path, env=env, record=None,
                       options={**options, "generation": generation}, **more)

    def all_of_it(broker):
        with start(1, setup, broker) as first:
            first.go().wait()
        for generation in range(3 if workload.kill else 1):
            with start(workload.writers, write, broker, generation, rows=rows) as writers, \
                    start(workload.readers, read, broker, first=100) as readers:
                writers.ready()
                readers.ready()
                writers.go()
                readers.go()
                if workload.kill:
                    kill_some(writers, range(workload.writers))
                results = writers.wait()
                readers.wait()
        return results

    if not workload.brokered:
        return all_of_it(None)
    with Broker(env=record.env) as broker:
        results = all_of_it(broker)
        if not [r for r in results if r["busy"]]:
            return results
        raise AssertionError(f"{workload.name}: BUSY: {results}")

