/* Loads the extension into testfixture whenever its SQLite is initialized (SQLITE_EXTRA_INIT): the tests shut SQLite
 * down and start it again, and start further processes of the same program. TURNSTILE_EXTENSION names the file;
 * unset, testfixture is what it is. */
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int load_turnstile(const char *unused) {
    const char *extension = getenv("TURNSTILE_EXTENSION");
    static int loaded = 0;
    sqlite3 *memory = NULL;
    char *message = NULL;
    (void)unused;
    if (!extension || !*extension) return SQLITE_OK;
    int done = sqlite3_open(":memory:", &memory) == SQLITE_OK &&
               sqlite3_enable_load_extension(memory, 1) == SQLITE_OK &&
               sqlite3_load_extension(memory, extension, NULL, &message) == SQLITE_OK;
    /* Later failures are the tests' own: they make allocations fail. The extension stays loaded. */
    if (!done && !loaded) {
        fprintf(stderr, "cannot load %s: %s\n", extension, message ? message : sqlite3_errmsg(memory));
        _exit(99);
    }
    loaded = 1;
    sqlite3_free(message);
    sqlite3_close(memory);
    return SQLITE_OK;
}
