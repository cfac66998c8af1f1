"""What the workers in Python share. See README.md."""

import json
import os
import sys
import time

path, worker, rows, record = sys.argv[1:5]
extension = os.environ.get("TURNSTILE_EXTENSION")
timeout = int(os.environ.get("WORKER_TIMEOUT", "0"))  # milliseconds


class Connection:
    """A connection that is spoken to in SQL. `ask(sql, parameters)` runs one statement and gives its rows."""

    def __init__(self, ask, close):
        self.ask = ask
        self.close = close

    def insert(self, seq):
        self.ask("INSERT INTO rows VALUES(?, ?)", (worker, seq))

    def transaction(self, seq):
        self.ask("BEGIN", ())
        try:
            self.insert(seq)
            self.ask("COMMIT", ())
        except Exception:
            self.ask("ROLLBACK", ())
            raise

    def count(self):
        return self.ask("SELECT count(*) FROM rows WHERE worker = ?", (worker,))[0][0]

    def status(self):
        answer = self.ask("PRAGMA turnstile_status", ())
        return answer[0][0] if answer else None


def of_module(module):
    """The two connections of a module with the interface of the standard library's `sqlite3`."""
    both = []
    for load in (extension, None):
        db = module.connect(path, timeout=timeout / 1000, isolation_level=None)
        if load:
            db.enable_load_extension(True)
            db.load_extension(load)
            db.enable_load_extension(False)
        both.append(Connection(lambda sql, values, db=db: db.execute(sql, values).fetchall(), db.close))
    return both


def work(both, client, sqlite):
    """Runs the protocol on two connections, which have the methods of `Connection`."""
    end = time.monotonic() + float(os.environ.get("WORKER_SECONDS", "60"))
    states = [db.status() for db in both]
    print("ready", flush=True)
    sys.stdin.readline()

    attempts = committed = busy = 0
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    while committed < int(rows) and time.monotonic() < end:
        db = both[committed % 2]
        attempts += 1
        try:
            (db.transaction if committed % 4 > 1 else db.insert)(committed)
        except Exception as e:
            if "locked" not in str(e):
                raise
            busy += 1
            continue
        os.write(log, f"{worker} {committed}\n".encode())
        committed += 1

    seen = None
    while seen is None:
        try:
            seen = both[0].count()
        except Exception as e:
            if "locked" not in str(e) or time.monotonic() > end:
                raise
            busy += 1
    for db in reversed(both):
        db.close()
    print(json.dumps({"worker": worker, "attempts": attempts, "committed": committed, "busy": busy, "seen": seen,
                      "client": client, "sqlite": sqlite, "status": states}))
