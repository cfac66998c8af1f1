"""One process of `turnstile demo`: inserts a row a commit for some seconds, without a busy timeout, and says in
one line of JSON how that went."""

import json
import sqlite3
import sys
import time

path, number, seconds, extension = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
db = sqlite3.connect(path, timeout=0, isolation_level=None)
if extension:
    db.enable_load_extension(True)
    db.load_extension(extension)
    db.enable_load_extension(False)
print("ready", flush=True)
sys.stdin.read()  # ends for all processes at the same moment

attempts = committed = locked = 0
worst_wait = worst_attempt = 0.0
error = mode = None
now = wanted = time.monotonic()
end = now + seconds
while now < end and error is None:
    attempts += 1
    began = now
    try:
        db.execute("INSERT INTO rows VALUES(?, ?)", (number, committed))
        written = True
    except sqlite3.Error as e:
        written = False
        if "database is locked" in str(e):
            locked += 1
        else:
            error = f"{type(e).__name__}: {e}"
    now = time.monotonic()
    worst_attempt = max(worst_attempt, now - began)
    worst_wait = max(worst_wait, now - wanted)
    if written:
        committed += 1
        wanted = now
if extension:
    row = db.execute("PRAGMA turnstile_status").fetchone()
    mode = json.loads(row[0])["mode"] if row else "none"
db.close()
print(json.dumps({"number": number, "attempts": attempts, "committed": committed, "locked": locked,
                  "worst_wait_ms": worst_wait * 1000, "worst_attempt_ms": worst_attempt * 1000,
                  "mode": mode, "error": error}), flush=True)
