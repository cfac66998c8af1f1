"""`turnstile backup`: the copy is a committed state, complete under its name or not there; what it refuses; and what
docs/backup.md says of other ways to back up and of restoring."""

import atexit
import collections
import contextlib
import functools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading

import harness
from harness import (PYTHON, SHELL, Broker, PlainError, PlainShell, Skip, Workers, acknowledged, check_rows, connect, create,
                     fails_without, is_busy, plain, planted_build, run, wait_until)
from test_belief import poison

NOBODY = 65534

# Stands between the program and libc: holds it at its first large pwrite, when its snapshot is taken and its first piece
# is read, until `go` lies in HOLD; and writes down what it syncs and names, in this order, into ORDER.
BETWEEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
static void hold(size_t n){
  static int held;
  const char *where = getenv("HOLD");
  char path[4096];
  if( where==0 || n<512 || __sync_lock_test_and_set(&held, 1) ) return;
  snprintf(path, sizeof path, "%s/held", where);
  close(open(path, O_CREAT|O_WRONLY, 0600));
  snprintf(path, sizeof path, "%s/go", where);
  while( access(path, F_OK)!=0 ) usleep(2000);
}
static void say(const char *what){
  const char *log = getenv("ORDER");
  if( log==0 ) return;
  int fd = open(log, O_CREAT|O_WRONLY|O_APPEND, 0600);
  dprintf(fd, "%s\n", what);
  close(fd);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t pwrite(int fd, const void *p, size_t n, off_t at){ hold(n); return REAL(pwrite)(fd, p, n, at); }
ssize_t pwrite64(int fd, const void *p, size_t n, off64_t at){ hold(n); return REAL(pwrite64)(fd, p, n, at); }
int fsync(int fd){
  struct stat st;
  int rc = REAL(fsync)(fd);
  if( fstat(fd, &st)==0 && rc==0 ) say(S_ISDIR(st.st_mode) ? "sync directory" : "sync file");
  return rc;
}
int linkat(int a, const char *b, int c, const char *d, int e){ say("name"); return REAL(linkat)(a, b, c, d, e); }
int renameat(int a, const char *b, int c, const char *d){ say("name"); return REAL(renameat)(a, b, c, d); }
int renameat2(int a, const char *b, int c, const char *d, unsigned e){ say("name"); return REAL(renameat2)(a, b, c, d, e); }
"""


@functools.cache
def between():
    if not shutil.which("cc"):
        raise Skip("no C compiler")
    directory = tempfile.mkdtemp(prefix="ts-between-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    source, library = os.path.join(directory, "between.c"), os.path.join(directory, "between.so")
    with open(source, "w") as f:
        f.write(BETWEEN)
    run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"])
    return library


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory(prefix="ts-") as place:
        os.chmod(place, 0o755)
        yield place


def command(db, file, *options):
    return [harness.bin(), "backup", *options, str(db), str(file)]


def backup(db, file, *options, broker=None, env=None, **more):
    """A copy that is made, and what is said of it."""
    done = run(command(db, file, "--json", *options), env=env or broker.env, **more)
    return json.loads(done.stdout)


def refused(db, file, *words, broker=None, env=None, options=(), status=1, **more):
    """No copy is made, and one line says why."""
    done = run(command(db, file, *options), env=env or broker.env, check=False, **more)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done
    for word in words:
        assert str(word) in done.stderr, (word, done.stderr)
    return done.stderr


class Held:
    """A backup that has its snapshot and its first piece, and waits for `go`."""

    def __init__(self, db, file, *options, broker, env=()):
        self.place = tempfile.mkdtemp(prefix="ts-hold-")
        env = {**broker.env, "LD_PRELOAD": between(), "HOLD": self.place, **dict(env)}
        self.process = subprocess.Popen(command(db, file, "--fast", *options), env=env, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        wait_until(lambda: os.path.exists(os.path.join(self.place, "held")) or self.process.poll() is not None, 30,
                   "the snapshot")
        if self.process.poll() is not None:
            raise AssertionError(f"it ended with {self.process.returncode}: {self.process.communicate()[1]}")
        return self

    def go(self):
        open(os.path.join(self.place, "go"), "w").close()

    def end(self, status=0):
        self.go()
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == status, (self.process.returncode, out, err)
        return err

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=20)
        shutil.rmtree(self.place, ignore_errors=True)


# --- a committed state --------------------------------------------------------------------------------------------

PAGES = 1000


def create_with_pages(path, journal="wal"):
    """A database of some 4 MB whose every page a worker changes in each of its commits."""
    create(path, journal)
    plain(path, f"""CREATE TABLE pages(id INTEGER PRIMARY KEY, version INTEGER, pad BLOB);
                    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {PAGES})
                    INSERT INTO pages SELECT i, 0, randomblob(3600) FROM n""")
    return path


def change_all_pages(w):
    """A target for workers: a new version of every page a commit."""
    db = w.connect()
    w.ready()
    while w.running():
        w.measure(lambda: db.execute("UPDATE pages SET version = version + 1"))
    db.close()


def counts_of(rows):
    """How many rows each worker has, who must have them in order and without a gap."""
    by_worker = collections.defaultdict(set)
    for worker, seq in rows:
        by_worker[str(worker)].add(int(seq))
    for worker, seqs in by_worker.items():
        assert seqs == set(range(len(seqs))), f"worker {worker} has {len(seqs)} rows, up to {max(seqs)}"
    return collections.Counter({worker: len(seqs) for worker, seqs in by_worker.items()})


def read_copy(file, changed=True):
    """What is in a copy, read by plain SQLite: the rows. It is sound, and of one moment."""
    assert plain(file, "PRAGMA integrity_check") == [["ok"]]
    if changed:
        assert len(plain(file, "SELECT DISTINCT version FROM pages")) == 1, "pages of several commits"
    return plain(file, "SELECT worker, seq FROM rows", timeout=60)


def copy_beside_writers(**options):
    """While a copy is held in its middle, everything is rewritten and checkpointed, again and again. The copy is the state
    before: all that was acknowledged when it began, and nothing that began when it had its snapshot."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        with Workers(3, "insert", 90, path=db, broker=broker) as writers, \
                Workers(1, change_all_pages, 90, path=db, broker=broker, first=3) as changer:
            writers.go()
            changer.go()
            wait_until(lambda: len(counts_of(acknowledged(broker.record))) == 3, 30, "every writer")
            before = counts_of(acknowledged(broker.record))
            with Held(db, file, broker=broker, **options) as held:
                after = counts_of(acknowledged(broker.record))
                reader = connect(db, broker=broker)
                for _ in range(2):
                    version = reader.execute("SELECT max(version) FROM pages").fetchone()[0]
                    wait_until(lambda: reader.execute("SELECT max(version) FROM pages").fetchone()[0] > version + 2, 60,
                               "some changes of all pages")
                    # Into the file, and the WAL begun anew: as far as the snapshot lets it.
                    reader.execute("PRAGMA busy_timeout=500")
                    reader.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
                reader.close()
                assert not os.path.exists(file), "it has its name before it is complete"
                held.end()
            assert all(p.poll() is None for w in (writers, changer) for p in w.processes.values()), "writers have ended"
            for i in range(3):
                writers.kill(i)
            changer.kill(3)
        copied = counts_of(read_copy(file))
        for worker in before:
            assert before[worker] <= copied[worker] <= after[worker] + 1, (worker, before, copied, after)
        assert os.listdir(place) == ["copy.db"], os.listdir(place)


@harness.timeout(240)
@fails_without("backup-not-one-snapshot")
def test_the_copy_is_a_committed_state_beside_writers():
    copy_beside_writers()


@harness.timeout(240)
@fails_without("backup-header-of-before", attempts=3)
def test_the_snapshot_is_the_one_that_is_read():
    copy_beside_writers()


@fails_without("backup-without-wal")
def test_what_is_in_the_wal_alone_is_in_the_copy():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        member = connect(db, broker=broker, mode="gated")
        member.execute("PRAGMA wal_autocheckpoint=0")
        for seq in range(200):
            member.execute("INSERT INTO rows VALUES(0, ?)", (seq,))
        member.execute("UPDATE pages SET version = 1 WHERE id <= 20")
        told = backup(db, file, broker=broker)
        assert told["mode"] == "gated" and told["journal"] == "wal" and not told["verified"], told
        assert plain(file, "SELECT sum(version), count(*) FROM pages") == [["20", str(PAGES)]]
        assert counts_of(read_copy(file, changed=False)) == {"0": 200}
        assert told["bytes"] == os.path.getsize(file) == told["pages"] * told["page_size"]
        # It grew in the WAL alone, and shrank there.
        member.executescript("UPDATE pages SET pad = randomblob(9000)")
        grown = backup(db, file, "--force", broker=broker)
        assert grown["pages"] > told["pages"] and os.path.getsize(db) < grown["bytes"], (told, grown)
        read_copy(file, changed=False)
        member.executescript("DELETE FROM pages WHERE id > 10; VACUUM")
        shrunk = backup(db, file, "--force", broker=broker)
        assert shrunk["bytes"] < 400_000 and plain(file, "SELECT count(*) FROM pages") == [["10"]]
        read_copy(file, changed=False)
        member.close()


def test_it_ends_while_eight_writers_write():
    """Also when it spares them."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        with Workers(8, "insert", 90, path=db, broker=broker) as writers:
            writers.go()
            wait_until(lambda: len(counts_of(acknowledged(broker.record))) == 8, 30, "every writer")
            for round in range(5):
                before = counts_of(acknowledged(broker.record))
                backup(db, file, *["--force"] * bool(round), broker=broker)
                copied = counts_of(read_copy(file, changed=False))
                assert all(before[w] <= copied[w] for w in before), (before, copied)
            assert all(p.poll() is None for p in writers.processes.values()), "writers have ended"
            for i in range(8):
                writers.kill(i)
        check_rows(db, broker.record, killed=range(8))


@fails_without("backup-takes-its-turn")
def test_it_keeps_no_writer_waiting():
    """It takes no turn, whatever the settings say of transactions that begin by reading."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        member = connect(db, broker=broker, mode="gated")
        with Held(db, file, broker=broker, env={"TURNSTILE_BEGIN": "immediate"}) as held:
            assert broker.database(db)["turn"] is None, broker.database(db)
            for seq in range(20):
                member.execute("INSERT INTO rows VALUES(0, ?)", (seq,))
            held.end()
        assert read_copy(file) == []
        member.close()


@fails_without("page-believed,frame-believed,size-believed")
def test_what_is_read_without_the_gate_is_no_copy():
    """Plain clients may have been in meanwhile: the pages are read as a member reads them, and looked after."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        with Held(db, file, broker=broker) as held:
            poison(broker, db)
            said = held.end(1)
            assert "cannot be read on" in said and len(said.splitlines()) == 1, said
        assert os.listdir(place) == []


def test_page_sizes_and_an_empty_database():
    with Broker() as broker, directory() as place:
        for size in (512, 1024, 4096, 65536):
            db, file = broker.path(f"{size}.db"), os.path.join(place, f"{size}.db")
            plain(db, f"PRAGMA page_size={size}")
            connection = connect(db, broker=broker)
            connection.executescript(f"""PRAGMA page_size={size}; PRAGMA journal_mode=wal; CREATE TABLE t(b);
                WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 333)
                INSERT INTO t SELECT randomblob(3000) FROM n""")
            connection.executescript("DELETE FROM t WHERE rowid % 7 = 0")
            told = backup(db, file, "--verify", broker=broker)
            assert told["page_size"] == size and told["verified"], told
            want = connection.execute("SELECT count(*), sum(length(b)) FROM t").fetchone()
            assert plain(file, "SELECT count(*), sum(length(b)) FROM t") == [[str(n) for n in want]]
            connection.close()
            # Closed, the file is the whole of it: the copy is it, byte for byte.
            backup(db, file, "--force", broker=broker)
            run(["cmp", db, file])
        empty = broker.path("empty.db")
        open(empty, "w").close()
        assert backup(empty, os.path.join(place, "empty.db"), broker=broker)["bytes"] == 0
        assert os.path.getsize(os.path.join(place, "empty.db")) == 0


def test_with_a_rollback_journal_writers_wait():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db"), "delete"), os.path.join(place, "copy.db")
        member = connect(db, broker=broker, mode="gated")
        with Held(db, file, broker=broker) as held:
            member.execute("PRAGMA busy_timeout=50")
            member.execute("SELECT count(*) FROM pages").fetchone()
            try:
                member.execute("INSERT INTO rows VALUES(0, 0)")
                raise AssertionError("a commit beside a copy, with a rollback journal")
            except sqlite3.OperationalError as e:
                assert is_busy(e), e
            member.execute("PRAGMA busy_timeout=30000")
            waiting = threading.Thread(target=lambda: run(
                [harness.bin(), "run", "--", SHELL, db, "INSERT INTO rows VALUES(0, 1)"], env=broker.env))
            waiting.start()
            held.end()
            waiting.join(60)
        assert read_copy(file) == []
        assert member.execute("SELECT seq FROM rows").fetchall() == [(1,)]
        member.close()


def test_a_hot_journal_is_played_back_first():
    """What a killed writer left is no part of a copy."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db"), "delete"), os.path.join(place, "copy.db")
        script = """if True:
            import os, sqlite3, sys
            db = sqlite3.connect(sys.argv[1], isolation_level=None)
            db.executescript("PRAGMA cache_size=5; BEGIN; UPDATE pages SET version = 7")
            os.kill(os.getpid(), 9)
        """
        run([PYTHON, "-c", script, db], check=False, env=harness.plain_env())
        assert os.path.exists(db + "-journal")
        backup(db, file, broker=broker)
        read_copy(file)
        assert plain(file, "SELECT DISTINCT version FROM pages") == [["0"]]


def test_guests_and_programs_without_a_broker():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        with PlainShell(db) as shell:
            shell.run("INSERT INTO rows VALUES(0, 0); BEGIN; SELECT count(*) FROM rows")
            assert backup(db, file, broker=broker)["mode"] == "guest"
            assert counts_of(read_copy(file)) == {"0": 1}
        nowhere = {**broker.env, "TURNSTILE_SOCKET": broker.path("none")}
        assert backup(db, file, "--force", env={**nowhere, "TURNSTILE_FALLBACK": "plain"})["mode"] == "plain"
        assert counts_of(read_copy(file)) == {"0": 1}
        os.unlink(file)
        refused(db, file, "no broker listens", env={**nowhere, "TURNSTILE_FALLBACK": "refuse"})
        assert os.listdir(place) == []


def test_who_may_only_read_gets_a_copy():
    if os.geteuid():
        raise Skip("needs root")
    with Broker("--everyone", "yes") as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        os.chmod(db, 0o644)
        os.chown(place, NOBODY, NOBODY)
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES(0, 0)")
        run(command(db, file), env=broker.env, user=NOBODY, group=NOBODY, extra_groups=[])
        assert counts_of(read_copy(file)) == {"0": 1}
        assert os.stat(file).st_uid == NOBODY
        os.chmod(db, 0o600)
        refused(db, os.path.join(place, "other.db"), "app.db", "ermission", broker=broker, user=NOBODY, group=NOBODY,
                extra_groups=[])
        member.close()


def test_what_is_no_database():
    with Broker() as broker, directory() as place:
        file = os.path.join(place, "copy.db")
        strange = broker.path("strange.db")
        with open(strange, "wb") as f:
            f.write(os.urandom(8192))
        refused(strange, file, "encrypted", broker=broker)
        refused(broker.path("none.db"), file, "none.db", "No such file", broker=broker)
        assert not os.path.exists(broker.path("none.db"))
        refused(place, file, "no file", broker=broker)
        refused(":memory:", file, ":memory:", broker=broker)
        assert os.listdir(place) == []


# --- complete, or not there ---------------------------------------------------------------------------------------

def test_a_killed_one_leaves_nothing():
    """With O_TMPFILE, that is: on ext4, xfs, btrfs, tmpfs."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        with Held(db, file, broker=broker) as held:
            held.process.kill()
            held.process.wait(20)
        assert os.listdir(place) == []
        with open(file, "w") as f:
            f.write("the old one")
        with Held(db, file, "--force", broker=broker) as held:
            held.process.kill()
            held.process.wait(20)
        assert os.listdir(place) == ["copy.db"] and open(file).read() == "the old one"
        # Nobody misses it: its seat and its snapshot are gone.
        member = connect(db, broker=broker)
        member.execute("UPDATE pages SET version = version + 1")
        wait_until(lambda: member.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 20, "a checkpoint")
        member.close()


@fails_without("backup-litters")
def test_a_stopped_one_leaves_nothing():
    """Also where the file needs a name meanwhile, as on filesystems without O_TMPFILE."""
    with planted_build(), Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        for sig, plant in ((signal.SIGTERM, ""), (signal.SIGINT, "backup-named"), (signal.SIGHUP, "backup-named")):
            plants = ",".join([plant, os.environ.get("TURNSTILE_PLANTED", "")])
            with Held(db, file, "--verify", broker=broker, env={"TURNSTILE_PLANTED": plants}) as held:
                assert (len(os.listdir(place)) == 1) == (plant == "backup-named"), os.listdir(place)
                held.process.send_signal(sig)
                said = held.end(128 + sig)
                assert sig.name in said and len(said.splitlines()) == 1, said
            assert os.listdir(place) == [], (plant, os.listdir(place))
        # And is renamed when all is well, over the old one or where there is none.
        env = {**broker.env, "TURNSTILE_PLANTED": "backup-named"}
        backup(db, file, env=env)
        refused(db, file, "is there already", env=env)
        backup(db, file, "--force", env=env)
        assert os.listdir(place) == ["copy.db"]
        read_copy(file)


@fails_without("backup-unsynced")
def test_the_copy_is_on_the_disk_before_it_has_its_name():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        order = broker.path("order")
        for options, wanted in (([], ["sync file", "name", "sync directory"]),
                                (["--force"], ["sync file", "name", "name", "sync directory"])):
            run(command(db, file, *options), env={**broker.env, "LD_PRELOAD": between(), "ORDER": order})
            with open(order) as f:
                said = f.read().splitlines()
            os.unlink(order)
            # The database may be synced by its last close.
            assert said[-len(wanted):] == wanted, (options, said)
            read_copy(file)


def test_a_full_disk_and_a_place_where_nothing_may_be_made():
    if os.geteuid():
        raise Skip("needs root")
    with Broker() as broker, directory() as place:
        db = create_with_pages(broker.path("app.db"))
        small = os.path.join(place, "small")
        os.mkdir(small)
        mounted = run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=False)
        if mounted.returncode:
            raise Skip(f"tmpfs cannot be mounted: {mounted.stderr}")
        try:
            said = refused(db, os.path.join(small, "copy.db"), "no room for", "No space left", broker=broker)
            assert "copy.db" in said
            assert os.listdir(small) == []
        finally:
            run(["umount", small])
        shut = os.path.join(place, "shut")
        os.mkdir(shut, 0o755)
        refused(db, os.path.join(shut, "copy.db"), "no file can be made in", shut, "ermission", broker=broker,
                user=NOBODY, group=NOBODY, extra_groups=[])
        refused(db, os.path.join(place, "none", "copy.db"), "none", "No such file", broker=broker)
        assert os.listdir(shut) == []


@fails_without("backup-unverified")
def test_verify_notices_a_damaged_copy():
    with planted_build(), Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        plants = ",".join(["backup-page-lost", os.environ.get("TURNSTILE_PLANTED", "")])
        env = {**broker.env, "TURNSTILE_PLANTED": plants}
        with open(file, "w") as f:
            f.write("the old one")
        said = refused(db, file, "damaged", env=env, options=["--verify", "--force"], status=3)
        assert "copy.db" in said, said
        assert open(file).read() == "the old one" and os.listdir(place) == ["copy.db"]
        backup(db, file, "--verify", "--force", broker=broker)
        read_copy(file)


# --- what is not replaced -----------------------------------------------------------------------------------------

@fails_without("backup-over-anything")
def test_what_is_there_is_not_replaced():
    with Broker() as broker, directory() as place:
        db = create_with_pages(broker.path("app.db"))
        there = os.path.join(place, "there.db")
        with open(there, "w") as f:
            f.write("the old one")
        refused(db, there, "there.db", "is there already", "--force", broker=broker)
        assert open(there).read() == "the old one"
        backup(db, there, "--force", broker=broker)
        read_copy(there)
        # One that comes meanwhile, too.
        meanwhile = os.path.join(place, "meanwhile.db")
        with Held(db, meanwhile, broker=broker) as held:
            with open(meanwhile, "w") as f:
                f.write("the other one")
            held.end(1)
        assert open(meanwhile).read() == "the other one"


@fails_without("backup-over-anything")
def test_a_database_in_use_is_never_replaced():
    """Not the one that is copied, by any name, nor its companions, nor another one that is open, gated or plain."""
    with Broker() as broker:
        db = create_with_pages(broker.path("app.db"))
        before = os.stat(db).st_ino

        def never(file, *words):
            return refused(db, file, *words, broker=broker, options=["--force"])

        never(db, "itself")
        os.symlink(db, broker.path("link.db"))
        never(broker.path("link.db"), "itself")
        os.link(db, broker.path("hard.db"))
        never(broker.path("hard.db"), "itself")
        os.unlink(broker.path("hard.db"))
        for suffix in ("-wal", "-journal", "-shm"):
            never(db + suffix, "a name that SQLite uses")
        elsewhere = broker.path("elsewhere")
        os.symlink(broker.dir, elsewhere)
        never(os.path.join(elsewhere, "app.db-wal"), "a name that SQLite uses")
        os.mkdir(broker.path("directory"))
        never(broker.path("directory"), "no file")
        os.symlink(broker.path("nothing"), broker.path("dangling.db"))
        never(broker.path("dangling.db"), "symbolic link")
        for journal in ("wal", "delete"):
            other = create(broker.path(f"other-{journal}.db"), journal)
            inode = os.stat(other).st_ino
            member = connect(other, broker=broker, mode="gated")
            never(other, "in use")
            member.execute("INSERT INTO rows VALUES(0, 0)")
            never(other, "in use")
            member.close()
            with PlainShell(other) as shell:
                shell.run("BEGIN; SELECT count(*) FROM rows")
                never(other, "in use")
            assert os.stat(other).st_ino == inode
        # A WAL that nobody has open any more would be applied to the copy.
        left = broker.path("left.db")
        for name in (left, left + "-wal", left + "-journal"):
            open(name, "w").close()
        for suffix in ("-wal", "-journal"):
            with open(left + suffix, "wb") as f:
                f.write(bytes(32))
            never(left, f"left.db{suffix}")
            os.unlink(left)
            refused(db, left, f"left.db{suffix}", broker=broker)
            open(left, "w").close()
            os.unlink(left + suffix)
        backup(db, left, "--force", broker=broker)
        assert os.stat(db).st_ino == before


@fails_without("backup-readable")
def test_the_copy_is_no_wider_than_the_database():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")

        def mode(**options):
            backup(db, file, "--force", broker=broker, **options)
            return os.stat(file).st_mode & 0o7777

        for bits in (0o600, 0o640, 0o644, 0o400):
            os.chmod(db, bits)
            assert mode() == bits & ~harness_umask(), oct(bits)
        os.chmod(db, 0o666)
        assert mode(umask=0o077) == 0o600
        assert mode(umask=0o022) == 0o644
        if os.geteuid():
            return
        os.chmod(db, 0o660)
        os.chown(db, NOBODY, 12345)
        assert mode(umask=0) == 0o660
        assert (os.stat(file).st_uid, os.stat(file).st_gid) == (NOBODY, 12345)
        # Who cannot give it to the group does not give the group's rights to another one.
        os.chown(place, NOBODY, NOBODY)
        os.unlink(file)
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        os.chmod(broker.dir, 0o777)
        assert mode(umask=0, **who) == 0o600
        os.chmod(db, 0o664)
        assert mode(umask=0, **who) == 0o644
        if shutil.which("setfacl"):
            # The group's bits are the mask of the ACL now.
            os.chown(db, 0, 0)
            os.chmod(db, 0o600)
            run(["setfacl", "-m", "u:daemon:rw", db])
            assert os.stat(db).st_mode & 0o070
            os.unlink(file)
            assert mode(umask=0) == 0o600


def harness_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- docs/backup.md: other ways ------------------------------------------------------------------------------------

def under_turnstile(*words):
    return [harness.bin(), "run", "--", *map(str, words)]


def test_other_tools_under_turnstile_run():
    """`.backup` and VACUUM INTO of Debian's shell, and Python's backup(), beside members that have it open."""
    with Broker() as broker, directory() as place:
        db = create_with_pages(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES(0, 0)")
        ways = {
            "backup.db": under_turnstile(SHELL, db, f".backup '{place}/backup.db'"),
            "vacuum.db": under_turnstile(SHELL, db, f"VACUUM INTO '{place}/vacuum.db'"),
            "python.db": under_turnstile(PYTHON, "-c", f"""if True:
                import sqlite3
                source, copy = sqlite3.connect({db!r}), sqlite3.connect("{place}/python.db")
                source.backup(copy)
                copy.close()"""),
        }
        for name, way in ways.items():
            run(way, env=broker.env)
            assert counts_of(read_copy(os.path.join(place, name))) == {"0": 1}, name
        assert member.execute("PRAGMA turnstile_status").fetchone()
        member.close()


def test_a_backup_that_is_begun_anew_never_ends():
    """Why `turnstile backup` holds one snapshot: stepwise, with every commit of another process the copying starts anew."""
    with Broker() as broker, directory() as place:
        db = create_with_pages(broker.path("app.db"))
        reader, member = connect(db, broker=broker), connect(db, broker=broker)
        copy = sqlite3.connect(os.path.join(place, "copy.db"))
        remaining = []

        def progress(_status, left, _total):
            # Of another connection: what sqlite3_backup hears of no other way than that it has to begin anew.
            member.execute("INSERT INTO rows VALUES(0, 0)")
            remaining.append(left)
            if len(remaining) > 3 * PAGES // 100:
                raise TimeoutError
        try:
            reader.backup(copy, pages=100, progress=progress)
            raise AssertionError("it ended")
        except TimeoutError:
            assert min(remaining) > 0
        copy.close()
        member.close()
        reader.close()


def test_plain_tools_are_kept_out_while_members_are_in_and_let_in_after():
    with Broker() as broker, directory() as place:
        db = create_with_pages(broker.path("app.db"))
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES(0, 0)")
        for sql in (f".backup '{place}/copy.db'", f"VACUUM INTO '{place}/copy.db'"):
            done = run([SHELL, db, sql], check=False, env=harness.plain_env())
            assert "locked" in done.stderr + done.stdout or "busy" in done.stderr + done.stdout, (sql, done)
        # A cp asks nobody, and has what is in the file alone: not the row.
        shutil.copy(db, os.path.join(place, "torn.db"))
        assert plain(os.path.join(place, "torn.db"), "SELECT count(*) FROM rows") == [["0"]]
        member.close()
        wait_until(lambda: not broker.members(db), 10, "the last close")
        # After the last close the file alone is the database.
        shutil.copy(db, os.path.join(place, "closed.db"))
        assert counts_of(read_copy(os.path.join(place, "closed.db"))) == {"0": 1}
        plain(db, f"VACUUM INTO '{place}/copy.db'", retry=10)


def test_restoring_into_a_database_that_is_in_use():
    """`.restore` under `turnstile run` is one write transaction: members wait for it, and go on with what it brought."""
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES(0, 0)")
        backup(db, file, broker=broker)
        member.execute("DELETE FROM rows")
        member.execute("UPDATE pages SET version = 9")
        run(under_turnstile(SHELL, db, f".restore '{file}'"), env=broker.env)
        assert member.execute("SELECT worker, seq FROM rows").fetchall() == [("0", 0)]
        assert member.execute("SELECT DISTINCT version FROM pages").fetchall() == [(0,)]
        member.execute("INSERT INTO rows VALUES(0, 1)")
        assert member.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        member.close()
        assert counts_of(plain(db, "SELECT worker, seq FROM rows", retry=10)) == {"0": 2}


def test_restoring_in_the_place_of_a_database_that_is_closed():
    with Broker() as broker, directory() as place:
        db, file = create_with_pages(broker.path("app.db")), os.path.join(place, "copy.db")
        member = connect(db, broker=broker, mode="gated")
        member.execute("INSERT INTO rows VALUES(0, 0)")
        backup(db, file, broker=broker)
        member.execute("INSERT INTO rows VALUES(0, 1)")
        refused(file, db, "in use", broker=broker, options=["--force"])
        member.close()
        wait_until(lambda: not broker.members(db), 10, "the last close")
        for suffix in ("-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(db + suffix)
        backup(file, db, "--force", broker=broker)
        assert counts_of(read_copy(db)) == {"0": 1}
        assert plain(db, "PRAGMA journal_mode") == [["wal"]], "the copy has the mode of its database"
        again = connect(db, broker=broker, mode="gated")
        again.execute("INSERT INTO rows VALUES(0, 1)")
        again.close()


def test_an_old_wal_is_applied_to_what_takes_its_databases_name():
    """Why the companions are removed before a copy is put in the place of a database."""
    with directory() as place:
        db = create(os.path.join(place, "app.db"))
        with PlainShell(db) as shell:
            shell.run("PRAGMA wal_autocheckpoint=0; INSERT INTO rows VALUES('old', 1)")
            for suffix in ("", "-wal"):
                shutil.copy(db + suffix, os.path.join(place, f"copied.db{suffix}"))
        other = create(os.path.join(place, "other.db"))
        os.replace(other, os.path.join(place, "copied.db"))
        try:
            assert plain(os.path.join(place, "copied.db"), "SELECT worker FROM rows") == [["old"]]
        except PlainError as e:
            assert "malformed" in str(e), e
