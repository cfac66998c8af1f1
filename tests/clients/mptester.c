/* SQLite's mptester with the extension loaded before it opens its database: it can name a VFS, but not load one.
 * Its children are this program again, so they load it too. TURNSTILE_EXTENSION names the file; unset, this is
 * mptester as it is. */
#include <sqlite3.h>

static int open_after_loading(const char *path, sqlite3 **db, int flags, const char *vfs);

#define sqlite3_open_v2 open_after_loading
#include "mptest.c"
#undef sqlite3_open_v2

static int open_after_loading(const char *path, sqlite3 **db, int flags, const char *vfs) {
    static int loaded = 0;
    const char *extension = getenv("TURNSTILE_EXTENSION");
    if (extension && *extension && !loaded) {
        sqlite3 *memory;
        char *message = NULL;
        loaded = 1;
        sqlite3_open(":memory:", &memory);
        sqlite3_enable_load_extension(memory, 1);
        if (sqlite3_load_extension(memory, extension, NULL, &message) != SQLITE_OK) {
            fprintf(stderr, "cannot load %s: %s\n", extension, message);
            exit(1);
        }
        sqlite3_close(memory);
    }
    return sqlite3_open_v2(path, db, flags, vfs);
}
