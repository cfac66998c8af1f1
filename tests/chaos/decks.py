"""What members do: a deck is a list of works, drawn from the seed, which a member plays over and over (README.md).

`:w` is the member, `:s` the number of its work, `:r` what the last `R` line has read. A row in `rows` carries both
numbers, and `inc` says whether its transaction has counted `shared` and `counters` up.
"""

import collections

# Rows that one work leaves: in `main` always, in the attached database if `both`.
Work = collections.namedtuple("Work", "kind lines rows both")
Deck = collections.namedtuple("Deck", "main attached opening works")

SCHEMA = """
CREATE TABLE rows(worker INTEGER, seq INTEGER, inc INTEGER, kind TEXT);
CREATE INDEX rows_at ON rows(worker, seq);
CREATE INDEX rows_inc ON rows(inc) WHERE inc;
CREATE TABLE accounts(id INTEGER PRIMARY KEY, balance INTEGER);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<20) INSERT INTO accounts SELECT i, 1000 FROM n;
CREATE TABLE shared(n INTEGER);
INSERT INTO shared VALUES(0);
CREATE TABLE counters(worker INTEGER PRIMARY KEY, n INTEGER);
CREATE TABLE bulk(worker INTEGER, seq INTEGER, k INTEGER, of INTEGER, text TEXT);
CREATE TABLE side(n INTEGER);
"""
MONEY = 20 * 1000

COUNT = ("S UPDATE shared SET n=n+1",
         "S INSERT INTO counters VALUES(:w, 1) ON CONFLICT(worker) DO UPDATE SET n=n+1")
HONEST = (f"E SELECT sum(balance)-{MONEY} FROM accounts",
          "E SELECT (SELECT n FROM shared)-(SELECT count(*) FROM rows WHERE inc)",
          "E SELECT (SELECT n FROM shared)-(SELECT coalesce(sum(n), 0) FROM counters)")


def row(kind, inc=0, schema="main"):
    return f"INSERT INTO {schema}.rows VALUES(:w, :s, {inc}, '{kind}')"


def fill(rng, most=120):
    n, size = rng.randint(3, most), rng.choice((20, 300, 900))
    return ("S DELETE FROM bulk WHERE worker=:w",
            f"S WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{n}) INSERT INTO bulk "
            f"SELECT :w, :s, i, {n}, :w||'/'||:s||'/'||i||printf('%.{size}c', 'x') FROM n")


def pause(rng, most):
    return f"P {rng.randint(0, most)}"


# --- the kinds of work: a function from the deck's random numbers to a Work --------------------------------------

def auto(rng, _):
    return Work("auto", ["C " + row("auto")], 1, False)


def returning(rng, _):
    return Work("returning", ["C " + row("returning") + " RETURNING seq"], 1, False)


def immediate(rng, _):
    return Work("immediate", ["S BEGIN IMMEDIATE", "S " + row("immediate", 1), *COUNT, pause(rng, 1), "C COMMIT"], 1, False)


def begin(rng, _):
    return Work("begin", ["S BEGIN", *COUNT, "S " + row("begin", 1), "C COMMIT"], 1, False)


def savepoint(rng, _):
    return Work("savepoint", ["S BEGIN IMMEDIATE", "S " + row("savepoint", 1), "S SAVEPOINT a", *COUNT, "S RELEASE a",
                              "C COMMIT"], 1, False)


def back(rng, _):
    """Not for every SQLite: see docs/reliability.md, what is left out."""
    return Work("back", ["S BEGIN IMMEDIATE", "S " + row("back", 1), "S SAVEPOINT a", *fill(rng),
                         "S UPDATE accounts SET balance=0", "S ROLLBACK TO a", *COUNT, "S RELEASE a", "C COMMIT"], 1, False)


def transfer(rng, _):
    a, b = rng.sample(range(1, 21), 2)
    much = rng.randint(1, 50)
    return Work("transfer", [rng.choice(("S BEGIN", "S BEGIN IMMEDIATE", "S BEGIN EXCLUSIVE")),
                             f"S UPDATE accounts SET balance=balance-{much} WHERE id={a}", pause(rng, 3),
                             f"S UPDATE accounts SET balance=balance+{much} WHERE id={b}", "S " + row("transfer"),
                             "C COMMIT"], 1, False)


def deferred(rng, _):
    """Reads first and writes what follows from it: a stale snapshot would lose somebody's count."""
    return Work("deferred", ["S BEGIN", "R SELECT n FROM shared", pause(rng, 3), "S UPDATE shared SET n=:r+1", COUNT[1],
                             "S " + row("deferred", 1), "C COMMIT"], 1, False)


def bulk(rng, _):
    return Work("bulk", ["S BEGIN IMMEDIATE", *fill(rng, 400), "S " + row("bulk", 1), *COUNT, "C COMMIT"], 1, False)


def rollback(rng, _):
    return Work("rollback", ["S BEGIN IMMEDIATE", "S " + row("rollback", 1), *fill(rng, 400), COUNT[0],
                             "S UPDATE accounts SET balance=balance-1 WHERE id=1", "S ROLLBACK"], 0, False)


def read(rng, _):
    """A long snapshot, which must not move."""
    return Work("read", ["S BEGIN", "R SELECT count(*) FROM rows", f"P {rng.choice((1, 5, 20, 60, 250))}",
                         "E SELECT count(*)-:r FROM rows", *HONEST, "S COMMIT"], 0, False)


def check(rng, _):
    return Work("check", [rng.choice(HONEST)], 0, False)


def elsewhere(rng, _):
    """A statement that writes, but into a temporary table."""
    return Work("elsewhere", ["S CREATE TEMP TABLE IF NOT EXISTS mine(n)", "S DELETE FROM temp.mine",
                              "S INSERT INTO temp.mine SELECT seq FROM main.rows LIMIT 200", "C " + row("elsewhere")], 1, False)


def schema(rng, _):
    n = rng.randint(1, 3)
    return Work("schema", rng.choice([
        [f"S CREATE TABLE IF NOT EXISTS side{n}(a, b)", f"S DROP TABLE IF EXISTS side{n}", "C " + row("schema")],
        ["S CREATE INDEX IF NOT EXISTS rows_kind ON rows(kind)", pause(rng, 5), "C " + row("schema")],
        ["S DROP INDEX IF EXISTS rows_kind", "C " + row("schema")],
        ["S BEGIN IMMEDIATE", f"S CREATE TABLE IF NOT EXISTS side{n}(a, b)", "S DROP INDEX IF EXISTS rows_kind",
         "S CREATE INDEX rows_kind ON rows(kind)", "S " + row("schema"), "C COMMIT"],
    ]), 1, False)


def vacuum(rng, _):
    return Work("vacuum", ["S VACUUM"], 0, False)


def checkpoint(rng, _):
    how = rng.choice(("PASSIVE", "FULL", "RESTART", "TRUNCATE"))
    return Work("checkpoint", [f"S PRAGMA wal_checkpoint({how})"], 0, False)


def journal(rng, _):
    return Work("journal", [f"S PRAGMA journal_mode={rng.choice(('wal', 'delete', 'truncate', 'persist', 'wal'))}"], 0, False)


def reopen(rng, _):
    return Work("reopen", ["O", "C " + row("reopen")], 1, False)


def fork(rng, manners):
    manner = rng.choice(manners)
    return Work("fork", ["S BEGIN IMMEDIATE", "S " + row("fork", 1), *(fill(rng, 400) if rng.random() < 0.6 else ()),
                         f"F {manner}", pause(rng, 8), *COUNT, "C COMMIT"], 1, False)


def exec_(rng, _):
    return Work("exec", ["S BEGIN IMMEDIATE", "S " + row("exec", 1), *fill(rng, 200), "X"], 0, False)


def exhaust(rng, _):
    leave = f"D {rng.randint(0, 9)}"
    return Work("exhaust", rng.choice(([leave, "O", "C " + row("exhaust"), "d"], [leave, "C " + row("exhaust"), "d"],
                                       [leave, "S BEGIN IMMEDIATE", "S " + row("exhaust"), "C COMMIT", "d"])), 1, False)


def pair(rng, _):
    """Two files in one transaction."""
    sides = ["S " + row("pair"), "S " + row("pair", schema="b")]
    return Work("pair", ["S BEGIN", *(sides if rng.random() < 0.8 else sides[::-1]), "C COMMIT"], 1, True)


KINDS = {"auto": 28, "returning": 4, "immediate": 12, "begin": 8, "savepoint": 2, "back": 0, "transfer": 10, "deferred": 6, "bulk": 5,
         "rollback": 3, "read": 6, "check": 4, "elsewhere": 2, "schema": 1.5, "vacuum": 0.4, "checkpoint": 2,
         "journal": 0, "reopen": 5, "fork": 1.5, "exec_": 0.6, "exhaust": 0.7, "pair": 0}
MANNERS = ("exit", "close", "rollback", "commit", "use", "own", "own", "own-exit")


def draw(rng, main, attached=None, weights=None, manners=MANNERS, size=80, only=None, never=(), caches=(5, 10, 100, 2000)):
    """A deck of `size` works. `weights` changes those of KINDS; `only` takes no others, and each of them, but `never`."""
    weights = {**KINDS, **({"pair": 14} if attached else {}), **(weights or {})}
    if only:
        weights = {k: max(w, 1) for k, w in weights.items() if k in only and k not in never}
    # No two members are alike: each kind is stressed or left out by some.
    weights = {k: w * rng.choice((0.3, 1, 1, 2)) for k, w in weights.items()}
    names = rng.choices(list(weights), list(weights.values()), k=size)
    if not only:
        names[rng.randrange(size)] = "auto"
    works = []
    for name in names:
        work = globals()[name](rng, manners)
        works.append(work._replace(lines=[*([pause(rng, 8)] if rng.random() < 0.7 else []), *work.lines]))
    opening = [f"S PRAGMA synchronous={rng.choice(('FULL', 'NORMAL'))}", f"S PRAGMA cache_size={rng.choice(caches)}"]
    if attached:
        opening += [f"S ATTACH '{attached}' AS b", f"S PRAGMA b.synchronous={rng.choice(('FULL', 'NORMAL'))}"]
    return Deck(main, attached, opening, works)


def write(deck, path):
    with open(path, "w") as f:
        f.write(f"M {deck.main}\n")
        f.writelines(line + "\n" for line in deck.opening)
        for work in deck.works:
            f.write(f"T {work.kind}\n")
            f.writelines(line + "\n" for line in work.lines)
