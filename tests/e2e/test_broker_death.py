"""The broker dies, or is replaced: members go on, the next broker takes everything over, and nothing is ever split."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import harness
from harness import (Broker, PYTHON, PlainError, Skip, Workers, check_rows, connect, create, fails_without, plain,
                     run, status_of, timeout, wait_until)

# The long form: `KILLS=200 python3 tests/e2e/run.py --only killed_under_load`.
KILLS = int(os.environ.get("KILLS", "12"))


def test_smoke():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        one, two = connect(db, broker=broker, mode="gated"), connect(db, mode="gated")
        one.execute("INSERT INTO rows VALUES('a', 1)")
        broker.kill()
        one.execute("INSERT INTO rows VALUES('a', 2)")
        broker.start()
        assert len(broker.members(db)) == 2, broker.status()
        three = connect(db, mode="gated")
        three.execute("INSERT INTO rows VALUES('c', 1)")
        two.execute("INSERT INTO rows VALUES('b', 1)")
        assert len(broker.members(db)) == 3, broker.status()
        one.close()
        two.close()
        three.close()
        assert broker.database(db) is None, broker.status()
        assert plain(db, "SELECT count(*) FROM rows") == [["4"]]
