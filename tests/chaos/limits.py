"""What members may be told, and how long they may be kept waiting."""

import collections
import datetime
import re
import sqlite3
import time

import plan as planning

SLACK = 5.0  # seconds: a statement's own work on a busy machine
AFTER = 2.0  # seconds after the broker's return in which connections find out that it was gone

BUSY, LOCKED, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, SCHEMA = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_SCHEMA)
# Works whose BUSY is SQL's own, or asked for: a stale snapshot, two files in either order, EXCLUSIVE beside others.
MAY_BE_BUSY = ("deferred", "pair", "journal", "vacuum", "checkpoint", "exhaust", "child")


def overlap(since, until, windows):
    return sum(max(0.0, min(until, b) - max(since, a)) for a, b in windows)


TAKEN_BACK = re.compile(r"(\S+)Z +DEBUG .*turn taken back.* database=(\d+)")
OPENED = re.compile(r"\S+ +INFO .*opened database=(\d+) name=\"([^\"]*)\.db\"")


def taken_back(log):
    """(database, seconds of the monotonic clock) of each turn that the broker has taken back, as its log tells."""
    ahead = time.time() - time.monotonic()
    names, found = {}, []
    for line in log.splitlines():
        if match := OPENED.match(line):
            names[match.group(1)] = match.group(2)
        elif match := TAKEN_BACK.match(line):
            at = datetime.datetime.fromisoformat(match.group(1)).replace(tzinfo=datetime.timezone.utc)
            found.append((names.get(match.group(2)), at.timestamp() - ahead))
    return found


class Limits:
    def __init__(self, round):
        self.round = round
        self.revoked = taken_back(round.broker.log())
        self.busy = collections.Counter()
        self.other = collections.Counter()
        self.worst = 0.0

    def check(self, logs):
        """What was wrong, as texts."""
        faults = []
        for log in logs:
            index = log.worker // 1000 - 1
            stops = [(a, b) for i, a, b in self.round.stops if i == index]
            for error in log.errors:
                faults += self.check_error(log, stops, *error)
            for since, until, seq, entry, step in log.slow:
                faults += self.check_time(log, stops, since, until, seq, entry, step)
        return faults

    def check_time(self, log, stops, since, until, seq, entry, step):
        waited = until - since - overlap(since, until, stops)
        if log.slot.how == "plain":
            return []
        self.worst = max(self.worst, waited)
        most = planning.LIMIT * (len(log.slot.deck.opening) + 1 if step < 0 else 1) + SLACK
        if waited <= most:
            return []
        what = "opening" if step < 0 else log.slot.deck.works[entry].lines[step]
        return [f"{log.slot.name} ({log.worker}), work {seq}: {waited:.1f} s in: {what}"]

    def check_error(self, log, stops, since, until, seq, entry, step, code, message):
        faults = self.check_time(log, stops, since, until, seq, entry, step)
        kind = "child" if seq < 0 else log.slot.deck.works[entry].kind if entry >= 0 else "open"
        kind = "open" if step < 0 and kind != "exhaust" else kind
        primary = code & 255
        if primary == BUSY:
            self.busy[kind] += 1
            if kind not in (*MAY_BE_BUSY, "open") and not self.excused(log, since, until):
                line = log.slot.deck.works[entry].lines[step]
                faults.append(f"{log.slot.name} ({log.worker}) at {since - self.round.started:.3f}, work {seq}, "
                                  f"{kind}: BUSY after {until - since:.3f} s: {line} ({code})")
            return faults
        self.other[kind, primary] += 1
        if self.allowed(log, kind, seq < 0, code, since, until):
            return faults
        return [*faults, f"{log.slot.name} ({log.worker}) at {since - self.round.started:.3f}, work {seq}, {kind}, step "
                         f"{step}: {message} ({code})"]

    def excused(self, log, since, until):
        """BUSY is SQL's own with several files, which members lock in a circle (BEGIN IMMEDIATE locks all of them), and
        in guest mode, where the locks are plain SQLite's; it is right when somebody was stopped, and cannot be helped without
        the broker. And a thread that the machine has kept off its processors for long loses a turn that it has not used: see
        docs/architecture.md."""
        deck = log.slot.deck
        guests = deck.main == "mixed" or "TURNSTILE_MODE" in self.round.env
        if deck.attached or guests or log.slot.how == "plain" or self.gone(since, until):
            return True
        if any(name == deck.main and since <= at <= until for name, at in self.revoked):
            return True
        slots = self.round.plan.slots
        return any(slots[i].deck.main == deck.main and since < b + 0.5 and until > a for i, a, b in self.round.stops)

    def gone(self, since, until):
        return any(since < b + AFTER and until > a for a, b in self.round.away)

    def allowed(self, log, kind, child, code, since, until):
        primary = code & 255
        if primary in (CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_INTERNAL):
            return False
        if primary == LOCKED and kind == "checkpoint" and log.slot.deck.main == "switch":
            # The first statement after a change to WAL, on a connection with temporary tables: sqlite3PagerCheckpoint runs a
            # statement of its own, whose read transaction on them is not ended when they are checkpointed next.
            return True
        if primary in (LOCKED, SCHEMA, PROTOCOL):
            return log.slot.how == "plain" or log.slot.deck.main == "mixed"
        if (primary == CANTOPEN or code == sqlite3.SQLITE_IOERR_DELETE_NOENT) and log.slot.deck.main in ("left", "right"):
            # Two that roll back the two files of one dead transaction both look for its super-journal, and the first removes
            # it before the second opens it, or removes it (pager.c, pager_delsuper).
            return True
        if primary == CANTOPEN and child and kind == "open" and log.slot.deck.main == "mixed":
            # Refused in guest mode, as long as what was inherited over the fork is open: SQLite would take its parent's
            # locks for its own.
            return True
        if log.slot.deck.main == "small" and primary in (FULL, IOERR, CANTOPEN):
            if any(since < b + AFTER and until > a for a, b in self.round.full):
                return True
        return kind in ("exhaust", "child") or self.gone(since, until)
