"""Attacks by the shared memory of a database of one's own."""

import ctypes
import mmap
import os
import random
import socket
import struct
import time

from attacker import attack, libc, regardless
from messages import WAL_FILE, WAL_GREW, WAITING
from test_gate import varint
from test_hostile import key, with_seat

POISONED = 12  # Header::poisoned
FUTEX_WAIT, FUTEX_WAKE, FUTEX_REQUEUE = 0, 1, 3
SYS_FUTEX = 202
KEEP_SIZE, PUNCH_HOLE = 1, 2


class Opened:
    """A member of a database in use: a connection by the extension, and a seat by hand, with its mappings."""

    def __init__(self, a):
        self.path = a.database()
        self.worker = a.spawn(works, a, self.path)
        end = time.monotonic() + 5
        while not os.path.exists(self.path + "-wal") and time.monotonic() < end:
            time.sleep(0.002)
        self.hostile, self.fds = a.member(self.path)
        self.control = mmap.mmap(self.fds[0], os.fstat(self.fds[0]).st_size)
        self.index = mmap.mmap(self.fds[1], 256 * 1024)
        with regardless():
            self.wal = os.open(self.path + "-wal", os.O_RDWR)
            a.say(self.hostile, varint(WAL_FILE) + key(self.hostile.seat), [self.wal])

    def provoke(self, a):
        """What makes the broker look."""
        for message in (varint(WAL_GREW), varint(WAITING)):
            a.say(self.hostile, message + key(self.hostile.seat))
        a.hear(self.hostile)


def works(a, path):
    """A program that goes on writing, whatever happens to it."""
    import sqlite3
    while a.going():
        try:
            db = a.connection(path)
            while a.going():
                db.execute("INSERT INTO rows VALUES('a', zeroblob(500))")
        except sqlite3.Error:
            time.sleep(0.01)


@attack
def a_scribbler_over_control(a):
    """Writes anything over all words of control while others work there and the broker looks."""
    opened, chance = Opened(a), random.Random(5)
    patterns = [b"\0", b"\xff", b"\1\0\0\0", b"\2\0\1\0\0\0\0\0"]
    while a.going():
        pattern = chance.choice([*patterns, chance.randbytes(4096)])
        opened.control[64:] = (pattern * (len(opened.control) // len(pattern) + 1))[:len(opened.control) - 64]
        opened.provoke(a)
        for message in chance.sample(list(with_seat(opened.hostile.seat).values()), 3):
            a.say(opened.hostile, message)
        a.blow()


@attack
def a_scribbler_over_words(a):
    """Writes plausible numbers into single words of control: seats, tickets, owners, counts."""
    opened, chance = Opened(a), random.Random(6)
    while a.going():
        for _ in range(200):
            at = chance.randrange(64, 1 << 15) & ~3
            value = chance.choice([0, 1, 2, 3, 1023, 1024, 2**31, 2**32 - 1, chance.randrange(1 << 32)])
            opened.control[at:at + 4] = value.to_bytes(4, "little")
        opened.provoke(a)
        a.blow()


@attack
def a_scribbler_over_the_index(a):
    """Writes anything over the wal-index while the checkpointer reads it."""
    opened, chance = Opened(a), random.Random(7)
    while a.going():
        block = chance.randbytes(4096)
        opened.index[0:4096] = block
        opened.index[32768:36864] = block
        opened.provoke(a)
        a.blow()


@attack
def holes_in_memory(a):
    """Punches holes into control and wal-index."""
    opened = Opened(a)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    while a.going():
        for fd in opened.fds[:2]:
            libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 0, 1 << 20)
        opened.provoke(a)
        a.blow()


@attack
def a_poisoned_segment(a):
    """Says in its database's segment that it is not to be used any more."""
    while a.going():
        opened = Opened(a)
        opened.control[POISONED:POISONED + 4] = b"\1\0\0\0"
        for _ in range(20):
            opened.provoke(a)
            time.sleep(0.002)
        opened.hostile.s.close()
        for fd in opened.fds:
            os.close(fd)
        a.blow()


@attack
def a_storm_of_futexes(a):
    """Wakes, waits and requeues on every word that somebody might sleep on."""
    opened = Opened(a)
    address = ctypes.addressof(ctypes.c_char.from_buffer(opened.control))
    timeout = ctypes.byref(ctypes.create_string_buffer(struct.pack("qq", 0, 1000)))
    while a.going():
        for at in range(64, 1 << 15, 128):
            word = ctypes.c_void_p(address + at)
            libc.syscall(SYS_FUTEX, word, FUTEX_WAKE, 2**31 - 1, None, None, 0)
            libc.syscall(SYS_FUTEX, word, FUTEX_REQUEUE, 1, ctypes.c_void_p(1000), ctypes.c_void_p(address + 128), 0)
        libc.syscall(SYS_FUTEX, ctypes.c_void_p(address + 64), FUTEX_WAIT, 0, timeout, None, 0)
        opened.provoke(a)
        a.blow()


def set_u64(opened, start, values):
    opened.control[start:start + 8 * len(values)] = struct.pack(f"<{len(values)}Q", *values)


@attack
def forged_commits(a):
    """Says of commits that they are durable, that the newest is the last number of all, and that a sync has failed."""
    opened, chance = Opened(a), random.Random(8)
    while a.going():
        # The commits' words lie between the table of statements and the seats: wherever that is, all of it.
        for at in range(1024, 1 << 14, 64):
            set_u64(opened, at, [chance.choice([0, 1, 2**63, 2**64 - 1, 1 << 40]) for _ in range(4)])
        opened.provoke(a)
        a.blow()


@attack
def indexes_that_kill_sqlite(a):
    """Wal-indexes that say that more is in the database than there is: wal.c reads before an array's beginning, and the
    checkpointer dies."""
    while a.going():
        opened = Opened(a)
        for value in (b"\x00\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"):
            for at in (96, 16, 64, 128):
                opened.index[at:at + 4] = value
            opened.provoke(a)
            time.sleep(0.01)
        opened.hostile.s.close()
        for fd in opened.fds:
            os.close(fd)
        a.blow()


def checksum(data):
    first = second = 0
    for x, y in struct.iter_unpack("<II", data):
        first = first + x + second & 0xFFFFFFFF
        second = second + y + first & 0xFFFFFFFF
    return struct.pack("<II", first, second)


@attack
def huge_page_counts(a):
    """Index headers with right checksums that say two thousand million frames and four thousand million pages."""
    opened = Opened(a)
    while a.going():
        for frames, pages in ((2**31, 2**32 - 1), (2**32 - 1, 1), (1, 2**32 - 2), (4096 * 32768, 7)):
            header = struct.pack("<IIIBBHIIIIII", 3007000, 0, 1, 1, 0, 4096, frames, pages, 0, 0, 0, 0)
            header += checksum(header)
            opened.index[0:96] = (header + header)[:96].ljust(96, b"\0")
            opened.provoke(a)
        a.blow()


@attack
def an_open_gate(a):
    """Takes the gate's descriptor out of the queue of what holds it, and unlocks it, again and again."""
    import fcntl
    from descriptors import PENDING, ofd_lock
    while a.going():
        opened = Opened(a)
        with regardless():
            hold = socket.socket(fileno=os.dup(opened.fds[2]))
            hold.setblocking(False)
            _, fds, _, _ = socket.recv_fds(hold, 4096, 4)
            for fd in fds:
                ofd_lock(fd, fcntl.F_UNLCK, PENDING, 512)
                os.close(fd)
            hold.close()
        opened.provoke(a)
        opened.hostile.s.close()
        for fd in opened.fds:
            os.close(fd)
        a.blow()
