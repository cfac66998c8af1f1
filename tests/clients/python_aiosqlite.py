"""A client in Python: aiosqlite, which gives each connection a thread of its own. See README.md."""

import asyncio
import importlib.metadata
import sqlite3

import aiosqlite

from common import Connection, extension, path, work

loop = asyncio.new_event_loop()


async def connect(load):
    db = await aiosqlite.connect(path, timeout=0, isolation_level=None)
    if load:
        await db.enable_load_extension(True)
        await db.load_extension(load)
    return db


def connection(load):
    db = loop.run_until_complete(connect(load))
    return Connection(lambda sql, values: list(loop.run_until_complete(db.execute_fetchall(sql, values))),
                      lambda: loop.run_until_complete(db.close()))


work([connection(extension), connection(None)], f"aiosqlite {importlib.metadata.version('aiosqlite')}",
     sqlite3.sqlite_version)
