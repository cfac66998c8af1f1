/*
** A member in C, with the system's libsqlite3: plays a deck (README.md beside this file) and writes down what it does.
**
**   worker DECK LOG ID SEQ OFFSET
*/
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct { char what; char *text; sqlite3_stmt *prepared; } Line;
typedef struct { int first, end; } Entry;

static char **arguments, *database;
static Line *lines;
static Entry *entries;
static int count, total, initial, record, taken[4096], takens;
static long long worker, seq, read_last;
static double offset;
static sqlite3 *db;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9 - offset;
}

static void note(const char *format, ...) {
    char line[600];
    va_list more;
    va_start(more, format);
    int n = vsnprintf(line, sizeof line - 1, format, more);
    va_end(more);
    if (n > (int)sizeof line - 2) n = sizeof line - 2;
    for (int i = 0; i < n; i++) if (line[i] == '\n') line[i] = ' ';
    line[n++] = '\n';
    if (write(record, line, n) != n) _exit(9);
}

/* What SQLite and turnstile have to say beside result codes. */
static void logged(void *unused, int code, const char *text) {
    (void)unused;
    note("l %.6f %d %s", now(), code, text);
}

static int told_to_end(void) {
    struct pollfd in = {0, POLLIN, 0};
    return poll(&in, 1, 0) > 0;
}

static void pause_ms(int ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

static void close_database(void) {
    for (int i = 0; i < total; i++) {
        sqlite3_finalize(lines[i].prepared);
        lines[i].prepared = NULL;
    }
    int rc = sqlite3_close(db);
    if (rc != SQLITE_OK) note("v %.6f close: %d", now(), rc);
    db = NULL;
}

/* The result code; `error` is set to the message. */
static int run(Line *line, int expect, const char **error) {
    static char message[300];
    int rc = SQLITE_OK, first = 1;
    *error = message;
    message[0] = 0;
    if (line->prepared == NULL) rc = sqlite3_prepare_v2(db, line->text, -1, &line->prepared, NULL);
    sqlite3_stmt *s = line->prepared;
    if (rc == SQLITE_OK && s) {
        const struct { const char *name; long long value; } values[] = {{":w", worker}, {":s", seq}, {":r", read_last}};
        for (int i = 0; i < 3; i++) {
            int at = sqlite3_bind_parameter_index(s, values[i].name);
            if (at) sqlite3_bind_int64(s, at, values[i].value);
        }
        while ((rc = sqlite3_step(s)) == SQLITE_ROW) {
            if (first && expect == 'R') read_last = sqlite3_column_int64(s, 0);
            if (first && expect == 'E' && (sqlite3_column_type(s, 0) != SQLITE_INTEGER || sqlite3_column_int64(s, 0)))
                note("v %.6f %lld seen %s: %s", now(), seq, sqlite3_column_text(s, 0), line->text);
            first = 0;
        }
        if (rc == SQLITE_DONE) rc = SQLITE_OK;
    }
    if (rc != SQLITE_OK) snprintf(message, sizeof message, "%s", sqlite3_errmsg(db));
    int extended = rc == SQLITE_OK ? rc : sqlite3_extended_errcode(db);
    if (s) sqlite3_reset(s);
    return extended;
}

static int open_once(const char **error) {
    static char message[300];
    *error = message;
    int rc = sqlite3_open(database, &db);
    snprintf(message, sizeof message, "%s", db ? sqlite3_errmsg(db) : "no memory");
    if (rc != SQLITE_OK) rc = db ? sqlite3_extended_errcode(db) : rc;
    const char *extension = getenv("TURNSTILE_EXTENSION");
    if (rc == SQLITE_OK && extension && *extension) {
        char *reason = NULL;
        sqlite3_db_config(db, SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 1, NULL);
        rc = sqlite3_load_extension(db, extension, NULL, &reason);
        snprintf(message, sizeof message, "load: %s", reason ? reason : "");
        sqlite3_free(reason);
        sqlite3_db_config(db, SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 0, NULL);
    }
    for (int i = 0; rc == SQLITE_OK && i < initial; i++) {
        const char *why;
        rc = run(&lines[i], 'S', &why);
        snprintf(message, sizeof message, "%s: %s", lines[i].text, why);
    }
    if (rc != SQLITE_OK) {
        for (int i = 0; i < total; i++) {
            sqlite3_finalize(lines[i].prepared);
            lines[i].prepared = NULL;
        }
        sqlite3_close(db);
        db = NULL;
    }
    return rc;
}

/* The mode that PRAGMA turnstile_status tells. */
static const char *mode(void) {
    static char found[40];
    sqlite3_stmt *s = NULL;
    strcpy(found, "none");
    if (sqlite3_prepare_v2(db, "PRAGMA turnstile_status", -1, &s, NULL) == SQLITE_OK && sqlite3_step(s) == SQLITE_ROW) {
        const char *text = (const char *)sqlite3_column_text(s, 0), *at = text ? strstr(text, "\"mode\":") : NULL;
        if (at) sscanf(at + 7, " \"%30[a-z-]\"", found);
    }
    sqlite3_finalize(s);
    return found;
}

static void release(void) {
    while (takens) close(taken[--takens]);
}

static int open_database(int entry) {
    while (!told_to_end()) {
        const char *error;
        double since = now();
        int rc = open_once(&error);
        if (rc == SQLITE_OK) {
            note("o %.6f %.6f %s", since, now(), mode());
            return 1;
        }
        note("e %.6f %.6f %lld %d -1 %d %s", since, now(), seq, entry, rc, error);
        release();
        pause_ms(100);
    }
    return 0;
}

/* The child of a fork in the middle of a transaction. */
static void child(const char *manner) {
    const char *error;
    signal(SIGALRM, SIG_DFL);
    alarm(25);
    seq = -seq;
    if (strcmp(manner, "rollback") == 0) sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    if (strcmp(manner, "commit") == 0) sqlite3_exec(db, "COMMIT", NULL, NULL, NULL);
    if (strcmp(manner, "use") == 0) sqlite3_exec(db, "SELECT count(*) FROM rows; DELETE FROM bulk; COMMIT", NULL, NULL, NULL);
    if (strcmp(manner, "close") == 0 || strcmp(manner, "own") == 0) close_database();
    if (strncmp(manner, "own", 3) == 0) {
        for (int i = 0; i < total; i++) lines[i].prepared = NULL;
        int rc = open_once(&error);
        if (rc != SQLITE_OK) {
            note("e %.6f %.6f %lld -1 -1 %d %s", now(), now(), seq, rc, error);
            _exit(0);
        }
        Line insert = {'C', "INSERT INTO rows VALUES(:w, :s, 0, 'child')", NULL};
        double since = now();
        note("b %.6f %lld -1", now(), seq);
        rc = run(&insert, 'C', &error);
        if (rc == SQLITE_OK) note("a %.6f %lld", now(), seq);
        else {
            note("e %.6f %.6f %lld -1 0 %d %s", since, now(), seq, rc, error);
            note("%c %.6f %lld %d", (rc & 255) == SQLITE_BUSY ? 'n' : 'u', now(), seq, rc);
        }
        sqlite3_finalize(insert.prepared);
        if (strcmp(manner, "own-exit") != 0) sqlite3_close(db);
    }
    _exit(0);
}

static void play(int entry) {
    seq++;
    int failed = 0, asked = 0;
    for (int i = entries[entry].first; i < entries[entry].end && !failed; i++) {
        Line *line = &lines[i];
        const char *error;
        switch (line->what) {
        case 'P': pause_ms(atoi(line->text)); break;
        case 'O':
            close_database();
            if (!open_database(entry)) return;
            break;
        case 'F': {
            while (waitpid(-1, NULL, WNOHANG) > 0) {}
            pid_t pid = fork();
            if (pid == 0) child(line->text);
            break;
        }
        case 'X': {
            char first[30], at[30];
            snprintf(first, sizeof first, "%lld", seq);
            snprintf(at, sizeof at, "%d", entry + 1);
            arguments[4] = first;
            arguments[5] = at;
            note("x %.6f", now());
            execv("/proc/self/exe", arguments);
            break;
        }
        case 'D': {
            int fd, leave = atoi(line->text);
            while (takens < 4096 && (fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0) taken[takens++] = fd;
            while (leave-- > 0 && takens) close(taken[--takens]);
            break;
        }
        case 'd': release(); break;
        default: {
            double since = now();
            if (line->what == 'C') {
                note("b %.6f %lld %d", since, seq, entry);
                asked = 1;
            }
            int rc = run(line, line->what, &error);
            if (rc != SQLITE_OK) {
                note("e %.6f %.6f %lld %d %d %d %s", since, now(), seq, entry, i - entries[entry].first, rc, error);
                int kind = rc & 255;
                if (line->what == 'C') {
                    int certain = kind == SQLITE_BUSY || kind == SQLITE_LOCKED || kind == SQLITE_FULL || kind == SQLITE_SCHEMA;
                    note("%c %.6f %lld %d", certain ? 'n' : 'u', now(), seq, rc);
                }
                failed = rc;
            } else {
                if (line->what == 'C') note("a %.6f %lld", now(), seq);
                if (now() - since > 0.5)
                    note("s %.6f %.6f %lld %d %d", since, now(), seq, entry, i - entries[entry].first);
            }
        }
        }
    }
    release();
    if (db && !sqlite3_get_autocommit(db)) {
        /* As SQLite's documentation has it: after an error the transaction may be open or not. */
        for (int i = 0; i < total; i++) if (lines[i].prepared) sqlite3_reset(lines[i].prepared);
        sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    }
    if (failed) {
        int kind = failed & 255;
        if (kind != SQLITE_BUSY && kind != SQLITE_FULL) {
            close_database();
            open_database(entry);
        }
    } else if (!asked) note("r %.6f %lld %d", now(), seq, entry);
}

static void load(const char *path) {
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t size = 0;
    ssize_t n;
    if (file == NULL) exit(3);
    while ((n = getline(&line, &size, file)) > 0) {
        if (line[n - 1] == '\n') line[n - 1] = 0;
        char *text = strdup(strlen(line) > 2 ? line + 2 : "");
        if (line[0] == 'M') database = text;
        else if (line[0] == 'T') {
            entries = realloc(entries, (count + 1) * sizeof *entries);
            entries[count].first = entries[count].end = total;
            count++;
        } else if (line[0]) {
            lines = realloc(lines, (total + 1) * sizeof *lines);
            lines[total] = (Line){line[0], text, NULL};
            total++;
            if (count) entries[count - 1].end = total;
            else initial = total;
        }
    }
    fclose(file);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    arguments = argv;
    const char *shift = getenv("CHAOS_CLOCK_OFFSET");
    offset = shift ? atof(shift) : 0;
    struct rlimit few = {128, 128};
    setrlimit(RLIMIT_NOFILE, &few);
    record = open(argv[2], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    load(argv[1]);
    worker = atoll(argv[3]);
    seq = atoll(argv[4]);
    if (record < 0 || count == 0) return 3;
    sqlite3_config(SQLITE_CONFIG_LOG, logged, NULL);
    if (open_database(-1)) {
        for (int i = atoi(argv[5]) % count; db && !told_to_end(); i = (i + 1) % count) play(i);
        if (db) close_database();
    }
    /* Children may live on; they end by themselves. */
    note("q %.6f", now());
    return 0;
}
