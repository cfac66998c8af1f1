/* What the parts of the preloaded library share. None of it is exported (exports.map). */
#ifndef TURNSTILE_PRELOAD_H
#define TURNSTILE_PRELOAD_H

typedef void *(*turnstile_dlopen_fn)(const char *, int);

/* The C library's dlopen(). (loading.c) */
turnstile_dlopen_fn turnstile_real_dlopen(void);

/* One datagram to `turnstile run`, if there is one: a kind (src/cli/run/reports.rs), and a line. (preload.c) */
void turnstile_report_fact(const char *kind, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
