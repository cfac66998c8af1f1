"""Django's SQLite backend with turnstile in each connection: ENGINE "turnstile_sqlite.django"."""

from django.db.backends.sqlite3 import base

import turnstile_sqlite


class DatabaseWrapper(base.DatabaseWrapper):
    def get_new_connection(self, conn_params):
        connection = super().get_new_connection(conn_params)
        turnstile_sqlite.load(connection)
        return connection
