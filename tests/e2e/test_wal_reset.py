"""SQLite's WAL-reset race (sqlite.org/wal.html#walresetbug), made to happen as often as `RACES` says: a checkpoint is held
when it has read the index's header, and a writer begins the WAL anew, if it may. Debian's SQLite has the race, and the
database is malformed then; as members, no version of SQLite meets it.
"""

import contextlib
import glob
import os
import re
import shutil
import subprocess

import harness
from harness import Broker, Skip, create, fails_without, plain_env, planted_build, run, timeout

RACES = int(os.environ.get("RACES", "40"))
SOURCE = os.path.join(harness.CLIENTS, "race.c")
MENDED = (3, 51, 3)
# What SQLite says, or an integrity check.
DAMAGE = r"malformed|missing from index|wrong # of entries|[Tt]ree \d+|[Pp]age \d+|are lost"


def build(directory, name, *options):
    if not shutil.which("gcc"):
        raise Skip("gcc is missing")
    path = os.path.join(directory, name)
    try:
        run(["gcc", "-O1", "-o", path, SOURCE, *options, "-lpthread", "-lm", "-ldl"], timeout=100)
    except AssertionError as e:
        raise Skip(f"race.c cannot be built: {harness.tail(str(e), 2)}") from None
    return path


def shared(directory):
    """With the system's SQLite."""
    return build(directory, "race", "-lsqlite3")


def hidden(directory):
    """The same SQLite, linked in."""
    archives = glob.glob("/usr/lib/*/libsqlite3.a")
    if not archives:
        raise Skip("no libsqlite3.a of the system's")
    return build(directory, "race-hidden", "-Wl,--exclude-libs,ALL", archives[0], "-lz")


def newest(directory):
    """With the SQLite that turnstile has linked in, as a library."""
    archives = glob.glob(os.path.join(harness.target(), "build", "libsqlite3-sys-*", "out", "libsqlite3.a"))
    if not archives:
        raise Skip("the build's libsqlite3.a is missing")
    library = os.path.join(directory, "libsqlite3.so.0")
    run(["gcc", "-shared", "-o", library, "-Wl,--whole-archive", max(archives, key=os.path.getmtime),
         "-Wl,--no-whole-archive", "-Wl,-soname,libsqlite3.so.0", "-lm", "-ldl", "-lpthread"], timeout=100)
    return build(directory, "race-newest", library, f"-Wl,-rpath,{directory}")


class Racer:
    """One process: a writer, a connection whose checkpoint can be held, or both."""

    def __init__(self, command, env):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, env=env, text=True)
        self.version = self.line()
        assert re.match(r"3\.\d", self.version), self.version

    def line(self):
        line = self.process.stdout.readline()
        assert line, f"the program ended: {self.process.wait(10)}"
        return line.rstrip("\n")

    def __call__(self, sql):
        self.process.stdin.write(sql + "\n")
        self.process.stdin.flush()
        answer = self.line()
        assert not answer.startswith("error"), f"{sql}: {answer}"
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def race(writer, checkpointer, number):
    """One race. The writer is in a transaction when the checkpoint begins, so that this does not wait for a turn."""
    def change(row):
        writer(f"UPDATE rows SET seq = {number} + 1, pad = hex(randomblob(1500)) WHERE rowid = {row}")

    checkpointer("second SELECT count(*) FROM rows")
    writer(f"UPDATE rows SET seq = {number}, pad = hex(randomblob(1500))")
    assert writer("PRAGMA wal_checkpoint(PASSIVE)").startswith("0|")
    writer("BEGIN IMMEDIATE")
    assert checkpointer("hold PRAGMA wal_checkpoint(PASSIVE)") == "held", "the checkpoint was not held"
    change(1)
    writer("COMMIT")
    for row in range(2, 6):
        change(row)
    checkpointer("go")
    for row in range(6, 11):
        change(row)
    writer("PRAGMA wal_checkpoint(TRUNCATE)")
    # By the connection that has nothing of it in its cache.
    check = checkpointer("second PRAGMA integrity_check")
    assert check == "ok", check
    seen = checkpointer(f"second SELECT sum(seq = {number} + 1), count(*) FROM rows")
    assert seen == "10|50", f"acknowledged changes are lost: {seen} instead of 10|50 (rows changed, rows)"


def make(path):
    create(path)
    harness.plain(path, "ALTER TABLE rows ADD COLUMN pad; CREATE INDEX by_pad ON rows(pad);"
                  "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50)"
                  "INSERT INTO rows SELECT 0, 0, hex(randomblob(1500)) FROM n")


@contextlib.contextmanager
def racers(path, commands, env):
    """Processes for these commands: the first writes, the last has the checkpoint that is held."""
    started = []
    try:
        started = [Racer(command, env) for command in commands]
        yield started[0], started[-1]
        for racer in started:
            racer.close()
    finally:
        for racer in started:
            racer.end()


def extended(program, path):
    return [program, "default", path, harness.lib()]


def wrapped(program, path):
    return [harness.bin(), "run", "--", program, "default", path]


def races(commands, mode="gated", env=(), races=RACES):
    """`commands`: of a directory and a database. With a broker whose checkpointer is not in the way."""
    with Broker("--no-checkpointer") as broker:
        path = broker.path("app.db")
        make(path)
        with racers(path, commands(broker.dir, path), {**broker.env, **dict(env)}) as (writer, checkpointer):
            for racer in {writer, checkpointer}:
                racer("SELECT count(*) FROM rows")
            entry = broker.database(path)
            assert entry and entry["members"], "it is no member"
            assert mode in str(entry["mode"]), entry["mode"]
            for number in range(races):
                race(writer, checkpointer, 2 * number)
            print(f"{races} races, {writer.version} beside {checkpointer.version}: right")
            return writer.version, checkpointer.version


def two(make_program, run_by=extended):
    def commands(directory, path):
        program = make_program(directory)
        return [run_by(program, path), run_by(program, path)]
    return commands


def one(make_program, run_by=extended):
    return lambda directory, path: [run_by(make_program(directory), path)]


def mixed(first, second):
    def commands(directory, path):
        return [extended(first(directory), path), extended(second(directory), path)]
    return commands


def test_plain_sqlite_has_the_race():
    """Or the tests below would show nothing."""
    with harness.empty_again("ts-race-") as directory, contextlib.ExitStack() as stack:
        stack.callback(lambda: [os.remove(f) for f in glob.glob(directory + "/*")])
        path = os.path.join(directory, "app.db")
        make(path)
        program = shared(directory)
        with contextlib.suppress(Skip), racers(path, [[program, "default", path]] * 2, plain_env()) as (writer, checkpointer):
            if tuple(int(x) for x in writer.version.split(".")) >= MENDED:
                raise Skip(f"the system's SQLite, {writer.version}, does not have it")
            try:
                race(writer, checkpointer, 0)
            except AssertionError as e:
                assert re.search(DAMAGE, str(e)), e
                return
            raise AssertionError("plain SQLite did not meet the race: it is not made any more")


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_members_do_not_meet_it():
    races(two(shared))


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_two_connections_of_one_process_do_not_meet_it():
    races(one(shared))


@timeout(600)
@fails_without("new-beginning-beside-checkpoint,no-fast-lane", message=DAMAGE)
def test_members_on_the_socket_lane_do_not_meet_it():
    with planted_build():
        planted = ",".join(filter(None, [os.environ.get("TURNSTILE_PLANTED"), "no-fast-lane"]))
        races(two(shared), env={"TURNSTILE_PLANTED": planted})


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_programs_with_sqlite_linked_in_do_not_meet_it():
    races(two(hidden, wrapped))


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_two_hidden_connections_of_one_process_do_not_meet_it():
    """They have one seat: the rules cannot tell them apart."""
    races(one(hidden, wrapped))


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_a_new_sqlite_writes_beside_an_old_ones_checkpoint():
    versions = races(mixed(newest, shared))
    assert versions[0] != versions[1], versions


@timeout(600)
def test_an_old_sqlite_writes_beside_a_new_ones_checkpoint():
    versions = races(mixed(shared, newest))
    assert versions[0] != versions[1], versions


@timeout(600)
@fails_without("new-beginning-beside-checkpoint", message=DAMAGE)
def test_guests_do_not_meet_it():
    """With SQLite's own locks, and a plain client beside them."""
    races(two(shared), mode="guest", env={"TURNSTILE_MODE": "guest"})


# --- a checkpoint that is refused ---------------------------------------------------------------------------------

def turn_of(broker, path):
    return (broker.database(path) or {}).get("turn")


def refused_beside_a_held_checkpoint(program, run_by):
    """Another checkpoint asks for its turn, has it, and finds CHECKPOINT taken."""
    with Broker("--no-checkpointer") as broker:
        path = broker.path("app.db")
        make(path)
        with racers(path, [run_by(program(broker.dir), path)] * 3, broker.env) as (writer, checkpointer):
            checkpointer("second SELECT count(*) FROM rows")
            writer("UPDATE rows SET seq = 1")
            # As above, so that the one that is held has no turn.
            writer("BEGIN IMMEDIATE")
            assert checkpointer("hold PRAGMA wal_checkpoint(PASSIVE)") == "held"
            writer("COMMIT")
            assert turn_of(broker, path) is None
            assert writer("PRAGMA wal_checkpoint(PASSIVE)").startswith("1|"), "it was not refused"
            assert turn_of(broker, path) is None, f"it keeps the turn: {turn_of(broker, path)}"
            checkpointer("go")


@fails_without("busy-keeps-turn", message="it keeps the turn")
def test_a_checkpoint_that_is_refused_keeps_no_turn():
    refused_beside_a_held_checkpoint(shared, extended)


@fails_without("busy-keeps-turn", message="it keeps the turn")
def test_a_refused_checkpoint_of_sqlite_that_is_linked_in_keeps_no_turn():
    refused_beside_a_held_checkpoint(hidden, wrapped)


@fails_without("busy-keeps-turn", message="it keeps the turn")
def test_a_guests_checkpoint_that_is_refused_keeps_no_turn():
    with Broker() as broker:
        path = create(broker.path("app.db"))
        with harness.PlainShell(path) as shell:
            shell.run("BEGIN IMMEDIATE; INSERT INTO rows VALUES('plain', 0)")
            guest = harness.connect(path, broker=broker, mode="guest")
            assert guest.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 1, "it was not refused"
            assert turn_of(broker, path) is None, f"it keeps the turn: {turn_of(broker, path)}"
            shell.run("COMMIT")
            guest.execute("INSERT INTO rows VALUES('guest', 0)")
            guest.close()
