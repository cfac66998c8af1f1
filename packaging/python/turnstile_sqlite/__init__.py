"""turnstile for Python programs: many processes write one SQLite database.

    import sqlite3, turnstile_sqlite
    db = turnstile_sqlite.connect("app.db")            # as sqlite3.connect
    turnstile_sqlite.load(db)                          # or: a connection that is open already

    engine = sqlalchemy.create_engine("sqlite:///app.db")
    turnstile_sqlite.enable(engine)                    # every connection of the engine, sync or async

    DATABASES = {"default": {"ENGINE": "turnstile_sqlite.django", "NAME": "app.db"}}     # Django

The extension itself, `libturnstile.so`, is installed with turnstile. A Python without `enable_load_extension` cannot
load it: use `turnstile run -- python3 app.py`, which needs no package and no change.
"""

import os
import shutil
import sqlite3

__all__ = ["connect", "enable", "library", "load", "status"]


def library():
    """What the extension is loaded by: $TURNSTILE_LIB; else the file in `lib` beside the `bin` of the installed
    program; else its name, for the dynamic linker to find."""
    named = os.environ.get("TURNSTILE_LIB")
    if named:
        return named
    program = shutil.which("turnstile")
    if program:
        directory = os.path.dirname(os.path.realpath(program))
        for candidate in (os.path.join(directory, "..", "lib"), directory):
            path = os.path.normpath(os.path.join(candidate, "libturnstile.so"))
            if os.path.exists(path):
                return path
    return "libturnstile"


def load(connection):
    """Loads the extension into an open `sqlite3.Connection`, which is adopted, as later ones of this process are."""
    if not hasattr(connection, "enable_load_extension"):
        raise RuntimeError("this Python's sqlite3 cannot load extensions: start the program by `turnstile run`")
    connection.enable_load_extension(True)
    try:
        connection.load_extension(library())
    finally:
        connection.enable_load_extension(False)
    return connection


def connect(database, *args, **options):
    """`sqlite3.connect` with turnstile in it."""
    connection = sqlite3.connect(database, *args, **options)
    try:
        return load(connection)
    except BaseException:
        connection.close()
        raise


def enable(engine):
    """Loads it into every connection that a SQLAlchemy engine makes from now on, before anything else is done with it."""
    from sqlalchemy import event

    async def load_async(connection):
        await connection.enable_load_extension(True)
        await connection.load_extension(library())
        await connection.enable_load_extension(False)

    def connected(connection, _record):
        # An async driver's connection lives in a thread of its own.
        connection.run_async(load_async) if hasattr(connection, "run_async") else load(connection)

    event.listen(getattr(engine, "sync_engine", engine), "connect", connected, insert=True)
    return engine


def status(connection):
    """What turnstile says of a connection, as a dict; None: it is plain SQLite's."""
    import json

    row = connection.execute("PRAGMA turnstile_status").fetchone()
    return json.loads(row[0]) if row else None
