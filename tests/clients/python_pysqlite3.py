"""A client in Python: `pysqlite3`, with a SQLite of its own linked in. See README.md."""

import importlib.metadata

from common import of_module, work
from pysqlite3 import dbapi2

work(of_module(dbapi2), f"pysqlite3 {importlib.metadata.version('pysqlite3-binary')}", dbapi2.sqlite_version)
