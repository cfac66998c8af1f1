"""The known differences between a test on plain SQLite and the same one over turnstile: differences.txt."""

import dataclasses
import fnmatch
import re
import sys

MODES = ("gated", "guest", "learn")
HEAD = re.compile(r"^(\S+) ((?:[a-z]+ )*[a-z]+)(?: \((by chance)\))?: (\S.*)$")


@dataclasses.dataclass
class Known:
    file: str
    modes: list
    chance: bool
    """Patterns of names; `*`: whatever differs, also that the file does not reach its end."""
    cases: list
    reason: str
    line: int

    def covers(self, name, mode):
        return mode in self.modes and fnmatch.fnmatchcase(name, self.file)


def read(path):
    """The entries; exits with a sentence on a line that is none."""
    entries = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            text = line.rstrip()
            if not text or text.startswith("#"):
                continue
            if text.startswith("    ") and entries:
                entries[-1].reason = f"{entries[-1].reason} {text.strip()}".strip()
                continue
            m = HEAD.match(text)
            modes = m[2].split() if m else []
            if not m or not set(modes) <= set(MODES):
                sys.exit(f"{path}:{number}: not FILE MODE... [(by chance)]: CASE...: {text}")
            entries.append(Known(m[1], modes, bool(m[3]), m[4].split(), "", number))
    for entry in entries:
        if not entry.reason:
            sys.exit(f"{path}:{entry.line}: no reason is given")
    return entries


def between(plain, ours):
    """The names of what fails in `ours` and not in `plain`: cases, `stops`, and `not-run:` what is not run at all."""
    found = set(ours.failed) - set(plain.failed)
    if ours.stopped:
        if not plain.stopped:
            found.add("stops")
    else:
        found |= {f"not-run:{stem}" for stem in set(plain.stems) - set(ours.stems)}
    return found


def judge(name, mode, found, known):
    """(what is new, sentences on listed differences that do not show any more)."""
    entries = [e for e in known if e.covers(name, mode)]
    new = {x for x in found if not any(fnmatch.fnmatchcase(x, p) for e in entries for p in e.cases)}
    gone = [f"differences.txt:{e.line}: {p} does not differ any more" for e in entries if not e.chance
            for p in e.cases if not any(fnmatch.fnmatchcase(x, p) for x in found)]
    return sorted(new), gone


def reasons(name, mode, found, known):
    """The entries that account for `found`."""
    return [e for e in known if e.covers(name, mode)
            and any(fnmatch.fnmatchcase(x, p) for x in found for p in e.cases)]
