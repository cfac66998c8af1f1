"""Containers that share a data directory and the broker's socket directory, and nothing else: docs/containers.md.

What was acknowledged is noted beside the database by the containers' programs (tests/containers/writer.py), for which
BUSY is an error, and compared with what is in the database at the end.
"""

import os
import shutil
import signal
import sqlite3
import sys

import harness
from harness import Programs, Skip, Workers, check_rows, connect, fails_without, run, timeout, wait_until

HERE = os.path.join(harness.ROOT, "tests", "containers")
sys.path.insert(0, HERE)

# How often a broker's container is ended under load. The long form:
# ROUNDS=50 python3 tests/e2e/run.py --only test_containers.*under_load
ROUNDS = int(os.environ.get("ROUNDS", "2"))

from engine import SOCKET, Containers, HostBroker, Podman, Sidecar, containers  # noqa: E402

WAITS = True


def grown(broker, what, rows=50, timeout=30):
    """Waits until that many more rows have been acknowledged."""
    before = len(harness.acknowledged(broker.record))
    wait_until(lambda: len(harness.acknowledged(broker.record)) >= before + rows, timeout, what)


def namespaces(results, kind):
    return {r[f"{kind} namespace"] for r in results}


def all_gated(results):
    assert all(r["status"]["mode"] == "gated" for r in results), results


def refusal(engine, name, command):
    """What a client says that must not get in."""
    with Containers(engine, {name: command}) as c:
        try:
            c.ready()
        except AssertionError as e:
            return str(e)
    raise AssertionError("not refused")


# --- what people do ---------------------------------------------------------------------------------------------

@timeout(120)
def test_readers_open_what_a_writer_container_left():
    """The writer's container has ended; two readers open `mode=ro` at once, and see all of it."""
    with HostBroker() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        with Containers(engine, {"writer": engine.writer("writer", 200)}) as c:
            all_gated(c.go().wait())
        readers = {name: engine.reader(name, 200) for name in ("one", "two")}
        with Containers(engine, readers) as c:
            results = c.go().wait()
        all_gated(results)
        assert all(r["seen"] == 200 and "readonly" in r["wrote"] for r in results), results
        assert len(namespaces(results, "pid") | {os.readlink("/proc/self/ns/pid")}) == 3, results
        check_rows(db, broker.record)


@timeout(180)
def test_two_writers_and_a_reader_in_a_loop_of_a_compose_file():
    """Programs that are started again and again, with the broker in a container of its own (compose.yaml)."""
    with HostBroker() as broker, containers(broker) as engine:
        if not isinstance(engine, Podman):
            raise Skip(f"containers are bubblewrap's here; {engine.why}")
        if not shutil.which("podman-compose"):
            raise Skip("podman-compose is missing: run tests/install")
        broker.stop()
        db = broker.database_for_all()
        env = {**engine.env, "IMAGE": engine.image, "DATA": broker.data, "SOCKETS": broker.sockets}
        compose = ["podman-compose", "--podman-path", os.path.join(HERE, "podman"), "--project-name",
                   engine.prefix + "compose", "--file", os.path.join(HERE, "compose.yaml")]
        try:
            run([*compose, "up", "--detach"], env=env)
            for service in ("one", "two", "reader"):
                name = f"{engine.prefix}compose_{service}_1"
                status = run(["podman", "wait", name], env=env, timeout=90).stdout.strip()
                assert status == "0", f"{service} ended with {status}"
        finally:
            run([*compose, "down"], env=env, timeout=60)
        assert check_rows(db, broker.record) == 480


@timeout(120)
def test_users_without_a_common_group_share_a_database():
    with HostBroker() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        writers = {name: engine.writer(name, user=uid) for name, uid in (("one", 1001), ("two", 1002))}
        with Containers(engine, writers) as c:
            c.go()
            grown(broker, "both to write")
            results = c.end()
        all_gated(results)
        assert {r["uid"] for r in results} == {1001, 1002} and all(r["committed"] for r in results), results
        check_rows(db, broker.record)


@timeout(120)
def test_user_namespaces_share_a_database_with_each_other_and_the_host():
    """Root in each of them, and three users out here."""
    with HostBroker() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        writers = {name: engine.writer(name, subuids=first) for name, first in (("one", 100000), ("two", 200000))}
        with Containers(engine, writers) as c:
            c.go()
            own = connect(db, broker=broker, mode="gated")
            for _ in range(20):
                own.execute("INSERT INTO rows VALUES('host', 0)")
                own.execute("DELETE FROM rows WHERE worker = 'host'")
            own.close()
            grown(broker, "both to write")
            results = c.end()
        all_gated(results)
        assert [r["uid"] for r in results] == [0, 0] and all(r["committed"] for r in results), results
        assert len(namespaces(results, "user") | {os.readlink("/proc/self/ns/user")}) == 3, results
        check_rows(db, broker.record)


@timeout(120)
def test_a_reader_with_a_read_only_mount_sees_every_commit():
    """It can take no lock in shared memory and change nothing, and it keeps nobody waiting."""
    with HostBroker() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        with Containers(engine, {"writer": engine.writer("writer")}) as w:
            w.go()
            grown(broker, "the writer to begin")
            with Containers(engine, {"reader": engine.reader("reader", 300, data="ro")}) as r:
                results = r.go().wait()
            all_gated(results)
            assert results[0]["status"]["role"] == "read-only" and results[0]["seen"] >= 300, results
            assert "readonly" in results[0]["wrote"], results
            grown(broker, "the writer to go on")
            w.end()
        check_rows(db, broker.record)


@timeout(60)
def test_a_reader_with_a_read_only_mount_and_nobody_else_is_where_plain_sqlite_leaves_it():
    """A database in WAL mode cannot be read without -wal and -shm, which it cannot make."""
    with HostBroker() as broker, containers(broker) as engine:
        broker.database_for_all()
        read = "import sqlite3; sqlite3.connect('file:/data/app.db?mode=ro', uri=True).execute('SELECT * FROM rows')"
        plain = engine.command("plain", ["python3", "-c", read], data="ro")
        for command in (engine.reader("reader", 0, data="ro"), plain):
            done = run(command, input="go\n", env=engine.env, check=False)
            assert done.returncode and "unable to open database file" in done.stderr, done


# --- deaths -----------------------------------------------------------------------------------------------------

@timeout(120)
def test_a_container_killed_for_its_memory_in_a_transaction_holds_nobody_up():
    """Part of its transaction is in the WAL, and its container is ended by the kernel."""
    with HostBroker() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        hog = engine.command("hog", ["python3", "/opt/hog.py", "/data/app.db"], memory="64m")
        with Containers(engine, {"writer": engine.writer("writer")}) as w, Containers(engine, {"hog": hog}) as h:
            h.ready()
            w.go()
            grown(broker, "the writer to begin")
            h.go()
            status = h.processes["hog"].wait(60)
            assert status == 128 + signal.SIGKILL, (status, h._stderr("hog"))
            h.killed.add("hog")
            grown(broker, "the writer to go on")
            w.end()
        check_rows(db, broker.record)


@timeout(120)
def test_a_broker_in_a_container_sees_its_clients_die():
    """No pid namespace is shared: it learns of a death by SO_PEERPIDFD. The data it has been given read-only."""
    with Sidecar() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        with Containers(engine, {name: engine.writer(name) for name in ("one", "two")}) as c:
            c.go()
            grown(broker, "both to write")
            c.kill("one")
            grown(broker, "the other to go on")
            all_gated(c.end())
        check_rows(db, broker.record, killed=["one"])


@timeout(120)
def test_a_broker_that_cannot_see_its_clients_die_refuses_them():
    """A kernel before Linux 6.5 (planted): refused with the reason, unless they share the broker's pid namespace."""
    if not os.path.exists(os.path.join(harness.planted_target(), "libturnstile.so")):
        raise Skip("needs the build with planted faults, which plays the older kernel")
    os.environ |= {"TURNSTILE_TARGET": harness.planted_target(), "TURNSTILE_PLANTED": "no-peerpidfd"}
    with Sidecar() as broker, containers(broker) as engine:
        db = broker.database_for_all()
        message = refusal(engine, "apart", engine.writer("apart", 10))
        assert "shared pid namespace is needed" in message, message
        with Containers(engine, {"beside": engine.writer("beside", 10, pid_of=broker.name)}) as c:
            all_gated(c.go().wait())
        assert check_rows(db, broker.record) == 10


def replaced_under_load(broker, engine, end):
    """Three writers go on while the broker's container is ended, stays away, and is followed by another one."""
    db = broker.database_for_all()
    os.environ["TURNSTILE_SOCKET"] = broker.socket

    def newcomer():
        try:
            connect(db, mode="gated").close()
            return True
        except sqlite3.OperationalError:
            return False

    with Containers(engine, {name: engine.writer(name) for name in ("one", "two", "three")}) as c:
        c.go()
        for _ in range(ROUNDS):
            grown(broker, "all to write")
            broker.stop(end)
            grown(broker, "members to go on without a broker")
            broker.start()
            wait_until(newcomer, 20, "a newcomer to be let in")
            for name, process in c.processes.items():
                assert process.poll() is None, c._stderr(name)
        grown(broker, "all to write")
        results = c.end()
    all_gated(results)
    assert all(r["committed"] for r in results), results
    check_rows(db, broker.record)


@timeout(180)
def test_the_brokers_container_is_replaced_under_load():
    """With `stop_signal: SIGUSR2`. No transaction fails, though its keeper ends with its pid namespace."""
    with Sidecar() as broker, containers(broker) as engine:
        replaced_under_load(broker, engine, signal.SIGUSR2)


@timeout(180)
def test_the_brokers_container_is_killed_under_load():
    with Sidecar() as broker, containers(broker) as engine:
        replaced_under_load(broker, engine, signal.SIGKILL)


# --- turns ------------------------------------------------------------------------------------------------------

SLEEPER = """
import os, sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
db.create_function("nap", 0, lambda: time.sleep(0.06) or 1)
db.enable_load_extension(True)
db.load_extension(os.environ["TURNSTILE_EXTENSION"])
db.execute("CREATE TEMP TABLE naps(n)")
assert os.getpid() == 1
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    # A statement that writes, and so takes its turn, but not this file. Each is another one.
    db.execute(f"INSERT INTO temp.naps SELECT nap() + {i} FROM (SELECT * FROM rows LIMIT 1)")
print("0")
"""


@fails_without("clock-alone")
@timeout(90)
def test_a_turn_is_not_taken_back_by_the_clock_from_a_thread_of_another_pid_namespace():
    """Its number there is another thread's here, or nobody's. Taken for one that runs and does not write, a thread that
    waits for a processor between READ and WRITE would lose its turn, and its statement get BUSY."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if run([*unshare, "true"], check=False).returncode:
        raise Skip("cannot unshare the pid namespace here")
    with HostBroker() as broker:
        db = broker.database_for_all()
        env = {**broker.env, "TURNSTILE_EXTENSION": harness.lib()}
        keep = connect(db, broker=broker, mode="gated")
        keep.execute("INSERT INTO rows VALUES('keep', 0)")
        with Programs({"sleeper": [*unshare, harness.PYTHON, "-c", SLEEPER, db]}, env) as sleeper, \
                Workers(1, "insert", 60.0, db, broker) as w:
            sleeper.ready()
            w.go()
            sleeper.go()
            sleeper.wait(60)
            assert broker.database(db)["turns_revoked"] == 0, broker.database(db)
            w.kill(0)
        keep.close()


# --- mistakes ---------------------------------------------------------------------------------------------------

@fails_without("other-gate-is-plain", message="not refused")
@timeout(120)
def test_two_brokers_on_one_database_by_mistake_is_an_error_of_its_own():
    """One on the host, and one in a container with a socket directory of its own."""
    with HostBroker() as one, containers(one) as engine:
        db = one.database_for_all()
        with Sidecar(data=one.data) as other, Containers(engine, {"member": engine.writer("member")}) as c:
            c.go()
            grown(one, "the member to write")
            message = refusal(other.engine, "stranger", other.engine.writer("stranger", 10))
            assert "another broker has it" in message, message
            c.end()
        check_rows(db, one.record)


@timeout(60)
def test_a_second_broker_does_not_take_the_socket_and_says_so():
    """Nor does `--replace` reach one in another container: no signal leads there."""
    with Sidecar() as broker, containers(broker) as engine:
        for name, more, says in (("second", [], "already serves"), ("next", ["--replace"], "another pid namespace")):
            command = engine.command(name, ["turnstile", "serve", "--socket", SOCKET, *more], data="ro")
            done = run(command, input="", env=engine.env, check=False)
            assert done.returncode and says in done.stderr, done
        assert broker.status()["broker"]


@timeout(60)
def test_without_the_socket_directory_nothing_is_started_in_a_container():
    """A broker inside would be one that other containers do not find."""
    with HostBroker() as broker, containers(broker) as engine:
        broker.database_for_all()
        message = refusal(engine, "alone", engine.writer("alone", 10, sockets=False))
        assert "no broker listens on" in message, message
