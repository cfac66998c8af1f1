/* Threads with stacks of 32 KiB, a quarter of what musl gives them, each with a connection of its own: opens it, writes so many rows, by
** autocommit and in transactions, and closes it. `threads DATABASE THREADS ROWS`. */
#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>

static const char *path;
static int rows;

static void *work(void *number) {
    sqlite3 *db = NULL;
    char sql[100];
    int failed = sqlite3_open(path, &db);
    sqlite3_busy_timeout(db, 20000);
    for (int i = 0; i < rows && !failed; i++) {
        if (i % 2) failed = sqlite3_exec(db, "BEGIN IMMEDIATE", 0, 0, 0);
        snprintf(sql, sizeof sql, "INSERT INTO rows VALUES('t%d', %d)", (int)(long)number, i);
        if (!failed) failed = sqlite3_exec(db, sql, 0, 0, 0);
        if (i % 2 && !failed) failed = sqlite3_exec(db, "COMMIT", 0, 0, 0);
    }
    if (failed) fprintf(stderr, "thread %d: %s\n", (int)(long)number, sqlite3_errmsg(db));
    sqlite3_close(db);
    return failed ? (void *)1 : NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[16];
    pthread_attr_t small;
    int count = argc == 4 ? atoi(argv[2]) : 0, failed = 0;
    if (count < 1 || count > 16) return 2;
    if (pthread_attr_init(&small) || pthread_attr_setstacksize(&small, 32 << 10)) return 3;
    path = argv[1];
    rows = atoi(argv[3]);
    for (long i = 0; i < count; i++) {
        if (pthread_create(&threads[i], &small, work, (void *)i)) return 3;
    }
    for (int i = 0; i < count; i++) {
        void *result;
        pthread_join(threads[i], &result);
        failed |= result != NULL;
    }
    return failed;
}
