"""The broker dies, or is replaced: members go on, the next broker takes everything over, and nothing is ever split."""

import contextlib
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import time
import traceback

import harness
from harness import (Broker, PYTHON, PlainError, Skip, Workers, check_rows, connect, create, fails_without, plain,
                     status_of, timeout, wait_until, waits)

# The long form: `KILLS=200 python3 tests/e2e/run.py --only killed_under_load`.
KILLS = int(os.environ.get("KILLS", "12"))


# --- processes ------------------------------------------------------------------------------------------------

def processes_of(broker, name):
    """Pids of what brokers of this socket have started under this name, whichever of them did."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/comm", errors="replace") as comm, \
                    open(f"/proc/{pid}/environ", "rb") as environ:
                ours = f"TURNSTILE_SOCKET={broker.socket}".encode() in environ.read().split(b"\0")
                if comm.read() == name + "\n" and ours:
                    found.append(int(pid))
    return found


def keepers(broker):
    return processes_of(broker, "turnstile-keep")


def kill_keeper(broker):
    pid = broker.status()["broker"]["keeper"]
    # It has just been started, perhaps, and does not bear its name yet.
    wait_until(lambda: keepers(broker) == [pid], what="the keeper")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in keepers(broker), what="the keeper's end")


def kill_both(broker):
    """Broker and keeper at once: neither sees the other end."""
    pid = broker.status()["broker"]["keeper"]
    os.kill(pid, signal.SIGSTOP)
    broker.kill()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not keepers(broker), what="the keeper's end")


def nothing_left(broker):
    """No process and no socket of a broker that has ended."""
    wait_until(lambda: not keepers(broker), what="the keeper's end")
    left = [p for p in (broker.socket, broker.socket + ".keeper") if os.path.exists(p)]
    assert not left, left


def replaced(broker):
    """Another broker process takes over. The test's broker is that one from now on."""
    old = broker.process
    arguments, broker.arguments = broker.arguments, [*broker.arguments, "--replace"]
    try:
        broker.process = None
        with open(broker.logfile, "ab") as log:
            env = {"NO_COLOR": "1", **broker.env}
            broker.process = subprocess.Popen([harness.bin(), "serve", "--socket", broker.socket, *broker.arguments],
                                              stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        assert old.wait(20) == 0, old.returncode
        wait_until(lambda: broker.answers() or broker.process.poll() is not None, what="the next broker")
        assert broker.alive(), harness.tail(broker.log())
    finally:
        broker.arguments = arguments


# --- under load -----------------------------------------------------------------------------------------------

def stays(w):
    """In from the beginning to the end: whatever happens to the broker, no transaction may fail."""
    db = w.connect()
    db.execute("PRAGMA synchronous=NORMAL")
    w.ready()
    seq = 0
    while w.running():
        def write():
            if seq % 3:
                db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
            else:
                db.execute("BEGIN IMMEDIATE")
                db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
                db.execute("COMMIT")
        assert w.measure(write, seq), "BUSY"
        seq += 1
        if seq % 50 == 0:
            assert db.execute("SELECT count(*) FROM rows WHERE worker = ?", (w.id,)).fetchone() == (seq,)
    db.close()


def comes_and_goes(w):
    """Opens, writes and closes. Between two brokers it may not get in; once in, nothing fails."""
    w.connect().close()
    w.ready()
    seq, outside = 0, 0
    while w.running():
        try:
            db = w.connect()
        except (sqlite3.Error, AssertionError):
            outside += 1
            time.sleep(0.005)
            continue
        for _ in range(5):
            assert w.measure(lambda: db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq)), seq), "BUSY"
            seq += 1
        db.close()
    w.more["outside"] = outside


def loaded(broker, rounds, change, stays=stays):
    """Calls `change` again and again while six members stay in and two come and go. Returns the database's path."""
    db = create(broker.path("app.db"))
    waits = []
    with Workers(6, stays, 600.0, db, broker) as stayers, \
            Workers(2, comes_and_goes, 600.0, db, broker, first=6) as others:
        stayers.go()
        others.go()
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        for n in range(rounds):
            before = os.path.getsize(broker.record)
            wait_until(lambda: os.path.getsize(broker.record) > before + 2000, what="work to go on")
            change(n)
            begun = time.monotonic()
            connect(db, mode="gated").close()
            waits.append(time.monotonic() - begun)
            for programs in (stayers, others):
                for i, p in programs.processes.items():
                    assert p.poll() is None, (n, i, programs._stderr(i))
        mode = broker.database(db)["mode"]
        assert mode == "gated", mode
        for programs in (stayers, others):
            for i in programs.processes:
                programs.kill(i)
    rows = check_rows(db, broker.record, killed=range(8))
    print(f"{rounds} rounds, {rows} rows, newcomers in within {max(waits):.3f} s")
    assert max(waits) < 1.0, waits
    return db


@timeout(900)
@fails_without("keeper-told-nothing,members-not-looked-for,sessions-end-with-the-broker")
def test_killed_under_load():
    """No transaction of a member fails, nothing acknowledged is lost, and newcomers are in at once."""
    with Broker() as broker:
        def kill(n):
            broker.kill()
            if n % 2:
                time.sleep(0.02)
            broker.start()
            # Those who stay are known, whether they have had anything to say to this broker or not.
            assert len(broker.members(broker.path("app.db"))) >= 6
        loaded(broker, KILLS, kill)
        broker.stop()
        nothing_left(broker)
        broker.start()


@timeout(600)
def test_replaced_under_load():
    """`serve --replace`: another process takes over, and nobody notices."""
    with Broker() as broker:
        db = loaded(broker, max(4, KILLS // 4), lambda n: replaced(broker))
        connect(db, mode="gated").close()


def knocks(w):
    """Opens, writes and closes, without a pause: nobody may be refused."""
    w.connect().close()
    w.ready()
    seq = 0
    while w.running():
        # In a process of its own: this one's seat would rest, and be used again.
        child = os.fork()
        if child == 0:
            try:
                with contextlib.closing(w.connect()) as db:
                    db.execute("INSERT INTO rows VALUES(?, ?)", (w.id, seq))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "refused"
        w.record.add(w.id, seq)
        seq += 1


@timeout(240)
@fails_without("listener-not-handed-over", attempts=2)
def test_nobody_is_refused_while_the_broker_is_replaced():
    """With databases open, and with none: then there has been no keeper."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Workers(3, knocks, 600.0, db, broker) as workers:
            workers.go()
            for n in range(30):
                before = os.path.getsize(broker.record)
                wait_until(lambda: os.path.getsize(broker.record) > before + 50, what="work to go on")
                replaced(broker)
                for i, p in workers.processes.items():
                    assert p.poll() is None, (n, i, workers._stderr(i))
            for i in workers.processes:
                workers.kill(i)
        check_rows(db, broker.record, killed=range(3))
        broker.stop()
        nothing_left(broker)


def on_the_socket_lane(w):
    os.environ["TURNSTILE_PLANTED"] = ",".join(["no-fast-lane", *w.options.get("planted", [])])
    stays(w)


def members_on_the_socket_lane(change, rounds=6, planted=""):
    """In the build in which a member can be kept off the fast lane."""
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    before = os.environ.get("TURNSTILE_TARGET")
    os.environ["TURNSTILE_TARGET"] = harness.planted_target()
    try:
        with Broker() as broker:
            loaded(broker, rounds, lambda n: change(broker), on_the_socket_lane)
    finally:
        os.environ.pop("TURNSTILE_TARGET") if before is None else os.environ.update(TURNSTILE_TARGET=before)


@contextlib.contextmanager
def planted_build(rule):
    """In the build in which rules can be taken away; yields the environment in which this one is."""
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    before = os.environ.get("TURNSTILE_TARGET")
    os.environ["TURNSTILE_TARGET"] = harness.planted_target()
    try:
        yield {"TURNSTILE_PLANTED": ",".join([rule, os.environ.get("TURNSTILE_PLANTED", "")])}
    finally:
        os.environ.pop("TURNSTILE_TARGET") if before is None else os.environ.update(TURNSTILE_TARGET=before)


def restart(broker):
    broker.kill()
    broker.start()


@timeout(300)
def test_members_on_the_socket_lane_go_on_with_the_next_broker():
    """Each of their locks is a message. One whose answer was lost is asked for again, of a broker that has taken back
    what the last one granted."""
    members_on_the_socket_lane(restart)
    members_on_the_socket_lane(replaced)


# --- who is there, and who is not -----------------------------------------------------------------------------

IDLE = """
import sys
sys.path.insert(0, sys.argv[1])
import harness
db = harness.connect(sys.argv[2])
for line in sys.stdin:
    try:
        if line == "close\\n":
            db.close()
        elif line == "again\\n":
            db = harness.connect(sys.argv[2])
        elif line == "nameless\\n":
            with open("/proc/self/comm", "wb") as f:
                f.write(bytes([255, 254]))
        elif line == "more\\n":
            more = harness.connect(sys.argv[2])
        elif line == "unseen\\n":
            import ctypes
            ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody without CAP_SYS_PTRACE looks into it
        else:
            db.execute(line)
        print("done", flush=True)
    except Exception as e:
        print(type(e).__name__, e, flush=True)
"""


class Other:
    """A member in a process of its own, which does what it is told."""

    def __init__(self, path, broker, uid=None):
        user = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
        self.process = subprocess.Popen([PYTHON, "-c", IDLE, harness.HERE, path], env=broker.env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, **user)
        self.says("SELECT 1")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def heard(self):
        return self.process.stdout.readline().strip()

    def says(self, line, expected="done"):
        self.tell(line)
        heard = self.heard()
        assert heard == expected, (line, heard)

    def kill(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


def shut_to_plain(path):
    try:
        plain(path, "SELECT count(*) FROM rows")
    except PlainError as e:
        assert "locked" in str(e), e
        return True
    return False


@fails_without("keeper-told-nothing,members-not-looked-for")
def test_an_idle_member_keeps_nobody_out_once_a_broker_is_back():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as idle:
            broker.kill()
            assert shut_to_plain(db)
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            c.execute("INSERT INTO rows VALUES('new', 1)")
            assert len(broker.members(db)) == 2
            # It leaves as if it had been this broker's from the beginning.
            idle.says("INSERT INTO rows VALUES('idle', 1)")
            idle.says("close")
            c.close()
            assert plain(db, "SELECT count(*) FROM rows") == [["2"]]


@fails_without("keeper-told-nothing,members-not-looked-for")
def test_who_dies_while_no_broker_is_there_is_cleared_by_the_next():
    with Broker(env={"TURNSTILE_WAIT": "2s"}) as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as holder, Other(db, broker) as waiter:
            holder.says("BEGIN IMMEDIATE")
            holder.says("INSERT INTO rows VALUES('lost', 1)")
            broker.kill()
            waiter.tell("INSERT INTO rows VALUES('kept', 1)")  # waits for the turn
            holder.kill()
            broker.start()
            assert waiter.heard() == "done"
            c = connect(db, broker=broker, mode="gated")
            assert c.execute("SELECT worker FROM rows").fetchall() == [("kept",)]
            c.close()


@fails_without("keeper-keeps-for-ever")
def test_the_gate_opens_when_all_members_have_died_without_a_broker():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as one, Other(db, broker) as two:
            one.says("INSERT INTO rows VALUES('one', 1)")
            broker.kill()
            one.kill()
            assert shut_to_plain(db)
            two.kill()
            assert plain(db, "SELECT count(*) FROM rows", retry=1) == [["1"]]
        nothing_left(broker)
        broker.start()
        connect(db, broker=broker, mode="gated").close()


@fails_without("gate-opened-over-a-checkpoint")
def test_the_gate_stands_as_long_as_the_dead_brokers_checkpointer_may_write():
    from test_checkpoint import checkpoints, made, write
    with Broker() as broker:
        db = made(broker)
        with Workers(1, write, 600.0, db, broker, options={"pad": 300}) as workers:
            workers.go()
            wait_until(lambda: (checkpoints(broker, db) or {}).get("done"), what="a checkpoint")
            checkpointer = broker.status()["broker"]["checkpointer"]
            os.kill(checkpointer, signal.SIGSTOP)
            broker.kill()
            workers.kill(0)
        try:
            time.sleep(0.5)  # longer than the keeper takes to look
            assert shut_to_plain(db), "a plain client got in beside a checkpoint"
        finally:
            os.kill(checkpointer, signal.SIGKILL)
        plain(db, "SELECT count(*) FROM rows", retry=5)
        broker.start()


def test_the_last_one_out_opens_no_gate_over_a_checkpoint():
    """Broker and keeper are killed, and the checkpointer is stopped: it may have something left to write. It has the
    gate's description, which only the broker and its keeper unlock."""
    from test_checkpoint import checkpoints, made, write
    with Broker() as broker:
        db = made(broker)
        with Workers(1, write, 600.0, db, broker, options={"pad": 300}) as workers, Other(db, broker) as rests, \
                Other(db, broker) as leaves:
            workers.go()
            wait_until(lambda: (checkpoints(broker, db) or {}).get("done"), what="a checkpoint")
            rests.says("close")
            workers.kill(0)
            wait_until(lambda: len(broker.members(db)) == 1, what="the seat to be cleared")
            checkpointer = broker.status()["broker"]["checkpointer"]
            os.kill(checkpointer, signal.SIGSTOP)
            try:
                kill_both(broker)
                leaves.says("close")
                assert shut_to_plain(db), "a plain client got in beside a checkpoint"
            finally:
                os.kill(checkpointer, signal.SIGKILL)
        plain(db, "SELECT count(*) FROM rows", retry=5)
        broker.start()


@fails_without("keeper-keeps-for-ever")
def test_the_gate_opens_when_the_last_member_leaves_without_a_broker():
    """At once, as ever: closed means closed."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as one, Other(db, broker) as two:
            broker.kill()
            one.says("INSERT INTO rows VALUES('one', 1)")
            one.says("close")
            two.says("INSERT INTO rows VALUES('two', 1)")
            two.says("close")
            assert plain(db, "SELECT count(*) FROM rows") == [["2"]]
            nothing_left(broker)
            broker.start()
            two.says("again")
            two.says("INSERT INTO rows VALUES('two', 2)")
            assert [m["pid"] for m in broker.members(db)] == [two.process.pid]


@fails_without("keeper-keeps-for-ever")
def test_seats_that_rest_do_not_keep_the_gate_shut_when_broker_and_member_are_killed():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as rests, Other(db, broker) as dies:
            rests.says("close")
            assert len(broker.database(db)["resting"]) == 1
            broker.kill()
            dies.kill()
            plain(db, "INSERT INTO rows VALUES('plain', 1)", retry=1)
            broker.start()
            rests.says("again")
            rests.says("INSERT INTO rows VALUES('rests', 1)")
        assert plain(db, "SELECT count(*) FROM rows", retry=5) == [["2"]]


def test_a_seat_that_rests_is_used_again_without_a_broker():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as one, Other(db, broker) as two:
            one.says("close")
            broker.kill()
            one.says("again")
            one.says("INSERT INTO rows VALUES('one', 1)")
            broker.start()
            assert sorted(m["pid"] for m in broker.members(db)) == sorted([one.process.pid, two.process.pid])
            assert broker.database(db)["resting"] == []


def test_who_left_without_a_broker_has_left():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as leaves, Other(db, broker) as stays_in:
            stays_in.says("INSERT INTO rows VALUES('s', 1)")
            broker.kill()
            leaves.says("close")
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            wait_until(lambda: len(broker.members(db)) == 2, what="the seat to be cleared")
            c.close()


@waits
@fails_without("each-file-waits")
def test_a_statement_over_two_databases_waits_its_limit_once():
    """Both are held by one who has died, and nobody is there to clear that."""
    with Broker(env={"TURNSTILE_WAIT": "2s"}) as broker:
        one, two = create(broker.path("one.db")), create(broker.path("two.db"))
        with Other(one, broker) as dies, Other(one, broker) as waits_for_both:
            for member in (dies, waits_for_both):
                member.says(f"ATTACH '{two}' AS two")
            dies.says("BEGIN IMMEDIATE")
            broker.kill()
            dies.kill()
            begun = time.monotonic()
            waits_for_both.tell("INSERT INTO two.rows SELECT * FROM main.rows")
            assert "locked" in waits_for_both.heard()
            waited = time.monotonic() - begun
            assert 1.9 < waited < 3.6, waited
            broker.start()
            waits_for_both.says("INSERT INTO two.rows SELECT * FROM main.rows")


@waits
@fails_without("silence-is-watched")
def test_a_member_that_is_silent_costs_nothing():
    """The broker's wake-ups are counted by its own voluntary context switches."""
    def wakeups():
        with open(f"/proc/{broker.pid}/status") as f:
            return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", f.read(), re.M)[1])

    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker):
            restart(broker)
            time.sleep(2.5)  # it is looked at closely for two seconds
            before = wakeups()
            time.sleep(2)
            assert wakeups() - before <= 6, wakeups() - before


# --- the keeper -----------------------------------------------------------------------------------------------

def test_a_keeper_that_dies_is_replaced_and_told_everything():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as member:
            kill_keeper(broker)
            wait_until(lambda: keepers(broker), what="another keeper")
            broker.kill()
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            assert len(broker.members(db)) == 2
            member.says("INSERT INTO rows VALUES('m', 1)")
            c.close()


@waits
@fails_without("keeper-not-tried-again")
def test_a_keeper_that_cannot_be_started_is_tried_again():
    """The broker is out of descriptors for a moment, which is when keepers end."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as member:
            pid, before = broker.status()["broker"]["keeper"], resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (3, before[1]))
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: "no keeper: " in broker.log(), what="a keeper that cannot be started")
            resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, before)
            wait_until(lambda: keepers(broker), what="another keeper")
            broker.kill()
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            assert len(broker.members(db)) == 2
            member.says("INSERT INTO rows VALUES('m', 1)")
            c.close()


@fails_without("sessions-end-with-the-broker")
def test_members_hand_everything_back_when_broker_and_keeper_were_killed():
    """Where the next broker cannot find them (`test_left_alone`): it may be in another pid namespace, say."""
    with planted_build("members-not-looked-for") as planted, Broker(env=planted) as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as one, Other(db, broker) as two:
            one.says("INSERT INTO rows VALUES('one', 1)")
            kill_both(broker)
            two.says("INSERT INTO rows VALUES('two', 1)")
            assert shut_to_plain(db)
            broker.start()
            # No second segment: nobody has come back.
            try:
                connect(db, broker=broker)
                raise AssertionError("a newcomer was given a segment of its own")
            except sqlite3.Error as e:
                assert "have not come back" in str(e) and "'app.db'" in str(e), e
            # One that has anything to say brings all of it.
            one.says("more")
            c = connect(db, mode="gated")
            c.execute("INSERT INTO rows VALUES('new', 1)")
            assert c.execute("SELECT count(*) FROM rows").fetchone() == (3,)
            pids = {one.process.pid, os.getpid()}
            assert {m["pid"] for m in broker.members(db)} >= pids, broker.members(db)
            # The other one is known when it comes back, too, and the next broker has it all from its keeper.
            two.says("more")
            assert {m["pid"] for m in broker.members(db)} == pids | {two.process.pid}, broker.members(db)
            broker.kill()
            broker.start()
            assert {m["pid"] for m in broker.members(db)} == pids | {two.process.pid}, broker.members(db)
            c.close()
            for member in (one, two):
                member.says("SELECT 1")
                member.kill()
            assert plain(db, "SELECT count(*) FROM rows", retry=2) == [["3"]]


@fails_without("keeper-is-anyone")
def test_another_users_process_is_not_taken_for_the_keeper():
    if os.geteuid():
        raise Skip("not root")
    with Broker() as broker:
        broker.stop()
        os.chmod(broker.dir, 0o777)
        impostor = subprocess.Popen([PYTHON, "-c", "import os, socket, sys\n"
                                     "os.setgid(54321); os.setuid(54321)\n"
                                     "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
                                     "s.bind(sys.argv[1]); s.listen(); print('ready', flush=True)\n"
                                     "while True: c = s.accept()[0]; c.send(b'not a keeper'); c.recv(1)",
                                     broker.socket + ".keeper"], stdout=subprocess.PIPE, text=True)
        try:
            assert impostor.stdout.readline() == "ready\n"
            broker.start()
            db = create(broker.path("app.db"))
            connect(db, broker=broker, mode="gated").close()
        except harness.SetupError as e:
            raise AssertionError(e) from None
        finally:
            impostor.kill()
            impostor.wait(10)
            impostor.stdout.close()


def test_segments_of_another_version_are_not_taken_over():
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    before = os.environ.get("TURNSTILE_TARGET")
    os.environ["TURNSTILE_TARGET"] = harness.planted_target()
    try:
        with Broker(env={"TURNSTILE_PLANTED": "keeper-of-another-layout"}) as broker:
            db = create(broker.path("app.db"))
            with Other(db, broker) as member:
                # It does not even try to replace a broker that it could not go on from.
                refused = harness.run([harness.bin(), "serve", "--replace", "--socket", broker.socket], check=False)
                assert refused.returncode and "another version" in refused.stderr, refused
                assert broker.alive()
                broker.kill()
                refused = harness.run([harness.bin(), "serve", "--socket", broker.socket], check=False)
                assert refused.returncode and "another version" in refused.stderr, refused
                member.says("INSERT INTO rows VALUES('m', 1)")
            nothing_left(broker)
            broker.start()
            assert plain(db, "SELECT count(*) FROM rows") == [["1"]]
    finally:
        os.environ.pop("TURNSTILE_TARGET") if before is None else os.environ.update(TURNSTILE_TARGET=before)


def test_a_stopped_broker_leaves_nothing_to_its_keeper():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as member:
            member.says("INSERT INTO rows VALUES('m', 1)")
            broker.stop()
            plain(db, "INSERT INTO rows VALUES('plain', 1)")
            nothing_left(broker)
            broker.start()


@fails_without("socket-lane-is-impatient")
def test_readers_who_may_only_read_go_on_with_the_next_broker():
    """Each of their locks is a message: they wait until there is somebody to send it to."""
    if os.geteuid():
        raise Skip("not root")
    from test_lifetimes import Reader
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        writer = connect(db, broker=broker, mode="gated")
        writer.execute("INSERT INTO rows VALUES('w', 1)")
        with Reader(broker, db) as reader:
            said = reader.do("open", "a")
            assert '"socket"' in said, said
            assert reader.do("count", "a") == "1"
            for n in range(4):
                if n % 2:
                    replaced(broker)
                    writer.execute("INSERT INTO rows VALUES('w', ?)", (n + 2,))
                    assert reader.do("count", "a") == str(n + 2)
                else:
                    broker.kill()
                    writer.execute("INSERT INTO rows VALUES('w', ?)", (n + 2,))
                    reader.process.stdin.write("count a\n")
                    reader.process.stdin.flush()
                    time.sleep(0.2)
                    broker.start()
                    assert reader.process.stdout.readline().strip() == str(n + 2)
        writer.close()


@fails_without("unclaimed-seats-stay")
def test_a_seat_that_its_process_does_not_claim_is_nobodys():
    if os.geteuid():
        raise Skip("not root")
    from test_lifetimes import Reader
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        writer = connect(db, broker=broker, mode="gated")
        writer.execute("INSERT INTO rows VALUES('w', 1)")
        with Reader(broker, db) as reader:
            for name in ("a", "b"):
                assert '"socket"' in reader.do("open", name)
            assert len(broker.members(db, reader.process.pid)) == 2
            broker.kill()
            assert reader.do("close", "b") == "closed"
            broker.start()
            assert len(broker.members(db, reader.process.pid)) == 2  # it has said nothing yet
            assert reader.do("count", "a") == "1"
            assert len(broker.members(db, reader.process.pid)) == 1
        writer.close()


@fails_without("stale-seats-believed")
def test_a_seat_that_was_given_out_again_behind_the_keepers_back_is_not_cleared():
    """The broker was killed while there was more to tell than the keeper had room for."""
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("no planted build")
    before, rule = os.environ.get("TURNSTILE_TARGET"), os.environ.get("TURNSTILE_PLANTED", "")
    os.environ["TURNSTILE_TARGET"] = harness.planted_target()
    try:
        with Broker(env={"TURNSTILE_WAIT": "300ms", "TURNSTILE_PLANTED": f"keeper-falls-behind,{rule}"}) as broker:
            db = create(broker.path("app.db"))
            with Other(db, broker) as other, Other(db, broker) as dies:
                dies.kill()
                wait_until(lambda: len(broker.members(db)) == 1, what="the seat to be cleared")
                with Other(db, broker) as heir:
                    heir.says("BEGIN IMMEDIATE")
                    heir.says("INSERT INTO rows VALUES('heir', 1)")
                    broker.kill()
                    broker.extra["TURNSTILE_PLANTED"] = rule
                    broker.start()
                    other.tell("INSERT INTO rows VALUES('other', 1)")
                    assert "locked" in other.heard(), "it wrote in the middle of another one's transaction"
                    heir.says("COMMIT")
                    other.says("INSERT INTO rows VALUES('other', 2)")
            assert plain(db, "SELECT worker FROM rows ORDER BY 1", retry=5) == [["heir"], ["other"]]
    finally:
        os.environ.pop("TURNSTILE_TARGET") if before is None else os.environ.update(TURNSTILE_TARGET=before)


@timeout(240)
@fails_without("two-checkpointers")
def test_the_next_broker_checkpoints_when_the_last_ones_checkpointer_is_gone():
    from test_checkpoint import checkpoints, made, write
    with Broker() as broker:
        db = made(broker)

        def done():
            return (checkpoints(broker, db) or {}).get("done", 0)

        with Workers(2, write, 600.0, db, broker, options={"pad": 300}) as workers:
            workers.go()
            for n in range(3):
                wait_until(lambda: done() > 2, timeout=10, what="checkpoints")
                old = broker.status()["broker"]["checkpointer"]
                if n == 1:
                    os.kill(old, signal.SIGSTOP)  # it does not see that its broker is gone
                broker.kill()
                broker.start()
                if n == 1:
                    time.sleep(0.3)
                    assert done() == 0, checkpoints(broker, db)
                    assert broker.status()["broker"]["checkpointer"] is None
                    os.kill(old, signal.SIGKILL)
            wait_until(lambda: done() > 2, timeout=10, what="checkpoints")
            assert checkpoints(broker, db)["by"] == "broker"
            for i in workers.processes:
                workers.kill(i)
        plain(db, "ALTER TABLE rows DROP COLUMN pad", retry=5)
        check_rows(db, broker.record, killed=range(2))
