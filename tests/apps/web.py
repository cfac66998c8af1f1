"""A Django site whose view reads, then writes, in one transaction: gunicorn web:application. See README.md."""

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import models, transaction
from django.http import HttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["APP_DATABASE"],
                           "CONN_MAX_AGE": None}},
    ROOT_URLCONF=__name__,
    SECRET_KEY="no secret",
)
django.setup()


class Counter(models.Model):
    visits = models.IntegerField()

    class Meta:
        app_label = "web"
        db_table = "counter"


class Row(models.Model):
    rowid = models.AutoField(primary_key=True)
    worker = models.TextField()
    seq = models.IntegerField()

    class Meta:
        app_label = "web"
        db_table = "rows"


def visit(request, worker, seq):
    with transaction.atomic():
        counter = Counter.objects.get(pk=1)
        counter.visits += 1
        counter.save()
        Row.objects.create(worker=worker, seq=seq)
    return HttpResponse(f"{counter.visits}\n")


urlpatterns = [path("visit/<worker>/<int:seq>", visit)]
application = get_wsgi_application()
