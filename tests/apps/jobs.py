"""A task queue in SQLite: huey's consumer with eight processes, and programs that put tasks into it. See README.md.

    huey_consumer jobs.huey -k process -w 8
    jobs.py WORKER TASKS            puts them in, prints how many times it was refused
"""

import logging
import os
import sqlite3
import sys

from huey import SqliteHuey

huey = SqliteHuey(filename=os.environ["APP_QUEUE"])


@huey.task()
def work(worker, seq):
    db = sqlite3.connect(os.environ["APP_DATABASE"])
    with db:
        db.execute("INSERT INTO rows VALUES(?, ?)", (worker, seq))
    db.close()
    with open(os.environ["APP_RECORD"], "ab", buffering=0) as record:
        record.write(f"{worker} {seq}\n".encode())


if __name__ == "__main__":
    worker, tasks = sys.argv[1], int(sys.argv[2])
    seq = refused = 0
    while seq < tasks:
        try:
            # Imported by its name: a task of `__main__` would be another one to the consumer.
            __import__("jobs").work(worker, seq)
        except sqlite3.OperationalError:
            logging.exception("refused")
            refused += 1
            continue
        seq += 1
    print(refused)
