/* SQLite's threadtest3, whose tests may be told to end sooner: THREADTEST3_SPEED=10, after a tenth of their time.
 * tests/install puts threadtest3_speed() where the end of a test is set. */
#include <sqlite3.h>
#include <stdlib.h>

static double threadtest3_speed(void) {
    const char *speed = getenv("THREADTEST3_SPEED");
    double times = speed ? atof(speed) : 1.0;
    return times > 0 ? times : 1.0;
}

/* For the option -multiplexor, which is about SQLite's VFS of that name. */
int sqlite3_multiplex_initialize(const char *vfs, int is_default) {
    (void)vfs;
    (void)is_default;
    return SQLITE_ERROR;
}

#include "threadtest3-timed.c"
