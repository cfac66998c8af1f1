"""A member in Python, with `sqlite3` of the standard library: plays a deck (README.md beside this file) and writes down
what it does.

    worker.py DECK LOG ID SEQ OFFSET
"""

import json
import os
import resource
import select
import signal
import sqlite3
import sys
import time

OFFSET = float(os.environ.get("CHAOS_CLOCK_OFFSET", "0"))
EXTENSION = os.environ.get("TURNSTILE_EXTENSION")
CERTAIN = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_SCHEMA)
taken = []


def now():
    return time.monotonic() - OFFSET


def told_to_end():
    return bool(select.select([0], [], [], 0)[0])


def code(error):
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)


def load(path):
    database, initial, entries = None, [], []
    with open(path) as f:
        for line in f:
            what, text = line[0], line[2:].rstrip("\n")
            if what == "M":
                database = text
            elif what == "T":
                entries.append([])
            else:
                (entries[-1] if entries else initial).append((what, text))
    return database, initial, entries


class Member:
    def __init__(self, deck, log, worker, seq):
        self.database, self.initial, self.entries = load(deck)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.worker, self.seq, self.read = int(worker), int(seq), 0
        self.db = None

    def note(self, text):
        os.write(self.log, text.replace("\n", " ")[:500].encode() + b"\n")

    def open_once(self):
        db = sqlite3.connect(self.database, timeout=0, isolation_level=None)
        try:
            if EXTENSION:
                db.enable_load_extension(True)
                db.load_extension(EXTENSION)
                db.enable_load_extension(False)
            for _, sql in self.initial:
                db.execute(sql).fetchall()
            row = db.execute("PRAGMA turnstile_status").fetchone()
            return db, json.loads(row[0])["mode"] if row else "none"
        except sqlite3.Error:
            db.close()
            raise

    def open(self, entry):
        while not told_to_end():
            since = now()
            try:
                self.db, mode = self.open_once()
                self.note(f"o {since:.6f} {now():.6f} {mode}")
                return True
            except sqlite3.Error as e:
                self.note(f"e {since:.6f} {now():.6f} {self.seq} {entry} -1 {code(e)} {e}")
            release()
            time.sleep(0.1)
        return False

    def close(self):
        try:
            self.db.close()
        except sqlite3.Error as e:
            self.note(f"v {now():.6f} close: {e}")
        self.db = None

    def run(self, what, sql):
        values = {"w": self.worker, "s": self.seq, "r": self.read}
        row = None
        for n, found in enumerate(self.db.execute(sql, values)):
            row = found if n == 0 else row
        if what == "R" and row:
            self.read = row[0]
        if what == "E" and row and row[0] != 0:
            self.note(f"v {now():.6f} {self.seq} seen {row[0]!r}: {sql}")

    def child(self, manner):
        """The child of a fork in the middle of a transaction."""
        signal.alarm(25)
        self.seq = -self.seq
        db = self.db
        try:
            if manner == "rollback":
                db.execute("ROLLBACK")
            elif manner == "commit":
                db.execute("COMMIT")
            elif manner == "use":
                for sql in ("SELECT count(*) FROM rows", "DELETE FROM bulk", "COMMIT"):
                    db.execute(sql).fetchall()
        except sqlite3.Error:
            pass
        if manner in ("close", "own"):
            db.close()
        if manner.startswith("own"):
            step, since = -1, now()
            try:
                self.db, _ = self.open_once()
                step, since = 0, now()
                self.note(f"b {since:.6f} {self.seq} -1")
                self.run("C", "INSERT INTO rows VALUES(:w, :s, 0, 'child')")
                self.note(f"a {now():.6f} {self.seq}")
                if manner != "own-exit":
                    self.db.close()
            except sqlite3.Error as e:
                self.note(f"e {since:.6f} {now():.6f} {self.seq} -1 {step} {code(e)} {e}")
                if step == 0:
                    self.note(f"{'n' if code(e) & 255 == sqlite3.SQLITE_BUSY else 'u'} {now():.6f} {self.seq} {code(e)}")

    def fork(self, manner):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if os.fork() == 0:
            try:
                self.child(manner)
            finally:
                os._exit(0)

    def play(self, entry):
        self.seq += 1
        failed, asked = 0, False
        for step, (what, text) in enumerate(self.entries[entry]):
            if what == "P":
                time.sleep(int(text) / 1000)
            elif what == "O":
                self.close()
                if not self.open(entry):
                    return
            elif what == "F":
                self.fork(text)
            elif what == "X":
                self.note(f"x {now():.6f}")
                os.execv(sys.executable, [sys.executable, *sys.argv[:4], str(self.seq), str(entry + 1)])
            elif what == "D":
                exhaust(int(text))
            elif what == "d":
                release()
            else:
                since = now()
                if what == "C":
                    self.note(f"b {since:.6f} {self.seq} {entry}")
                    asked = True
                try:
                    self.run(what, text)
                except sqlite3.Error as e:
                    failed = code(e)
                    self.note(f"e {since:.6f} {now():.6f} {self.seq} {entry} {step} {failed} {e}")
                    if what == "C":
                        self.note(f"{'n' if failed & 255 in CERTAIN else 'u'} {now():.6f} {self.seq} {failed}")
                    break
                if what == "C":
                    self.note(f"a {now():.6f} {self.seq}")
                if now() - since > 0.5:
                    self.note(f"s {since:.6f} {now():.6f} {self.seq} {entry} {step}")
        release()
        if self.db.in_transaction:
            try:
                self.db.execute("ROLLBACK")
            except sqlite3.Error:
                pass
        if failed:
            if failed & 255 not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                self.close()
                self.open(entry)
        elif not asked:
            self.note(f"r {now():.6f} {self.seq} {entry}")


def exhaust(leave):
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(min(leave, len(taken))):
        os.close(taken.pop())


def release():
    while taken:
        os.close(taken.pop())


def main():
    deck, log, worker, seq, offset = sys.argv[1:6]
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    member = Member(deck, log, worker, seq)
    if member.open(-1):
        entry = int(offset) % len(member.entries)
        while member.db and not told_to_end():
            member.play(entry)
            entry = (entry + 1) % len(member.entries)
        if member.db:
            member.close()
    member.note(f"q {now():.6f}")


if __name__ == "__main__":
    main()
