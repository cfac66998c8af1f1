"""`turnstile bench`: both sides are what they say they are, the figures add up, a lost row is a failure and not a
figure, and nothing is left behind. That one side is faster than the other is no test's business."""

import json
import os
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree

import harness
from harness import empty_again, ending, fails_without, plain, processes_in, run, wait_until

INSERTS = ["insert-normal", "insert-full", "insert-delete-full", "insert-delete-normal"]


def command(directory, *arguments):
    return [harness.bin(), "bench", "--dir", directory, *arguments]


def bench(directory, *arguments, check=True, **env):
    env = {**os.environ, "TMPDIR": directory, **env}
    return run(command(directory, *arguments), env=env, timeout=100, check=check)


def report_of(done):
    report = json.loads(done.stdout)
    assert report["good"] is True and report["problems"] == [], report["problems"]
    return report


def check_side(side, processes, writes=True):
    assert side["ops_per_s"] > 0 and side["errors"] == 0, side
    latency = side["latency_us"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p99_9"] <= latency["max"], latency
    assert 0 <= side["fairness"] <= 1, side
    for one in side["rounds"]:
        assert one["faults"] == [], one
        assert one["least"] * processes <= one["operations"] <= one["most"] * processes, one
        if writes:
            assert one["written"] == one["acknowledged"] >= one["operations"], one
        else:
            assert one["written"] is None, one


@fails_without("bench-row-lost", message="FAILED insert-normal, n = 1, plain: process 0: .* 1 lost")
def test_every_insert_is_found_again_on_both_sides():
    # Settings that would break either side if they reached it.
    hostile = {"TURNSTILE_SOCKET": "/nonexistent/socket", "TURNSTILE_MODE": "nonsense", "TURNSTILE_WAIT": "0"}
    with empty_again("ts-bench-") as directory:
        done = bench(directory, "--quick", "--only", "insert", "--processes", "1,2", "--json", "-", **hostile)
    report = report_of(done)
    cases = [(w["name"], w["processes"]) for w in report["workloads"]]
    assert cases == [(name, n) for name in INSERTS for n in (1, 2)], cases
    for workload in report["workloads"]:
        for name, timeout in (("plain", 5000), ("turnstile", 0)):
            side = workload[name]
            check_side(side, workload["processes"])
            assert len(side["rounds"]) == 1 and side["busy_timeout_ms"] == timeout, side
        # Turnstile's writers wait in line.
        assert workload["turnstile"]["busy"] == 0, workload
        assert workload["ratio"] > 0, workload
    environment = report["environment"]
    assert environment["filesystem"] and environment["kernel"] == os.uname().release, environment
    assert environment["cores"] >= 1 and environment["sqlite"].startswith("3."), environment
    assert report["options"]["seconds"] == 0.5 and report["options"]["rounds"] == 1, report["options"]


@fails_without("bench-row-lost", message="the counter is -?[0-9]+, and")
def test_no_increment_is_lost_where_transactions_are_refused():
    with empty_again("ts-bench-") as directory:
        done = bench(directory, "--quick", "--only", "read-write", "--processes", "2", "--json", "-")
    [workload] = report_of(done)["workloads"]
    check_side(workload["plain"], 2)
    check_side(workload["turnstile"], 2)


def test_the_other_workloads_do_their_work():
    names = ["select", "select-500", "immediate", "open", "open-same", "temp-fill", "mirrored-attach"]
    only = [argument for name in names for argument in ("--only", name)]
    with empty_again("ts-bench-") as directory:
        done = bench(directory, "--seconds", "0.2", "--rounds", "2", "--processes", "2", *only, "--json", "-")
    report = report_of(done)
    assert [w["name"] for w in report["workloads"]] == names, report
    for workload in report["workloads"]:
        writes = workload["name"] in ("immediate", "temp-fill", "mirrored-attach")
        assert workload["measured_one_of"] == (64 if workload["name"].startswith("select") else 1), workload
        for side in (workload["plain"], workload["turnstile"]):
            check_side(side, 2, writes)
            assert len(side["rounds"]) == 2, side
        assert workload["plain"]["busy_timeout_ms"] == (5000 if writes else 0), workload
    assert report["workloads"][5]["beside"]["processes"] == 1, report["workloads"][5]


def test_a_crowd_and_idle_connections_are_there():
    with empty_again("ts-bench-") as directory:
        done = bench(directory, "--seconds", "0.2", "--rounds", "1", "--only", "idle-1000", "--only", "crowd",
                     "--json", "-")
    crowd, idle = report_of(done)["workloads"]
    assert crowd["processes"] == 200 and idle["beside"]["processes"] == 4, (crowd, idle)
    # In a run as short as this not all of the crowd get their turn.
    for workload in (crowd, idle):
        for side in (workload["plain"], workload["turnstile"]):
            assert side["rounds"][0]["written"] == side["rounds"][0]["acknowledged"] > 0, side


def worker(directory, side, **env):
    """A worker by itself, with the files of a run that would begin and end now."""
    with open(os.path.join(directory, "window.json"), "w") as f:
        json.dump({"start": 0, "begin": 0, "end": 0}, f)
    task = {"workload": "insert-normal", "side": side, "number": 0, "beside": False, "busy_timeout_ms": 0,
            "fill_ms": 1}
    env = {**os.environ, **env}
    return run([harness.bin(), "bench-worker", directory, json.dumps(task)], env=env, check=False)


def test_a_worker_on_the_wrong_side_refuses():
    with harness.Broker() as broker:
        sql = "PRAGMA journal_mode=wal; CREATE TABLE rows(worker, seq); CREATE TABLE counter(id, value)"
        plain(broker.path("app.db"), sql)
        assert worker(broker.dir, "plain").returncode == 0
        served = worker(broker.dir, "turnstile", TURNSTILE_SOCKET=broker.socket)
        assert served.returncode == 0, served
        guest = worker(broker.dir, "turnstile", TURNSTILE_SOCKET=broker.socket, TURNSTILE_MODE="guest")
        assert guest.returncode == 1 and "not gated, but in mode 'guest'" in guest.stderr, guest
        unserved = worker(broker.dir, "turnstile", TURNSTILE_SOCKET=broker.path("nobody"), TURNSTILE_FALLBACK="plain")
        assert unserved.returncode == 1 and "in mode 'plain'" in unserved.stderr, unserved
        alone = worker(broker.dir, "turnstile", TURNSTILE_SOCKET=broker.path("nobody"))
        assert alone.returncode == 1 and "ready" not in alone.stdout, alone


def test_the_table_and_the_chart():
    with empty_again("ts-bench-") as directory, tempfile.TemporaryDirectory() as elsewhere:
        files = [os.path.join(elsewhere, name) for name in ("result.json", "result.svg")]
        done = bench(directory, "--quick", "--only", "open", "--only", "idle-0", "--seconds", "0.1",
                     "--json", files[0], "--svg", files[1])
        with open(files[0]) as f:
            report = json.load(f)
        drawing = ElementTree.parse(files[1]).getroot()
    lines = done.stdout.splitlines()
    wide = [line for line in lines if len(line) > 100 and directory not in line]
    assert not wide, wide
    rows = [line.split()[:2] for line in lines if " → " in line and not line.startswith("Each")]
    assert rows == [["open", "1"], ["open", "2"], ["idle-0", "1"]], done.stdout
    assert rows == [[w["name"], str(w["processes"])] for w in report["workloads"]], report
    assert f", on {report['environment']['filesystem']}" in done.stdout, done.stdout
    assert done.stderr == "", done.stderr  # no progress bar where there is no terminal
    space = "{http://www.w3.org/2000/svg}"
    assert drawing.tag == space + "svg" and not list(drawing.iter(space + "script")), drawing
    bars = [r for r in drawing.iter(space + "rect") if r.get("class") in ("faster", "slower")]
    assert len(bars) == 3, bars


def test_questions_that_cannot_be_answered():
    with empty_again("ts-bench-") as directory:
        listed = bench(directory, "--list").stdout
        assert all(name in listed for name in INSERTS), listed
        for arguments, reason in ((["--only", "nonsense"], "no workload is called 'nonsense'"),
                                  (["--dir", "/nonexistent"], "/nonexistent: No such file"),
                                  (["--processes", "0"], "from 1 to 1000"),
                                  (["--seconds", "nan"], "expected seconds")):
            command = [harness.bin(), "bench", *arguments]
            done = run(command, env={**os.environ, "TMPDIR": directory}, check=False)
            assert done.returncode == 2 and reason in done.stderr, done


def test_interrupted_in_the_middle_it_leaves_nothing_behind():
    # Ctrl-C reaches the whole group, also the broker; a supervisor's signal the benchmark alone.
    for sig, whole_group in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        for side in ("plain", "turnstile"):
            with empty_again("ts-bench-") as directory:
                interrupt(directory, side, sig, whole_group)


def interrupt(directory, side, sig, whole_group):
    def begun():
        assert process.poll() is None, f"it ended too early: {ending(process.returncode)}"
        return [c for c in processes_in(directory).values() if f"insert-full-4-{side}" in c and '"number":3' in c]

    arguments = ["--only", "insert-full", "--processes", "4", "--seconds", "2", "--rounds", "1"]
    env = {**os.environ, "TMPDIR": directory}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command(directory, *arguments), env=env, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, start_new_session=True)
        try:
            wait_until(begun, 60, f"the workers on the {side} side")
            (os.killpg if whole_group else os.kill)(process.pid, sig)
            process.wait(20)
            assert process.returncode == 128 + sig, ending(process.returncode)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)


def test_a_worker_that_dies_is_a_failure():
    def begun():
        assert process.poll() is None, f"it ended too early: {ending(process.returncode)}"
        return [pid for pid, c in processes_in(directory).items() if "turnstile" in c and '"side":"turnstile"' in c]

    with empty_again("ts-bench-") as directory:
        arguments = ["--only", "insert-full", "--processes", "2", "--seconds", "2", "--rounds", "1"]
        process = subprocess.Popen(command(directory, *arguments), env={**os.environ, "TMPDIR": directory}, text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            victim = wait_until(begun, 60, "turnstile's workers")[0]
            os.kill(victim, signal.SIGKILL)
            output, errors = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
        assert process.returncode == 1, (output, errors)
        assert "FAILED insert-full, n = 2, turnstile: process " in output and "SIGKILL" in output, output
