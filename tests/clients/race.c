/* The WAL-reset race of SQLite before 3.51.3, made to happen: sqlite3WalCheckpoint has read the index's header, and is
 * held there, while a writer goes on.
 *
 *     race VFS DATABASE [EXTENSION]      statements from standard input, a line each
 *
 * A VFS of this program's own lies over the default one (which may be turnstile's). wal.c calls `xUnfetch(file, 0, NULL)`
 * right after it has read a header that has changed since. A line that begins with `hold ` is run as the second
 * connection, by a thread, until it is there, and answered with `held` or `done`; `go` lets it go on. Any other line is
 * run as the first connection. Each is answered with a line: `ok`, the last row's columns, or `error` and the message.
 */
#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    sqlite3_file base;
    sqlite3_file *real;
} File;

static sqlite3_vfs *lower;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static enum { RUNNING, ARMED, HELD, OVER } state;
static pthread_t checkpointer;
static char answer[4096];

#define REAL(f) (((File *)(f))->real)
#define CALL(f, method, ...) REAL(f)->pMethods->method(REAL(f), ##__VA_ARGS__)

static int x_close(sqlite3_file *f) {
    int rc = CALL(f, xClose);
    sqlite3_free(REAL(f));
    return rc;
}
static int x_read(sqlite3_file *f, void *to, int n, sqlite3_int64 at) { return CALL(f, xRead, to, n, at); }
static int x_write(sqlite3_file *f, const void *from, int n, sqlite3_int64 at) { return CALL(f, xWrite, from, n, at); }
static int x_truncate(sqlite3_file *f, sqlite3_int64 n) { return CALL(f, xTruncate, n); }
static int x_sync(sqlite3_file *f, int flags) { return CALL(f, xSync, flags); }
static int x_size(sqlite3_file *f, sqlite3_int64 *n) { return CALL(f, xFileSize, n); }
static int x_lock(sqlite3_file *f, int level) { return CALL(f, xLock, level); }
static int x_unlock(sqlite3_file *f, int level) { return CALL(f, xUnlock, level); }
static int x_reserved(sqlite3_file *f, int *out) { return CALL(f, xCheckReservedLock, out); }
static int x_control(sqlite3_file *f, int op, void *arg) { return CALL(f, xFileControl, op, arg); }
static int x_sector(sqlite3_file *f) { return CALL(f, xSectorSize); }
static int x_characteristics(sqlite3_file *f) { return CALL(f, xDeviceCharacteristics); }
static int x_shm_map(sqlite3_file *f, int i, int n, int extend, void volatile **out) {
    return CALL(f, xShmMap, i, n, extend, out);
}
static int x_shm_lock(sqlite3_file *f, int at, int n, int flags) { return CALL(f, xShmLock, at, n, flags); }
static void x_shm_barrier(sqlite3_file *f) { CALL(f, xShmBarrier); }
static int x_shm_unmap(sqlite3_file *f, int del) { return CALL(f, xShmUnmap, del); }
static int x_fetch(sqlite3_file *f, sqlite3_int64 at, int n, void **out) { return CALL(f, xFetch, at, n, out); }

static void set(int to) {
    state = to;
    pthread_cond_broadcast(&changed);
}

static int x_unfetch(sqlite3_file *f, sqlite3_int64 at, void *page) {
    pthread_mutex_lock(&lock);
    if (!page && state == ARMED && pthread_equal(checkpointer, pthread_self())) {
        set(HELD);
        while (state == HELD) pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
    return CALL(f, xUnfetch, at, page);
}

static const sqlite3_io_methods methods = {
    3, x_close, x_read, x_write, x_truncate, x_sync, x_size, x_lock, x_unlock, x_reserved, x_control, x_sector,
    x_characteristics, x_shm_map, x_shm_lock, x_shm_barrier, x_shm_unmap, x_fetch, x_unfetch,
};

static int x_open(sqlite3_vfs *vfs, const char *name, sqlite3_file *f, int flags, int *out) {
    (void)vfs;
    if (!(flags & SQLITE_OPEN_MAIN_DB)) return lower->xOpen(lower, name, f, flags, out);
    File *file = (File *)f;
    memset(file, 0, sizeof *file);
    file->real = sqlite3_malloc(lower->szOsFile);
    memset(file->real, 0, lower->szOsFile);
    int rc = lower->xOpen(lower, name, file->real, flags, out);
    if (rc == SQLITE_OK) file->base.pMethods = &methods;
    else sqlite3_free(file->real);
    return rc;
}

static void run(sqlite3 *db, const char *sql) {
    sqlite3_stmt *statement = 0;
    int rc = SQLITE_OK;
    strcpy(answer, "ok");
    while (rc == SQLITE_OK && *sql) {
        rc = sqlite3_prepare_v2(db, sql, -1, &statement, &sql);
        if (rc != SQLITE_OK || !statement) break;
        while ((rc = sqlite3_step(statement)) == SQLITE_ROW) {
            answer[0] = 0;
            for (int i = 0; i < sqlite3_column_count(statement); i++) {
                const char *text = (const char *)sqlite3_column_text(statement, i);
                size_t used = strlen(answer);
                snprintf(answer + used, sizeof answer - used, "%s%s", i ? "|" : "", text ? text : "");
            }
        }
        rc = sqlite3_finalize(statement);
    }
    for (char *c = answer; *c; c++) if (*c == '\n') *c = ' ';
    if (rc != SQLITE_OK) snprintf(answer, sizeof answer, "error %d: %s", sqlite3_extended_errcode(db), sqlite3_errmsg(db));
}

static sqlite3 *second;
static char held_sql[4096];

static void *hold(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    checkpointer = pthread_self();
    set(ARMED);
    pthread_mutex_unlock(&lock);
    run(second, held_sql);
    pthread_mutex_lock(&lock);
    set(OVER);
    pthread_mutex_unlock(&lock);
    return 0;
}

static sqlite3 *opened(const char *path) {
    sqlite3 *db;
    if (sqlite3_open_v2(path, &db, SQLITE_OPEN_READWRITE, "race") != SQLITE_OK) {
        printf("error: %s\n", sqlite3_errmsg(db));
        exit(1);
    }
    sqlite3_busy_timeout(db, 10000);
    return db;
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    setvbuf(stdout, 0, _IOLBF, 0);
    if (argc > 3) {
        sqlite3 *db;
        char *error = 0;
        sqlite3_open(":memory:", &db);
        sqlite3_enable_load_extension(db, 1);
        if (sqlite3_load_extension(db, argv[3], 0, &error) != SQLITE_OK) {
            printf("error: %s\n", error);
            return 1;
        }
        sqlite3_close(db);
    }
    lower = sqlite3_vfs_find(strcmp(argv[1], "default") ? argv[1] : 0);
    sqlite3_vfs own = *lower;
    own.pNext = 0;
    own.zName = "race";
    own.szOsFile = lower->szOsFile > (int)sizeof(File) ? lower->szOsFile : (int)sizeof(File);
    own.xOpen = x_open;
    sqlite3_vfs_register(&own, 0);
    sqlite3 *first = opened(argv[2]);
    second = opened(argv[2]);
    printf("%s\n", sqlite3_libversion());
    pthread_t thread;
    char line[4096];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "second ", 7)) {
            run(second, line + 7);
        } else if (!strncmp(line, "hold ", 5)) {
            strcpy(held_sql, line + 5);
            pthread_mutex_lock(&lock);
            state = RUNNING;
            pthread_create(&thread, 0, hold, 0);
            while (state != HELD && state != OVER) pthread_cond_wait(&changed, &lock);
            if (state == HELD) strcpy(answer, "held");
            else pthread_join(thread, 0);
            pthread_mutex_unlock(&lock);
        } else if (!strcmp(line, "go")) {
            pthread_mutex_lock(&lock);
            set(RUNNING);
            pthread_mutex_unlock(&lock);
            pthread_join(thread, 0);
        } else {
            run(first, line);
        }
        printf("%s\n", answer);
    }
    sqlite3_close(second);
    sqlite3_close(first);
    return 0;
}
