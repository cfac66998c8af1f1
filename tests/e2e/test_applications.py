"""Real applications, unchanged, plain and under `turnstile run`: nobody is refused there, and everything that was
acknowledged is in the database, once. What they are is in `tests/apps`; the long form's figures are in
`docs/applications.md`.
"""

import os
import sys

import harness

sys.path.insert(0, os.path.join(harness.ROOT, "tests", "apps"))

from applications import ALL  # noqa: E402 (its directory comes first)

WAITS = True

SECONDS = 1.0


def define(name):
    def test():
        application = ALL[name]
        if application.missing():
            raise harness.Skip(application.missing())
        plain, outcome = application.on_plain_sqlite(SECONDS), application.under_turnstile(SECONDS)
        for which, found in (("plain", plain), ("turnstile", outcome)):
            print(f"{which:10} {found.rate:8,.0f} {application.unit}/s, refused {found.refused}")
        assert outcome.done, "nothing was done"
        assert outcome.refused == 0, f"{outcome.refused} times refused, {outcome.done} {application.unit}"
    test.__name__ = f"test_{name}"
    return test


for _name in ALL:
    globals()[f"test_{_name}"] = define(_name)
