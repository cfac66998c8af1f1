"""The broker's checkpointer writes to users' files, and has no right on them that their users have not."""

import contextlib
import os
import shutil
import signal
import sqlite3
import stat

import harness
from harness import Broker, create, fails_without, timeout, wait_until
from test_checkpoint import checkpoints, load, traced
from test_foreign import STRANGER, root_only
from test_places import mounted


@contextlib.contextmanager
def member(path):
    """A process of another user that writes when it is told, by the number of rows."""
    import json
    import socket
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        try:
            _keep = load()
            db = traced(path)
            db.execute("PRAGMA synchronous=NORMAL")
            theirs.sendall(b"ready\n")
            for line in theirs.makefile():
                said = "ok"
                try:
                    for _ in range(int(line)):
                        db.execute("INSERT INTO rows VALUES(zeroblob(3500), 1)")
                except sqlite3.Error as e:
                    said = str(e)
                theirs.sendall(json.dumps(said).encode() + b"\n")
        except BaseException as e:
            theirs.sendall(f"{e}\n".encode())
        os._exit(0)
    theirs.close()
    answers = ours.makefile()
    line = answers.readline()
    try:
        assert line == "ready\n", line

        def write(rows):
            ours.sendall(f"{rows}\n".encode())
            return json.loads(answers.readline())
        yield write
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ours.close()


def of_stranger(*paths):
    for path in paths:
        os.chown(path, STRANGER, STRANGER)


@fails_without("checkpointer-keeps-rights")
def test_a_checkpoint_takes_the_set_uid_bit_away_as_any_write_does():
    """Kept, a file whose content another may write would run as its owner."""
    root_only()
    with Broker("--everyone", "yes") as broker:
        os.mkdir(broker.path("d"))
        db = create(broker.path("d/app.db"))
        of_stranger(broker.path("d"), db)
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        with member(db) as write:
            os.chmod(db, 0o6777)
            assert write(1500) == "ok"
            wait_until(lambda: (checkpoints(broker, db) or {}).get("done"), what="the broker's checkpoint")
            assert checkpoints(broker, db)["by"] == "broker", checkpoints(broker, db)
            mode = stat.S_IMODE(os.stat(db).st_mode)
            assert mode == 0o777, f"it is {mode:o} still"


@fails_without("checkpointer-keeps-rights")
@timeout(60)
def test_a_checkpoint_uses_no_block_that_is_kept_for_root():
    """On a full filesystem the members must do without it, and say what a full filesystem makes them say."""
    root_only()
    maker = shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/sbin:/usr/sbin")
    if not maker:
        raise harness.Skip("mkfs.ext4 is missing: run tests/install")
    with contextlib.ExitStack() as end:
        broker = end.enter_context(Broker("--everyone", "yes"))
        file = broker.path("image")
        with open(file, "wb") as f:
            f.truncate(160 << 20)
        harness.run([maker, "-q", "-m", "40", file])
        at = end.enter_context(mounted("-o", "loop", file, broker.path("full")))
        db = create(os.path.join(at, "app.db"))
        os.chmod(at, 0o777)
        of_stranger(db)
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        with member(db) as write:
            assert write(50) == "ok"
            # A WAL with blocks of its own, which is begun anew.
            for _ in range(3):
                assert write(1500) == "ok"
                wait_until(lambda: not checkpoints(broker, db)["running"], what="the checkpoint's end")
            assert checkpoints(broker, db)["done"], checkpoints(broker, db)
            fill(at)
            free = os.statvfs(at)
            assert free.f_bavail < 100, free
            for _ in range(6):
                if write(300) != "ok" or checkpoints(broker, db)["reason"]:
                    break
            wait_until(lambda: checkpoints(broker, db)["reason"], what="the checkpointer to give up", timeout=10)
            after = os.statvfs(at)
            used = (free.f_bfree - after.f_bfree) * after.f_frsize
            assert used < 1 << 20, f"{used} bytes of what is kept for root were used"
            os.unlink(os.path.join(at, "filled"))
            assert write(10) == "ok"


def fill(at):
    child = os.fork()
    if child == 0:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(at, "filled"), os.O_WRONLY | os.O_CREAT)
            size = 1 << 20
            while size >= 4096:
                try:
                    os.write(fd, bytes(size))
                except OSError:
                    size //= 2
            os.fsync(fd)
        os._exit(0)
    os.waitpid(child, 0)
