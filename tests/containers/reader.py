"""A reader in a container: opens a database `mode=ro` and reads it until it has seen so many rows.

    reader.py DB ROWS

Prints `ready` when it has joined, waits for a line, and ends with one line of JSON. Each snapshot is read twice, so
that what changes within one is noticed, and no snapshot may be older than the one before.
"""

import json
import os
import sqlite3
import sys
import time

path, rows = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + float(os.environ.get("WORKER_SECONDS", "60"))

db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0, isolation_level=None)
db.enable_load_extension(True)
db.load_extension(os.environ["TURNSTILE_EXTENSION"])
status = json.loads(db.execute("PRAGMA turnstile_status").fetchone()[0])
print("ready", flush=True)
sys.stdin.readline()

snapshots, seen = 0, -1
while seen < rows and time.monotonic() < end:
    db.execute("BEGIN")
    count = db.execute("SELECT count(*) FROM rows").fetchone()[0]
    again = db.execute("SELECT count(*) FROM rows").fetchone()[0]
    db.execute("COMMIT")
    if count != again:
        sys.exit(f"a snapshot changed: {count} rows, then {again}")
    if count < seen:
        sys.exit(f"a snapshot is older than the one before: {count} rows after {seen}")
    snapshots, seen = snapshots + 1, count
try:
    db.execute("INSERT INTO rows VALUES('reader', 0)")
    sys.exit("a reader wrote")
except sqlite3.OperationalError as e:
    wrote = str(e)
if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
    sys.exit("integrity_check is not ok")
db.close()
print(json.dumps({"seen": seen, "snapshots": snapshots, "status": status, "wrote": wrote, "uid": os.getuid(),
                  "pid namespace": os.readlink("/proc/self/ns/pid"),
                  "user namespace": os.readlink("/proc/self/ns/user")}))
