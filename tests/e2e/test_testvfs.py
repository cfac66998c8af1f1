"""VFSes above ours: SQLite's `testvfs`, which has shared memory of its own, so that ours never sees the wal-index."""

import os

import harness
from harness import CACHE, Broker, Skip, fails_without, lib

PROGRAM = os.path.join(CACHE, "bin", "testfixture")

# All pages are in the WAL, which comes to the copy with its process gone: no page of the database file is read.
TWO_READERS = """
sqlite3 db first.db
db eval {PRAGMA journal_mode=WAL; CREATE TABLE t1(a); INSERT INTO t1 VALUES(1)}
file copy first.db copy.db
file copy first.db-wal copy.db-wal
db close
testvfs T -default 1
sqlite3 db copy.db
sqlite3 db2 copy.db
puts [db eval {PRAGMA turnstile_status}]
db eval {BEGIN; SELECT * FROM t1}
puts "second reader: [db2 eval {SELECT * FROM t1}]"
"""


@fails_without("probation-until-a-page")
def test_a_wal_that_opens_ends_the_look_for_a_hot_journal():
    """At first sight of a database SHARED is one seat's until that has looked for a hot journal."""
    if not os.path.exists(PROGRAM):
        raise Skip("testfixture is missing: run tests/install")
    with Broker() as broker:
        with open(broker.path("two.tcl"), "w") as f:
            f.write(TWO_READERS)
        env = {**broker.env, "TURNSTILE_EXTENSION": lib(), "TURNSTILE_WAIT": "100ms"}
        done = harness.run([PROGRAM, "two.tcl"], env=env, cwd=broker.dir)
        assert '"gated"' in done.stdout, done.stdout
        assert "second reader: 1" in done.stdout, done.stdout + done.stderr
