"""What another user can delay: closing what it has sent, looking beside its file, memory that it can lock. Nothing of that
is done by the broker or its keeper; whoever does it may hang for good, and nobody waits."""

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import stat
import struct
import threading
import time

from harness import Broker, Skip, bin, create, fails_without, run, timeout, wait_until, waits
from test_broker_death import planted_build, processes_of, replaced
from test_foreign import STRANGER, as_user, libc, root_only
from test_foreign_files import (BATCH_FORGET, FLUSH, FORGET, GETATTR, INIT, LOOKUP, OPEN, OPENDIR, RELEASE, attributes,
                                fuse_mounted, outcast)
from test_gate import REFUSED
from test_hostile import (ANSWER_LEFT, ANSWER_WAL_INDEX, GROW_WAL_INDEX, LEAVE, OPEN_WAL_INDEX, Hostile, join, key, text,
                          varint, victim)
from test_left_alone import imitation, kept

HAND_BACK = 21
RESUMED = 9
WRITEBACK_CACHE = 1 << 16
READ, WRITE, STATFS = 15, 16, 17


def serve_fuse(without):
    """A directory with one file (linux/fuse.h); some operations are never answered."""
    def serve(fuse):
        while True:
            request = os.read(fuse, 1 << 17)
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in (*without, FORGET, BATCH_FORGET):
                continue
            answer, error = b"", 0
            if operation == INIT:
                answer = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, WRITEBACK_CACHE, 16, 12, 1 << 16, 1, 16, 0, 0, *[0] * 7)
            elif operation == LOOKUP:
                answer = struct.pack("<4Q2I", 2, 1, 3600, 0, 0, 0) + attributes(2)
            elif operation == GETATTR:
                answer = struct.pack("<QII", 0, 0, 0) + attributes(node)
            elif operation in (OPEN, OPENDIR):
                answer = struct.pack("<QII", 1, 0, 0)
            elif operation == STATFS:
                answer = struct.pack("<5Q10I", *[0] * 5, 4096, 255, 4096, *[0] * 7)
            elif operation not in (RELEASE, FLUSH):
                error = -38  # ENOSYS
            os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)
    return serve


def state_of(pid):
    with open(f"/proc/{pid}/stat") as line:
        return line.read().rsplit(")", 1)[1].split()[0]


def hangs(pid):
    """In uninterruptible sleep, for longer than a disk would take."""
    end = time.monotonic() + 2
    while state_of(pid) == "D":
        if time.monotonic() > end:
            return True
        time.sleep(0.02)
    return False


def all_is_well(broker, db, goes_on=None):
    """Others are served, and neither broker nor keeper hangs."""
    run([bin(), "status"], env=broker.env, timeout=10)
    with Hostile(broker) as another:
        another.s.settimeout(10)
        another.joined(db)
    if goes_on:
        goes_on()
    for pid in [broker.pid, *processes_of(broker, "turnstile-keep")]:
        assert not hangs(pid), f"{pid} hangs"


def slow_socket():
    """A TCP connection whose closing waits for an hour: its peer does not read."""
    listener = socket.create_server(("127.0.0.1", 0))
    slow = socket.create_connection(listener.getsockname())
    peer = listener.accept()[0]
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    slow.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            slow.send(b"x" * 65536)
    kept.extend([listener, peer])
    return slow


def dirty(path):
    """From here on, whoever closes a description of this file waits for a page to be written, which never is."""
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, 0)
    kept.append(fd)


def foul(hostile, fd):
    """A packet that ends the session, and behind it one with a descriptor, which stays unread."""
    hostile.send(b"\xff")
    hostile.send(b"x", [fd])


@waits
@fails_without("closed-by-the-broker", message="hangs|timed out|in vain|after 10 s|after 5 s|did not")
@timeout(90)
def test_what_lies_unread_in_a_session_stops_nobody():
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        serve = serve_fuse(without=(WRITE,))
        with fuse_mounted(broker.path("fuse"), serve, STRANGER) as (evil, stop), victim(broker, db) as goes_on:
            def send():
                sessions = [Hostile(broker) for _ in range(2)]
                slow = slow_socket()
                fd = os.open(evil, os.O_RDWR)
                os.write(ready, b"+")
                os.read(go, 1)  # the broker is stopped
                foul(sessions[0], slow.fileno())
                foul(sessions[1], fd)
                slow.close()
                os.close(fd)
                threading.Thread(target=dirty, args=(evil,), daemon=True).start()
                time.sleep(0.2)
                kept.extend(sessions)
                return "sent"

            (seen, ready), (go, going) = os.pipe(), os.pipe()
            with as_user(STRANGER, send, wait=False), contextlib.ExitStack() as end:
                end.callback(stop)
                os.read(seen, 1)
                os.kill(broker.pid, signal.SIGSTOP)
                os.write(going, b"+")
                time.sleep(1)
                os.kill(broker.pid, signal.SIGCONT)
                wait_until(lambda: broker.log().count("session ended") >= 2, timeout=10, what="both sessions' ends")
                for _ in range(3):
                    all_is_well(broker, db, goes_on)
                    time.sleep(1)
                replaced(broker)
                all_is_well(broker, db, goes_on)
                broker.kill()
                broker.start()
                all_is_well(broker, db, goes_on)


@waits
@timeout(90)
def test_a_broker_that_is_killed_over_what_lies_unread_makes_room_for_the_next():
    """It gives nothing away, and its process may never end. Its locks and its socket are free all the same."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        (seen, ready), (go, going) = os.pipe(), os.pipe()

        def send(evil):
            hostile, fd = Hostile(broker), os.open(evil, os.O_RDWR)
            os.write(ready, b"+")
            os.read(go, 1)  # the broker is stopped
            foul(hostile, fd)
            os.close(fd)
            kept.append(hostile)
            threading.Thread(target=dirty, args=(evil,), daemon=True).start()
            time.sleep(0.5)
            os.write(ready, b"+")

        with fuse_mounted(broker.path("fuse"), serve_fuse(without=(WRITE,)), STRANGER) as (evil, stop):
            with victim(broker, db) as goes_on, contextlib.ExitStack() as end:
                end.enter_context(as_user(STRANGER, lambda: send(evil), wait=False))
                os.read(seen, 1)
                os.kill(broker.pid, signal.SIGSTOP)
                os.write(going, b"+")
                os.read(seen, 1)
                before, broker.process = broker.process, None
                end.callback(before.wait, 10)
                end.callback(stop)
                before.kill()
                broker.start()
                # For a moment the one that is being killed still listens, and answers nobody.
                wait_until(lambda: run([bin(), "status"], env=broker.env, check=False).returncode == 0, what="the next broker")
                all_is_well(broker, db, goes_on)
                assert before.poll() is None, "it ended: this shows nothing"
                replaced(broker)
                all_is_well(broker, db, goes_on)


def hold_a_socket(broker, db):
    """A member's end of what holds its gate."""
    hostile = Hostile(broker)
    fds = hostile.joined(db)
    return hostile, socket.socket(fileno=fds[2])


def fill_the_hold(broker, own, evil):
    hostile, hold = hold_a_socket(broker, own)
    slow, fd = slow_socket(), os.open(evil, os.O_RDWR)
    try:
        for one in (slow.fileno(), fd):
            socket.send_fds(hold, [b"r"], [one])
    except PermissionError:  # Linux 6.16
        said = "refused"
        kept.append(slow)
    else:
        said = "taken"
        slow.close()
    os.close(fd)
    threading.Thread(target=dirty, args=(evil,), daemon=True).start()
    time.sleep(0.2)
    hold.close()
    assert hostile.ask(varint(LEAVE) + varint(7) + key(hostile.seat))[0] == ANSWER_LEFT
    kept.append(hostile)
    return said


def fouled_hold(broker, expected, while_dead=False):
    db = create(broker.path("app.db"))
    own = create(broker.path("own.db"))
    os.chmod(own, 0o666)
    with fuse_mounted(broker.path("fuse"), serve_fuse(without=(WRITE,)), STRANGER) as (evil, stop):
        with victim(broker, db) as goes_on, contextlib.ExitStack() as end:
            said = end.enter_context(as_user(STRANGER, lambda: fill_the_hold(broker, own, evil)))
            end.callback(stop)  # first: the attacker could not end either
            assert said in expected, said
            for _ in range(3):
                all_is_well(broker, db, goes_on)
                time.sleep(0.5)
            replaced(broker)
            all_is_well(broker, db, goes_on)


@waits
@fails_without("no-passrights,closed-by-the-broker,closed-by-the-keeper", message="hangs|timed out|in vain|after|did not")
@timeout(90)
def test_what_a_member_puts_into_the_hold_of_its_gate_stops_nobody():
    """The keeper has the other end, and would close it when the database is closed."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        fouled_hold(broker, ("refused", "taken"))


@waits
@timeout(90)
def test_the_same_where_the_kernel_lets_it_in():
    """Linux before 6.16 has no SO_PASSRIGHTS."""
    root_only()
    with planted_build("no-passrights") as planted, Broker("--everyone", "yes", env=planted) as broker:
        fouled_hold(broker, ("taken",))


@waits
@fails_without("no-passrights,closed-by-the-keeper", message="hangs|timed out|in vain|after|did not|not ended|Occupied")
@timeout(90)
def test_the_same_while_no_broker_is_there():
    """Then the keeper opens the gate, and the next broker needs what the keeper has."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        own = create(broker.path("own.db"))
        os.chmod(own, 0o666)
        (seen, ready), (go, going) = os.pipe(), os.pipe()

        def send(evil):
            hostile, hold = hold_a_socket(broker, own)
            fd = os.open(evil, os.O_RDWR)
            with contextlib.suppress(PermissionError):  # Linux 6.16
                socket.send_fds(hold, [b"r"], [fd])
            os.close(fd)
            threading.Thread(target=dirty, args=(evil,), daemon=True).start()
            os.write(ready, b"+")
            os.read(go, 1)
            hold.close()
            hostile.s.close()
            os.close(hostile.liveness)
            os.write(ready, b"+")

        with fuse_mounted(broker.path("fuse"), serve_fuse(without=(WRITE,)), STRANGER) as (evil, stop):
            with victim(broker, db) as goes_on, contextlib.ExitStack() as end:
                end.enter_context(as_user(STRANGER, lambda: send(evil), wait=False))
                end.callback(stop)
                os.read(seen, 1)
                keeper, = processes_of(broker, "turnstile-keep")
                broker.kill()
                os.write(going, b"+")
                os.read(seen, 1)
                time.sleep(1)  # it looks four times
                assert not hangs(keeper), "the keeper hangs"
                broker.start()
                all_is_well(broker, db, goes_on)
                assert not broker.members(own)


@waits
@fails_without("judged-by-the-broker,file-mounts-unseen", message="hangs|timed out|in vain|after|did not")
@timeout(90)
def test_a_name_over_which_another_filesystem_is_mounted_is_not_looked_at():
    """An overlay over a filesystem that does not answer, mounted over the database's name in a user namespace."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        os.chmod(broker.dir, 0o777)
        db = create(broker.path("app.db"))
        device = broker.path("device")  # of all users, as it is on most systems
        if not os.path.exists("/dev/fuse"):
            raise Skip("no FUSE here")
        os.mknod(device, 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
        os.chmod(device, 0o666)

        def send():
            at = broker.path("mine")
            for name in ("", "/d", "/fuse", "/merged", "/upper", "/work"):
                os.mkdir(at + name)
            real = f"{at}/d/app.db"
            with open(real, "wb") as f:
                f.write(b"x")
            libc.prctl(4, 1)  # PR_SET_DUMPABLE: it has changed its user, and /proc/self would be root's
            if libc.unshare(0x10000000 | 0x00020000):
                return f"no user namespaces here: {os.strerror(ctypes.get_errno())}"
            for name, content in (("setgroups", "deny"), ("uid_map", f"0 {STRANGER} 1"), ("gid_map", f"0 {STRANGER} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(content)
            fuse = os.open(device, os.O_RDWR)

            def mount(what, where, kind, flags=0, options=""):
                if libc.mount(what.encode(), where.encode(), kind.encode(), flags, options.encode()):
                    raise Skip(f"no {kind} here: {os.strerror(ctypes.get_errno())}")
            try:
                mount("test", f"{at}/fuse", "fuse", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
                daemon = os.fork()
                if daemon == 0:
                    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                    try:
                        serve_fuse(without=())(fuse)
                    finally:
                        os._exit(0)
                os.close(fuse)
                mount("overlay", f"{at}/merged", "overlay", 0,
                      f"lowerdir={at}/fuse,upperdir={at}/upper,workdir={at}/work,userxattr")
                fd, directory = os.open(real, os.O_RDWR), os.open(f"{at}/d", os.O_PATH)
                mount(f"{at}/merged/app.db", real, "", 4096)  # MS_BIND
            except Skip as e:
                return f"{e}"
            os.kill(daemon, signal.SIGSTOP)
            hostile = Hostile(broker)
            hostile.s.settimeout(5)
            kept.append(hostile)
            hostile.send(join("app.db"), [fd, directory])
            try:
                answer = hostile.s.recv(65536)
            except OSError as e:
                return f"did not answer: {e}"
            return "refused" if answer[0] == REFUSED and b"bind mount" in answer else f"not refused: {answer!r}"

        def stays():
            try:
                said = send()
            except Exception as e:  # the test waits for it
                said = repr(e)
            os.write(saying, said.encode())
            os.read(go_on, 1)
        (heard, saying), (go_on, went_on) = os.pipe(), os.pipe()
        with victim(broker, db) as goes_on, contextlib.ExitStack() as end:
            end.enter_context(as_user(STRANGER, stays, wait=False))
            end.callback(os.write, went_on, b"+")
            said = os.read(heard, 4096).decode()
            if said.startswith("no "):
                raise Skip(said)
            all_is_well(broker, db, goes_on)
            assert said == "refused", said


@waits
@fails_without("anybodys-segment")
@timeout(60)
def test_a_segment_that_no_broker_has_made_is_not_taken_back():
    """A member could hand back one of huge pages, of which one that is not there kills whoever touches it."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        os.chmod(broker.dir, 0o777)
        db = create(broker.path("app.db"))
        own = create(broker.path("own.db"))
        os.chmod(own, 0o666)

        def hand_back():
            imitation(own, broker.socket + ".lock")
            control, index, gate, member = kept[-4:]
            directory = os.stat(broker.dir)
            home = varint(directory.st_dev) + varint(directory.st_ino) + text("own.db")
            hostile = Hostile(broker)
            answer = hostile.ask(varint(HAND_BACK) + varint(7) + varint(7777) + varint(0x1234) + home,
                                 [control, index, member.fileno()])
            kept.append(hostile)
            return f"{answer[0]} {answer[-1]}"

        with as_user(STRANGER, hand_back) as said:
            assert said == f"{RESUMED} 0", said
            all_is_well(broker, db)


@waits
@fails_without("pages-by-fallocate", message="hangs|timed out|in vain|after|did not")
@timeout(60)
def test_a_member_that_keeps_the_wal_index_locked_stops_nobody():
    """It writes into it out of a page that its own filesystem never brings: the inode stays locked meanwhile."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        own = create(broker.path("own.db"))
        os.chmod(own, 0o666)
        with fuse_mounted(broker.path("fuse"), serve_fuse(without=(READ,)), STRANGER) as (evil, stop):
            def grow():
                hostile = Hostile(broker)
                fds = hostile.joined(own)
                page = mmap.mmap(os.open(evil, os.O_RDWR), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                address = ctypes.addressof(ctypes.c_char.from_buffer(page))
                writer = os.fork()
                if writer == 0:
                    libc.write(fds[1], ctypes.c_void_p(address), 4096)
                    os._exit(0)
                time.sleep(0.5)
                k = key(hostile.seat)
                assert hostile.ask(varint(OPEN_WAL_INDEX) + varint(7) + k)[0] == ANSWER_WAL_INDEX
                hostile.send(varint(GROW_WAL_INDEX) + varint(8) + k + varint(2))
                kept.extend([hostile, page])
                hostile.s.settimeout(5)
                try:
                    return f"{hostile.s.recv(4096)[0]} {state_of(writer) in 'DS'}"
                except OSError as e:
                    return f"did not answer: {e}"

            with victim(broker, db) as goes_on, as_user(STRANGER, grow) as said, contextlib.ExitStack() as end:
                end.callback(stop)
                assert said == f"{ANSWER_WAL_INDEX} True", said
                all_is_well(broker, db, goes_on)


def stuck(broker):
    return max([u["stuck"] for u in broker.status()["broker"]["users"] if u["uid"] == STRANGER], default=0)


@waits
@fails_without("hangs-without-limit", message="in vain")
@timeout(120)
def test_who_makes_one_process_after_the_other_hang_is_let_in_no_more():
    """And is let in again when they have ended."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        serve = serve_fuse(without=(WRITE,))
        with contextlib.ExitStack() as end:
            places = [end.enter_context(fuse_mounted(broker.path(f"fuse{n}"), serve, STRANGER)) for n in range(4)]
            goes_on = end.enter_context(victim(broker, db))
            (seen, ready), (go, going) = os.pipe(), os.pipe()

            def send():
                sessions = [Hostile(broker) for _ in places]
                for hostile, (evil, _) in zip(sessions, places):
                    fd = os.open(evil, os.O_RDWR)
                    os.write(ready, b"+")
                    os.read(go, 1)  # the broker is stopped
                    foul(hostile, fd)
                    os.close(fd)
                    kept.append(hostile)
                    threading.Thread(target=dirty, args=(evil,), daemon=True).start()
                    time.sleep(0.2)
                    os.write(ready, b"+")
                return "sent"

            end.enter_context(as_user(STRANGER, send, wait=False))
            for _, stop in places:
                end.callback(stop)
            for n in range(4):
                os.read(seen, 1)
                os.kill(broker.pid, signal.SIGSTOP)
                os.write(going, b"+")
                os.read(seen, 1)
                os.kill(broker.pid, signal.SIGCONT)
                wait_until(lambda n=n: stuck(broker) == n + 1, what=f"process {n + 1} to hang")
                all_is_well(broker, db, goes_on)
            wait_until(lambda: "keeps the broker's processes from ending" in outcast(broker), what="the user to be kept out")
            all_is_well(broker, db, goes_on)
            for _, stop in places:
                stop()
            wait_until(lambda: "from ending" not in outcast(broker), what="the user to be let in again")
