"""Attacks by how processes live and die."""

import ctypes
import fcntl
import os
import resource
import signal
import socket
import sys
import threading
import time

from attacker import attack, libc, regardless
from test_gate import varint
from test_hostile import STATUS, HELLO, introduction, join, key, liveness_memfd, lock, with_seat

EXCLUSIVE = varint(0) + varint(4) + b"\0"


@attack
def stopped_holders(a):
    """Processes with seats, locks and the turn that are stopped, and go on from time to time."""
    path = a.database()

    def holder():
        hostile, _ = a.member(path)
        a.say(hostile, lock(hostile.seat))
        while True:
            a.say(hostile, varint(STATUS) + varint(1))
            a.hear(hostile)
            time.sleep(0.001)
    children = [a.spawn(holder) for _ in range(20)]
    while a.going():
        for child in children:
            with regardless():
                os.kill(child, signal.SIGSTOP)
        time.sleep(0.03)
        for child in children:
            with regardless():
                os.kill(child, signal.SIGCONT)
        a.blow()


@attack
def a_stopped_writer(a):
    """A program that is stopped in a transaction, with others waiting in the line behind it."""
    path = a.database()

    def writer():
        db = a.connection(path)
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO rows VALUES('a', 1)")
        os.kill(os.getpid(), signal.SIGSTOP)

    def waiter():
        db = a.connection(path)
        while a.going():
            with regardless():
                try:
                    db.execute("INSERT INTO rows VALUES('a', 2)")
                except Exception:
                    pass
    first = a.spawn(writer)
    for _ in range(4):
        a.spawn(waiter)
    while a.going():
        time.sleep(0.05)
        a.blow()
    with regardless():
        os.kill(first, signal.SIGKILL)


@attack
def exec_with_seats(a):
    """Processes that take seats and call exec, with the socket and without: their liveness ends and they do not."""
    path = a.database()

    def one(inherit):
        hostile, _ = a.member(path)
        a.say(hostile, lock(hostile.seat))
        if inherit:
            os.set_inheritable(hostile.s.fileno(), True)
        os.execv("/bin/sleep", ["sleep", "1"])
    while a.going():
        for inherit in (True, False):
            a.spawn(one, inherit)
            a.blow()
        time.sleep(0.01)


@attack
def forks_that_hold_the_socket(a):
    """A process with seats ends, and a child goes on with its socket and its memfds."""
    path = a.database()

    def one():
        hostile, _ = a.member(path)
        a.say(hostile, lock(hostile.seat))
        if os.fork() == 0:
            time.sleep(1)
        os._exit(0)
    while a.going():
        a.spawn(one)
        a.blow()
        time.sleep(0.01)


@attack
def pids_that_are_used_again(a):
    """Very many short processes, some with a session, so that pids come round."""
    def one(speaks):
        if speaks:
            a.session()
        os._exit(0)
    count = 0
    while a.going():
        count += 1
        a.spawn(one, count % 8 == 0)
        with regardless():
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        a.blow()


@attack
def zombies(a):
    """Members that are dead and that nobody waits for."""
    path = a.database()

    def one():
        hostile, _ = a.member(path)
        a.say(hostile, lock(hostile.seat))
    while a.going():
        a.spawn(one)
        a.blow()
        time.sleep(0.005)


@attack
def a_leader_that_has_ended(a):
    """A process whose first thread has ended while another holds the session and the locks: in /proc it is a zombie."""
    path = a.database()

    def one():
        def lives():
            hostile, _ = a.member(path)
            a.say(hostile, lock(hostile.seat))
            while True:
                a.say(hostile, varint(STATUS) + varint(1))
                a.hear(hostile)
                time.sleep(0.01)
        threading.Thread(target=lives).start()
        time.sleep(0.05)
        libc.syscall(60, 0)  # exit(2): of this thread alone
    for _ in range(8):
        a.spawn(one)
    while a.going():
        time.sleep(0.02)
        a.blow()


@attack
def killed_in_transactions(a):
    """Programs that are killed in the middle of their transactions, one after another."""
    path = a.database()

    def one():
        db = a.connection(path)
        while True:
            db.execute("BEGIN IMMEDIATE")
            for _ in range(20):
                db.execute("INSERT INTO rows VALUES('a', zeroblob(3000))")
            db.execute("COMMIT")
    while a.going():
        children = [a.spawn(one) for _ in range(3)]
        time.sleep(0.06)
        for child in children:
            os.kill(child, signal.SIGKILL)
        a.blow()


@attack
def a_large_heap_that_dies(a):
    """Members with hundreds of megabytes that are killed: the kernel takes its time."""
    path = a.database()

    def one():
        hostile, _ = a.member(path)
        a.say(hostile, lock(hostile.seat))
        heap = bytearray(100 << 20)
        heap[::4096] = b"x" * len(heap[::4096])
        time.sleep(10)
    while a.going():
        child = a.spawn(one)
        time.sleep(0.15)
        os.kill(child, signal.SIGKILL)
        a.blow()


@attack
def a_line_of_hundreds(a):
    """Hundreds of seats that wait for one lock, with a cycle among them."""
    one, other = a.database(), a.database()
    members = []
    for path in (one, other):
        for _ in range(50):
            with regardless():
                hostile, fds = a.member(path)
                members.append(hostile)
                for fd in fds:
                    os.close(fd)
    while a.going():
        for hostile in members:
            a.say(hostile, lock(hostile.seat))
            a.say(hostile, lock(hostile.seat, varint(0) + varint(2) + b"\0"))
            a.say(hostile, lock(hostile.seat, EXCLUSIVE))
            a.say(hostile, varint(14) + key(hostile.seat))
            a.hear(hostile)
            a.blow()


@attack
def imitations(a):
    """Processes full of memfds that are called as turnstile's are, and of sockets with a nonce in their queue."""
    place = os.stat(a.socket + ".lock") if os.path.exists(a.socket + ".lock") else os.stat(a.place)

    def one():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for i in range(min(hard // 2, 1500)):
            nonce = f"{i:016x}-{place.st_dev:x}.{place.st_ino:x}"
            os.memfd_create(f"turnstile-control-{nonce}")
            os.memfd_create(f"turnstile-wal-index-{nonce}")
        for i in range(50):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.send(i.to_bytes(8, "little"))
            os.dup(theirs.fileno())
            os.dup(ours.fileno())
        time.sleep(60)
    for _ in range(3):
        a.spawn(one)
        a.blow()
    while a.going():
        with regardless():
            hostile, _ = a.member()
            hostile.s.close()


@attack
def signals_and_traces(a):
    """Signals, traces, priorities and limits of the broker and the victims, which another user may not touch."""
    pids = [int(p) for p in os.listdir("/proc") if p.isdigit()]
    while a.going():
        for pid in [int(os.environ["BROKER"]), *pids]:
            if pid == os.getpid():
                continue
            for way in (lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGUSR2),
                        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
                        lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, 4)),
                        lambda: os.listdir(f"/proc/{pid}/fd")):
                # (Of processes of its own uid alone one might; there are none but itself.)
                with regardless():
                    if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                        way()
            libc.ptrace(16, pid, 0, 0)
        a.blow()


@attack
def descriptors_of_a_session_elsewhere(a):
    """Passes its session's own socket, its liveness and its seats' memfds to the broker and to another session."""
    while a.going():
        with regardless():
            hostile, fds = a.member()
            another = a.session()
            for target in (hostile, another):
                a.say(target, varint(STATUS) + varint(1), [hostile.s.fileno(), another.s.fileno()])
                a.say(target, join("x.db"), [hostile.s.fileno(), another.s.fileno()])
                a.say(target, join("x.db"), [fds[0], fds[2]])
            another.s.close()
            hostile.s.close()
            for fd in fds:
                os.close(fd)
        a.blow()


@attack
def two_threads_one_socket(a):
    """Many processes that speak through one socket at once, out of order."""
    s = a.session()

    def speaks(message):
        while a.going():
            if not a.say(s, message):
                a.hear(s)
                time.sleep(0.001)
    for message in (varint(STATUS) + varint(1), HELLO, introduction(), *with_seat((1, 1)).values()):
        a.spawn(speaks, message)
    while a.going():
        with regardless():
            s = a.session()
            s.send(varint(STATUS) + varint(1))
        a.blow()


@attack
def locks_that_vanish(a):
    """Gives up its liveness byte and takes it again, while it has seats and waits."""
    path = a.database()
    hostile, _ = a.member(path)
    while a.going():
        fcntl.lockf(hostile.liveness, fcntl.LOCK_UN, 1)
        if not a.say(hostile, lock(hostile.seat)):
            with regardless():
                hostile, _ = a.member(path)
        with regardless():
            fcntl.lockf(hostile.liveness, fcntl.LOCK_EX, 1)
        a.hear(hostile)
        a.blow()


@attack
def truncated_under_a_member(a):
    """Cuts, removes and replaces WAL and database of its own while a program writes there and the broker checkpoints."""
    from memory import works
    path = a.database()
    a.spawn(works, a, path)
    while a.going():
        for act in (lambda: os.truncate(path + "-wal", 0), lambda: os.unlink(path + "-wal"),
                    lambda: os.truncate(path, 1000), lambda: os.mkfifo(path + "-wal"),
                    lambda: os.unlink(path + "-wal"), lambda: os.symlink("/dev/zero", path + "-wal")):
            with regardless():
                act()
            time.sleep(0.01)
        a.blow()
