"""Places: where a database may lie, and where it is refused with the reason (docs/containers.md)."""

import contextlib
import os
import shutil
import struct
import subprocess

import harness
from harness import (Broker, Skip, check_rows, connect, create, fails_without, plain, run, run_workers,
                     timeout, wait_until)
from test_foreign_files import (BATCH_FORGET, FORGET, GETATTR, INIT, LOOKUP, OPEN, OPENDIR, attributes, fuse_mounted)
from test_gate import refused


# --- mounts -----------------------------------------------------------------------------------------------------

def mount_or_skip(*arguments):
    done = run(["mount", *arguments], check=False)
    if done.returncode:
        raise Skip(f"cannot mount here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*arguments):
    """`mount ARGUMENTS`, whose last one is the directory, made if it is not there."""
    os.makedirs(arguments[-1], exist_ok=True)
    mount_or_skip(*arguments)
    try:
        yield arguments[-1]
    finally:
        run(["umount", "--lazy", arguments[-1]], check=False)


@contextlib.contextmanager
def bindfs(directory, at):
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        raise Skip("bindfs or /dev/fuse is missing")
    os.mkdir(at)
    done = run(["bindfs", directory, at], check=False)
    if done.returncode:
        raise Skip(f"cannot mount FUSE here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        run(["umount", "--lazy", at], check=False)


@contextlib.contextmanager
def image(broker, kind, megabytes):
    """A filesystem of its own in a file, as small as it may be."""
    maker, file = shutil.which(f"mkfs.{kind}", path=os.environ["PATH"] + ":/sbin:/usr/sbin"), broker.path(f"{kind}.img")
    if not maker:
        raise Skip(f"mkfs.{kind} is missing: run tests/install")
    with open("/proc/filesystems") as known:
        if kind not in known.read().split() and run(["modprobe", kind], check=False).returncode:
            raise Skip(f"this kernel has no {kind}")
    with open(file, "wb") as f:
        f.truncate(megabytes << 20)
    run([maker, "-q", file])
    with mounted("-o", "loop", file, broker.path(kind)) as at:
        yield at


# --- refused ----------------------------------------------------------------------------------------------------

def test_fuse_is_refused_with_the_reason_and_can_be_allowed():
    with Broker() as broker:
        os.mkdir(broker.path("data"))
        create(broker.path("data/app.db"))
        with bindfs(broker.path("data"), broker.path("mnt")) as mnt:
            message = refused(f"{mnt}/app.db", broker)
            assert "FUSE" in message and "TURNSTILE_ALLOW_UNSAFE=1" in message, message
            os.environ["TURNSTILE_ALLOW_UNSAFE"] = "1"
            member = connect(f"{mnt}/app.db", broker=broker)
            member.execute("INSERT INTO rows VALUES('m', 1)")
            member.close()
            assert "overridden" in broker.log()


@fails_without("any-filesystem", message="not refused")
def test_two_fuse_mounts_of_one_directory_are_refused():
    """Each shows another file to locks and mappings: plain SQLite loses rows there, and says nothing."""
    with Broker() as broker:
        os.mkdir(broker.path("data"))
        db = create(broker.path("data/app.db"))
        with bindfs(broker.path("data"), broker.path("a")) as a, bindfs(broker.path("data"), broker.path("b")) as b:
            member = connect(db, broker=broker, mode="gated")
            for mnt in (a, b):
                message = refused(f"{mnt}/app.db", broker)
                assert "nobody can prove that this is its only mount" in message, message
            # Where the file really is, it goes on.
            member.execute("INSERT INTO rows VALUES('m', 1)")
            assert len(broker.members(db)) == 1
            member.close()
        assert plain(db, "SELECT count(*) FROM rows") == [["1"]]


def serve_without_locks(fuse):
    """A directory with one file, for which the filesystem keeps no locks, and says so (linux/fuse.h)."""
    ENOENT, ENOLCK, ENOSYS, POSIX_LOCKS, READ = -2, -37, -38, 2, 15
    while True:
        request = os.read(fuse, 1 << 17)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if operation in (FORGET, BATCH_FORGET):
            continue
        answer, error = b"", 0
        if operation == INIT:
            answer = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, POSIX_LOCKS, 16, 12, 1 << 16, 1, 16, 0, 0, *[0] * 7)
        elif operation == LOOKUP and request[40:] == b"app.db\0":
            answer = struct.pack("<4Q2I", 2, 1, 3600, 3600, 0, 0) + attributes(2)
        elif operation == GETATTR:
            answer = struct.pack("<QII", 3600, 0, 0) + attributes(node)
        elif operation in (OPEN, OPENDIR):
            answer = struct.pack("<QII", 1, 0, 0)
        elif operation == READ:
            _, offset, size = struct.unpack_from("<QQI", request, 40)
            answer = bytes(max(0, min(size, 4096 - offset)))
        else:
            locks = (31, 32, 33)  # GETLK, SETLK, SETLKW
            error = {LOOKUP: ENOENT, **dict.fromkeys(locks, ENOLCK)}.get(operation, ENOSYS)
        os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


def test_a_filesystem_that_cannot_lock_is_refused_even_if_unsafe_ones_are_allowed():
    with Broker() as broker, fuse_mounted(broker.path("fuse"), serve_without_locks, os.getuid()) as (db, _):
        os.environ["TURNSTILE_ALLOW_UNSAFE"] = "1"
        message = refused(db, broker)
        assert "cannot lock" in message, message


def test_the_refusal_says_what_to_do_in_docker_desktop_and_rootless_containers():
    with Broker() as broker:
        for kind, says in (("fuse.fuse-overlayfs", "Keep the database in a volume or a mounted directory"),
                           ("fuse.grpcfuse", "Keep the database in a named volume")):
            with fuse_mounted(broker.path(kind), serve_without_locks, os.getuid(), kind) as (db, _):
                message = refused(db, broker)
                assert kind in message and says in message and "TURNSTILE_ALLOW_UNSAFE=1" in message, message


@fails_without("file-mounts-unseen", message="not refused")
def test_a_single_file_bind_mount_is_refused():
    """As `docker run -v app.db:/app/app.db` makes one. Its -wal would be made beside the mount point."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        os.mkdir(broker.path("container"))
        open(broker.path("container/app.db"), "w").close()
        mount_or_skip("--bind", db, broker.path("container/app.db"))
        try:
            message = refused(broker.path("container/app.db"), broker)
            assert "bind mount of a single file" in message and "mount the directory instead" in message, message
        finally:
            run(["umount", broker.path("container/app.db")])


# --- accepted ---------------------------------------------------------------------------------------------------

def works_at(directory, broker):
    """Two members write, a `mode=ro` reader sees it, and plain SQLite reads it all afterwards."""
    db, record = create(os.path.join(directory, "app.db")), broker.path(f"record-{os.path.basename(directory)}")
    keep = connect(db, broker=broker, mode="gated")
    results = run_workers(2, "insert", 20.0, db, broker, rows=100, record=record)
    assert [r["committed"] for r in results] == [100, 100] and not sum(r["busy"] for r in results), results
    reader = connect(f"file:{db}?mode=ro", uri=True, mode="gated")
    assert reader.execute("SELECT count(*) FROM rows").fetchone() == (200,)
    assert len(broker.members(db)) == 2
    reader.close()
    keep.close()
    assert check_rows(db, record) == 200
    return db


def test_xfs():
    with Broker() as broker, image(broker, "xfs", 300) as at:
        works_at(at, broker)


def test_btrfs():
    with Broker() as broker, image(broker, "btrfs", 128) as at:
        works_at(at, broker)


def test_tmpfs_and_the_merged_view_of_an_overlay():
    with Broker() as broker, mounted("-t", "tmpfs", "none", broker.path("top")) as top:
        works_at(top, broker)
        for d in ("lower", "upper", "work", "merged"):
            os.mkdir(os.path.join(top, d))
        create(os.path.join(top, "lower", "old.db"))
        layers = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
        with mounted("-t", "overlay", "none", "-o", layers, os.path.join(top, "merged")) as merged:
            works_at(merged, broker)
            # One of a lower layer, which a reader has open before the first write copies it up.
            old = os.path.join(merged, "old.db")
            reader = connect(f"file:{old}?mode=ro", uri=True, mode="gated")
            assert reader.execute("SELECT count(*) FROM rows").fetchone() == (0,)
            writer = connect(old, mode="gated")
            writer.execute("INSERT INTO rows VALUES('m', 1)")
            assert reader.execute("SELECT count(*) FROM rows").fetchone() == (1,)
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            writer.execute("INSERT INTO rows VALUES('m', 2)")
            assert reader.execute("SELECT count(*) FROM rows").fetchone() == (2,)
            reader.close()
            writer.close()
            assert plain(old, "SELECT count(*) FROM rows") == [["2"]]


def test_a_bind_mounted_directory_is_one_group_with_the_original():
    with Broker() as broker:
        os.mkdir(broker.path("data"))
        db = create(broker.path("data/app.db"))
        with mounted("--bind", broker.path("data"), broker.path("mnt")) as mnt:
            one = connect(db, broker=broker, mode="gated")
            two = connect(f"{mnt}/app.db", mode="gated")
            one.execute("INSERT INTO rows VALUES('a', 1)")
            two.execute("INSERT INTO rows VALUES('b', 1)")
            assert one.execute("SELECT count(*) FROM rows").fetchone() == (2,)
            assert len(broker.members(db)) == 2
            one.close()
            two.close()


# --- a broker that does not see its clients' mounts -------------------------------------------------------------

@contextlib.contextmanager
def apart(broker):
    """The broker once more, in mount and pid namespaces of its own: as a container has them."""
    broker.stop()
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if run([*unshare, "true"], check=False).returncode:
        raise Skip("cannot unshare the mount and pid namespaces here")
    with open(broker.logfile, "ab") as log:
        other = subprocess.Popen([*unshare, harness.bin(), "serve", "--socket", broker.socket],
                                 stdin=subprocess.DEVNULL, stderr=log, env={"NO_COLOR": "1", **broker.env})
    try:
        wait_until(broker.answers)
        yield
    finally:
        other.kill()
        other.wait(10)


@timeout(60)
def test_a_broker_in_a_container_knows_the_filesystem_by_its_own_mount_of_it():
    """A client's mount is none of its own: tmpfs and a subvolume of btrfs are known by their devices."""
    with Broker() as broker, contextlib.ExitStack() as mounts:
        top = mounts.enter_context(mounted("-t", "tmpfs", "none", broker.path("top")))
        disk = mounts.enter_context(image(broker, "btrfs", 128))
        run(["btrfs", "--quiet", "subvolume", "create", f"{disk}/sub"])
        os.mkdir(f"{disk}/sub/data")
        mounts.enter_context(mounted("--bind", f"{disk}/sub/data", broker.path("brokers")))
        with apart(broker):
            with mounted("--bind", top, broker.path("client")) as client, \
                    mounted("--bind", f"{disk}/sub/data", broker.path("clients")) as clients:
                works_at(client, broker)
                works_at(clients, broker)


@timeout(60)
def test_a_broker_in_a_container_refuses_what_it_cannot_know():
    with Broker() as broker, apart(broker), mounted("-t", "tmpfs", "none", broker.path("late")) as late:
        message = refused(create(f"{late}/app.db"), broker)
        assert "cannot tell which filesystem it is on" in message, message
