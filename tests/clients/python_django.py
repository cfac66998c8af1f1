"""A client in Python: Django's models, on two aliases of one database. See README.md."""

import sqlite3

import django
from django.conf import settings
from django.db import connections, models, transaction
from django.db.backends.signals import connection_created

from common import extension, path, work, worker

ALIASES = ("default", "other")
DATABASE = {"ENGINE": "django.db.backends.sqlite3", "NAME": path, "OPTIONS": {"timeout": 0}}
settings.configure(DATABASES={alias: dict(DATABASE) for alias in ALIASES})
django.setup()


class Row(models.Model):
    rowid = models.AutoField(primary_key=True)
    worker = models.TextField()
    seq = models.IntegerField()

    class Meta:
        app_label = "clients"
        db_table = "rows"
        managed = False


def load(connection, **_):
    if connection.alias == ALIASES[0]:
        connection.connection.enable_load_extension(True)
        connection.connection.load_extension(extension)


if extension:
    connection_created.connect(load)


class Alias:
    def __init__(self, alias):
        self.alias = alias
        self.rows = Row.objects.using(alias)

    def insert(self, seq):
        self.rows.create(worker=worker, seq=seq)

    def transaction(self, seq):
        with transaction.atomic(using=self.alias):
            self.insert(seq)

    def count(self):
        return self.rows.filter(worker=worker).count()

    def status(self):
        with connections[self.alias].cursor() as cursor:
            answer = cursor.execute("PRAGMA turnstile_status").fetchone()
        return answer[0] if answer else None

    def close(self):
        connections[self.alias].close()


work([Alias(alias) for alias in ALIASES], f"Django {django.__version__}", sqlite3.sqlite_version)
