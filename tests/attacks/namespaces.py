"""Attacks by what anybody may do in a user namespace: mounts, FUSE, pids of one's own."""

import ctypes
import os
import signal
import socket
import struct
import time

from attacker import CannotHere, attack, libc, regardless
from test_gate import text, varint
from test_hostile import LOG, STATUS, join, with_seat

NEWNS, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
BIND, REC, PRIVATE, DETACH = 4096, 16384, 1 << 18, 2
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = (
    1, 2, 3, 14, 15, 17, 18, 25, 26, 27, 28, 29)
BATCH_FORGET = 42


def mount(source, at, kind=None, flags=0, options=None):
    encode = lambda x: None if x is None else x.encode()  # noqa: E731
    if libc.mount(encode(source), encode(at), encode(kind), ctypes.c_ulong(flags), encode(options)):
        raise CannotHere(f"{kind or 'bind'} cannot be mounted: {os.strerror(ctypes.get_errno())}")


def namespace(flags=NEWNS):
    """This process is root in a user namespace of its own."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(NEWUSER | flags):
        raise CannotHere(f"no user namespaces here: {os.strerror(ctypes.get_errno())}")
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(content)
    if flags & NEWNS and libc.mount(b"none", b"/", None, ctypes.c_ulong(REC | PRIVATE), None):
        raise CannotHere("mounts cannot be made private")


def attributes(node):
    mode, size = (0o40755, 0) if node == 1 else (0o100666, 8192)
    return struct.pack("<6Q10I", node, size, 16, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def serve(fuse, silent):
    """A directory in which every name is a file. Operations in `silent` are never answered."""
    while True:
        request = os.read(fuse, 1 << 17)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in silent or operation in (FORGET, BATCH_FORGET):
            continue
        answer, error = b"", 0
        if operation == INIT:
            answer = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 16, 0, 0, *[0] * 7)
        elif operation == LOOKUP:
            # Nothing is cached: each look asks again.
            answer = struct.pack("<4Q2I", 2, 1, 0, 0, 0, 0) + attributes(2)
        elif operation == GETATTR:
            answer = struct.pack("<QII", 0, 0, 0) + attributes(node)
        elif operation in (OPEN, OPENDIR):
            answer = struct.pack("<QII", 1, 0, 0)
        elif operation == STATFS:
            answer = struct.pack("<5Q10I", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, 0, *[0] * 6)
        elif operation not in (RELEASE, RELEASEDIR, READ, READDIR, FLUSH):
            error = -38  # ENOSYS
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


def fuse_at(a, at, silent):
    """A FUSE filesystem that answers all but what is `silent` once SIGUSR1 has come. Returns its server's pid."""
    os.makedirs(at, exist_ok=True)
    try:
        fuse = os.open(os.environ["FUSE"], os.O_RDWR)
    except OSError as e:
        raise CannotHere(f"no FUSE here: {e}") from None
    mount("fuse", at, "fuse", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other")

    def server():
        from_now = []
        signal.signal(signal.SIGUSR1, lambda *_: from_now.extend(silent))
        serve(fuse, from_now)
    child = a.spawn(server)
    os.close(fuse)
    return child


def sent(a, fds, message=None):
    with regardless():
        s = a.keep(a.session())
        s.s.settimeout(0.2)
        s.send(message or join("app.db"), fds)
        s.s.recv(4096)


def fuse_that_sleeps(a, silent):
    namespace()
    at = os.path.join(a.place, f"fuse-{os.getpid()}")
    server = fuse_at(a, at, silent)
    files = [os.open(os.path.join(at, f"{i}.db"), os.O_RDWR) for i in range(4)]
    directory = os.open(at, os.O_PATH)
    os.kill(server, signal.SIGUSR1)
    time.sleep(0.02)

    def sender():
        while a.going():
            for fd in files:
                for message in (None, varint(LOG) + text("x"), varint(STATUS) + varint(1), b"\xff"):
                    sent(a, [fd, directory], message)
                    sent(a, [fd] * 4, message)
    # It may not come back from its own end.
    a.spawn(sender)
    while a.going():
        a.blow()
        time.sleep(0.02)


@attack
def a_file_whose_close_never_ends(a):
    """Descriptors of a FUSE filesystem that does not answer when a file is closed."""
    fuse_that_sleeps(a, (FLUSH, RELEASE))


@attack
def a_file_whose_stat_never_ends(a):
    """Descriptors of a FUSE filesystem that does not answer when it is asked for a file's attributes, or its name."""
    fuse_that_sleeps(a, (GETATTR, LOOKUP, FLUSH))


@attack
def an_overlay_over_one_that_sleeps(a):
    """An overlay over such a filesystem: another type, which waits for it all the same."""
    namespace()
    base = os.path.join(a.place, f"over-{os.getpid()}")
    lower, merged, upper, work = (os.path.join(base, n) for n in ("lower", "merged", "upper", "work"))
    for path in (base, merged, upper, work):
        os.makedirs(path, exist_ok=True)
    server = fuse_at(a, lower, (GETATTR, LOOKUP, FLUSH, OPEN, READ))
    mount("overlay", merged, "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work},userxattr")
    files = [os.open(os.path.join(merged, f"{i}.db"), os.O_RDONLY) for i in range(4)]
    directory = os.open(merged, os.O_PATH)
    os.kill(server, signal.SIGUSR1)
    time.sleep(0.02)

    def sender():
        while a.going():
            for fd in files:
                sent(a, [fd, directory])
    a.spawn(sender)
    while a.going():
        a.blow()
        time.sleep(0.02)


@attack
def a_name_under_which_one_sleeps(a):
    """A real file and its directory, opened before; then a file of an overlay over FUSE is mounted over the name: whoever
    looks the name up in that directory waits."""
    path = a.database("real.db")
    file, directory = os.open(path, os.O_RDWR), os.open(a.place, os.O_PATH)
    namespace()
    inside = os.open(a.place, os.O_PATH)
    base = os.path.join(a.place, f"name-{os.getpid()}")
    server = fuse_at(a, base, (GETATTR, LOOKUP, FLUSH))
    mount(os.path.join(base, "x.db"), path, None, BIND)
    os.kill(server, signal.SIGUSR1)
    time.sleep(0.02)

    def sender():
        while a.going():
            for d in (directory, inside):
                sent(a, [file, d], join("real.db"))
                sent(a, [file, d], join("real.db-wal"))
    a.spawn(sender)
    while a.going():
        a.blow()
        time.sleep(0.02)


@attack
def an_overlay_as_the_directory(a):
    """A real file with a directory of an overlay over FUSE, and the other way round."""
    path = a.database("real2.db")
    file = os.open(path, os.O_RDWR)
    namespace()
    base = os.path.join(a.place, f"dir-{os.getpid()}")
    lower, merged, upper, work = (os.path.join(base, n) for n in ("lower", "merged", "upper", "work"))
    for one in (base, merged, upper, work):
        os.makedirs(one, exist_ok=True)
    server = fuse_at(a, lower, (GETATTR, LOOKUP, FLUSH))
    mount("overlay", merged, "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work},userxattr")
    directory = os.open(merged, os.O_PATH)
    os.kill(server, signal.SIGUSR1)

    def sender():
        while a.going():
            sent(a, [file, directory], join("real2.db"))
    a.spawn(sender)
    while a.going():
        a.blow()
        time.sleep(0.02)


@attack
def a_file_on_a_mount_of_ones_own(a):
    """Databases on a tmpfs that only its own mount namespace sees."""
    namespace()
    at = os.path.join(a.place, f"tmpfs-{os.getpid()}")
    os.makedirs(at)
    mount("tmpfs", at, "tmpfs")
    path = a.database(f"tmpfs-{os.getpid()}/app.db")
    directory = os.open(at, os.O_PATH)
    while a.going():
        fd = os.open(path, os.O_RDWR)
        sent(a, [fd, directory])
        os.close(fd)
        a.blow()


@attack
def mounts_over_what_is_joined(a):
    """Mounts something over its database and over the directory while it joins, works and leaves."""
    path = a.database("mounted.db")
    other = a.database("other.db")
    namespace()
    while a.going():
        with regardless():
            hostile, fds = a.member(path)
            mount(other, path, None, BIND)
            directory = os.open(a.place, os.O_PATH)
            sent(a, [os.open(path, os.O_RDWR), directory], join("mounted.db"))
            hostile.send(with_seat(hostile.seat)["Leave"])
            libc.umount2(path.encode(), DETACH)
            hostile.s.close()
            for fd in (*fds, directory):
                os.close(fd)
        a.blow()


@attack
def thousands_of_mounts(a):
    """A mount namespace with thousands of mounts: whoever looks a mount up in it reads a line for each."""
    namespace()
    at = os.path.join(a.place, f"many-{os.getpid()}")
    os.makedirs(at)
    mount("tmpfs", at, "tmpfs")
    with regardless():
        for i in range(12):
            # Doubles what is there.
            one = os.path.join(at, f"{i}")
            os.makedirs(one)
            mount(at, one, None, BIND | REC)
    path = a.database(f"many-{os.getpid()}/app.db")
    directory = os.open(at, os.O_PATH)
    while a.going():
        fd = os.open(path, os.O_RDWR)
        sent(a, [fd, directory])
        os.close(fd)
        a.blow()


@attack
def pids_of_ones_own(a):
    """Members in pid namespaces of their own that are ended with their first process."""
    namespace(NEWPID)
    path = os.path.join(a.place, "pids.db")
    if not os.path.exists(path):
        a.database("pids.db")

    def first():
        for _ in range(6):
            a.spawn(lambda: (a.member(path), time.sleep(5)))
        time.sleep(0.1)
        os._exit(0)  # and with it all the others
    while a.going():
        child = a.spawn(first)
        os.waitpid(child, 0)
        a.blow()
        break  # an ended namespace takes no other
    while a.going():
        with regardless():
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)


@attack
def a_session_of_a_stopped_namespace(a):
    """Root in its user namespace with a session, seats and locks, every process of it stopped."""
    namespace()

    def one():
        hostile, _ = a.member(a.database())
        a.say(hostile, with_seat(hostile.seat)["Lock"])
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(10):
        a.spawn(one)
        a.blow()
    while a.going():
        time.sleep(0.02)
