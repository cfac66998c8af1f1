"""A broker whose socket is the service manager's (sd_listen_fds(3)), which the test plays; `test_install.py` does it with
systemd.
"""

import os
import signal
import socket
import subprocess
import tempfile

import harness
from harness import PYTHON, Broker, connect, create, fails_without, plain, plain_env, run, wait_until


class Activated(Broker):
    """A broker whose socket is the test's, which plays the service manager."""

    listener = notices = None

    def start(self, timeout=20.0):
        if self.listener is None:
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listener.bind(self.socket)
            self.listener.listen(100)
            self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.notices.bind(self.path("notify"))
            self.notices.settimeout(timeout)
        number = self.listener.fileno()
        env = {"NO_COLOR": "1", **self.env, "LISTEN_FDS": "1", "NOTIFY_SOCKET": self.path("notify")}
        with open(self.logfile, "ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f'LISTEN_PID=$$ exec "$@" 3<&{number}', "bash", harness.bin(), "serve", *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, pass_fds=[number])
        assert self.told() == "READY=1"

    def told(self):
        return self.notices.recv(1000).decode().strip()

    def stop(self, sig=signal.SIGTERM, timeout=20.0):
        here = self.process is not None
        status = super().stop(sig, timeout)
        if here and sig == signal.SIGTERM:
            assert self.told() == "STOPPING=1"
        return status

    def _clean(self):
        super()._clean()
        for s in (self.listener, self.notices):
            if s is not None:
                s.close()


NEWCOMER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
db.enable_load_extension(True)
db.load_extension(sys.argv[2])
db.execute("INSERT INTO rows VALUES(?, ?)", (sys.argv[3], 0))
"""


def newcomer(broker, db, name):
    return subprocess.Popen([PYTHON, "-c", NEWCOMER, db, harness.lib(), name], env=broker.env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def is_in(process):
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text.decode()


def test_the_service_managers_socket_outlives_the_broker():
    """Who knocks while there is no broker waits for the next one, also when the last one was stopped."""
    with Activated() as broker:
        db = create(broker.path("app.db"))
        inode = os.stat(broker.socket).st_ino
        is_in(newcomer(broker, db, "first"))
        for end in (broker.kill, broker.stop):
            end()
            assert os.stat(broker.socket).st_ino == inode
            waits = newcomer(broker, db, end.__name__)
            broker.start()
            is_in(waits)
        assert plain(db, "SELECT count(*) FROM rows", retry=10) == [["3"]]


def test_restarts_as_systemd_does_them_turn_nobody_away():
    """SIGUSR2, and the next broker on the same socket: with a member that writes and newcomers all the time."""
    with Activated() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        for round in range(5):
            comers = [newcomer(broker, db, f"{round}-{i}") for i in range(3)]
            broker.stop(signal.SIGUSR2)
            member.execute("INSERT INTO rows VALUES('member', ?)", (round,))
            broker.start()
            comers += [newcomer(broker, db, f"{round}-after")]
            for comer in comers:
                is_in(comer)
        assert member.execute("SELECT count(*) FROM rows").fetchone() == (25,)
        member.close()


def test_it_is_replaced_by_one_that_was_started_by_hand():
    with Activated() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        old = broker.process
        command = [harness.bin(), "serve", "--socket", broker.socket, "--replace"]
        with open(broker.logfile, "ab") as log:
            broker.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                              env={**broker.env, "NOTIFY_SOCKET": broker.path("notify")})
        assert old.wait(20) == 0
        assert broker.told() == "READY=1"
        member.execute("INSERT INTO rows VALUES('member', 0)")
        is_in(newcomer(broker, db, "newcomer"))
        assert broker.status()["broker"]["pid"] == broker.pid
        member.close()


@fails_without("keeper-takes-the-socket")
def test_the_keeper_leaves_the_service_managers_socket():
    with Activated() as broker:
        db = create(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        keeper = broker.status()["broker"]["keeper"]
        broker.kill()
        member.close()
        wait_until(lambda: not os.path.exists(broker.socket + ".keeper"), what="the keeper's end")
        wait_until(lambda: not os.path.exists(f"/proc/{keeper}/exe"), what="the keeper's end")
        assert os.path.exists(broker.socket), "the service manager's socket has been removed"
        broker.start()


def test_what_is_no_socket_for_a_broker_is_refused():
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        def refused(kind, listens, *arguments):
            path = os.path.join(place, f"{kind}-{listens}-{len(arguments)}")
            with socket.socket(socket.AF_UNIX, kind) as s:
                s.bind(path)
                if listens:
                    s.listen()
                done = run(["bash", "-c", f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{s.fileno()}', "bash", harness.bin(),
                            "serve", *arguments], check=False, pass_fds=[s.fileno()], env=plain_env())
                assert done.returncode == 1, done
                return done.stderr
        assert "SOCK_SEQPACKET" in refused(socket.SOCK_STREAM, True)
        assert "does not listen" in refused(socket.SOCK_SEQPACKET, False)
        assert "but the service manager's listens on" in refused(socket.SOCK_SEQPACKET, True, "--socket", place + "/other")
