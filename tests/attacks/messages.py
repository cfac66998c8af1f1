"""Attacks by what is said."""

import os
import random
import socket
import time

from attacker import attack, regardless, sealed
from test_gate import text, varint
from test_hostile import (CANCEL, GROW_WAL_INDEX, HELLO, LOG, STATUS, introduction, join, key, liveness_memfd, lock,
                          with_seat)

WAITING, KICK, ASK_BLOCKER, LET_GO, WAL_FILE, WAL_GREW, RESUME, HAND_BACK, CLAIM = range(14, 23)
CONTROL_SIZE = 1 << 18


@attack
def connections_come_and_go(a):
    """Connects and closes as fast as it can."""
    while a.going():
        with regardless():
            a.connected().close()
        a.blow()


@attack
def connections_that_say_nothing(a):
    """As many sockets as it may have, none of which says hello."""
    for _ in range(900):
        with regardless():
            a.keep(a.connected())
        a.blow()


@attack
def half_a_hello(a):
    """Half of a greeting on each of many sockets, and then silence."""
    for _ in range(400):
        with regardless():
            a.keep(a.connected()).send(HELLO[:3])
        a.blow()


@attack
def half_messages(a):
    """Each message cut off at each of its bytes."""
    whole = [join("app.db"), introduction(), *with_seat((1, 1)).values()]
    while a.going():
        for message in whole:
            for length in range(1, len(message), 3):
                with regardless(), a.session() as s:
                    s.send(message[:length])
                a.blow()
                if not a.going():
                    return


@attack
def garbage(a):
    """Random bytes at each stage of a session."""
    chance = random.Random(2)
    while a.going():
        for stage in (dict(hello=False), dict(introduce=False), {}):
            with regardless(), a.session(**stage) as s:
                for _ in range(8):
                    s.send(chance.randbytes(chance.randrange(1, 200)))
            a.blow()


@attack
def packets_that_are_too_long(a):
    """Packets of a hundred thousand bytes, which nobody asked for."""
    data = bytes(100_000)
    while a.going():
        for stage in (dict(hello=False), dict(introduce=False), {}):
            with regardless(), a.session(**stage) as s:
                for _ in range(20):
                    s.send(data)
            a.blow()


@attack
def packets_without_a_byte(a):
    """Empty packets, with descriptors and without, which look like the end of a connection."""
    null = os.open("/dev/null", os.O_RDONLY)
    while a.going():
        with regardless():
            s = a.connected()
            for _ in range(50):
                s.send(b"")
                socket.send_fds(s, [b""], [null])
            a.blow()
            s.close()


@attack
def a_flood_of_status(a):
    """Asks for the status again and again, and reads no answer."""
    s = a.session()
    while a.going():
        if not a.say(s, varint(STATUS) + varint(1)):
            time.sleep(0.001)
            with regardless():
                s = a.session()
        a.blow()


@attack
def a_flood_of_log_lines(a):
    """Has the broker write its log as fast as it can."""
    s = a.session()
    while a.going():
        if not a.say(s, varint(LOG) + text("x" * 4000)):
            time.sleep(0.0005)
        a.blow()


@attack
def a_thousand_sessions(a):
    """Introduces as many processes as it may, and keeps them."""
    while a.going():
        with regardless():
            a.keep(a.session())
        a.blow()
        if len(a.kept) > 250:
            break
    while a.going():
        for s in a.kept:
            a.say(s, varint(STATUS) + varint(1))
        time.sleep(0.02)


@attack
def dead_at_once(a):
    """Sessions whose liveness byte nobody holds: dead as soon as they are there."""
    while a.going():
        with regardless():
            s = a.session(introduce=False)
            liveness = liveness_memfd()
            s.send(introduction(), [liveness])
            os.close(liveness)
            s.s.close()
        a.blow()


@attack
def liveness_that_is_none(a):
    """Introduces itself with files, pipes, devices and memfds that can be cut."""
    fds = [os.open("/dev/zero", os.O_RDWR), os.pipe()[0], os.open(a.place, os.O_RDONLY), sealed("x", 4096, 0),
           sealed("x", 1 << 30), os.open("/proc/self/mem", os.O_RDONLY), os.open(a.place, os.O_PATH)]
    while a.going():
        for fd in fds:
            with regardless():
                s = a.session(introduce=False)
                s.send(introduction(), [fd])
                s.s.close()
            a.blow()


@attack
def cancel_and_lock(a):
    """Many sessions with seats in many databases that ask for locks, wait for each other and cancel."""
    members = []
    for i in range(30):
        path = a.database()
        for _ in range(4):
            with regardless():
                hostile, fds = a.member(path)
                members.append(hostile)
                for fd in fds:
                    os.close(fd)
    exclusive = varint(0) + varint(4) + b"\0"
    while a.going():
        for hostile in members:
            a.say(hostile, lock(hostile.seat, exclusive))
            a.say(hostile, lock(hostile.seat))
            a.say(hostile, varint(CANCEL) + key(hostile.seat))
            a.hear(hostile)
            a.blow()


@attack
def many_databases_and_cancels(a):
    """As many databases as it may open, a seat in each, and a thousand cancellations of each in turn: a broker that looks at
    everything for each message does so a million times."""
    members = []
    end = time.monotonic() + 4
    while len(members) < 700 and time.monotonic() < end:
        with regardless():
            hostile, fds = a.member()
            members.append(hostile)
            for fd in fds:
                os.close(fd)
        a.blow()
    while a.going():
        for hostile in members:
            for _ in range(4):
                a.say(hostile, varint(CANCEL) + key(hostile.seat))
            a.blow()


@attack
def seats_of_others(a):
    """Every message that names a seat, with the numbers of seats that are another's, near its own and anywhere."""
    hostile, _ = a.member()
    chance = random.Random(3)
    database = hostile.seat[0]
    while a.going():
        for number in (database - 1, database - 2, database + 1, chance.randrange(1 << 30)):
            for seat in (1, 2, 3, 1023, 1024, 0, 2**32 - 1):
                for message in with_seat((max(0, number), seat)).values():
                    with regardless(), a.session() as s:
                        s.send(message)
                    a.blow()
                    if not a.going():
                        return


@attack
def forged_tokens(a):
    """Says that it had a session before, with one token after another."""
    s = a.session()
    while a.going():
        token = os.urandom(16)
        if not a.say(s, varint(RESUME) + varint(5) + token):
            a.hear(s)
            with regardless():
                s = a.session()
        a.blow()


@attack
def forged_claims(a):
    """Claims 128 seats of databases of others with each message."""
    seats = b"".join(key((n, 1)) + varint(0) + varint(1) + text("3.40.1") + varint(1) + b"\0" for n in range(128))
    while a.going():
        with regardless(), a.session() as s:
            for _ in range(100):
                a.say(s, varint(CLAIM) + varint(5) + varint(128) + seats + b"\0")
                a.say(s, varint(CLAIM) + varint(5) + varint(0) + b"\1")
                a.hear(s)
                a.blow()


def u64(n):
    return varint(n)


def hand_back(number, nonce, directory, name):
    """HandBack { id, database, nonce, home }"""
    s = os.stat(directory)
    name = os.fsencode(name)
    return (varint(HAND_BACK) + varint(5) + varint(number) + u64(nonce) + u64(s.st_dev) + u64(s.st_ino) +
            varint(len(name)) + name)


@attack
def forged_databases(a):
    """Hands back databases that never were: sealed memfds of its own, and a socket with a file in its queue."""
    path = a.database()
    number = 0
    while a.going():
        number += 1
        control, index = sealed("turnstile-control-x", CONTROL_SIZE), sealed("turnstile-wal-index-x", 1 << 30)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with open(path, "r+b") as f:
            socket.send_fds(ours, [number.to_bytes(8, "little")], [f.fileno()])
        with regardless(), a.session() as s:
            s.send(hand_back(number, number, a.place, "x.db"), [control, index, theirs.fileno()])
            s.s.recv(4096)
        for fd in (control, index):
            os.close(fd)
        ours.close()
        theirs.close()
        a.blow()


@attack
def a_forged_home(a):
    """Hands a database of its own back under the name of a victim's, where the victim opens one."""
    while a.going():
        with regardless():
            hostile, (control, index, hold) = a.member()
            nonce = int.from_bytes(os.pread(control, 8, 16), "little")
            with a.session() as s:
                for i in range(16):
                    s.send(hand_back(hostile.seat[0] + 1, nonce, a.data, f"{i}.db"), [control, index, hold])
                    s.s.recv(4096)
            # And as a join that names it.
            own = os.open(a.database(), os.O_RDWR)
            theirs = os.open(a.data, os.O_PATH)
            with a.session() as s:
                for i in range(16):
                    s.send(join(f"{i}.db"), [own, theirs])
                    s.s.recv(4096)
            for fd in (control, index, hold, own, theirs):
                os.close(fd)
        a.blow()


@attack
def an_index_of_all_regions(a):
    """Has the wal-index of each of its databases grow to its last region."""
    while a.going():
        with regardless():
            hostile, fds = a.member()
            for regions in (32768, 30000, 2**32 - 1):
                a.say(hostile, varint(GROW_WAL_INDEX) + varint(7) + key(hostile.seat) + varint(regions))
            hostile.s.settimeout(1)
            hostile.s.recv(4096)
            for fd in fds:
                os.close(fd)
            hostile.s.close()
        a.blow()


@attack
def questions_about_waits(a):
    """Says that it waits, asks for whom, and kicks, as fast as it can."""
    hostile, _ = a.member()
    while a.going():
        for message in (varint(WAITING) + key(hostile.seat), varint(ASK_BLOCKER) + varint(7) + key(hostile.seat),
                        varint(KICK) + varint(hostile.seat[0])):
            if not a.say(hostile, message):
                a.hear(hostile)
        a.blow()


@attack
def joins_and_leaves(a):
    """Joins its database and leaves it, as fast as it can."""
    path = a.database()
    while a.going():
        with regardless():
            hostile, fds = a.member(path)
            for fd in fds:
                os.close(fd)
            hostile.send(with_seat(hostile.seat)["Leave"])
            hostile.s.recv(4096)
            hostile.s.close()
        a.blow()


@attack
def a_wal_that_has_grown(a):
    """Says that the WAL has grown when it has not: a checkpoint each time."""
    path = a.database()
    db = a.connection(path)
    db.execute("INSERT INTO rows VALUES('a', 1)")
    hostile, _ = a.member(path)
    wal = os.open(path + "-wal", os.O_RDWR)
    while a.going():
        a.say(hostile, varint(WAL_FILE) + key(hostile.seat), [wal])
        for _ in range(20):
            a.say(hostile, varint(WAL_GREW) + key(hostile.seat))
            a.say(hostile, varint(LET_GO) + key(hostile.seat) + varint(0))
        a.hear(hostile)
        a.blow()


@attack
def the_keepers_socket(a):
    """Knocks where the keeper waits for the next broker."""
    for name in (".keeper", ".lock", ".new"):
        with regardless():
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.connect(a.socket + name)
            raise SystemExit(f"{name} lets anybody in")
    a.blow()


@attack
def sixteen_joins_under_way(a):
    """Asks to join more databases at once than anybody may, from many sessions, and reads no answer."""
    paths = [a.database() for _ in range(20)]
    directory = os.open(a.place, os.O_PATH)
    files = [os.open(path, os.O_RDWR) for path in paths]
    while a.going():
        with regardless():
            s = a.keep(a.session())
            for path, fd in zip(paths, files):
                a.say(s, join(os.path.basename(path)), [fd, directory])
        a.blow()
        if len(a.kept) > 100:
            a.kept.clear()
