"""`turnstile demo`, the first thing that a stranger runs: its turnstile side is flawless, it says what it skips,
and it leaves nothing behind, also when it is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import harness
from harness import PYTHON, SHELL, Skip, empty_again, ending, processes_in, run, wait_until

WORKLOADS = {"shells": 16, "python": 8, "linked": 8}


def environment(directory, **more):
    return {**os.environ, "TMPDIR": directory, **more}


def demo(directory, *arguments, env=None, check=True):
    return run([harness.bin(), "demo", "--seconds", "1", *arguments], env=env or environment(directory),
               timeout=100, check=check)


def check_turnstile_side(name, outcome):
    assert outcome["processes"] == WORKLOADS[name], outcome
    assert outcome["committed"] == outcome["attempts"] == outcome["rows"] > 0, outcome
    assert outcome["locked"] == outcome["failed_otherwise"] == 0, outcome
    assert outcome["problems"] == [], outcome
    assert outcome["least"] > 0, f"{name}: a process committed nothing: {outcome}"


def check_plain_side(name, outcome):
    """It may fail as it likes, but the figures must add up."""
    assert outcome["processes"] == WORKLOADS[name], outcome
    failed = outcome["locked"] + outcome["failed_otherwise"]
    assert outcome["attempts"] == outcome["committed"] + failed, outcome
    assert outcome["problems"] == [], outcome
    assert outcome["least"] <= outcome["most"] <= outcome["committed"], outcome


def test_turnstiles_side_is_flawless_and_nothing_is_left():
    # Settings that would break either side if they reached it.
    hostile = {"TURNSTILE_SOCKET": "/nonexistent/socket", "TURNSTILE_MODE": "nonsense", "TURNSTILE_WAIT": "0"}
    with empty_again("ts-demo-") as directory:
        done = demo(directory, "--json", env=environment(directory, **hostile))
        report = json.loads(done.stdout)
    assert report["good"] is True and report["broker"] is None and report["kept"] is None, report
    for workload in report["workloads"]:
        check_turnstile_side(workload["name"], workload["turnstile"])
        check_plain_side(workload["name"], workload["plain"])
    skipped = {s["name"]: s["reason"] for s in report["skipped"]}
    assert {w["name"] for w in report["workloads"]} | set(skipped) == set(WORKLOADS), report
    assert "linked" not in skipped
    for name, program in {"shells": SHELL, "python": PYTHON}.items():
        if name in skipped and os.path.exists(program):
            raise AssertionError(f"{name} was skipped although there is {program}: {skipped[name]}")
    if skipped:
        raise Skip(f"checked without {skipped}")


def test_without_a_shell_it_says_so_and_goes_on():
    with empty_again("ts-demo-") as directory:
        done = demo(directory, env=environment(directory, PATH="/nonexistent"))
    assert "skipped: 16 sqlite3 shells: there is no sqlite3 on PATH" in done.stderr, done.stderr
    assert "programs with SQLite linked in" in done.stdout, done.stdout
    wide = [line for line in done.stdout.splitlines() if len(line) > 100]
    assert not wide, wide


def test_an_extension_that_cannot_be_loaded_is_a_failure_and_not_a_result():
    with empty_again("ts-demo-") as directory, tempfile.TemporaryDirectory(prefix="ts-demo-bin-") as elsewhere:
        alone = shutil.copy(harness.bin(), elsewhere)
        missing = run([alone, "demo"], env=environment(directory), check=False)
        assert missing.returncode == 2 and "TURNSTILE_LIB" in missing.stderr, missing
        bogus = os.path.join(elsewhere, "libturnstile.so")
        with open(bogus, "w") as f:
            f.write("no library")
        done = run([alone, "demo", "--seconds", "1", "--json"], env=environment(directory), check=False, timeout=100)
    report = json.loads(done.stdout)
    loaded = [w for w in report["workloads"] if w["name"] != "linked"]
    if not loaded:
        raise Skip(f"nothing here loads the extension: {report['skipped']}")
    assert done.returncode == 1 and report["good"] is False, done
    for workload in loaded:
        outcome = workload["turnstile"]
        assert outcome["committed"] == 0 and outcome["failed_otherwise"] == outcome["processes"], outcome
        assert outcome["problems"], outcome


def test_keep_keeps_the_databases():
    with tempfile.TemporaryDirectory(prefix="ts-demo-") as directory:
        kept = json.loads(demo(directory, "--json", "--keep").stdout)["kept"]
        assert os.path.dirname(kept) == directory, kept
        assert os.path.exists(os.path.join(kept, "linked-turnstile", "app.db")), os.listdir(kept)
        assert not processes_in(directory), processes_in(directory)


def interrupt(directory, side, sig, whole_group):
    """Starts the demo and sends it the signal when the writers of a timed workload have begun on this side."""
    def begun():
        assert process.poll() is None, f"it ended too early: {ending(process.returncode)}"
        return [command for command in processes_in(directory).values()
                if f"/python-{side}/app.db 7 " in command or f"/linked-{side}/app.db 7 " in command]

    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([harness.bin(), "demo", "--seconds", "2"], env=environment(directory),
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(begun, 60, f"the writers on the {side} side")
            (os.killpg if whole_group else os.kill)(process.pid, sig)
            process.wait(20)
            assert process.returncode == 128 + sig, ending(process.returncode)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace"))


def test_interrupted_in_the_middle_it_leaves_nothing_behind():
    # Ctrl-C reaches the whole group, also the broker; a supervisor's signal the demo alone.
    for sig, whole_group in ((signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)):
        for side in ("plain", "turnstile"):
            with empty_again("ts-demo-") as directory:
                interrupt(directory, side, sig, whole_group)


def test_the_extension_is_found_as_cargo_run_leaves_it():
    """`cargo run` builds the extension into `deps`, beside the program, and nowhere else."""
    with tempfile.TemporaryDirectory() as elsewhere:
        os.mkdir(os.path.join(elsewhere, "deps"))
        program = shutil.copy(harness.bin(), elsewhere)
        shutil.copy(harness.lib(), os.path.join(elsewhere, "deps"))
        env = {k: v for k, v in os.environ.items() if not k.startswith("TURNSTILE_")}
        done = run([program, "run", "--", SHELL, ":memory:", "SELECT 1"], env=env)
        assert done.stdout == "1\n", done
