"""The table in `docs/clients.md`: what it says of each kind of client, and what is found.

    tests/e2e/client_table.py --write [KIND...]     tries every client that is here, or these, and writes the table anew
"""

import datetime
import json
import os
import platform
import re
import sys

import harness
from clients import EXTENSION, KINDS, RUN, Clients, record_of
from harness import Broker, check_rows, create

PAGE = os.path.join(harness.ROOT, "docs", "clients.md")
BEGIN, END = "<!-- tests/e2e/client_table.py --write\n", "<!-- end -->\n"
WORKS = "works"
HEAD = "| client | tried with | its SQLite | by the extension | under `turnstile run` |\n|---|---|---|---|---|\n"


# --- what is found ---------------------------------------------------------------------------------------------

def check_result(result, rows):
    assert result["committed"] == rows, f"only {result['committed']} of {rows} rows: {result}"
    assert result["seen"] == rows, f"wrote {rows} rows, reads {result['seen']}: {result}"


def check_member(result):
    """Both connections of a client are turnstile's, in gated mode, as the extension says in both."""
    for which, text in zip(("first", "second"), result["status"]):
        assert text is not None, f"{result['worker']}: its {which} connection is not turnstile's"
        assert json.loads(text)["mode"] == "gated", f"{result['worker']}: its {which} connection says {text}"


def joins(clients, name, broker, db):
    """Whether the broker comes to know a member of `db` before the client's end."""
    while clients.processes[name].poll() is None:
        if broker.members(db):
            return True
    return False


def alone(kind, way):
    """Runs one client by itself, on a WAL database and on one with a rollback journal. Returns how the table puts
    that, and the client's result; AssertionError where something is wrong that no table could excuse."""
    rows = 200
    outcomes = set()
    with Broker() as broker:
        jobs = [(f"{kind}-{journal}", kind, way, create(broker.path(f"{journal}.db"), journal))
                for journal in ("wal", "delete")]
        with Clients(jobs, rows, broker) as clients:
            clients.go()
            unsure = KINDS[kind].linked and way == RUN
            members = {name: joins(clients, name, broker, db) for name, _, _, db in jobs} if unsure else {}
            results = clients.wait()
            for (name, _, _, db), result in zip(jobs, results):
                check_result(result, rows)
                assert result["busy"] == 0, f"{name}: BUSY without a competitor: {result}"
                assert check_rows(db, record_of(db)) == rows
                if not unsure:
                    check_member(result)
                outcomes.add(WORKS if members.get(name, True) else plain_because(clients, name, result))
    assert len(outcomes) == 1, f"{kind}: not the same in both journal modes: {outcomes}"
    return outcomes.pop(), results[0]


def plain_because(clients, name, result):
    """Of a client that `turnstile run` does not make a member: it must have been said why."""
    assert result["status"] == [None, None], result
    said = clients.said(name)
    assert "has SQLite linked in" in said, f"{name} is no member, and nobody says so: {said!r}"
    return "no: SQLite linked in"


# --- what the page says ----------------------------------------------------------------------------------------

def cells(kind, found):
    """The line's last two cells, from what was found by each way."""
    client = KINDS[kind]
    loaded = f"{found[EXTENSION]}: {client.line}" if client.line else f"no: {client.cannot}"
    return [loaded, found[RUN]]


def page():
    with open(PAGE) as f:
        return f.read()


def table_of(text):
    """The lines of the table: the cells behind the title, by title."""
    part = text[text.index(BEGIN):text.index(END)]
    lines = [[c.strip() for c in line.strip("|\n").split(" | ")] for line in part.splitlines() if line.startswith("| ")]
    return {title: rest for title, *rest in lines[1:]}


def claimed(kind, way):
    """What the page says of a client and a way, without the line of code."""
    line = table_of(page()).get(KINDS[kind].title)
    assert line, f"docs/clients.md has no line for {KINDS[kind].title}"
    cell = line[2 if way == EXTENSION else 3]
    return WORKS if cell.startswith(WORKS) else cell


def line_of(kind, older, wanted):
    client = KINDS[kind]
    reason = client.missing() if kind in wanted else "not asked for"
    if reason:
        print(f"{'kept' if client.title in older else 'left out':10}{client.title}: {reason}")
        return [client.title, *older[client.title]] if client.title in older else None
    found, result = {}, None
    for way in client.ways:
        found[way], result = alone(kind, way)
        print(f"{way:10}{client.title}: {found[way]}", flush=True)
    linked = "linked in" if client.linked else "shared"
    return [client.title, result["client"], f"{result['sqlite']}, {linked}", *cells(kind, found)]


def write(wanted):
    text = page()
    older = table_of(text)
    found = [line_of(kind, older, wanted) for kind in KINDS]
    lines = "".join("| " + " | ".join(line) + " |\n" for line in found if line)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    release = re.match(r"\d+\.\d+", platform.release()).group()
    comment = f"{BEGIN}     {today}, {os.cpu_count()}-core machine, Linux {release} -->\n\n"
    with open(PAGE, "w") as f:
        f.write(text[:text.index(BEGIN)] + comment + HEAD + lines + "\n" + text[text.index(END):])


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or not set(sys.argv[2:]) <= set(KINDS):
        sys.exit(f"{__doc__}\nKINDs: {' '.join(KINDS)}")
    write(sys.argv[2:] or list(KINDS))
