"""A client in Python: `sqlite3` of the standard library. See README.md."""

import platform
import sqlite3

from common import of_module, work

work(of_module(sqlite3), f"Python {platform.python_version()}", sqlite3.sqlite_version)
