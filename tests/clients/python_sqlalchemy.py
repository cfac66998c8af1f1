"""A client in Python: SQLAlchemy, with its pool, its transactions and its AUTOCOMMIT. See README.md."""

import sqlite3

import sqlalchemy
from sqlalchemy import create_engine, event, text

from common import extension, path, work, worker


class Engine:
    def __init__(self, load):
        self.engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
        if load:
            event.listen(self.engine, "connect", lambda dbapi, _: self.load(dbapi, load))

    @staticmethod
    def load(dbapi, extension):
        dbapi.enable_load_extension(True)
        dbapi.load_extension(extension)

    def write(self, connection, seq):
        connection.execute(text("INSERT INTO rows VALUES(:worker, :seq)"), {"worker": worker, "seq": seq})

    def insert(self, seq):
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            self.write(connection, seq)

    def transaction(self, seq):
        with self.engine.begin() as connection:
            self.write(connection, seq)

    def scalar(self, sql, **values):
        with self.engine.connect() as connection:
            result = connection.execute(text(sql), values)
            return result.scalar() if result.returns_rows else None

    def count(self):
        return self.scalar("SELECT count(*) FROM rows WHERE worker = :worker", worker=worker)

    def status(self):
        return self.scalar("PRAGMA turnstile_status")

    def close(self):
        self.engine.dispose()


work([Engine(extension), Engine(None)], f"SQLAlchemy {sqlalchemy.__version__}", sqlite3.sqlite_version)
