"""Where an application runs: a directory, an environment, and what is put in front of its commands."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "e2e"))

import harness  # noqa: E402 (its directory comes first)


class Record:
    """What was acknowledged, written down by several threads."""

    def __init__(self, path):
        self.path = path
        self.inner = harness.Record(path)
        self.lock = threading.Lock()
        self.counts = {}

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def add(self, worker, seq):
        with self.lock:
            self.inner.add(worker, seq)


class Setting:
    """`turnstile`: under `turnstile run`, with a broker, and with these settings of turnstile's; else plain SQLite. A
    context manager."""

    def __init__(self, turnstile, settings=()):
        self.settings = dict(settings)
        self.broker = harness.Broker() if turnstile else None
        self.wrapper = [harness.bin(), "run", "--"] if turnstile else []
        self.running = []

    def __enter__(self):
        if self.broker:
            self.broker.__enter__()
        self.dir = self.broker.dir if self.broker else tempfile.mkdtemp(prefix="ts-")
        self.database = harness.create(self.path("app.db"))
        self.record = Record(self.path("acknowledged"))
        self.env = {**(self.broker.env if self.broker else harness.plain_env()), **self.settings, "APP_DATABASE": self.database,
                    "APP_QUEUE": self.path("queue.db"), "APP_RECORD": self.record.path, "PYTHONDONTWRITEBYTECODE": "1",
                    "PYTHONPATH": HERE}
        return self

    def __exit__(self, *failure):
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait(20)
        if failure[0]:
            sys.stderr.write(self.said())
        if self.broker:
            self.broker.__exit__(*failure)
        else:
            shutil.rmtree(self.dir, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.dir, name)

    def start(self, *command, **options):
        """Starts a part of the application; what it says on standard error is kept."""
        with open(self.path("said"), "ab") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": said, **options}
            process = subprocess.Popen([*self.wrapper, *command], env=self.env, stderr=said, cwd=HERE, **options)
        self.running.append(process)
        return process

    def answer(self, process, limit):
        """The numbers that a part prints at its end."""
        text, _ = process.communicate(timeout=limit)
        assert process.returncode == 0, f"{process.args}: {harness.ending(process.returncode)}"
        return [int(word) for word in text.split()]

    def stop(self, process, sig=signal.SIGTERM):
        process.send_signal(sig)
        process.wait(30)

    def said(self):
        try:
            with open(self.path("said"), errors="replace") as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def check(self):
        """Everything that was acknowledged is there, once, and nothing else. Returns the number of rows."""
        return harness.check_rows(self.database, self.record.path)
