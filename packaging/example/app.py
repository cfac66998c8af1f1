"""An application that has never heard of turnstile: `app.py write ROWS` or `app.py read`, on /data/app.db."""

import os
import sqlite3
import sys
import time

db = sqlite3.connect(os.environ.get("DATABASE", "/data/app.db"), isolation_level=None)
db.execute("PRAGMA journal_mode=wal")
db.execute("CREATE TABLE IF NOT EXISTS visits(host TEXT, at REAL)")
if sys.argv[1] == "write":
    for _ in range(int(sys.argv[2])):
        db.execute("INSERT INTO visits VALUES(?, ?)", (os.uname().nodename, time.time()))
for host, count in db.execute("SELECT host, count(*) FROM visits GROUP BY host"):
    print(f"{host}: {count}", flush=True)
