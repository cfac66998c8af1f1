"""An ordinary program that inserts a row per commit. See README.md.

    writer.py DATABASE WORKER SECONDS RECORD            prints rows written and statements refused
"""

import sqlite3
import sys
import time

path, worker, seconds, record = sys.argv[1:]
end = time.monotonic() + float(seconds)
db = sqlite3.connect(path, isolation_level=None)
seq = refused = 0
with open(record, "ab", buffering=0) as log:
    while time.monotonic() < end:
        try:
            db.execute("INSERT INTO rows VALUES(?, ?)", (worker, seq))
        except sqlite3.OperationalError as e:
            if "locked" not in str(e):
                raise
            refused += 1
            continue
        log.write(f"{worker} {seq}\n".encode())
        seq += 1
db.close()
print(seq, refused)
