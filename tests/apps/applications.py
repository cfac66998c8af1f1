"""The applications of docs/applications.md: how each is run, for some seconds, and what came of it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse

from setting import Setting, harness
from load import flood, get

VENV = os.path.join(harness.CACHE, "venv", "bin")
PYTHON = os.path.join(VENV, "python")


@dataclasses.dataclass
class Outcome:
    done: int         # what the application is there for: visits, tasks, rows, jobs
    refused: int      # times that SQLite said "database is locked"
    seconds: float

    @property
    def rate(self):
        return self.done / self.seconds


def tables(setting, sql):
    harness.plain(setting.database, sql)


def count(setting, sql):
    return int(harness.plain(setting.database, sql, retry=10)[0][0])


def django(setting, seconds):
    """Sixteen visitors of a Django site under gunicorn with eight workers. A visit reads a counter, counts it up and
    writes a row, in one transaction."""
    tables(setting, "CREATE TABLE counter(id INTEGER PRIMARY KEY, visits INTEGER); INSERT INTO counter VALUES(1, 0)")
    socket = setting.path("site")
    server = setting.start(os.path.join(VENV, "gunicorn"), "--workers", "8", "--bind", f"unix:{socket}", "web:application")
    harness.wait_until(lambda: os.path.exists(socket) and get(socket, "/")[0] == 404, 60, "the site")

    def visit(thread, number):
        status, _ = get(socket, f"/visit/{thread}/{number}")
        assert status in (200, 500), status
        if status == 200:
            setting.record.add(thread, number)
        else:
            setting.record.count("refused")

    took = flood(16, seconds, visit)
    setting.stop(server)
    visits = setting.check()
    counted = count(setting, "SELECT visits FROM counter")
    assert counted == visits, f"{visits} visits, and the counter says {counted}"
    return Outcome(visits, setting.record.counts.get("refused", 0), took)


def huey(setting, seconds):
    """Four programs put tasks into huey's queue, eight processes of its consumer do them: a row each in another
    database."""
    each = max(10, int(50 * seconds))
    command = [PYTHON, "-m", "huey.bin.huey_consumer", "jobs.huey", "-k", "process", "-w", "8", "-n", "-q", "-d", "0.01",
               "-m", "0.1"]
    consumer = setting.start(*command)
    began = time.monotonic()
    programs = [setting.start(PYTHON, "jobs.py", f"huey-{i}", str(each), stdout=subprocess.PIPE, text=True) for i in range(4)]
    refused = sum(setting.answer(program, 60 + 10 * seconds)[0] for program in programs)
    done, progress = 0, time.monotonic()
    # Refused tasks are lost to huey, so there may be fewer than were asked for.
    while done < 4 * each and time.monotonic() < progress + 10:
        time.sleep(0.01)
        now = len(harness.acknowledged(setting.record.path))
        if now > done:
            done, progress = now, time.monotonic()
    setting.stop(consumer, signal.SIGINT)
    rows = setting.check()
    refused += setting.said().count("OperationalError: database is locked")
    assert rows == 4 * each or refused, f"{rows} of {4 * each} tasks done, and nobody was refused"
    return Outcome(rows, refused, progress - began)


def datasette(setting, seconds):
    """Four programs write while eight readers look at the table through Datasette."""
    socket = setting.path("datasette")
    server = setting.start(os.path.join(VENV, "datasette"), "serve", setting.database, "--uds", socket)
    url = "/app.json?_shape=array&" + urllib.parse.urlencode({"sql": "select count(*) as n from rows"})
    harness.wait_until(lambda: os.path.exists(socket) and get(socket, url)[0] == 200, 60, "Datasette")
    seen = [0] * 8
    writers = [setting.start(PYTHON, "writer.py", setting.database, f"writer-{i}", str(seconds), setting.record.path,
                             stdout=subprocess.PIPE, text=True) for i in range(4)]

    def read(thread, _):
        status, body = get(socket, url)
        if status != 200:
            assert b"locked" in body, (status, body)
            setting.record.count("refused")
            return
        setting.record.count("read")
        now = json.loads(body)[0]["n"]
        assert now >= seen[thread], f"{now} rows, after {seen[thread]}"
        seen[thread] = now

    took = flood(8, seconds, read)
    written, refused = map(sum, zip(*(setting.answer(writer, 60 + seconds) for writer in writers)))
    status, body = get(socket, url)
    assert status == 200 and json.loads(body)[0]["n"] == written, (status, body, written)
    setting.stop(server)
    assert setting.check() == written
    assert setting.record.counts.get("read"), "nobody has read anything"
    return Outcome(written, refused + setting.record.counts.get("refused", 0), took)


def ruby(setting, seconds):
    """Eight forked workers in Ruby take jobs from a table: a transaction reads the next one, marks it and writes the
    result."""
    tables(setting, "CREATE TABLE jobs(seq INTEGER PRIMARY KEY, worker TEXT); CREATE INDEX free ON jobs(seq) WHERE worker "
                    "IS NULL; WITH RECURSIVE n(i) AS (VALUES(0) UNION ALL SELECT i + 1 FROM n WHERE i < 499999) INSERT "
                    "INTO jobs SELECT i, NULL FROM n")
    program = setting.start("ruby", "pool.rb", setting.database, setting.record.path, "8", str(seconds),
                            stdout=subprocess.PIPE, text=True)
    began = time.monotonic()
    done, refused = setting.answer(program, 60 + seconds)
    took = time.monotonic() - began
    assert setting.check() == done
    assert count(setting, "SELECT count(*) FROM jobs WHERE worker IS NOT NULL") == done
    return Outcome(done, refused, took)


@dataclasses.dataclass(frozen=True)
class Application:
    title: str
    run: object
    unit: str
    needs: str  # a program
    settings: tuple = ()

    def on_plain_sqlite(self, seconds):
        with Setting(turnstile=False) as setting:
            return self.run(setting, seconds)

    def under_turnstile(self, seconds):
        with Setting(turnstile=True, settings=self.settings) as setting:
            return self.run(setting, seconds)

    def missing(self):
        """Why it cannot be run here, or None."""
        return None if shutil.which(self.needs) else f"{os.path.basename(self.needs)} is missing: run tests/install"


# Their transactions read before they write: from the first one on, each takes its turn when it begins.
READ_FIRST = (("TURNSTILE_BEGIN", "immediate"),)

ALL = {
    "django": Application("Django under gunicorn, 8 workers", django, "visits", os.path.join(VENV, "gunicorn"),
                          READ_FIRST),
    "huey": Application("huey, 8 processes", huey, "tasks", os.path.join(VENV, "huey_consumer")),
    "datasette": Application("Datasette beside 4 writers", datasette, "rows", os.path.join(VENV, "datasette")),
    "ruby": Application("Ruby, 8 forked workers", ruby, "jobs", "ruby", READ_FIRST),
}
