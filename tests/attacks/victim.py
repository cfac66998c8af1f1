"""A victim: does one thing all the time, and notes on the board how long it waited. VICTIM says which thing.

works     writes and reads, on connections that stay open
opens     opens a database, writes, closes it; always another one, so that the broker is asked each time
arrives   a new process that does the same: its session is new as well
"""

import os
import signal
import sqlite3
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from rig import Board, run_delay  # noqa: E402

HOME = sys.argv[1]
KIND = os.environ["VICTIM"]
PAUSE = {"works": 0.002, "opens": 0.003, "arrives": 0.02}[KIND]
board = Board(os.path.join(HOME, "board"))
ended = []


def connect(name):
    db = sqlite3.connect(os.path.join(HOME, "data", name), timeout=30, isolation_level=None)
    db.enable_load_extension(True)
    db.load_extension(os.environ["LIBRARY"])
    db.execute("PRAGMA synchronous=NORMAL")
    return db


class Works:
    def __init__(self):
        self.dbs = []
        self.acknowledged = 0

    def __call__(self):
        if not self.dbs:
            self.dbs = [connect("main.db"), connect("read.db")]
        try:
            self.dbs[0].execute("INSERT INTO rows VALUES('v', 1)")
            self.acknowledged += 1
            self.dbs[0].execute("SELECT count(*) FROM rows WHERE seq = 0").fetchone()
            self.dbs[1].execute("INSERT INTO rows VALUES('v', 1)")
        except sqlite3.Error:
            for db in self.dbs:
                db.close()
            self.dbs = []
            raise


class Opens:
    acknowledged = 0

    def __call__(self):
        db = connect(f"{self.acknowledged % 16}.db")
        try:
            db.execute("INSERT INTO rows VALUES('v', 1)")
            self.acknowledged += 1
        finally:
            db.close()


class Arrives:
    acknowledged = 0

    def __call__(self):
        """The child says how long it was kept from a processor: nothing of it is a wait for the broker."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                db = connect(f"{16 + self.acknowledged % 8}.db")
                db.execute("INSERT INTO rows VALUES('v', 1)")
                db.close()
                os.write(theirs, f"{run_delay()}".encode())
                os._exit(0)
            except BaseException as e:
                os.write(theirs, f"!{e}".encode())
                os._exit(1)
        os.close(theirs)
        said = os.read(ours, 4096).decode()
        os.close(ours)
        os.waitpid(child, 0)
        if not said.isdigit():
            raise sqlite3.OperationalError(said)
        self.acknowledged += 1
        return int(said)


def main():
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    operation = {"works": Works, "opens": Opens, "arrives": Arrives}[KIND]()
    while not ended:
        began, delay, broker = time.monotonic_ns(), run_delay(), board.broker()
        before = run_delay(broker)
        board.begin(KIND)
        try:
            more = operation() or 0
            wall = time.monotonic_ns() - began
            brokers = max(0, run_delay(broker) - before)
            board.end(KIND, max(0, wall - (run_delay() - delay) - brokers - more))
        except sqlite3.Error as e:
            board.failed(KIND, e)
        time.sleep(PAUSE)
    for db in getattr(operation, "dbs", []):
        db.close()
    print(operation.acknowledged, flush=True)


main()
