"""Attacks by what is sent along: descriptors, and what is done to the files that they are of."""

import ctypes
import fcntl
import os
import re
import select
import socket
import struct
import time

from attacker import CannotHere, attack, libc, regardless, sealed
from harness import ROOT
from messages import CONTROL_SIZE, WAL_FILE, hand_back
from test_gate import text, varint
from test_hostile import LOG, OPEN_WAL_INDEX, STATUS, join, key, with_seat

SOL_TCP_LINGER = struct.pack("ii", 1, 3600)
SHARED_FIRST, SHARED_SIZE, PENDING = 0x40000002, 510, 0x40000000
F_OFD_SETLK = 37
with open(os.path.join(ROOT, "src", "segment", "layout.rs")) as source:
    LAYOUT_VERSION = int(re.search(r"LAYOUT_VERSION: u32 = (\d+);", source.read())[1])


def ofd_lock(fd, kind, start, length):
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


def unlike_databases(a):
    """Descriptors that are no database's, of all kinds."""
    fifo = os.path.join(a.place, f"fifo-{os.getpid()}")
    if not os.path.exists(fifo):
        os.mkfifo(fifo)
    kinds = [os.open(a.place, os.O_RDONLY), os.open(fifo, os.O_RDWR), os.open("/dev/zero", os.O_RDWR),
             os.open("/dev/full", os.O_RDWR), os.open("/proc/self/status", os.O_RDONLY), os.open("/proc/self/mem", os.O_RDWR),
             os.open("/proc/self/mounts", os.O_RDONLY), os.open("/sys/kernel", os.O_RDONLY),
             os.open(a.database(), os.O_PATH), *os.pipe(), os.eventfd(0), select.epoll().fileno(),
             os.memfd_create("x"), os.pidfd_open(os.getpid()), socket.socket().fileno(),
             socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).fileno(), a.connected().fileno()]
    for name, arguments in (("inotify_init", ()), ("timerfd_create", (1, 0))):
        fd = getattr(libc, name)(*arguments)
        if fd >= 0:
            kinds.append(fd)
    return [fd for fd in kinds if valid(fd)]


def valid(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False


@attack
def joins_of_what_is_no_database(a):
    """Joins with directories, fifos, devices, files of /proc, sockets, pipes, epoll and the like, as database, directory and
    -shm."""
    kinds = unlike_databases(a)
    own, place = os.open(a.database(), os.O_RDWR), os.open(a.place, os.O_PATH)
    while a.going():
        for fd in kinds:
            for fds in ([fd, place], [own, fd], [own, place, fd], [fd, fd, fd]):
                with regardless(), a.session() as s:
                    s.send(join("app.db"), fds)
                    s.s.recv(4096)
                a.blow()


@attack
def a_wal_that_is_none(a):
    """Names fifos, devices, sockets and files of others as its database's WAL, and asks for a checkpoint."""
    kinds = unlike_databases(a)
    hostile, _ = a.member()
    while a.going():
        for fd in kinds:
            if not a.say(hostile, varint(WAL_FILE) + key(hostile.seat), [fd]):
                with regardless():
                    hostile, _ = a.member()
            a.say(hostile, varint(19) + key(hostile.seat))
            a.blow()


@attack
def two_hundred_descriptors_a_packet(a):
    """As many descriptors as fit a packet, with everything that it says."""
    null = os.open("/dev/null", os.O_RDONLY)
    while a.going():
        with regardless(), a.session() as s:
            for message in (varint(STATUS) + varint(1), varint(LOG) + text("x"), b"x"):
                a.say(s, message, [null] * 253)
                a.blow()


@attack
def answers_that_are_not_received(a):
    """Joins one database after another and receives none of the descriptors that it is sent."""
    place = os.open(a.place, os.O_PATH)
    while a.going():
        with regardless():
            s = a.keep(a.session())
            for _ in range(8):
                path = a.database()
                fd = os.open(path, os.O_RDWR)
                a.say(s, join(os.path.basename(path)), [fd, place])
                os.close(fd)
        a.blow()


@attack
def sockets_in_sockets(a):
    """Descriptors in the queues of sockets that are in the queues of sockets, in rings, which the kernel has to look for
    whenever it collects what nobody holds."""
    while a.going():
        with regardless():
            chain = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(60)]
            for (ours, _), (inner, other) in zip(chain, chain[1:] + chain[:1]):
                ours.setblocking(False)
                with regardless():
                    socket.send_fds(ours, [b"x"], [inner.fileno(), other.fileno()])
            with a.session() as s:
                for ours, theirs in chain[:20]:
                    a.say(s, varint(LOG) + text("x"), [ours.fileno(), theirs.fileno()])
            for pair in chain:
                for one in pair:
                    one.close()
        a.blow()


def sleeping_sockets(count):
    """TCP connections whose closing waits for an hour: the peer does not read, and SO_LINGER says to wait."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen(count)
    sleepers = []
    for _ in range(count):
        s = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
        s.setblocking(False)
        try:
            while True:
                s.send(bytes(65536))
        except BlockingIOError:
            pass
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SOL_TCP_LINGER)
        sleepers.append((s, peer))
    return listener, sleepers


@attack
def a_close_that_sleeps(a):
    """Sends a connection whose closing waits for an hour, behind a packet that breaks a rule: the session ends with it
    unread."""
    listener, sleepers = sleeping_sockets(12)
    a.keep(listener, sleepers)
    for s, _ in sleepers:
        for breaks in (b"\xff", b"", varint(LOG) + text("x")):
            with regardless():
                hostile = a.session()
                a.say(hostile, breaks)
                a.say(hostile, varint(LOG) + text("x"), [s.fileno()])
                hostile.s.close()
        with regardless():
            raw = a.connected()
            raw.send(b"\xff\xff")
            socket.send_fds(raw, [b"x"], [s.fileno()])
            raw.close()
        # The last to close it is whoever has it in a queue.
        fd = s.detach()
        child = os.fork()
        if child == 0:
            os.close(fd)
            os._exit(0)
        threaded_close(fd)
        a.blow()


def threaded_close(fd):
    import threading
    threading.Thread(target=os.close, args=(fd,), daemon=True).start()


@attack
def a_gate_hold_that_sleeps(a):
    """Puts such a connection into the queue of the socket that holds its own database's gate, and leaves."""
    listener, sleepers = sleeping_sockets(6)
    a.keep(listener, sleepers)
    for s, _ in sleepers:
        with regardless():
            hostile, fds = a.member()
            hold = socket.socket(fileno=os.dup(fds[2]))
            for _ in range(3):
                socket.send_fds(hold, [b"x"], [s.fileno()])
            threaded_close(s.detach())
            for fd in fds:
                os.close(fd)
            hold.close()
            hostile.send(with_seat(hostile.seat)["Leave"])
            hostile.s.recv(4096)
            hostile.s.close()
        a.blow()


@attack
def a_hand_back_of_huge_pages(a):
    """Hands back a database whose wal-index is a memfd of huge pages: touching one that cannot be had is a SIGBUS."""
    try:
        huge = sealed("turnstile-wal-index-x", 1 << 30, flags=os.MFD_HUGETLB)
    except OSError as e:
        raise CannotHere(f"no huge pages: {e}") from None
    path = a.database()
    number = 77
    while a.going():
        number += 1
        control = sealed("turnstile-control-x", CONTROL_SIZE)
        os.pwrite(control, b"trnstile" + LAYOUT_VERSION.to_bytes(4, "little") + bytes(4) + number.to_bytes(8, "little"), 0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with open(path, "r+b") as f:
            with regardless():
                ofd_lock(f.fileno(), fcntl.F_WRLCK, PENDING, 512)
            socket.send_fds(ours, [number.to_bytes(8, "little")], [f.fileno()])
            with regardless(), a.session() as s:
                s.send(hand_back(number, number, a.place, os.path.basename(path)), [control, huge, theirs.fileno()])
                s.s.recv(4096)
                s.send(varint(OPEN_WAL_INDEX) + varint(9) + key((number, 1)))
                s.s.recv(4096)
        os.close(control)
        a.blow()


@attack
def thousands_of_locks(a):
    """Joins with a file on which thousands of locks lie: whoever reads its fdinfo gets a line for each."""
    path = a.database()
    fd, place = os.open(path, os.O_RDWR), os.open(a.place, os.O_PATH)
    for i in range(6000):
        ofd_lock(fd, fcntl.F_RDLCK if i % 2 else fcntl.F_WRLCK, 0x50000000 + 4 * i, 1)
    while a.going():
        with regardless(), a.session() as s:
            s.send(join(os.path.basename(path)), [fd, place])
            s.s.recv(4096)
        a.blow()


@attack
def an_epoll_of_thousands(a):
    """Sends an epoll that watches thousands of descriptors: its fdinfo has a line for each."""
    epoll = select.epoll()
    pipe = os.pipe()
    for _ in range(800):
        with regardless():
            fd = os.dup(pipe[0])
            a.keep(fd)
            epoll.register(fd, select.EPOLLIN)
    place = os.open(a.place, os.O_PATH)
    while a.going():
        with regardless(), a.session() as s:
            s.send(join("app.db"), [epoll.fileno(), place])
            s.s.recv(4096)
        a.blow()


@attack
def changes_to_files_at_rest(a):
    """Eighty databases that have just been closed twice, and a change of each file's mode in turn, again and again."""
    paths = [a.database() for _ in range(80)]
    for path in paths:
        for _ in range(2):
            with regardless():
                db = a.connection(path)
                db.execute("INSERT INTO rows VALUES('a', 1)")
                db.close()
    while a.going():
        for path in paths:
            os.chmod(path, 0o600)
            os.chmod(path, 0o644)
            a.blow()


@attack
def renames_in_the_directory(a):
    """Makes, renames and removes files beside its databases, as fast as it can."""
    a.connection(a.database())
    names = [os.path.join(a.place, f"n{i}") for i in range(3)]
    while a.going():
        with regardless():
            os.close(os.open(names[0], os.O_WRONLY | os.O_CREAT, 0o600))
            os.rename(names[0], names[1])
            os.link(names[1], names[2])
            os.unlink(names[1])
            os.unlink(names[2])
        a.blow()


@attack
def links_and_renames_while_joining(a):
    """Renames its database, links it and puts another into its place while it joins."""
    path, other = a.database(), a.database()
    place = os.open(a.place, os.O_PATH)

    def renames():
        while a.going():
            with regardless():
                os.rename(path, path + "-x")
                os.link(path + "-x", path + "-y")
                os.rename(other, path)
                os.rename(path, other)
                os.rename(path + "-x", path)
                os.unlink(path + "-y")
    a.spawn(renames)
    while a.going():
        with regardless():
            fd = os.open(path, os.O_RDWR)
            with a.session() as s:
                s.send(join(os.path.basename(path)), [fd, place])
                s.s.recv(4096)
            os.close(fd)
        a.blow()


@attack
def a_file_that_grows_and_shrinks(a):
    """Its database is a terabyte long, and empty, by turns."""
    path = a.database()
    while a.going():
        with regardless():
            hostile, fds = a.member(path)
            for size in (1 << 40, 0, 4096, 1 << 40):
                with regardless():
                    os.truncate(path, size)
            for fd in fds:
                os.close(fd)
            hostile.s.close()
        a.blow()


@attack
def a_read_lock_as_a_gate(a):
    """Holds read locks on the victims' database that it may read, where plain SQLite's readers have theirs."""
    fd = os.open(os.path.join(a.data, "read.db"), os.O_RDONLY)
    while a.going():
        for start, length in ((SHARED_FIRST, SHARED_SIZE), (PENDING, 512), (0, 1 << 40)):
            with regardless():
                ofd_lock(fd, fcntl.F_RDLCK, start, length)
                time.sleep(0.02)
                ofd_lock(fd, fcntl.F_UNLCK, start, length)
            a.blow()


@attack
def leases(a):
    """Takes and breaks leases on its databases, which the broker may want one of."""
    path = a.database()
    fd = os.open(path, os.O_RDONLY)
    import signal
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    place, own = os.open(a.place, os.O_PATH), os.open(path, os.O_RDWR)

    def opens():
        while a.going():
            with regardless():
                db = a.connection(path)
                db.execute("INSERT INTO rows VALUES('a', 1)")
                db.close()
    a.spawn(opens)
    while a.going():
        for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK):
            with regardless():
                fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
            sent = a.session()
            a.say(sent, join(os.path.basename(path)), [own, place])
            time.sleep(0.005)
            sent.s.close()
            with regardless():
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        a.blow()


@attack
def locks_on_ones_own_file(a):
    """POSIX locks, flock and locks of open descriptions on its database, all over the bytes that SQLite and the broker
    lock."""
    path = a.database()

    def locks():
        fd = os.open(path, os.O_RDWR)
        while a.going():
            with regardless():
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 512, PENDING)
                fcntl.lockf(fd, fcntl.LOCK_UN)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_UN)
                ofd_lock(fd, fcntl.F_WRLCK, PENDING, 512)
                ofd_lock(fd, fcntl.F_UNLCK, PENDING, 512)
    for _ in range(3):
        a.spawn(locks)
    while a.going():
        with regardless():
            hostile, fds = a.member(path)
            hostile.s.close()
            for fd in fds:
                os.close(fd)
        a.blow()


@attack
def readers_of_anothers_database(a):
    """As many seats as it may have in the victims' database that it may read, joined and left again and again."""
    path = os.path.join(a.data, "read.db")
    fd, place = os.open(path, os.O_RDONLY), os.open(a.data, os.O_PATH)
    while a.going():
        with regardless():
            s = a.keep(a.session())
            for _ in range(60):
                s.send(join("read.db"), [fd, place])
                _, fds, _, _ = socket.recv_fds(s.s, 65536, 4)
                for received in fds:
                    os.close(received)
                a.blow()
        if len(a.kept) > 8:
            while a.kept:
                a.kept.pop().s.close()


@attack
def a_reader_that_holds_locks(a):
    """Read locks and slots on the victims' database that it may read, by messages, never given back."""
    path = os.path.join(a.data, "read.db")
    fd, place = os.open(path, os.O_RDONLY), os.open(a.data, os.O_PATH)
    shared = varint(0) + varint(1) + b"\0"
    while a.going():
        with regardless():
            s = a.keep(a.session())
            s.send(join("read.db"), [fd, place])
            answer, fds, _, _ = socket.recv_fds(s.s, 65536, 4)
            from test_hostile import number
            _, rest = number(answer[1:])
            database, rest = number(rest)
            s.seat = (database, number(rest)[0])
            for request in (shared, varint(1) + bytes([4]), varint(1) + bytes([3]), varint(2) + bytes([0, 1, 0])):
                a.say(s, varint(2) + varint(7) + key(s.seat) + request + b"\0" + varint(1) + varint(1))
            for received in fds:
                os.close(received)
        a.blow()
        if len(a.kept) > 40:
            while a.kept:
                a.kept.pop().s.close()


@attack
def a_memfd_as_a_database(a):
    """Joins with a memfd, a file that has been removed, and one without a name (O_TMPFILE)."""
    place = os.open(a.place, os.O_PATH)
    removed = os.open(os.path.join(a.place, "gone.db"), os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(os.path.join(a.place, "gone.db"))
    nameless = os.open(a.place, os.O_RDWR | os.O_TMPFILE, 0o600)
    while a.going():
        for fd in (os.memfd_create("app.db"), removed, nameless):
            with regardless(), a.session() as s:
                s.send(join("gone.db"), [fd, place])
                s.s.recv(4096)
            a.blow()


@attack
def names_of_all_kinds(a):
    """Joins under names with slashes, dots, of 255 and of 4,000 bytes, and of no byte."""
    path = a.database()
    fd, place = os.open(path, os.O_RDWR), os.open(a.place, os.O_PATH)
    names = ["", ".", "..", "/", "../x.db", "x" * 255, "x" * 4000, "a/b", "\0", "x\0y", os.path.basename(path) + "/"]
    while a.going():
        for name in names:
            with regardless(), a.session() as s:
                s.send(join(name), [fd, place])
                s.s.recv(4096)
            a.blow()
