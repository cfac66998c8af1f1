"""The judgement, by plain SQLite, after all have ended: what was acknowledged is there exactly once, what was not begun is
not there, and what transactions keep is kept."""

import collections
import glob
import os
import sqlite3

import decks

ACKNOWLEDGED, REFUSED, OPEN = "acknowledged", "refused", "open"


class Log:
    """What one member has written down: README.md says how."""

    def __init__(self, path, slot):
        self.slot = slot
        self.worker = int(os.path.basename(path).rsplit("-", 1)[1])
        self.works = {}  # seq: [entry, outcome]
        self.errors = []  # (since, until, seq, entry, step, code, message)
        self.slow = []  # (since, until, seq, entry, step)
        self.opened = collections.Counter()
        self.faults = []
        self.reads = 0
        with open(path, "rb") as f:
            for line in f:
                if line.endswith(b"\n"):  # else the process was killed while it wrote the line
                    self._line(line.decode(errors="replace").split())

    def _line(self, w):
        if w[0] == "b":
            if int(w[2]) in self.works:
                self.faults.append(f"work {w[2]} begun twice")
            self.works[int(w[2])] = [int(w[3]), OPEN]
        elif w[0] in "anu":
            self.works[int(w[2])][1] = {"a": ACKNOWLEDGED, "n": REFUSED, "u": OPEN}[w[0]]
        elif w[0] == "e":
            self.errors.append((float(w[1]), float(w[2]), *(int(x) for x in w[3:7]), " ".join(w[7:])))
        elif w[0] == "s":
            self.slow.append((float(w[1]), float(w[2]), *(int(x) for x in w[3:6])))
        elif w[0] == "o":
            self.opened[w[3]] += 1
        elif w[0] == "v":
            self.faults.append(" ".join(w[2:]))
        elif w[0] == "r":
            self.reads += 1


def read_logs(directory, slots):
    logs = []
    for n, slot in enumerate(slots):
        logs += [Log(path, slot) for path in glob.glob(os.path.join(directory, f"{n:02}-*"))]
    return logs


def work_of(log, entry):
    """A forked child's row, which no deck has, is entry -1."""
    return decks.Work("child", (), 1, False) if entry < 0 else log.slot.deck.works[entry]


def check_database(name, path, logs):
    """What is wrong with one database, and {(worker, seq)} of its rows of pairs."""
    faults = []
    db = sqlite3.connect(path, timeout=5, isolation_level=None)
    try:
        integrity = [r[0] for r in db.execute("PRAGMA integrity_check")]
        if integrity != ["ok"]:
            faults.append(f"integrity_check: {integrity[:5]}")
        found = collections.Counter()
        kinds = {}
        for worker, seq, inc, kind in db.execute("SELECT worker, seq, inc, kind FROM rows NOT INDEXED"):
            found[worker, seq] += 1
            kinds[worker, seq] = kind
        faults += check_rows(name, found, kinds, logs)
        [(n,)] = db.execute("SELECT sum(n) FROM shared")
        [(rows,)] = db.execute("SELECT count(*) FROM rows NOT INDEXED WHERE inc")
        if n != rows:
            faults.append(f"the shared counter is {n}, but {rows} transactions have counted it up")
        wrong = db.execute("SELECT w, sum(a), sum(b) FROM (SELECT worker AS w, n AS a, 0 AS b FROM counters UNION ALL "
                           "SELECT worker, 0, 1 FROM rows NOT INDEXED WHERE inc) GROUP BY w HAVING sum(a)<>sum(b)").fetchall()
        if wrong:
            faults.append(f"members' counters (member, counter, rows): {wrong[:5]}")
        [(money,)] = db.execute("SELECT sum(balance) FROM accounts")
        if money != decks.MONEY:
            faults.append(f"the accounts hold {money} together, not {decks.MONEY}")
        faults += check_bulk(name, db, logs)
    except sqlite3.Error as e:
        faults.append(f"plain SQLite cannot read it: {e}")
        found = collections.Counter()
    finally:
        db.close()
    return [f"{name}: {f}" for f in faults], found


def check_rows(name, found, kinds, logs):
    lost, back, twice, known = [], [], [], set()
    for log in logs:
        for seq, (entry, outcome) in log.works.items():
            work, deck = work_of(log, entry), log.slot.deck
            if not work.rows or name not in (deck.main, deck.attached if work.both else None):
                continue
            key = (log.worker, seq)
            known.add(key)
            n = found.get(key, 0)
            where = (log.slot.name, *key, work.kind)
            if n > 1:
                twice.append(where)
            if outcome == ACKNOWLEDGED and n == 0:
                lost.append(where)
            if outcome == REFUSED and n:
                back.append(where)
    never = [(*k, kinds[k]) for k in found if k not in known]
    said = (("acknowledged and lost", lost), ("there more than once", twice),
            ("there, though the commit was refused", back), ("there, though no commit was asked for", never))
    return [f"{len(rows)} {what}, such as {rows[:4]}" for what, rows in said if rows]


def check_bulk(name, db, logs):
    """A member's bulk rows are those of one transaction, all of them, and not older than the last acknowledged."""
    faults, last = [], {}
    for log in logs:
        if log.slot.deck.main == name:
            done = [s for s, (e, o) in log.works.items() if o == ACKNOWLEDGED and e >= 0
                    and any(line.startswith("S DELETE FROM bulk") for line in log.slot.deck.works[e].lines)
                    and log.slot.deck.works[e].kind != "back"]
            last[log.worker] = max(done, default=0)
    rows = db.execute("SELECT worker, min(seq), max(seq), count(*), min(of), max(of), count(DISTINCT k), "
                      "sum(text NOT LIKE worker||'/'||seq||'/'||k||'x%') FROM bulk GROUP BY worker").fetchall()
    for worker, low, high, n, least, most, different, wrong in rows:
        if low != high or n != least or n != most or different != n or wrong:
            faults.append(f"half a transaction in bulk: member {worker}, transactions {low} to {high}, {n} rows of {most}")
    there = {r[0]: r[2] for r in rows}
    old = [(w, s, there.get(w)) for w, s in last.items() if s and there.get(w, 0) < s]
    if old:
        faults.append(f"bulk rows are older than what was acknowledged (member, acknowledged, there): {old[:5]}")
    return faults


def judge(directory, databases, slots, path_of):
    """(faults, logs). Both files of a transaction over two rollback journals have it, or none."""
    logs = read_logs(directory, slots)
    faults = [f"{log.slot.name}: {f}" for log in logs for f in log.faults]
    found = {}
    for name in databases:
        wrong, found[name] = check_database(name, path_of(name), logs)
        faults += wrong
    if "left" in found and "right" in found:
        for log in logs:
            for seq, (entry, _) in log.works.items():
                if work_of(log, entry).both and log.slot.deck.main in ("left", "right"):
                    key = (log.worker, seq)
                    if found["left"][key] != found["right"][key]:
                        faults.append(f"left and right: a transaction over both is in one: {log.slot.name} {key}")
    return faults, logs
