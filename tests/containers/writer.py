"""A writer in a container: a row per commit, each noted in a file beside the database once its COMMIT has returned.

    writer.py DB NAME ROWS RECORD

Prints `ready` when it has joined, waits for a line, and writes ROWS rows or, if that is 0, until the next line. BUSY is
an error: nobody should ever see it. Ends with one line of JSON.
"""

import json
import os
import select
import sqlite3
import sys

path, name, rows, record = sys.argv[1:5]
db = sqlite3.connect(path, timeout=0, isolation_level=None)
db.enable_load_extension(True)
db.load_extension(os.environ["TURNSTILE_EXTENSION"])
status = json.loads(db.execute("PRAGMA turnstile_status").fetchone()[0])
log = os.open(record, os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
sys.stdin.readline()

committed = 0
while committed < int(rows) if int(rows) else not select.select([0], [], [], 0)[0]:
    if committed % 3:
        db.execute("INSERT INTO rows VALUES(?, ?)", (name, committed))
    else:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO rows VALUES(?, ?)", (name, committed))
        db.execute("COMMIT")
    os.write(log, f"{name} {committed}\n".encode())
    committed += 1
seen = db.execute("SELECT count(*) FROM rows WHERE worker = ?", (name,)).fetchone()[0]
if seen != committed:
    sys.exit(f"{committed} rows written, {seen} seen")
db.close()
print(json.dumps({"name": name, "committed": committed, "status": status, "uid": os.getuid(),
                  "pid namespace": os.readlink("/proc/self/ns/pid"),
                  "user namespace": os.readlink("/proc/self/ns/user")}))
