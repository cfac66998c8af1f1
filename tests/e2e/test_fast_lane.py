"""The fast lane: what an uncontended transaction costs, and what becomes of it when the broker is gone."""

import os
import re
import shutil
import tempfile

import harness
from harness import CACHE, Broker, Skip, connect, create, fails_without, lib, plain, run_workers, status_of

PROGRAM = os.path.join(CACHE, "bin", "transactions")


def skip_without(program):
    if not shutil.which(program):
        raise Skip(f"{program} is not installed")
    if not os.path.exists(PROGRAM):
        raise Skip(f"{PROGRAM} is missing: run tests/install")


def between_marks(db, kind, n, extension, env):
    """The system calls of n transactions, by name."""
    with tempfile.NamedTemporaryFile("r", prefix="ts-strace-") as trace:
        harness.run(["strace", "-f", "-o", trace.name, PROGRAM, db, extension, kind, str(n)], env={**os.environ, **env})
        text = trace.read()
    inside = text[text.index('"begin\\n"'):text.index('"end\\n"')].splitlines()[1:-1]
    calls = {}
    for line in inside:
        name = re.match(r"(?:\d+\s+)?(\w+)\(", line)
        assert name, line
        calls[name[1]] = calls.get(name[1], 0) + 1
    return calls


def test_an_uncontended_read_makes_no_system_call():
    skip_without("strace")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker, mode="gated")  # else the WAL goes with the last close
        holder.execute("INSERT INTO rows VALUES('h', 0)")
        calls = between_marks(db, "read", 200, lib(), broker.env)
        assert calls == {}, calls
        holder.close()
        beside = create(broker.path("plain.db"))
        plain_calls = between_marks(beside, "read", 200, "-", {})
        assert sum(plain_calls.values()) >= 400, f"plain SQLite makes none either: {plain_calls}"


def test_an_uncontended_write_asks_nobody():
    """It writes the WAL, looks once whether its descriptors are still its own, and once a clock tick at most whether the
    gate still stands. No lock, no message, no wake-up."""
    skip_without("strace")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        holder = connect(db, broker=broker, mode="gated")
        holder.execute("INSERT INTO rows VALUES('h', 0)")
        n = 50
        calls = between_marks(db, "write", n, lib(), broker.env)
        stat = sum(calls.pop(name, 0) for name in ("fstat", "newfstatat"))
        assert stat <= n, f"{stat} looks at descriptors in {n} transactions"
        looks = calls.pop("fcntl", 0)
        assert looks <= n, f"{looks} looks at the gate in {n} transactions"
        assert set(calls) <= {"pwrite64", "pread64"}, calls
        holder.close()


def callgrind(db, kind, n, extension, env, out):
    harness.run(["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", PROGRAM, db, extension, kind, str(n)],
         env={**os.environ, **env}, timeout=120)
    totals, names, files, current, own = {}, {}, {}, None, {}
    calls_malloc, target = 0, None
    with open(out) as f:
        for line in f:
            if m := re.match(r"(c?)(ob|fn)=\((\d+)\)(?: (.*))?", line):
                table = files if m[2] == "ob" else names
                if m[4]:
                    table[m[3]] = m[4].strip()
                name = table.get(m[3], "")
                if m[2] == "fn":
                    if m[1]:
                        target = name
                    else:
                        current, own["fn"] = name, name
                elif not m[1]:
                    own["ob"] = name
            elif m := re.match(r"calls=(\d+)", line):
                if target and re.match(r"(malloc|calloc|realloc|posix_memalign|aligned_alloc)\b", target):
                    calls_malloc += int(m[1])
                next(f)  # the callee's cost
            elif m := re.match(r"[+\-*\d]\S* (\d+)\s*$", line):
                totals[own.get("ob", "")] = totals.get(own.get("ob", ""), 0) + int(m[1])
    ours = sum(n for ob, n in totals.items() if "libturnstile" in ob)
    return sum(totals.values()), ours, calls_malloc


def each(db, kind, extension, env, broker):
    """Instructions, those of them in turnstile, and allocations of one transaction: the difference of two runs."""
    few, many = 100, 300
    a = callgrind(db, kind, few, extension, env, broker.path("few.out"))
    b = callgrind(db, kind, many, extension, env, broker.path("many.out"))
    return [(y - x) / (many - few) for x, y in zip(a, b)]


def test_what_a_transaction_costs_in_instructions():
    """Counted, not timed. turnstile's own part of a read is bounded, and it allocates nothing that plain SQLite does
    not."""
    skip_without("valgrind")
    with Broker() as broker:
        db, beside = create(broker.path("app.db")), create(broker.path("plain.db"))
        holder = connect(db, broker=broker, mode="gated")
        holder.execute("INSERT INTO rows VALUES('h', 0)")
        for kind, most in (("read", 1550), ("write", 6200)):
            total, ours, allocations = each(db, kind, lib(), broker.env, broker)
            plain_total, none, plain_allocations = each(beside, kind, "-", {}, broker)
            assert none == 0 and ours > 0, (none, ours)
            assert ours <= most, f"{kind}: {ours:.0f} instructions in turnstile, {total:.0f} in all ({plain_total:.0f})"
            assert allocations <= plain_allocations + 0.5, (kind, allocations, plain_allocations)
        holder.close()


def test_a_broker_that_is_gone_changes_nothing_for_members():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            db = create(broker.path(f"{journal}.db"), journal)
            one, two = connect(db, broker=broker, mode="gated"), connect(db, mode="gated")
            one.execute("INSERT INTO rows VALUES('before', 1)")
            if journal == "wal":
                continue
            broker.kill()
            for i in range(100):
                (one if i % 2 else two).execute("INSERT INTO rows VALUES('after', ?)", (i,))
            assert two.execute("SELECT count(*) FROM rows").fetchall() == [(101,)]
            for c in (one, two):
                c.close()
            assert plain(db, "PRAGMA integrity_check", retry=5) == [["ok"]]
            assert plain(db, "SELECT count(*) FROM rows") == [["101"]]


@fails_without("other-layout-version")
def test_members_are_on_the_fast_lane_unless_the_segment_is_laid_out_otherwise():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES('m', 1)")
        assert member.execute("SELECT count(*) FROM rows").fetchall() == [(1,)]
        [seen] = broker.members(db)
        assert seen["lane"] == status_of(member)["lane"], (seen, status_of(member))
        assert seen["lane"] == "fast", seen
        member.close()


def on_lanes(w):
    """Inserts. Options: lanes ("socket", "mixed")."""
    socket = w.options["lanes"] == "socket" or w.id % 2
    os.environ["TURNSTILE_PLANTED"] = "no-fast-lane" if socket else ""
    db = w.connect()
    seen = status_of(db)["lane"]
    assert seen == ("socket" if socket else "fast"), seen
    w.ready()
    seq = 0
    while w.running():
        seq += w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq)
    db.close()


def test_the_socket_lane_and_a_mixture_keep_the_same_rules():
    """In the build in which a member can be kept off the fast lane."""
    with harness.planted_build():
        for lanes in ("socket", "mixed"):
            for journal in ("wal", "delete"):
                with Broker() as broker:
                    db = create(broker.path("app.db"), journal)
                    results = run_workers(4, on_lanes, 2.0, db, broker, options={"lanes": lanes})
                    assert sum(r["busy"] for r in results) == 0, (lanes, journal, results)
                    # Fair in turns, not in transactions: on the fast lane a turn is a streak of them, by messages
                    # it is one.
                    assert all(r["worst_wait"] < 1 and r["committed"] > 0 for r in results), (lanes, results)
                    harness.check_rows(db, broker.record)


def counter(w):
    """BEGIN; SELECT; UPDATE; COMMIT on one row. Options: begin (the setting)."""
    db = w.connect()
    w.ready()

    def write():
        try:
            db.execute("BEGIN")
            [(n,)] = db.execute("SELECT n FROM counter WHERE id = 1").fetchall()
            db.execute("UPDATE counter SET n = ? WHERE id = 1", (n + 1,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    while w.running():
        w.measure(write)
    db.close()


def count_up(broker, name, mode, journal="wal"):
    db = create(broker.path(name), journal)
    plain(db, "CREATE TABLE counter(id INTEGER PRIMARY KEY, n); INSERT INTO counter VALUES(1, 0)")
    os.environ["TURNSTILE_BEGIN"] = mode
    try:
        results = run_workers(4, counter, 2.0, db, broker)
    finally:
        del os.environ["TURNSTILE_BEGIN"]
    [[n]] = plain(db, "SELECT n FROM counter", retry=5)
    assert int(n) == sum(r["committed"] for r in results), "an acknowledged increment is missing"
    return sum(r["busy"] for r in results), sum(r["committed"] for r in results)


@fails_without("upgrades-not-learned")
def test_transactions_that_read_first_learn_to_take_their_turn():
    with Broker() as broker:
        for journal in ("wal", "delete"):
            busy, committed = count_up(broker, f"{journal}.db", "learn", journal)
            assert committed > 100 and busy <= 16, f"{journal}: {busy} failures beside {committed} commits"


def test_immediate_takes_the_turn_at_the_first_statement():
    with Broker() as broker:
        busy, committed = count_up(broker, "app.db", "immediate")
        assert busy == 0 and committed > 100, (busy, committed)


def test_deferred_is_plain_sqlite():
    with Broker() as broker:
        busy, committed = count_up(broker, "app.db", "deferred")
        assert busy > 16, f"{busy} failures beside {committed} commits: nothing to learn here"
