/*
** Runs N uncontended transactions on one connection, between two marks that strace shows. For tests of what a
** transaction costs. See README.md.
**
**   transactions DB EXTENSION|- KIND N     KIND: read, write; EXTENSION -: plain SQLite
*/
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static sqlite3 *db;

static void must(int rc, const char *what){
  if( rc!=SQLITE_OK && rc!=SQLITE_ROW && rc!=SQLITE_DONE ){
    fprintf(stderr, "%s: %d %s\n", what, rc, db ? sqlite3_errmsg(db) : "");
    exit(1);
  }
}

static void mark(const char *text){
  if( write(1, text, strlen(text))<0 ) exit(1);
}

int main(int argc, char **argv){
  sqlite3_stmt *stmt;
  int i, n, writes;
  if( argc!=5 ) return 2;
  n = atoi(argv[4]);
  writes = strcmp(argv[3], "write")==0;
  if( strcmp(argv[2], "-")!=0 ){
    sqlite3 *first;
    char *message = 0;
    must(sqlite3_open(":memory:", &first), "open");
    sqlite3_enable_load_extension(first, 1);
    if( sqlite3_load_extension(first, argv[2], 0, &message)!=SQLITE_OK ){
      fprintf(stderr, "%s\n", message);
      return 1;
    }
  }
  must(sqlite3_open(argv[1], &db), "open");
  must(sqlite3_exec(db, "PRAGMA synchronous=NORMAL; INSERT INTO rows VALUES('first', 0)", 0, 0, 0), "insert");
  must(sqlite3_prepare_v2(db, writes ? "INSERT INTO rows VALUES('t', 1)" : "SELECT * FROM rows LIMIT 1", -1, &stmt, 0),
       "prepare");
  for(i=0; i<3; i++){ must(sqlite3_step(stmt), "step"); must(sqlite3_reset(stmt), "reset"); }
  mark("begin\n");
  for(i=0; i<n; i++){ must(sqlite3_step(stmt), "step"); must(sqlite3_reset(stmt), "reset"); }
  mark("end\n");
  sqlite3_finalize(stmt);
  sqlite3_close(db);
  return 0;
}
