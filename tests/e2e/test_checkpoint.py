"""The broker's checkpointer: WALs are copied back off the commit path, stay bounded, and are never left alone."""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time

from harness import (Broker, PlainShell, SHELL, Record, Workers, acknowledged, check_rows, connect, create,
                     fails_without, lib, plain, run, timeout, wait_until, waits)

FRAME = 4096 + 24
# See LIMIT in src/checkpointer/job.rs: frames from which readers are waited for, in a turn, ever longer.
LIMIT = 8000


def traced(path, broker=None, **options):
    """A connection that is opened through turnstile, as all are but the one that loads the extension."""
    if broker:
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        load().close()
    options.setdefault("isolation_level", None)
    return sqlite3.connect(path, timeout=0, **options)


def load():
    """Loads the extension in this process, so that the connections that are opened from now on are traced."""
    db = sqlite3.connect(":memory:")
    db.enable_load_extension(True)
    db.load_extension(lib())
    return db


def frames(path):
    try:
        return os.path.getsize(path + "-wal") // FRAME
    except FileNotFoundError:
        return 0


def checkpoints(broker, path):
    entry = broker.database(path)
    return entry["checkpoints"] if entry else None


def write(w):
    """One row a commit, padded so that the WAL grows. Options: pad, pause."""
    keep = load()
    db = traced(w.path)
    db.execute("PRAGMA synchronous=NORMAL")
    pad = "x" * w.options.get("pad", 0)
    w.ready()
    seq = 0
    w.more["longest"] = 0
    while w.running():
        if w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?, ?)", (w.id, seq, pad)), seq):
            seq += 1
        if seq % 64 == 0:
            w.more["longest"] = max(w.more["longest"], frames(w.path))
    db.close()
    keep.close()


def made(broker, name="app.db"):
    path = create(broker.path(name))
    plain(path, "ALTER TABLE rows ADD COLUMN pad")
    return path


def fill(db, record, worker, first, rows, pad=1500):
    for seq in range(first, first + rows):
        db.execute("INSERT INTO rows VALUES(?, ?, ?)", (worker, seq, "x" * pad))
        record.add(worker, seq)


@fails_without("wal-left-to-writers")
def test_the_broker_checkpoints_and_the_wal_begins_anew():
    with Broker() as broker:
        path = made(broker)
        with Workers(1, write, 3.0, path, broker, options={"pad": 300}) as workers:
            workers.go()
            wait_until(lambda: (checkpoints(broker, path) or {}).get("done", 0) > 5, what="checkpoints")
            seen = checkpoints(broker, path)
            assert seen["by"] == "broker" and seen["reason"] is None, seen
            results = workers.wait()
        assert not sum(r["busy"] for r in results), results
        assert max(r["longest"] for r in results) < 4 * LIMIT, results
        check_rows(path, broker.record)


@fails_without("autocheckpoint-tells-raised")
def test_an_application_finds_its_own_settings():
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)

        def setting():
            return db.execute("PRAGMA wal_autocheckpoint").fetchone()[0]

        db.execute("INSERT INTO rows VALUES(0, 0, '')")
        assert setting() == 1000
        assert setting() == 1000
        # What it sets is what it gets, and is SQLite's to follow.
        assert db.execute("PRAGMA wal_autocheckpoint=0").fetchone()[0] == 0
        for seq in range(1, 1500):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        assert setting() == 0
        assert frames(path) > 1400, "an application that wants no checkpoints got one"
        assert checkpoints(broker, path)["done"] == 0
        # An explicit checkpoint keeps its results.
        busy, log, copied = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (busy, log, copied) == (0, 0, 0) and frames(path) == 0
        assert db.execute("PRAGMA wal_autocheckpoint=50").fetchone()[0] == 50
        for seq in range(2000, 2400):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
            assert frames(path) < 120
        assert setting() == 50 and checkpoints(broker, path)["done"] == 0
        assert db.execute("PRAGMA journal_size_limit=40000").fetchone()[0] == 40000
        db.execute("PRAGMA wal_autocheckpoint=1000")
        assert setting() == 1000
        for seq in range(3000, 7000):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        wait_until(lambda: checkpoints(broker, path)["done"], what="the broker's checkpoint")
        db.close()


@fails_without("autocheckpoint-set-early")
def test_members_do_not_checkpoint_while_the_broker_does():
    """SQLite sets a connection's automatic checkpoint after the auto-extensions have run: what is set there is lost."""
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("PRAGMA synchronous=NORMAL")
        for seq in range(600):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        wait_until(lambda: checkpoints(broker, path)["done"], what="the broker's checkpoint")
        pid = pid_of_checkpointer(broker)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "T", what="the stop")
            size = os.path.getsize(path)
            for seq in range(1500):
                db.execute("INSERT INTO rows VALUES(1, ?, ?)", (seq, "x" * 3000))
            assert frames(path) > 1400, frames(path)
            assert os.path.getsize(path) == size, "a member has copied frames into the database"
        finally:
            os.kill(pid, signal.SIGCONT)
        db.close()


@timeout(90)
def test_a_wal_that_begins_anew_is_cut_to_the_applications_size_limit():
    """The broker has it begin anew without cutting the file; the limit is a connection's, at its next commit."""
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("PRAGMA journal_size_limit=400000")
        record = Record(broker.record)
        longest, seq = 0, 0
        while (length := os.path.getsize(path + "-wal") if seq else 0) >= longest or not checkpoints(broker, path)["done"]:
            longest = max(longest, length)
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
            record.add(0, seq)
            seq += 1
        assert longest > 1000 * FRAME, longest
        assert length <= 400000, (length, longest)
        db.close()
        check_rows(path, broker.record)


@fails_without("attached-forgotten")
def test_another_database_of_the_connection_is_checkpointed_too():
    with Broker() as broker:
        path, other = made(broker), broker.path("plain.db")
        plain(other, "PRAGMA journal_mode=wal; CREATE TABLE rows(worker, seq, pad)")
        db = traced(path, broker, uri=True)
        db.execute("INSERT INTO main.rows VALUES(0, 0, '')")
        db.execute("ATTACH ? AS other", (f"file:{other}?vfs=unix-excl",))
        db.execute("PRAGMA other.locking_mode=EXCLUSIVE")
        for seq in range(3000):
            db.execute("INSERT INTO other.rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        assert frames(other) < 1500, frames(other)
        db.close()


@fails_without("checkpoint-beside-brokers", attempts=3)
@timeout(60)
def test_an_explicit_checkpoint_is_not_busy_for_the_brokers():
    with Broker() as broker:
        path = made(broker)
        with Workers(1, write, 5.0, path, broker, options={"pad": 1500}) as workers:
            db = traced(path, broker)
            workers.go()
            end = time.monotonic() + 4
            asked = 0
            while time.monotonic() < end:
                busy, log, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                assert not busy and log >= copied, (busy, log, copied)
                asked += 1
                time.sleep(0.02 * (1 + asked % 5))  # long enough for the WAL to become due for the broker's
            assert asked > 10
            workers.wait()
            db.close()
        check_rows(path, broker.record)


def read_overlapping(w):
    """Read transactions of `hold` seconds on two connections, each begun before the other ends."""
    keep = load()
    dbs = [traced(w.path) for _ in range(2)]
    hold = w.options["hold"]
    w.ready()
    dbs[1].execute("BEGIN")
    dbs[1].execute("SELECT max(rowid) FROM rows").fetchone()
    n = 0
    while w.running():
        new, old = dbs[n % 2], dbs[(n + 1) % 2]
        new.execute("BEGIN")
        new.execute("SELECT max(rowid) FROM rows").fetchone()
        time.sleep(hold / 2)
        old.execute("COMMIT")
        time.sleep(hold / 2)
        n += 1
    w.more["reads"] = n
    for db in dbs:
        db.close()
    keep.close()


@fails_without("readers-not-waited-for")
@timeout(120)
def test_the_wal_is_bounded_under_readers_that_always_overlap():
    with Broker() as broker:
        path = made(broker)
        with Workers(6, read_overlapping, 8.0, path, broker, first=10, options={"hold": 0.005}) as readers, \
                Workers(1, write, 6.0, path, broker, options={"pad": 300}) as writers:
            readers.ready()
            writers.ready()
            readers.go()
            writers.go()
            written, = writers.wait()
            read = readers.wait()
        assert not written["busy"], written
        assert written["committed"] > LIMIT, written
        assert min(r["reads"] for r in read) > 100, read
        assert written["longest"] < 2 * LIMIT, written
        check_rows(path, broker.record)


@timeout(60)
def test_the_wal_begins_anew_when_a_reader_that_stayed_is_gone():
    with Broker() as broker:
        path = made(broker)
        db, reader = traced(path, broker), traced(path)
        db.execute("PRAGMA synchronous=NORMAL")

        def log():
            return db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]

        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rows").fetchone()
        for seq in range(20000):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        grown = frames(path)
        assert grown > 2 * LIMIT, grown
        reader.execute("COMMIT")
        def begun_anew():
            for _ in range(500):
                db.execute("INSERT INTO rows VALUES(0, 0, ?)", ("x" * 3000,))
            return log() < LIMIT

        wait_until(begun_anew, what=f"a WAL that is begun anew: {grown} frames when the reader went")
        reader.close()
        db.close()


def pid_of_checkpointer(broker):
    return wait_until(lambda: broker.status()["broker"]["checkpointer"], what="a checkpointer")


def stop_in_turn(broker, path, seconds=20):
    """SIGSTOPs the checkpointer at a moment at which it has the turn, and returns its pid."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid = pid_of_checkpointer(broker)
        os.kill(pid, signal.SIGSTOP)
        turn = broker.database(path)["turn"]
        if turn and turn["pid"] == pid:
            assert turn["program"] == "turnstile checkpointer", turn
            return pid
        os.kill(pid, signal.SIGCONT)
        time.sleep(random.random() / 50)
    raise AssertionError("the checkpointer was never seen with the turn")


@waits
@fails_without("dead-checkpointer-keeps-locks")
@timeout(90)
def test_a_killed_checkpointer_is_replaced():
    with Broker() as broker:
        path = made(broker)
        with Workers(2, write, 8.0, path, broker, options={"pad": 1500}) as workers:
            workers.go()
            for _ in range(2):
                pid = stop_in_turn(broker, path)
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: pid_of_checkpointer(broker) != pid, what="another checkpointer")
                before = checkpoints(broker, path)["done"]
                wait_until(lambda: checkpoints(broker, path)["done"] > before + 2, what="more checkpoints")
            results = workers.wait()
        assert not sum(r["busy"] for r in results), results
        assert max(r["longest"] for r in results) < 2 * LIMIT, results
        check_rows(path, broker.record)


def is_stopped(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


@waits
@fails_without("stopped-checkpointer-left")
@timeout(90)
def test_a_stopped_checkpointer_holds_nobody_up():
    """With the turn. It goes on; one that is stopped again and again is replaced, and it is not its database's fault."""
    with Broker() as broker:
        path = made(broker)
        with Workers(2, write, 600.0, path, broker, options={"pad": 1500}) as workers:
            workers.go()
            pid = stop_in_turn(broker, path)
            wait_until(lambda: not is_stopped(pid), timeout=12, what="it to go on")
            pid = pid_of_checkpointer(broker)
            end = time.monotonic() + 20
            while pid_of_checkpointer(broker) == pid and time.monotonic() < end:
                try:
                    os.kill(pid, signal.SIGSTOP)
                except ProcessLookupError:
                    break
                time.sleep(0.005)
            assert wait_until(lambda: pid_of_checkpointer(broker) != pid, what="another checkpointer")
            before = checkpoints(broker, path)["done"]
            wait_until(lambda: checkpoints(broker, path)["done"] > before + 2, what="more checkpoints")
            assert checkpoints(broker, path)["by"] == "broker"
            for i in workers.processes:
                workers.kill(i)
        plain(path, "ALTER TABLE rows DROP COLUMN pad", retry=10)
        check_rows(path, broker.record, killed=range(2))


@waits
@fails_without("given-up-in-silence")
@timeout(90)
def test_members_checkpoint_when_the_checkpointer_keeps_dying():
    with Broker() as broker:
        path = made(broker)
        with Workers(2, write, 6.0, path, broker, options={"pad": 1500}) as workers:
            workers.go()
            seen = {None}
            for _ in range(7):  # the fourth death at this database, or at none
                def next_one():
                    by = (checkpoints(broker, path) or {}).get("by")
                    return {broker.status()["broker"]["checkpointer"]} - seen or by == "members"
                pid = wait_until(next_one, what="another checkpointer")
                if pid is True:
                    break
                seen |= pid
                os.kill(*pid, signal.SIGKILL)
            state = wait_until(lambda: (lambda c: c and c["by"] == "members" and c)(checkpoints(broker, path)),
                               what="members' own checkpoints")
            assert "within a minute" in state["reason"], state
            results = workers.wait()
        assert max(r["longest"] for r in results) < 2 * LIMIT, results
        assert "within a minute" in broker.log()
        check_rows(path, broker.record)


@fails_without("one-dies-for-all", message="are left to the members")
@timeout(90)
def test_a_database_at_which_the_checkpointer_keeps_dying_is_left_alone():
    """And no other one: what a member writes into its own database's index must not cost others their checkpoints."""
    with Broker() as broker:
        evil, good = made(broker), made(broker, "good.db")
        with Workers(1, write, 60.0, evil, broker, record=evil + ".record", options={"pad": 1500}) as first, \
                Workers(1, write, 60.0, good, broker, record=good + ".record", first=1,
                        options={"pad": 1500}) as second:
            first.go()
            second.go()
            for _ in range(7):  # at the first one the other may have been at work as well
                if checkpoints(broker, evil)["by"] == "members":
                    break
                assert checkpoints(broker, good)["by"] == "broker", "checkpoints of the good one are left to the members"
                os.kill(stop_in_turn(broker, evil), signal.SIGKILL)
                wait_until(lambda: (lambda e: not e["turn"] or e["turn"]["program"] != "turnstile checkpointer")
                           (broker.database(evil)), what="the dead one's turn to end")
            assert checkpoints(broker, good)["by"] == "broker", "checkpoints of the good one are left to the members"
            state = checkpoints(broker, evil)
            assert state["by"] == "members" and "at this database" in state["reason"], state
            before = checkpoints(broker, good)["done"]
            wait_until(lambda: checkpoints(broker, good)["done"] > before + 2, what="more checkpoints of the good one")
            assert checkpoints(broker, good)["by"] == "broker", "checkpoints of the good one are left to the members"
            first.kill(0)
            second.kill(1)
        check_rows(evil, evil + ".record", killed=(0,))
        check_rows(good, good + ".record", killed=(1,))


@waits
@fails_without("gone-broker-trusted")
@timeout(90)
def test_automatic_checkpoints_come_back_when_the_broker_is_gone():
    with Broker() as broker:
        path = made(broker)
        with Workers(1, write, 5.0, path, broker, options={"pad": 1500}) as workers:
            workers.go()
            wait_until(lambda: (checkpoints(broker, path) or {}).get("done", 0) > 2, what="checkpoints")
            broker.kill()
            result, = workers.wait()
        assert result["committed"] > 2 * LIMIT and not result["busy"], result
        assert result["longest"] < 2 * LIMIT, result
        check_rows(path, broker.record)
        broker.start()


def write_with_a_trace(w):
    """As `write`, by an application that sets a trace of its own once it has written."""
    keep = load()
    db = traced(w.path)
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("INSERT INTO rows VALUES('first', 0, '')")
    db.set_trace_callback(lambda text: None)
    w.ready()
    seq = 0
    w.more["longest"] = 0
    while w.running():
        seq += w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?, ?)", (w.id, seq, "x" * 1500)), seq)
        if seq % 64 == 0:
            w.more["longest"] = max(w.more["longest"], frames(w.path))
    db.close()
    keep.close()


@waits
@fails_without("given-back-by-trace-alone")
@timeout(90)
def test_automatic_checkpoints_come_back_where_an_application_traces():
    """Its trace has taken the place of ours, by which we hear of the next statement."""
    with Broker() as broker:
        path = made(broker)
        with Workers(1, write_with_a_trace, 5.0, path, broker) as workers:
            workers.go()
            wait_until(lambda: (checkpoints(broker, path) or {}).get("done", 0) > 2, what="checkpoints")
            broker.kill()
            result, = workers.wait()
        assert result["committed"] > 2 * LIMIT and not result["busy"], result
        assert result["longest"] < 2 * LIMIT, result
        broker.start()


@fails_without("checkpointer-is-anyone", attempts=3)
@timeout(90)
def test_exclusive_is_had_beside_a_checkpoint():
    with Broker() as broker:
        path = made(broker)
        record = Record(broker.record)
        db = traced(path, broker)
        db.execute("PRAGMA synchronous=NORMAL")
        for n in range(25):
            fill(db, record, "a", n * 1200, 1200)
            assert db.execute("PRAGMA journal_mode=delete").fetchone()[0] == "delete"
            if n % 5 == 4:
                db.execute("VACUUM")
            assert db.execute("PRAGMA journal_mode=wal").fetchone()[0] == "wal"
        db.close()
        check_rows(path, broker.record)


@fails_without("checkpointer-is-anyone", attempts=3)
@timeout(90)
def test_a_copy_right_after_the_last_close_is_complete():
    with Broker() as broker:
        path, copy = made(broker), broker.path("copy.db")
        record = Record(broker.record)
        traced(":memory:", broker).close()
        for n in range(30):
            db = traced(path)
            db.execute("PRAGMA synchronous=NORMAL")
            fill(db, record, "a", n * 1100, 1100)
            db.close()
            shutil.copy(path, copy)
            held = {(w, s) for w, s in plain(copy, "SELECT worker, seq FROM rows")}
            missing = set(acknowledged(broker.record)) - held
            assert not missing, f"{len(missing)} rows are not in a copy made after the last close"
        check_rows(path, broker.record)


@waits
@fails_without("short-wal-copied")
def test_a_wal_shorter_than_its_index_says_is_refused():
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("PRAGMA synchronous=NORMAL")
        for seq in range(500):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        size = os.path.getsize(path + "-wal")
        db.execute("BEGIN")
        for seq in range(500, 2500):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        hold = traced(path)
        hold.execute("BEGIN")
        hold.execute("SELECT count(*) FROM rows").fetchone()
        db.execute("COMMIT")
        os.truncate(path + "-wal", size)
        state = wait_until(lambda: (lambda c: c["by"] == "members" and c)(checkpoints(broker, path)),
                           what="the WAL to be refused")
        assert "bytes" in state["reason"] and "frames need" in state["reason"], state
        assert "checkpoints are left to its members" in broker.log()
        hold.close()
        db.close()


@fails_without("reserved-bytes-copied")
def test_a_database_with_reserved_bytes_is_left_to_its_members():
    with Broker() as broker:
        path = broker.path("app.db")
        run([SHELL, path, ".filectrl reserve_bytes 8", "PRAGMA journal_mode=wal",
             "CREATE TABLE rows(worker, seq, pad)"])
        with open(path, "rb") as f:
            assert f.read(21)[20] == 8, "the shell did not reserve bytes"
        db = traced(path, broker)
        db.execute("PRAGMA synchronous=NORMAL")
        longest = 0
        for seq in range(6000):
            db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
            longest = max(longest, frames(path))
        state = checkpoints(broker, path)
        assert state["by"] == "members" and "reserved" in state["reason"], state
        assert longest < 5000, longest
        db.close()


# --- whoever takes the automatic checkpoints away makes them, in every mode, or gives them back ----------------------

# The documented brake: a WAL of so many frames has outrun its checkpoint, and writers wait for its end.
BRAKE = 10_000
COMMITS = 6000


def grown(db, path, commits=COMMITS):
    """The longest that the WAL is over so many commits of one page each and more."""
    longest = 0
    for seq in range(commits):
        db.execute("INSERT INTO rows VALUES(0, ?, ?)", (seq, "x" * 3000))
        if seq % 100 == 0:
            longest = max(longest, frames(path))
    return max(longest, frames(path))


def alone(db, path, most=2000):
    """Where nobody but the connection itself can checkpoint: as on plain SQLite, 1000 frames and a commit's."""
    db.execute("PRAGMA synchronous=OFF")
    longest = grown(db, path)
    assert 500 < longest <= most, f"{longest} frames"


@fails_without("exclusive-left-to-the-broker")
def test_a_connection_in_exclusive_mode_checkpoints_for_itself():
    """From before its first read (its index is in its own memory then), and from the middle of its life."""
    with Broker() as broker:
        for reads in (False, True):
            path = made(broker, f"{reads}.db")
            db = traced(path, broker)
            if reads:
                db.execute("INSERT INTO rows VALUES(1, 0, '')")
                assert db.execute("PRAGMA wal_autocheckpoint").fetchone() == (1000,)
                db.execute("INSERT INTO rows VALUES(1, 1, '')")
            assert db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchone() == ("exclusive",)
            alone(db, path)
            db.close()
            assert plain(path, "PRAGMA integrity_check", retry=5) == [["ok"]]


@fails_without("exclusive-left-to-the-broker")
def test_a_connection_in_exclusive_mode_without_our_trace_checkpoints_for_itself():
    """An application that traces statements itself has taken the place of the trace by which we hear of them."""
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("INSERT INTO rows VALUES(1, 0, '')")
        db.set_trace_callback(lambda text: None)
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        alone(db, path)
        db.close()


@fails_without("exclusive-left-to-the-broker")
def test_the_broker_checkpoints_again_when_exclusive_mode_is_left():
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("SELECT * FROM rows").fetchall()
        for _ in range(3):
            assert db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchone() == ("exclusive",)
            # A WAL that begins anew keeps its length; what the broker has not copied yet is copied first, and appended to.
            length = frames(path)
            longest = grown(db, path, 5000)
            assert longest <= length + 2000, (longest, length)
            assert db.execute("PRAGMA locking_mode=NORMAL").fetchone() == ("normal",)
            before = checkpoints(broker, path)["done"]
            longest = grown(db, path, 3000)
            assert longest <= BRAKE + 1000, longest
            wait_until(lambda: checkpoints(broker, path)["done"] > before, what="the broker's checkpoint")
        db.close()


def test_an_exclusive_connection_that_the_extension_adopted_checkpoints_for_itself():
    with Broker() as broker:
        path = made(broker)
        db = connect(path, broker=broker, mode="gated")
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        alone(db, path)
        db.close()


def test_members_checkpoint_where_the_broker_does_not():
    """Without a checkpointer, and as guests; adopted connections and others."""
    for arguments, guest in (["--no-checkpointer"], False), ([], True):
        with Broker(*arguments) as broker:
            for adopted in (False, True):
                path = made(broker, f"{adopted}.db")
                with contextlib.ExitStack() as stack:
                    if guest:
                        shell = stack.enter_context(PlainShell(path))
                        shell.run("SELECT count(*) FROM rows")
                    db = connect(path, broker=broker) if adopted else traced(path, broker)
                    alone(db, path)
                    db.close()


def test_the_wal_is_bounded_by_the_brake_where_the_broker_checkpoints():
    with Broker() as broker:
        for adopted in (False, True):
            path = made(broker, f"{adopted}.db")
            db = connect(path, broker=broker) if adopted else traced(path, broker)
            db.execute("PRAGMA synchronous=OFF")
            longest = grown(db, path, 15_000)
            assert longest <= BRAKE + 1000, longest
            db.close()


def test_an_exclusive_connection_goes_on_checkpointing_without_a_broker():
    with Broker() as broker:
        path = made(broker)
        db = traced(path, broker)
        db.execute("INSERT INTO rows VALUES(1, 0, '')")
        broker.kill()
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        alone(db, path)
        db.execute("PRAGMA locking_mode=NORMAL")
        alone(db, path, most=2 * 4000 + 1000)  # it finds out that the broker is gone at the next length at which it is told
        db.close()
