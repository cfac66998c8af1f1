"""What an application can observe of a connection is the same with the extension and without; and what SQLite tells the
extension of a connection need not come once, nor be the last."""

import ctypes
import json
import os
import shutil
import traceback

from harness import CACHE, PYTHON, Broker, Skip, create, fails_without, lib, plain, run
from test_artifact import Library, system_library
from test_fork import in_child

BUSY = 5
OLD = os.path.join(CACHE, "sqlite-3.34")

# Run in a process of its own: `observe.py HOW DATABASE OTHER EXTENSION`. It sets every observer that SQLite has, runs a
# script of statements, and prints what was observed, a line each.
OBSERVE = r'''
import ctypes, json, os, sys
how, scenario, path, other, extension = sys.argv[1:]
lib = ctypes.CDLL("libsqlite3.so.0")
P, I, S, L = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_longlong
for name in ("errmsg", "sql", "db_filename", "column_name"):
    getattr(lib, "sqlite3_" + name).restype = S
lib.sqlite3_db_filename.argtypes = [P, S]
lib.sqlite3_next_stmt.restype = P
lib.sqlite3_last_insert_rowid.restype = L
lib.sqlite3_column_text.restype = S
for name in ("trace", "profile", "wal_hook", "update_hook", "commit_hook", "rollback_hook"):
    getattr(lib, "sqlite3_" + name).restype = P
seen, kept, where = [], [], ["setup"]
def say(*what):
    seen.append([where[0], *what])
def text(t):
    return None if t is None else t.decode().replace(os.path.dirname(path), "")
def callback(*types):
    def make(function):
        kept.append(ctypes.CFUNCTYPE(*types)(function))
        return kept[-1]
    return make

@callback(I, P, I, S, S, S, S)
def authorizer(_, action, a, b, c, d):
    say("authorizer", action, *map(text, (a, b, c, d)))
    return 0
steps = [0]
@callback(I, P)
def progress(_):
    steps[0] += 1
    return 0
@callback(None, P, S, ctypes.c_ulonglong)
def profile(_, sql, nanoseconds):
    say("profile", text(sql))
@callback(None, P, S)
def trace(_, sql):
    say("trace", text(sql))
@callback(I, ctypes.c_uint, P, P, P)
def trace_v2(event, _, subject, more):
    say("trace_v2", event, text(ctypes.cast(more, S).value) if event == 1 else None,
        text(lib.sqlite3_sql(P(subject))) if event in (1, 2, 4) else None)
    return 0
@callback(I, P, P, S, I)
def wal_hook(argument, _, name, frames):
    say("wal_hook", argument, text(name), frames)
    return 0
@callback(None, P, I, S, S, L)
def update(_, action, name, table, row):
    say("update", action, text(name), text(table), row)
@callback(I, P)
def commit(_):
    say("commit")
    return 0
@callback(None, P)
def rollback(_):
    say("rollback")
@callback(I, P, I)
def busy(_, count):
    say("busy", count)
    return 0
@callback(I, P, P, P)
def auto(db, _, __):
    where[0] = "auto-extension"
    observe(ctypes.c_void_p(db), "auto")
    return 0

def observe(db, what):
    """What the application sets: everything, but for a trace only in the scenarios that have one."""
    if what == "auto":
        if scenario == "auto-trace":
            say("set", lib.sqlite3_trace_v2(db, 15, trace_v2, None))
        return
    lib.sqlite3_set_authorizer(db, authorizer, None)
    lib.sqlite3_progress_handler(db, 1, progress, None)
    lib.sqlite3_profile(db, profile, None)
    if scenario == "trace":
        lib.sqlite3_trace(db, trace, None)
    if scenario == "trace_v2":
        lib.sqlite3_trace_v2(db, 15, trace_v2, None)
    if scenario == "wal-hook":
        # An integer as a number of frames, as SQLite's own hook has it.
        say("replaced", lib.sqlite3_wal_hook(db, wal_hook, P(2000)))
    lib.sqlite3_update_hook(db, update, None)
    lib.sqlite3_commit_hook(db, commit, None)
    lib.sqlite3_rollback_hook(db, rollback, None)
    lib.sqlite3_busy_handler(db, busy, None)

def load(db):
    message = S()
    lib.sqlite3_enable_load_extension(db, 1)
    rc = lib.sqlite3_load_extension(db, extension.encode(), None, ctypes.byref(message))
    assert rc == 0, message.value
    lib.sqlite3_enable_load_extension(db, 0)

def state(db):
    statements, at = [], lib.sqlite3_next_stmt(db, None)
    while at:
        statements.append([text(lib.sqlite3_sql(P(at))), lib.sqlite3_stmt_busy(P(at)), lib.sqlite3_stmt_readonly(P(at))]
                          + [lib.sqlite3_stmt_status(P(at), i, 0) for i in (1, 2, 3, 4, 5, 6)])
        at = lib.sqlite3_next_stmt(db, P(at))
    numbers = []
    for op in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12):  # all of SQLITE_DBSTATUS_ but SCHEMA_USED's neighbour of padding
        now, high = I(), I()
        lib.sqlite3_db_status(db, op, ctypes.byref(now), ctypes.byref(high), 0)
        numbers.append([op, now.value, high.value])
    say("state", lib.sqlite3_errcode(db), lib.sqlite3_extended_errcode(db), text(lib.sqlite3_errmsg(db)),
        lib.sqlite3_changes(db), lib.sqlite3_total_changes(db), lib.sqlite3_last_insert_rowid(db),
        lib.sqlite3_get_autocommit(db), lib.sqlite3_txn_state(db, None), lib.sqlite3_txn_state(db, b"main"),
        statements, steps[0], numbers)

def run(db, sql):
    where[0] = sql.replace(os.path.dirname(path), "")
    statement = P()
    rc = lib.sqlite3_prepare_v2(db, sql.encode(), -1, ctypes.byref(statement), None)
    say("prepare", rc)
    state(db)
    while rc in (0, 100) and statement:
        rc = lib.sqlite3_step(statement)
        say("step", rc, [text(lib.sqlite3_column_text(statement, i))
                         for i in range(lib.sqlite3_column_count(statement))] if rc == 100 else None)
        state(db)
    say("finalize", lib.sqlite3_finalize(statement))
    state(db)

def opened(path):
    db = P()
    say("open", lib.sqlite3_open(path.encode(), ctypes.byref(db)))
    return db

if scenario == "auto-trace":
    lib.sqlite3_auto_extension(auto)  # before the extension is loaded
if how == "loaded":
    first = P()
    lib.sqlite3_open(b":memory:", ctypes.byref(first))
    load(first)
    del seen[:]
elif scenario == "auto-trace":
    first = P()
    lib.sqlite3_open(b":memory:", ctypes.byref(first))
    del seen[:]
db = opened(path)
if how == "adopted":
    observe(db, "all")
    load(db)
else:
    observe(db, "all")
state(db)
for sql in (
        "PRAGMA journal_mode", "SELECT count(*) FROM rows", "INSERT INTO rows VALUES('a', 1)", "BEGIN",
        "INSERT INTO rows VALUES('b', 2)", "SELECT seq FROM rows", "COMMIT", "BEGIN IMMEDIATE",
        "DELETE FROM rows WHERE seq=1", "ROLLBACK", "SAVEPOINT s", "UPDATE rows SET seq=seq+1", "RELEASE s",
        "INSERT INTO nowhere VALUES(1)", "CREATE TABLE strict(x UNIQUE)", "INSERT INTO strict VALUES(1)",
        "INSERT INTO strict VALUES(1)", f"ATTACH '{other}' AS other", "INSERT INTO other.rows SELECT * FROM main.rows",
        "BEGIN", "INSERT INTO other.rows VALUES('c', 3)", "INSERT INTO main.rows VALUES('c', 3)", "COMMIT",
        "PRAGMA wal_autocheckpoint", "PRAGMA wal_autocheckpoint=500", "INSERT INTO rows VALUES('d', 4)",
        "PRAGMA wal_autocheckpoint=1000", "INSERT INTO rows VALUES('e', 5)", "PRAGMA wal_autocheckpoint",
        "PRAGMA locking_mode", "PRAGMA main.wal_checkpoint(PASSIVE)", "PRAGMA busy_timeout=10",
        "CREATE TEMP TABLE t(x)", "INSERT INTO t VALUES(1)", "CREATE TRIGGER after_rows AFTER INSERT ON rows BEGIN "
        "INSERT INTO strict VALUES(new.seq+100); END", "INSERT INTO rows VALUES('f', 6)", "DETACH other",
        "PRAGMA database_list", "PRAGMA wal_checkpoint(TRUNCATE)", "INSERT INTO rows VALUES('g', 7)", "VACUUM"):
    run(db, sql)
where[0] = "a close that is refused"
statement = P()
lib.sqlite3_prepare_v2(db, b"SELECT worker FROM rows", -1, ctypes.byref(statement), None)
say("step", lib.sqlite3_step(statement))
say("close", lib.sqlite3_close(db))
state(db)
say("step", lib.sqlite3_step(statement))
say("finalize", lib.sqlite3_finalize(statement))
run(db, "INSERT INTO rows VALUES('h', 8)")
where[0] = "the close"
say("close", lib.sqlite3_close(db))
for line in seen:
    print(json.dumps(line))
'''


def observed(broker, how, scenario, old=False):
    """What the script observes, by lines; the databases are made anew each time."""
    for name in ("app.db", "other.db"):
        for end in ("", "-wal", "-shm", "-journal"):
            if os.path.exists(broker.path(name) + end):
                os.unlink(broker.path(name) + end)
        create(broker.path(name))
    env = {**broker.env, **({"LD_LIBRARY_PATH": OLD} if old else {})}
    if how == "plain":
        env = {k: v for k, v in env.items() if not k.startswith("TURNSTILE")}
    done = run([PYTHON, "-c", OBSERVE, how, scenario, broker.path("app.db"), broker.path("other.db"), lib()], env=env)
    return [json.loads(line) for line in done.stdout.splitlines()]


def same(broker, how, scenario, old=False):
    bare, ours = (observed(broker, h, scenario, old) for h in ("plain", how))
    for a, b in zip(bare, ours):
        assert a == b, f"{how}, {scenario}:\n plain: {a}\n ours:  {b}"
    assert len(bare) == len(ours) > 200, f"{how}, {scenario}: {bare[len(ours):][:3]} {ours[len(bare):][:3]}"


SCENARIOS = ("no-trace", "trace", "trace_v2", "wal-hook")


@fails_without("asked-by-statements")
def test_an_application_observes_nothing_of_us():
    """On a connection that opens when the extension is loaded already, from its opening to its close."""
    with Broker() as broker:
        for scenario in SCENARIOS:
            same(broker, "loaded", scenario)


@fails_without("asked-by-statements")
def test_an_application_observes_nothing_of_us_on_the_connection_that_loads_the_extension():
    with Broker() as broker:
        for scenario in SCENARIOS:
            same(broker, "adopted", scenario)


def test_an_application_observes_nothing_of_us_with_the_oldest_sqlite():
    """But on the connection that loads the extension, whose attached databases it does not tell by a function."""
    if not os.path.exists(OLD):
        raise Skip("SQLite 3.34 is missing: run tests/install")
    with Broker() as broker:
        for scenario in SCENARIOS:
            same(broker, "loaded", scenario, old=True)


@fails_without("profile-ends-with-trace")
def test_a_profile_goes_on_after_a_close_that_was_refused():
    with Broker() as broker:
        same(broker, "loaded", "no-trace")


@fails_without("traced-late")
def test_a_trace_that_an_auto_extension_of_the_application_sets_is_the_applications():
    """Its auto-extension was there before ours, and runs on each connection that opens."""
    with Broker() as broker:
        same(broker, "loaded", "auto-trace")


# --- what SQLite says more than once -------------------------------------------------------------------------------

class Connections(Library):
    """The system's library with the extension loaded in it."""

    def __init__(self):
        super().__init__(system_library())
        self.lib.sqlite3_wal_hook.restype = ctypes.c_void_p
        self.memory = self.open(":memory:")
        assert self.load(self.memory) == (0, "")

    def prepare(self, db, sql):
        statement = ctypes.c_void_p()
        rc = self.lib.sqlite3_prepare_v2(db, sql.encode(), -1, ctypes.byref(statement), None)
        assert rc == 0, (rc, self.lib.sqlite3_extended_errcode(db))
        return statement

    def step(self, statement):
        return self.lib.sqlite3_step(statement)


def apart(body, *arguments):
    """In a process of its own, because a test that fails may leave its memory in disorder."""
    def shown():
        try:
            body(*arguments)
        except BaseException:
            traceback.print_exc()
            raise
    assert in_child(shown) == 0, "see above"


def rows(path):
    return plain(path, "SELECT count(*) FROM rows", retry=5)[0][0]


@fails_without("closes-once")
def test_a_close_that_is_refused_is_no_close():
    """SQLite tells of the close before it finds a statement that is not finished, and again at the next close."""
    with Broker() as broker:
        paths = [create(broker.path(f"{i}.db")) for i in range(2)]
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        apart(closes_that_are_refused, paths)
        assert [rows(path) for path in paths] == ["14", "14"]


def closes_that_are_refused(paths):
    sqlite = Connections()
    for turn in range(4):
        db = sqlite.open(paths[turn % 2])
        sqlite.execute(db, "INSERT INTO rows VALUES('a', 1)")
        statement = sqlite.prepare(db, "SELECT * FROM rows")
        assert sqlite.step(statement) == 100
        for _ in range(3):
            assert sqlite.lib.sqlite3_close(db) == BUSY
        # It goes on: reads, writes, and is told of another close.
        sqlite.execute(db, "INSERT INTO rows VALUES('b', 2)")
        assert sqlite.step(statement) in (100, 101)
        assert sqlite.lib.sqlite3_finalize(statement) == 0
        sqlite.execute(db, "INSERT INTO rows VALUES('c', 3)")
        sqlite.close(db)
        for path in paths:
            for _ in range(2):
                other = sqlite.open(path)
                sqlite.execute(other, "INSERT INTO rows VALUES('d', 4)")
                sqlite.close(other)


@fails_without("closes-once")
def test_statements_go_on_after_sqlite3_close_v2():
    """The connection lives until its last statement is finalized; SQLite tells of it at the beginning."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        apart(statements_after_close_v2, path)
        assert rows(path) == "12"


def statements_after_close_v2(path):
    sqlite = Connections()
    for turn in range(4):
        db = sqlite.open(path)
        insert = sqlite.prepare(db, "INSERT INTO rows VALUES('v', 2)")
        read = sqlite.prepare(db, "SELECT count(*) FROM rows")
        assert sqlite.step(read) == 100
        assert sqlite.lib.sqlite3_close_v2(db) == 0
        assert sqlite.lib.sqlite3_reset(read) == 0
        for _ in range(3):
            assert sqlite.step(insert) == 101
            assert sqlite.lib.sqlite3_reset(insert) == 0
        assert sqlite.lib.sqlite3_finalize(insert) == 0
        assert sqlite.lib.sqlite3_finalize(read) == 0


def test_a_connection_whose_close_was_refused_has_its_own_automatic_checkpoint():
    """Nobody would raise or lower it any more: see `test_checkpoint` for what is done with one that is traced."""
    with Broker() as broker:
        path = create(broker.path("app.db"))
        os.environ["TURNSTILE_SOCKET"] = broker.socket
        sqlite = Connections()
        for refused in (False, True):
            db = sqlite.open(path)
            sqlite.execute(db, "INSERT INTO rows VALUES('a', 1)")
            statement = sqlite.prepare(db, "SELECT * FROM rows")
            assert sqlite.step(statement) == 100
            if refused:
                assert sqlite.lib.sqlite3_close(db) == BUSY
            number = sqlite.lib.sqlite3_wal_hook(db, None, None)
            assert (number == 1000) == refused, number
            assert sqlite.lib.sqlite3_finalize(statement) == 0
            sqlite.close(db)


PERL = """
use strict; use warnings; use DBI;
my ($library, @paths) = @ARGV;
sub opened {
    my $db = DBI->connect("dbi:SQLite:dbname=$_[0]", '', '', { RaiseError => 1, PrintWarn => 0, PrintError => 0 });
    return $db;
}
my $first = opened(':memory:');
$first->sqlite_enable_load_extension(1);
$first->sqlite_load_extension($library) or die;
for my $turn (0 .. 3) {
    my $db = opened($paths[$turn % 2]);
    $db->do("INSERT INTO rows VALUES('p', 1)");
    my $statement = $db->prepare("SELECT * FROM rows UNION ALL SELECT 'x', 1");
    $statement->execute;
    $statement->fetchrow_arrayref;
    eval { local $SIG{__WARN__} = sub {}; $db->disconnect };
    undef $statement;
    undef $db;
    my $other = opened($_) for @paths;
    for my $path (@paths) {
        my $other = opened($path);
        $other->do("INSERT INTO rows VALUES('q', 2)");
        $other->disconnect;
    }
}
"""


def test_perl_disconnects_with_a_statement_that_is_not_finished():
    if not shutil.which("perl") or run(["perl", "-MDBD::SQLite", "-e", "1"], check=False).returncode:
        raise Skip("DBD::SQLite is missing: run tests/install")
    with Broker() as broker:
        paths = [create(broker.path(f"{i}.db")) for i in range(2)]
        run(["perl", "-e", PERL, lib(), *paths], env=broker.env)
        assert [rows(path) for path in paths] == ["6", "6"]
