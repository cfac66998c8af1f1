/* A child forked in the middle of its parent's transaction: it uses and closes the connection, opens one of its own and
** reads. Then the parent commits. Prints what the child got from the inherited connection's write, and from its own.
** `forked DATABASE`. */
#include <sqlite3.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

static int execute(sqlite3 *db, const char *sql) { return sqlite3_exec(db, sql, NULL, NULL, NULL); }

int main(int argc, char **argv) {
    sqlite3 *db, *own;
    int status;
    if (argc != 2 || sqlite3_open(argv[1], &db)) return 2;
    sqlite3_busy_timeout(db, 20000);
    if (execute(db, "BEGIN IMMEDIATE") || execute(db, "INSERT INTO rows VALUES('parent', 1)")) return 3;
    pid_t child = fork();
    if (child == 0) {
        sqlite3_busy_timeout(db, 0);
        int inherited = execute(db, "INSERT INTO rows VALUES('child', 1)") || execute(db, "COMMIT");
        sqlite3_close(db);
        int read = sqlite3_open(argv[1], &own) || execute(own, "SELECT count(*) FROM rows");
        printf("%s %s\n", inherited ? "refused" : "written", read ? "unread" : "read");
        fflush(stdout);
        sqlite3_close(own);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status) return 4;
    return execute(db, "INSERT INTO rows VALUES('parent', 2)") || execute(db, "COMMIT") || sqlite3_close(db) ? 5 : 0;
}
