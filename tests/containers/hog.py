"""Takes more memory than its container may have, in the middle of a transaction.

    hog.py DB

Prints `ready` when it has joined. After a line on its standard input it begins a transaction, writes so much that part
of it is in the WAL already, and takes memory until it is killed.
"""

import os
import sqlite3
import sys

db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
db.enable_load_extension(True)
db.load_extension(os.environ["TURNSTILE_EXTENSION"])
db.execute("PRAGMA cache_size = 10")
print("ready", flush=True)
sys.stdin.readline()
db.execute("BEGIN IMMEDIATE")
db.executemany("INSERT INTO rows VALUES('hog', ?)", ((n,) for n in range(20000)))
if os.path.getsize(sys.argv[1] + "-wal") < 100000:
    sys.exit("nothing of the transaction is in the WAL")
memory = []
while len(memory) < 1024:
    memory.append(os.urandom(1 << 20))
sys.exit("nobody has minded that it took a gigabyte")
