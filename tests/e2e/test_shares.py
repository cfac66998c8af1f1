"""The broker's time: what a message costs does not depend on what others have, and one user's crowd does not keep the others
waiting."""

import contextlib
import os
import resource
import socket
import sqlite3
import threading
import time

from harness import Broker, connect, create, fails_without, run, bin, timeout
from test_foreign import STRANGER, as_user, root_only
from test_hostile import CANCEL, Hostile, LOCK, key, lock, varint

DATABASES = int(os.environ.get("DATABASES", "60"))
SESSIONS = int(os.environ.get("SESSIONS", "200"))


def settled(broker):
    return broker.status()["broker"]["settled"]


@fails_without("settles-all")
def test_a_message_has_its_own_database_looked_at():
    """Not all that this or another user has open."""
    with Broker() as broker, contextlib.ExitStack() as stack:
        for n in range(DATABASES):
            c = connect(create(broker.path(f"{n}.db")), broker=broker)
            c.execute("SELECT * FROM rows").fetchall()
            stack.callback(c.close)
        member = stack.enter_context(Hostile(broker))
        member.joined(broker.path("0.db"))
        before = settled(broker)
        for _ in range(300):
            member.send(varint(CANCEL) + key(member.seat))
            member.ask(lock(member.seat))
        # Once for each message, once at the end of a round.
        assert settled(broker) - before < 4 * 600, settled(broker) - before


def flood(broker, stop):
    """A crowd of one user's: as many databases, and sessions that all send as fast as they can."""
    def crowd():
        own = [connect(broker.path(f"{n}.db"), broker=broker) for n in range(DATABASES)]
        for c in own:
            c.execute("SELECT * FROM rows").fetchall()
        members = [Hostile(broker) for _ in range(SESSIONS)]
        for n, member in enumerate(members):
            member.joined(broker.path(f"{n % DATABASES}.db"))
            member.s.setblocking(False)
        if os.fork() == 0:
            while True:
                for member in members:
                    with contextlib.suppress(BlockingIOError, OSError):
                        for _ in range(8):
                            member.s.send(varint(CANCEL) + key(member.seat))
        return "ready"
    return as_user(STRANGER, crowd, files=4096)


def latency(broker, rounds=40):
    took = []
    for _ in range(rounds):
        with Hostile(broker) as asker:
            begun = time.monotonic()
            asker.ask(varint(12) + varint(7))  # Status
            took.append(time.monotonic() - begun)
    took.sort()
    return took[len(took) // 2], took[-1]
