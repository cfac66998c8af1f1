"""A client in Python: peewee. See README.md."""

import sqlite3

import peewee

from common import extension, path, work, worker


class Database:
    def __init__(self, load):
        db = self.db = peewee.SqliteDatabase(path, timeout=0)
        if load:
            db.load_extension(load)

        class Row(peewee.Model):
            worker = peewee.TextField()
            seq = peewee.IntegerField()

            class Meta:
                database = db
                table_name = "rows"
                primary_key = False

        self.rows = Row

    def insert(self, seq):
        self.rows.insert(worker=worker, seq=seq).execute()

    def transaction(self, seq):
        with self.db.atomic():
            self.insert(seq)

    def count(self):
        return self.rows.select().where(self.rows.worker == worker).count()

    def status(self):
        answer = self.db.execute_sql("PRAGMA turnstile_status").fetchone()
        return answer[0] if answer else None

    def close(self):
        self.db.close()


work([Database(extension), Database(None)], f"peewee {peewee.__version__}", sqlite3.sqlite_version)
