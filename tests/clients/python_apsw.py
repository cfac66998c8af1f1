"""A client in Python: APSW, with a SQLite of its own linked in. See README.md."""

import apsw

from common import Connection, extension, path, timeout, work


def connect(load):
    db = apsw.Connection(path)
    db.set_busy_timeout(timeout)
    if load:
        db.enable_load_extension(True)
        db.load_extension(load)
    return Connection(lambda sql, values: db.execute(sql, values).fetchall(), db.close)


work([connect(extension), connect(None)], f"APSW {apsw.apsw_version()}", apsw.sqlite_lib_version())
