/*
** The few functions of SQLite that turnstile calls, taken out of the routine table that SQLite hands to an
** extension. The table's type is only known to sqlite3ext.h, and libsqlite3-sys declares it only in builds that
** cannot contain a SQLite of their own, which the turnstile program needs: so this one file speaks it.
**
** The table grew with the versions. An entry newer than the library that handed it over lies behind the table's
** end, so it is read only when the version says that it is there.
*/
#define SQLITE_CORE 1 /* keep sqlite3ext.h from redefining the API's names as macros over a global pointer */
#include "sqlite3ext.h"
#include <stddef.h>

struct turnstile_api {
  int version;
  const char *(*libversion)(void);
  sqlite3_vfs *(*vfs_find)(const char *);
  int (*vfs_register)(sqlite3_vfs *, int);
  int (*file_control)(sqlite3 *, const char *, int, void *);
  sqlite3_stmt *(*next_stmt)(sqlite3 *, sqlite3_stmt *);
  int (*stmt_busy)(sqlite3_stmt *);
  int (*stmt_readonly)(sqlite3_stmt *);
  int (*stmt_status)(sqlite3_stmt *, int, int);
  const char *(*sql)(sqlite3_stmt *);
  const char *(*db_filename)(sqlite3 *, const char *);
  int (*prepare_v2)(sqlite3 *, const char *, int, sqlite3_stmt **, const char **);
  int (*step)(sqlite3_stmt *);
  const unsigned char *(*column_text)(sqlite3_stmt *, int);
  int (*finalize)(sqlite3_stmt *);
  int (*get_autocommit)(sqlite3 *);
  int (*trace_v2)(sqlite3 *, unsigned, int (*)(unsigned, void *, void *, void *), void *);
  void (*log)(int, const char *, ...);
  char *(*mprintf)(const char *, ...);
  const char *(*uri_parameter)(const char *, const char *);
  int (*uri_boolean)(const char *, const char *, int);
  const char *(*filename_journal)(const char *);
  const char *(*filename_wal)(const char *);
  int (*txn_state)(sqlite3 *, const char *);
  int (*column_count)(sqlite3_stmt *);
  sqlite3_uint64 (*msize)(void *);
  /* These two are NULL in a library without WAL. */
  void *(*wal_hook)(sqlite3 *, int (*)(void *, sqlite3 *, const char *, int), void *);
  int (*wal_autocheckpoint)(sqlite3 *, int);
  int (*is_interrupted)(sqlite3 *); /* 3.41; else NULL */
  const char *(*db_name)(sqlite3 *, int); /* 3.39; else NULL */
};

/* Returns the library's version number; fills *out only when that is at least `least`. */
int turnstile_api_read(const sqlite3_api_routines *p, int least, struct turnstile_api *out){
  int version = p->libversion_number();
  if( version<least ) return version;
  out->version = version;
  out->libversion = p->libversion;
  out->vfs_find = p->vfs_find;
  out->vfs_register = p->vfs_register;
  out->file_control = p->file_control;
  out->next_stmt = p->next_stmt;
  out->stmt_busy = p->stmt_busy;
  out->stmt_readonly = p->stmt_readonly;
  out->stmt_status = p->stmt_status;
  out->sql = p->sql;
  out->db_filename = p->db_filename;
  out->prepare_v2 = p->prepare_v2;
  out->step = p->step;
  out->column_text = p->column_text;
  out->finalize = p->finalize;
  out->get_autocommit = p->get_autocommit;
  out->trace_v2 = p->trace_v2;
  out->log = p->log;
  out->mprintf = p->mprintf;
  out->uri_parameter = p->uri_parameter;
  out->uri_boolean = p->uri_boolean;
  out->filename_journal = p->filename_journal;
  out->filename_wal = p->filename_wal;
  out->txn_state = p->txn_state;
  out->column_count = p->column_count;
  out->db_name = version>=3039000 ? p->db_name : NULL;
  out->msize = p->msize;
  out->wal_hook = p->wal_hook;
  out->wal_autocheckpoint = p->wal_autocheckpoint;
  out->is_interrupted = version>=3041000 ? p->is_interrupted : NULL;
  return version;
}

/* A message where sqlite3_load_extension returns it, also for a library that is too old for the rest. */
void turnstile_api_say(const sqlite3_api_routines *p, char **out, const char *text){
  *out = p->mprintf("%s", text);
}
