/* A client in C, linked with the system's libsqlite3. See README.md. */
#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void fail(sqlite3 *db, const char *what) {
    fprintf(stderr, "%s: %s\n", what, db ? sqlite3_errmsg(db) : "failed");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static sqlite3 *open_database(const char *path) {
    sqlite3 *db = NULL;
    if (sqlite3_open(path, &db) != SQLITE_OK) fail(db, "open");
    const char *timeout = getenv("WORKER_TIMEOUT"); /* ms */
    if (timeout) sqlite3_busy_timeout(db, atoi(timeout));
    return db;
}

static sqlite3_stmt *prepare(sqlite3 *db, const char *sql, const char *worker) {
    sqlite3_stmt *statement;
    if (sqlite3_prepare_v2(db, sql, -1, &statement, NULL) != SQLITE_OK) fail(db, sql);
    if (worker) sqlite3_bind_text(statement, 1, worker, -1, SQLITE_STATIC);
    return statement;
}

/* One statement without parameters; its result code. */
static int execute(sqlite3 *db, const char *sql) { return sqlite3_exec(db, sql, NULL, NULL, NULL); }

/* Inserts a row, every other pair of them in a transaction of its own; BUSY leaves none open. */
static int insert_row(sqlite3_stmt *insert, int seq) {
    sqlite3 *db = sqlite3_db_handle(insert);
    int transaction = seq % 4 > 1, rc = transaction ? execute(db, "BEGIN") : SQLITE_OK;
    if (rc != SQLITE_OK) return rc;
    sqlite3_bind_int(insert, 2, seq);
    sqlite3_step(insert);
    rc = sqlite3_reset(insert);
    if (transaction && rc == SQLITE_OK) rc = execute(db, "COMMIT");
    if (!sqlite3_get_autocommit(db)) execute(db, "ROLLBACK");
    return rc;
}

/* The first column of the first row as a JSON string, or null. */
static char *status(sqlite3 *db) {
    sqlite3_stmt *s = prepare(db, "PRAGMA turnstile_status", NULL);
    char *text = NULL;
    if (sqlite3_step(s) == SQLITE_ROW) {
        sqlite3_stmt *quote = prepare(db, "SELECT json_quote(?1)", (const char *)sqlite3_column_text(s, 0));
        if (sqlite3_step(quote) == SQLITE_ROW) text = strdup((const char *)sqlite3_column_text(quote, 0));
        sqlite3_finalize(quote);
    }
    sqlite3_finalize(s);
    return text ? text : strdup("null");
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    const char *path = argv[1], *worker = argv[2], *extension = getenv("TURNSTILE_EXTENSION");
    const char *limit = getenv("WORKER_SECONDS");
    int rows = atoi(argv[3]);
    double end = now() + (limit ? atof(limit) : 60);

    sqlite3 *both[2];
    both[0] = open_database(path);
    if (extension && *extension) {
        char *message = NULL;
        sqlite3_db_config(both[0], SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 1, NULL);
        if (sqlite3_load_extension(both[0], extension, NULL, &message) != SQLITE_OK) {
            fprintf(stderr, "load_extension: %s\n", message);
            return 1;
        }
    }
    both[1] = open_database(path);
    char *states[2] = {status(both[0]), status(both[1])};

    puts("ready");
    fflush(stdout);
    (void)getchar();

    sqlite3_stmt *insert[2];
    for (int i = 0; i < 2; i++) insert[i] = prepare(both[i], "INSERT INTO rows VALUES(?, ?)", worker);
    int log = open(argv[4], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    int attempts = 0, committed = 0, busy = 0;
    while (committed < rows && now() < end) {
        attempts++;
        int rc = insert_row(insert[committed % 2], committed);
        if ((rc & 0xff) == SQLITE_BUSY) {
            busy++;
            continue;
        }
        if (rc != SQLITE_OK) fail(both[committed % 2], "insert");
        dprintf(log, "%s %d\n", worker, committed);
        committed++;
    }

    sqlite3_stmt *count = prepare(both[0], "SELECT count(*) FROM rows WHERE worker = ?", worker);
    int rc;
    while ((rc = sqlite3_step(count)) != SQLITE_ROW) {
        if ((rc & 0xff) != SQLITE_BUSY || now() > end) fail(both[0], "count");
        busy++;
        sqlite3_reset(count);
    }
    int seen = sqlite3_column_int(count, 0);
    sqlite3_finalize(count);
    for (int i = 1; i >= 0; i--) {
        sqlite3_finalize(insert[i]);
        if (sqlite3_close(both[i]) != SQLITE_OK) fail(both[i], "close");
    }
    printf("{\"worker\": \"%s\", \"attempts\": %d, \"committed\": %d, \"busy\": %d, \"seen\": %d, "
           "\"client\": \"libsqlite3 %s\", \"sqlite\": \"%s\", \"status\": [%s, %s]}\n",
           worker, attempts, committed, busy, seen, sqlite3_libversion(), sqlite3_libversion(), states[0], states[1]);
    return 0;
}
