"""What a run of SQLite's tests has shown: judged against the known differences, and as a page of docs/."""

import os
import platform
import time

import differences
import testfixture

PAGE = """# SQLite's own tests

SQLite's Tcl tests, as they come with Debian's source of SQLite {version}, run with turnstile as the default VFS, and each is
compared, case by case, with the same test on plain SQLite. No case may fail that passes there, but for those listed below,
each with its reason; the run fails on any other, and on one that is listed and passes.

    tests/sqlite/run                   # a minute's worth, part of tests/run
    tests/sqlite/run --full            # everything below
    tests/sqlite/run --only walro      # any of SQLite's test files

(`tests/install` builds SQLite's `testfixture`; `cargo build --release` before.) The tests run as a user who is not root,
several of SQLite's cannot pass as root. `testfixture` loads the extension whenever it initializes SQLite
(`tests/sqlite/load.c`), and so do the processes that tests start. The VFSes of the tests (`testvfs`, `devsym`, `crash`) stand
over turnstile as they stand over unix otherwise; most `testvfs` have shared memory of their own, so there turnstile has only
the file's locks.

| mode | settings | why |
|---|---|---|
| `gated` | `TURNSTILE_WAIT=50ms`, `TURNSTILE_BEGIN=deferred` | the tests expect BUSY from locks that only they themselves could give back: waits end soon, and no transaction takes its turn before it writes |
| `guest` | the same with `TURNSTILE_MODE=guest` | the locks and the `-shm` file are SQLite's |
| `learn` | `TURNSTILE_WAIT=1500ms` | everything as it comes; waits longer than a transaction that only reads may keep a turn, 1 s |

Fault injection (`-oom-`, `-ioerr-`, `-shmerr-`) numbers its steps until nothing fails any more. How many there are depends on
what is beneath SQLite, so the numbers of cases differ in such files.

## Results

{when}, {machine}, {took}. {total} cases in {runs} runs.

| file | cases on plain SQLite | {modes} |
|---|---|{dashes}|
{rows}

A cell: how many cases were run, and of them how many failed that pass on plain SQLite.

SQLite's other tests with several processes or threads are parts of `tests/run`: `mptester` (`tests/e2e/test_mptest.py`) and
`threadtest3` (`tests/e2e/test_threadtest3.py`), which `tests/sqlite/threads` runs in full, beside plain SQLite.

## Known differences

{known}
"""


def judge(results, pairs, known):
    """Prints what is not as it must be; returns how many runs that were."""
    wrong = 0
    for name, mode in sorted(pairs):
        plain, ours = results[name, "plain"], results[name, mode]
        found = differences.between(plain, ours)
        new, gone = differences.judge(name, mode, found, known)
        if plain.stopped or plain.failed:
            print(f"{name} on plain SQLite: {plain.stopped or ' '.join(plain.failed)}")
        if new or gone:
            wrong += 1
            print(f"WRONG  {name} {mode}: {' '.join(new) or 'listed differences are gone'}")
            for line in excerpt(ours, new) + gone:
                print(f"    {line}")
    return wrong


def excerpt(result, cases):
    """What the test's output says about those cases."""
    lines = result.log.splitlines()
    if result.stopped and "stops" in cases:
        return [result.stopped] + lines[-12:]
    found = []
    for i, line in enumerate(lines):
        if any(line.startswith(f"{case}...") for case in cases[:5]) and not line.endswith(" Ok"):
            found += lines[i:i + 3]
    return found


def cell(results, name, mode, known):
    ours = results.get((name, mode))
    if ours is None:
        return ""
    found = differences.between(results[name, "plain"], ours)
    failed = "stops" if "stops" in found else f"{len(found)} failed" if found else ""
    notes = ", ".join(f"[{known.index(e) + 1}]" for e in differences.reasons(name, mode, found, known))
    return " ".join(x for x in (f"{ours.cases:,}", failed, notes) if x)


def page(results, pairs, known, took):
    modes = [m for m in differences.MODES if any(mode == m for _, mode in pairs)]
    names = sorted({name for name, _ in pairs})
    rows = [f"| `{name}` | {results[name, 'plain'].cases:,} | "
            + " | ".join(cell(results, name, mode, known) for mode in modes) + " |" for name in names]
    listed = []
    for number, entry in enumerate(known, 1):
        cases = " ".join(f"`{c}`" for c in entry.cases) if entry.cases != ["*"] else "all of it"
        chance = ", by chance" if entry.chance else ""
        listed.append(f"{number}. **{entry.file}** ({', '.join(entry.modes)}{chance}), {cases}: {entry.reason}")
    with open(os.path.join(testfixture.SOURCE, "VERSION")) as f:
        version = f.read().strip()
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return PAGE.format(version=version, when=time.strftime("%Y-%m-%d"), machine=f"{os.cpu_count()}-core machine, {system}",
                       took=f"{took:.0f} s", runs=len(pairs), modes=" | ".join(f"`{m}`" for m in modes),
                       dashes="---|" * (len(modes) - 1) + "---", rows="\n".join(rows), known="\n".join(listed),
                       total=f"{sum(results[p].cases for p in pairs):,}")
