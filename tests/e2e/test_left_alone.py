"""Broker and keeper are both killed: the next broker finds the members in their processes, whether they have anything to
say or not, and believes nobody who imitates them."""

import array
import contextlib
import fcntl
import os
import re
import resource
import socket
import struct
import sqlite3
import subprocess
from unittest import mock

import harness
from harness import (Broker, PYTHON, Skip, connect, create, fails_without, plain, timeout, wait_until, waits)
from test_broker_death import Other, keepers, kill_both, loaded, planted_build, shut_to_plain
from test_foreign import STRANGER, as_user, root_only

CONTROL_SIZE, WAL_INDEX_SIZE = 8192 + 1024 * 128, 1 << 30


@fails_without("members-not-looked-for", message="cannot be found|did not|locked")
def test_members_that_have_nothing_to_say_are_found():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        other = create(broker.path("other.db"))
        with Other(db, broker) as one, Other(db, broker) as two, Other(other, broker) as third:
            for member in (one, two, third):  # names may be any bytes
                member.says("nameless")
            one.says("INSERT INTO rows VALUES('one', 1)")
            before = {m["seat"]: m["pid"] for m in broker.members(db)}
            kill_both(broker)
            two.says("INSERT INTO rows VALUES('two', 1)")
            assert shut_to_plain(db)
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            c.execute("INSERT INTO rows VALUES('new', 1)")
            assert c.execute("SELECT count(*) FROM rows").fetchone() == (3,)
            seats = {m["seat"]: m["pid"] for m in broker.members(db)}
            assert {s: p for s, p in seats.items() if p != os.getpid()} == before, (seats, before)
            assert [m["pid"] for m in broker.members(other)] == [third.process.pid]
            # They go on as this broker's members: one opens it once more, one leaves, one dies with the turn.
            two.says("more")
            assert [m["pid"] for m in broker.members(db)].count(two.process.pid) == 2
            one.says("close")
            assert one.process.pid not in [m["pid"] for m in broker.members(db)]
            two.says("BEGIN IMMEDIATE")
            two.kill()
            c.execute("INSERT INTO rows VALUES('new', 2)")
            c.close()
            assert plain(db, "SELECT count(*) FROM rows", retry=2) == [["4"]]
            # And a broker after this one has them from its keeper.
            broker.kill()
            broker.start()
            assert [m["pid"] for m in broker.members(other)] == [third.process.pid]


@waits
@fails_without("dead-seats-stay")
def test_who_died_after_broker_and_keeper_is_cleared():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as holder, Other(db, broker) as idle:
            holder.says("BEGIN IMMEDIATE")
            holder.says("INSERT INTO rows VALUES('lost', 1)")
            kill_both(broker)
            holder.kill()
            broker.start()
            c = connect(db, broker=broker, mode="gated")
            c.execute("PRAGMA busy_timeout=3000")
            c.execute("INSERT INTO rows VALUES('kept', 1)")
            assert c.execute("SELECT worker FROM rows").fetchall() == [("kept",)]
            idle.says("INSERT INTO rows VALUES('idle', 1)")
            c.close()


HEADLESS_STRANGER = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("done", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): this thread alone
"""


def test_a_headless_process_that_is_no_member_keeps_no_dead_seats():
    """Any user can have one; it must not make the search look as if somebody could not be seen."""
    stranger = subprocess.Popen([PYTHON, "-c", HEADLESS_STRANGER], text=True, stdout=subprocess.PIPE)
    try:
        assert stranger.stdout.readline() == "done\n"
        test_who_died_after_broker_and_keeper_is_cleared.body()
    finally:
        stranger.kill()
        stranger.wait(10)
        stranger.stdout.close()


HEADLESS = """
import ctypes, sys, threading
sys.path.insert(0, sys.argv[1])
import harness
db = harness.connect(sys.argv[2], check_same_thread=False)
db.execute("BEGIN IMMEDIATE")
db.execute("INSERT INTO rows VALUES('headless', 1)")

def go_on():
    for line in sys.stdin:
        db.execute(line)
        print("done", flush=True)

threading.Thread(target=go_on).start()
print("done", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): this thread alone
"""


@fails_without("headless-is-dead")
def test_a_process_whose_first_thread_has_ended_is_not_dead():
    """Its table of descriptors is not where others' are."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        member = subprocess.Popen([PYTHON, "-c", HEADLESS, harness.HERE, db], env=broker.env, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert member.stdout.readline() == "done\n"
            with Other(db, broker):
                kill_both(broker)
                broker.start()
                c = connect(db, broker=broker, mode="gated")
                c.execute("PRAGMA busy_timeout=300")
                try:
                    c.execute("INSERT INTO rows VALUES('c', 1)")
                    raise AssertionError("it wrote in the middle of another one's transaction")
                except sqlite3.OperationalError as e:
                    assert "locked" in str(e), e
                member.stdin.write("COMMIT\n")
                member.stdin.flush()
                assert member.stdout.readline() == "done\n"
                assert c.execute("SELECT worker FROM rows").fetchall() == [("headless",)]
                c.close()
        finally:
            member.kill()
            member.wait(10)
            member.stdin.close()
            member.stdout.close()


@fails_without("members-not-looked-for")
def test_seats_at_rest_keep_nobody_out_when_broker_keeper_and_member_are_killed():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as rests, Other(db, broker) as dies:
            rests.says("close")
            assert len(broker.database(db)["resting"]) == 1
            kill_both(broker)
            dies.kill()
            assert shut_to_plain(db)
            broker.start()
            plain(db, "INSERT INTO rows VALUES('plain', 1)", retry=3)
            rests.says("again")
            rests.says("INSERT INTO rows VALUES('rests', 1)")


@timeout(240)
def test_broker_and_keeper_killed_under_load():
    """No transaction of a member fails, nothing acknowledged is lost, and newcomers are in at once."""
    with Broker() as broker:
        def kill(_):
            kill_both(broker)
            broker.start()
        loaded(broker, int(os.environ.get("KILLS", "4")), kill)


def test_a_reader_who_may_only_read_is_found():
    root_only()
    from test_lifetimes import Reader
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as writer, Reader(broker, db) as reader:
            writer.says("INSERT INTO rows VALUES('w', 1)")
            assert '"socket"' in reader.do("open", "a")
            assert reader.do("count", "a") == "1"
            kill_both(broker)
            broker.start()
            connect(db, broker=broker, mode="gated").close()
            assert reader.process.pid in [m["pid"] for m in broker.members(db)]
            assert reader.do("count", "a") == "1"
            writer.says("INSERT INTO rows VALUES('w', 2)")
            assert reader.do("count", "a") == "2"


@fails_without("sockets-are-strange")
def test_a_member_of_another_user_hands_everything_back():
    """What it sends is received elsewhere; what holds the gate is a socket."""
    root_only()
    with planted_build("members-not-looked-for") as planted, Broker("--everyone", "yes", env=planted) as broker:
        db = create(broker.path("app.db"))
        for path, mode in ((broker.dir, 0o777), (db, 0o666)):
            os.chmod(path, mode)
        with Other(db, broker, STRANGER) as member:
            member.says("INSERT INTO rows VALUES('s', 1)")
            kill_both(broker)
            broker.start()
            member.says("more")
            with contextlib.closing(connect(db, broker=broker, mode="gated")) as c:
                c.execute("INSERT INTO rows VALUES('c', 1)")
            assert [m["uid"] for m in broker.members(db)] == [STRANGER] * 2, broker.members(db)
            member.says("INSERT INTO rows VALUES('s', 2)")


# --- who cannot be seen ---------------------------------------------------------------------------------------

@fails_without("unknown-is-dead", message="it was let in")
def test_a_member_that_nobody_knows_keeps_the_gate_shut():
    """Broker and keeper are killed, one member hands everything back and another one has not come back yet; that broker is
    killed, too, and the first member leaves: its keeper knows nothing of the other one but its seat."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        for path, mode in ((broker.dir, 0o777), (db, 0o666)):
            os.chmod(path, mode)
        with Other(db, broker) as one, Other(db, broker, STRANGER) as other:
            kill_both(broker)
            with unsearched(broker):
                broker.start()
                one.says("more")  # has something to say: it hands everything back
                members = {m["seat"]: m["pid"] for m in broker.members(db)}
                assert sorted(members.values()) == [0, one.process.pid, one.process.pid], members
                broker.kill()
            one.kill()
            # The keeper, which looks again and again, has made up its mind when it has ended.
            wait_until(lambda: not keepers(broker) or not shut_to_plain(db), what="the keeper's mind")
            assert shut_to_plain(db), "it was let in beside a member"
            other.says("INSERT INTO rows VALUES('other', 1)")
            assert shut_to_plain(db), "it was let in beside a member"
            other.kill()
            assert plain(db, "SELECT count(*) FROM rows", retry=3) == [["1"]]


@contextlib.contextmanager
def unsearched(broker):
    """Members are not looked for: as where they cannot be seen."""
    rules = ",".join(filter(None, [os.environ.get("TURNSTILE_PLANTED"), "members-not-looked-for"]))
    with planted_build(rules), mock.patch.dict(broker.extra, {"TURNSTILE_PLANTED": rules}):
        yield


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def no_room(pid):
    """No descriptor more for this process, by its limit."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    numbers = {int(n) for n in os.listdir(f"/proc/{pid}/fd")}
    free = next(n for n in range(len(numbers) + 1) if n not in numbers)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@fails_without("unknown-is-dead", message="it was let in")
def test_a_keeper_without_room_for_a_member_does_not_take_it_for_dead():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker) as one:
            keeper = broker.status()["broker"]["keeper"]
            with no_room(keeper), Other(db, broker) as other:
                broker.kill()
                one.kill()
                wait_until(lambda: not keepers(broker) or not shut_to_plain(db), what="the keeper's mind")
                assert shut_to_plain(db), "it was let in beside a member"
                other.says("INSERT INTO rows VALUES('other', 1)")
                assert shut_to_plain(db), "it was let in beside a member"
            assert plain(db, "SELECT count(*) FROM rows", retry=3) == [["1"]]


@fails_without("lost-in-silence")
def test_what_a_keeper_had_no_room_for_is_told_again():
    """The next broker knows all members."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        with Other(db, broker):
            keeper = broker.status()["broker"]["keeper"]
            with no_room(keeper):
                had = descriptors(keeper)
                other = Other(db, broker)
                assert descriptors(keeper) <= had + 1
            with other:
                # The session's pidfd and its liveness memfd.
                wait_until(lambda: descriptors(keeper) >= had + 2, what="the keeper to be told")
                pids = sorted(m["pid"] for m in broker.members(db))
                broker.kill()
                with unsearched(broker):
                    broker.start()
                    assert sorted(m["pid"] for m in broker.members(db)) == pids, broker.members(db)
                    broker.stop()


def started_as(broker, uid, *before):
    """Ends the broker and starts it again as this user's, its command behind `before`."""
    broker.stop()
    broker.extra["TURNSTILE_BROKER_UID"] = str(uid)
    os.unlink(broker.socket + ".lock")
    os.chmod(broker.dir, 0o777)
    again_as(broker, uid, *before)


def again_as(broker, uid, *before):
    started = subprocess.Popen

    def start(command, **options):
        user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--"]
        return started([*before, *user, *command], **options)
    with mock.patch.object(harness.subprocess, "Popen", start):
        broker.start()


@fails_without("hidden-is-dead")
def test_who_is_hidden_from_the_broker_is_not_dead():
    """A `/proc` that shows a user its own processes alone (hidepid)."""
    root_only()
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], stderr=subprocess.DEVNULL).returncode:
        raise Skip("no mount namespace")
    with contextlib.suppress(FileNotFoundError), open("/proc/sys/kernel/yama/ptrace_scope") as scope:
        if scope.read().strip() != "0":
            raise Skip("a user may not trace its own processes")
    with Broker("--everyone", "yes") as broker:
        started_as(broker, STRANGER)
        db = create(broker.path("app.db"))
        os.chmod(db, 0o666)
        with Other(db, broker, STRANGER), Other(db, broker, STRANGER + 1) as hidden_one:
            kill_both(broker)
            again_as(broker, STRANGER, *hidden)
            with Other(db, broker):
                # Its seat is there, whosever it is.
                assert len(broker.members(db)) == 3, broker.members(db)
            hidden_one.says("INSERT INTO rows VALUES('hidden', 1)")
            assert len(broker.members(db)) == 2, broker.members(db)


def under_way(count):
    """Puts so many descriptors of this user's under way (unix(7), ETOOMANYREFS), where they stay."""
    ours, theirs = socket.socketpair()
    for _ in range(0, count, 50):
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ours.fileno()] * 50))])
    kept.extend([ours, theirs])
    return "ready"


@fails_without("told-once")
def test_what_could_not_be_sent_to_the_keeper_is_told_again():
    root_only()
    user = STRANGER + 2  # nobody else's in these tests: what is under way is counted by user
    with Broker() as broker:
        # What one user may have under way is as many as one of its processes may have open.
        started_as(broker, user, "sh", "-c", 'ulimit -n 256 && exec "$@"', "sh")
        db = create(broker.path("app.db"))
        os.chown(db, user, user)
        with Other(db, broker, user) as member:
            member.says("close")
            member.says("again")  # not adopted, but opened by the extension: it leaves its checkpoints to the broker
            keeper = broker.status()["broker"]["keeper"]
            had = descriptors(keeper)
            with as_user(user, lambda: under_way(300)) as said:
                assert said == "ready"
                # More than a checkpoint is due for: the broker is given the WAL, which the keeper is to have.
                member.says("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 2000) "
                            "INSERT INTO rows SELECT hex(randomblob(2000)), n FROM c")
                wait_until(lambda: "told everything again" in broker.log(), what="the broker to see that it failed")
                assert descriptors(keeper) == had
            wait_until(lambda: descriptors(keeper) > had, what="the keeper to be told")


# --- imitations -----------------------------------------------------------------------------------------------

def memfd(name, size):
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def imitation(path, lock):
    """All that a member has: a segment, and what holds the gate. (src/segment/layout.rs, hold.rs)"""
    place = os.stat(lock)
    nonce = 0x1234
    directory = os.stat(os.path.dirname(path))
    control = memfd(f"turnstile-control-{nonce:016x}-{place.st_dev:x}.{place.st_ino:x}", CONTROL_SIZE)
    index = memfd(f"turnstile-wal-index-{nonce:016x}-{place.st_dev:x}.{place.st_ino:x}", WAL_INDEX_SIZE)
    layout = int(re.search(r"LAYOUT_VERSION: u32 = (\d+)", open(LAYOUT).read())[1]) if LAYOUT else 0
    os.pwrite(control, b"trnstile" + struct.pack("<IIQ", layout, 0, nonce), 0)
    name = os.path.basename(path).encode()
    os.pwrite(control, struct.pack("<4Q", 7777, directory.st_dev, directory.st_ino, len(name)) + name, 8192 - 1664)
    gate = os.open(path, os.O_RDWR)
    fcntl.fcntl(gate, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0x40000000, 512, 0))  # F_OFD_SETLK
    member, broker = socket.socketpair()
    broker.sendmsg([b"turnstile-gate" + struct.pack("<Q", nonce)],
                   [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [gate]))])
    broker.close()
    kept.extend([control, index, gate, member])
    return "ready"


kept = []
LAYOUT = os.path.join(harness.ROOT, "src", "segment", "layout.rs")


def refused(db, broker):
    seen = broker.log().count("cannot be found")
    try:
        connect(db, broker=broker).close()
    except sqlite3.Error:
        assert broker.log().count("cannot be found") > seen, broker.log()
        return True
    return False


@fails_without("imitations-believed,anybodys-segment")
def test_another_users_imitation_of_a_member_is_not_believed():
    """It may write the file and so hold its gate, but it has no segment that a broker has made."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        os.chmod(db, 0o666)
        os.chmod(broker.dir, 0o777)
        with as_user(STRANGER, lambda: imitation(db, broker.socket + ".lock")) as said:
            assert said == "ready"
            assert refused(db, broker), "a segment of another user's was taken for a broker's"
        connect(db, broker=broker, mode="gated").close()


def test_a_gate_without_a_segment_is_left_alone():
    """And a segment without a gate."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        gate = os.open(db, os.O_RDWR)
        fcntl.fcntl(gate, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0x40000000, 512, 0))
        assert refused(db, broker)
        with Other(db := create(broker.path("second.db")), broker) as member:
            kill_both(broker)
            # What holds the gate is taken from the member; the gate itself is held here.
            command = [PYTHON, "-c", TAKE_GATE, str(member.process.pid)]
            taker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert taker.stdout.readline() == "taken\n"
                broker.start()
                assert refused(db, broker)
                assert shut_to_plain(db)
            finally:
                taker.kill()
                taker.wait(10)
                taker.stdout.close()
            os.close(gate)


# Takes the gate out of the queue of a member's socket, and keeps it (pidfd_getfd(2)).
TAKE_GATE = """
import array, ctypes, os, socket, sys, time
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(pid)
for n in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
    if not os.readlink(f"/proc/{pid}/fd/{n}").startswith("socket:"):
        continue
    s = socket.socket(fileno=libc.syscall(438, pidfd, n, 0))
    if s.family == socket.AF_UNIX and s.type == socket.SOCK_STREAM:
        data, rights, _, _ = s.recvmsg(64, 64)
        assert data.startswith(b"turnstile-gate") and rights, data
        print("taken", flush=True)
        time.sleep(60)
"""
