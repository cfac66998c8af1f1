"""A client in Python: `sqlite3` of the standard library. See README.md."""

import json
import os
import sqlite3
import sys
import time

path, worker, rows, record = sys.argv[1:5]
extension = os.environ.get("TURNSTILE_EXTENSION")
end = time.monotonic() + float(os.environ.get("WORKER_SECONDS", "60"))


def status(db):
    row = db.execute("PRAGMA turnstile_status").fetchone()
    return row[0] if row else None


first = sqlite3.connect(path, timeout=0, isolation_level=None)
if extension:
    first.enable_load_extension(True)
    first.load_extension(extension)
    first.enable_load_extension(False)
second = sqlite3.connect(path, timeout=0, isolation_level=None)
states = [status(first), status(second)]

print("ready", flush=True)
sys.stdin.readline()

attempts = committed = busy = 0
log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
while committed < int(rows) and time.monotonic() < end:
    db = (first, second)[committed % 2]
    attempts += 1
    try:
        db.execute("INSERT INTO rows VALUES(?, ?)", (worker, committed))
    except sqlite3.OperationalError as e:
        if "locked" not in str(e):
            raise
        busy += 1
        continue
    os.write(log, f"{worker} {committed}\n".encode())
    committed += 1

seen = None
while seen is None:
    try:
        seen = first.execute("SELECT count(*) FROM rows WHERE worker = ?", (worker,)).fetchone()[0]
    except sqlite3.OperationalError:
        busy += 1
        if time.monotonic() > end:
            raise
second.close()
first.close()
print(json.dumps({"worker": worker, "attempts": attempts, "committed": committed, "busy": busy, "seen": seen,
                  "sqlite": sqlite3.sqlite_version, "status": states}))
