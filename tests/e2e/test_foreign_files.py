"""A filesystem that never answers: whoever touches a descriptor of a file there, or only closes it, waits for ever."""

import contextlib
import ctypes
import os
import struct

from harness import Broker, Skip, bin, create, fails_without, run, timeout, wait_until, waits
from test_broker_death import processes_of
from test_foreign import STRANGER, as_user, root_only
from test_gate import REFUSED
from test_hostile import LOG, STATUS, Hostile, descriptors, join, text, varint, victim

LOOKUP, GETATTR, OPEN, FLUSH, INIT, OPENDIR, RELEASE, FORGET, BATCH_FORGET = 1, 3, 14, 25, 26, 27, 18, 2, 42
libc = ctypes.CDLL(None, use_errno=True)


def attributes(node):
    mode, size = (0o40755, 0) if node == 1 else (0o100666, 4096)
    return struct.pack("<6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, STRANGER, STRANGER, 0, 4096, 0)


def serve_fuse(fuse):
    """A directory with one file, whose closing is never answered (linux/fuse.h)."""
    while True:
        request = os.read(fuse, 1 << 17)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in (FLUSH, FORGET, BATCH_FORGET):
            continue
        answer, error = b"", 0
        if operation == INIT:
            answer = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 16, 0, 0, *[0] * 7)
        elif operation == LOOKUP:
            answer = struct.pack("<4Q2I", 2, 1, 3600, 3600, 0, 0) + attributes(2)
        elif operation == GETATTR:
            answer = struct.pack("<QII", 3600, 0, 0) + attributes(node)
        elif operation in (OPEN, OPENDIR):
            answer = struct.pack("<QII", 1, 0, 0)
        elif operation != RELEASE:
            error = -38  # ENOSYS
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


@contextlib.contextmanager
def fuse_mounted(at, serve, user, kind="fuse"):
    """A FUSE filesystem served by `serve`, in a process of its own: the path of its file, and how it is ended."""
    os.mkdir(at)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError as e:
        raise Skip(f"no FUSE here: {e}") from None
    options = f"fd={fuse},rootmode=40000,user_id={user},group_id={user},allow_other"
    if libc.mount(b"test", at.encode(), kind.encode(), 0, options.encode()):
        raise Skip(f"FUSE cannot be mounted: {os.strerror(ctypes.get_errno())}")
    server = os.fork()
    if server == 0:
        try:
            serve(fuse)
        finally:
            os._exit(0)
    os.close(fuse)
    stopped = []

    def stop():
        """Whoever waits is told that the filesystem is gone."""
        if not stopped:
            stopped.append(True)
            os.kill(server, 9)
            os.waitpid(server, 0)
            libc.umount2(at.encode(), 2)
    try:
        yield os.path.join(at, "app.db"), stop
    finally:
        stop()


@waits
@fails_without("foreign-descriptors-closed", message="in vain|timed out|after 5 s")
@timeout(60)
def test_a_file_that_never_answers_stops_nobody():
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        with fuse_mounted(broker.path("fuse"), serve_fuse, STRANGER) as (evil, stop), victim(broker, db) as goes_on:
            def send():
                fd, directory = os.open(evil, os.O_RDWR), os.open(os.path.dirname(evil), os.O_PATH)
                hostile = Hostile(broker)
                hostile.send(join("app.db"), [fd, directory])
                answer = hostile.s.recv(65536)
                if answer[0] != REFUSED or b"FUSE" not in answer:
                    return f"not refused: {answer}"
                for message in (varint(LOG) + text("x"), varint(STATUS) + varint(1), b"\xff"):
                    for count in (1, 4, 5):
                        # In the end it is turned away.
                        with contextlib.suppress(OSError, AssertionError):
                            another = Hostile(broker)
                            another.send(message, [fd] * count)
                            another.ended()
                return "sent"

            before = descriptors(broker)
            # Its process cannot end either before the filesystem is gone.
            with as_user(STRANGER, send, wait=False), contextlib.ExitStack() as end:
                end.callback(stop)
                for _ in range(3):
                    run([bin(), "status"], env=broker.env, timeout=5)
                    with Hostile(broker) as another:
                        another.s.settimeout(5)
                        another.joined(db)
                    goes_on()
                # A user that goes on is let in no more; what it has sent the broker has never had.
                wait_until(lambda: "descriptors of filesystems" in outcast(broker), what="the user to be kept out")
                goes_on()
                assert descriptors(broker) < before + 12, descriptors(broker)


def outcast(broker):
    with as_user(STRANGER, lambda: refusal(broker)) as said:
        return said


def refusal(broker):
    done = run([bin(), "status"], env=broker.env, check=False, timeout=5)
    return done.stdout + done.stderr


@waits
@fails_without("foreign-descriptors-closed", message="in vain|timed out|did not|still running")
@timeout(60)
def test_a_broker_that_was_sent_such_a_file_ends_and_comes_again():
    """What holds its descriptor is another process, which is waited for by nobody."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        db = create(broker.path("app.db"))
        with fuse_mounted(broker.path("fuse"), serve_fuse, STRANGER) as (evil, stop):
            def send():
                fd, directory = os.open(evil, os.O_RDWR), os.open(os.path.dirname(evil), os.O_PATH)
                hostile = Hostile(broker)
                hostile.send(join("app.db"), [fd, directory])
                hostile.s.recv(65536)
                return "sent"

            with as_user(STRANGER, send, wait=False), contextlib.ExitStack() as end:
                end.callback(stop)
                wait_until(lambda: "FUSE" in broker.log(), timeout=5, what="the refusal")
                with Hostile(broker) as another:
                    another.s.settimeout(5)
                    another.joined(db)
                broker.kill()
                broker.start()
                with Hostile(broker) as another:
                    another.s.settimeout(5)
                    another.joined(db)
        # They end when they have had nothing to do for 10 s, or when their broker has ended.
        wait_until(lambda: not processes_of(broker, "turnstile-recv"), timeout=25, what="its receiver's end")


@fails_without("stacked-is-local")
@timeout(60)
def test_what_a_user_has_mounted_over_something_is_not_taken_for_local():
    """In a user namespace of its own anybody may mount an overlay, over a filesystem that never answers, say."""
    root_only()
    new_user, new_mounts = 0x10000000, 0x00020000
    with Broker("--everyone", "yes") as broker:
        os.chmod(broker.dir, 0o777)

        def send():
            at = broker.path("mine")
            for name in ("", "/lower", "/upper", "/work", "/merged"):
                os.mkdir(at + name)
            libc.prctl(4, 1)  # PR_SET_DUMPABLE: it has changed its user, and /proc/self would be root's
            if libc.unshare(new_user | new_mounts):
                return f"no user namespaces here: {os.strerror(ctypes.get_errno())}"
            for name, content in (("setgroups", "deny"), ("uid_map", f"0 {STRANGER} 1"), ("gid_map", f"0 {STRANGER} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(content)
            layers = f"lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work"
            if libc.mount(b"overlay", f"{at}/merged".encode(), b"overlay", 0, layers.encode()):
                return f"no overlay here: {os.strerror(ctypes.get_errno())}"
            file = f"{at}/merged/app.db"
            with open(file, "wb") as f:
                f.write(b"x")
            hostile = Hostile(broker)
            hostile.send(join("app.db"), [os.open(file, os.O_RDWR), os.open(f"{at}/merged", os.O_PATH)])
            answer = hostile.s.recv(65536)
            return "refused" if answer[0] == REFUSED and b"user namespace" in answer else f"not refused: {answer!r}"

        with as_user(STRANGER, send) as said:
            if said.startswith("no "):
                raise Skip(said)
            assert said == "refused", said
