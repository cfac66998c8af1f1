/*
** The interposers of `turnstile run`: under LD_PRELOAD, a program's sqlite3_open(), sqlite3_open_v2() and
** sqlite3_open16() arrive here. Each finds the SQLite library that the caller would have reached, makes turnstile
** known to it before its first connection, and passes the call on.
**
** This code runs inside other people's programs. It starts no thread, prints nothing, keeps no descriptor, and
** leaves errno, signals and the environment as they were. What it has to say goes as one datagram to the parent
** that set TURNSTILE_RUN_REPORT, and is lost without harm when nobody listens.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "sqlite3.h"
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

struct sqlite3_api_routines;
extern int turnstile_auto_init(sqlite3 *, char **, const struct sqlite3_api_routines *);
extern void turnstile_report_files(void (*)(const char *kind, const char *text)); /* files.c */

typedef int (*open_fn)(const char *, sqlite3 **);
typedef int (*open_v2_fn)(const char *, sqlite3 **, int, const char *);
typedef int (*open16_fn)(const void *, sqlite3 **);
typedef int (*close_fn)(sqlite3 *);
typedef int (*auto_extension_fn)(void (*)(void));
typedef sqlite3_vfs *(*vfs_find_fn)(const char *);

/* ------------------------------------------------------------------ objects: what the dynamic linker loaded */

struct object {
  const char *name;   /* as the linker knows it; empty for the main program (glibc) */
  uintptr_t base;
  int is_main;
};

struct object_search {
  uintptr_t address;
  int index, found;
  struct object object;
};

static int holds_address(struct dl_phdr_info *info, size_t size, void *arg){
  struct object_search *search = arg;
  int is_main = search->index++==0; /* the main program always comes first */
  (void)size;
  for(int i=0; i<info->dlpi_phnum; i++){
    const ElfW(Phdr) *p = &info->dlpi_phdr[i];
    uintptr_t start = info->dlpi_addr + p->p_vaddr;
    if( p->p_type!=PT_LOAD || search->address<start || search->address-start>=p->p_memsz ) continue;
    search->object.name = info->dlpi_name;
    search->object.base = info->dlpi_addr;
    search->object.is_main = is_main;
    search->found = 1;
    return 1;
  }
  return 0;
}

/* The object whose code or data `address` is; 0 when none is (JIT code, for one). */
static int object_of(const void *address, struct object *out){
  struct object_search search = { .address = (uintptr_t)address };
  dl_iterate_phdr(holds_address, &search);
  if( search.found ) *out = search.object;
  return search.found;
}

/* A handle on an object that is loaded already; its dlsym() sees the object, then what the object needs. */
static void *handle_of(const struct object *object, int flags){
  turnstile_dlopen_fn open = turnstile_real_dlopen();
  if( !open ) return NULL;
  void *handle = open(object->is_main ? NULL : object->name, RTLD_LAZY | RTLD_NOLOAD | flags);
  if( !handle ) dlerror(); /* the host's next dlerror() is not about us */
  return handle;
}

static void *symbol(void *handle, const char *name){
  void *found = dlsym(handle, name);
  if( !found ) dlerror();
  return found;
}

/* --------------------------------------------------------------- reports: one datagram to `turnstile run` */

static char report_name[sizeof(((struct sockaddr_un *)0)->sun_path)]; /* "@name"; empty: nobody to tell */
static char report_exe[1024];

struct report {
  char text[8192];
  size_t length, header;
};

static void report_start(struct report *report, const char *kind){
  int n = snprintf(report->text, sizeof(report->text), "%s %ld %s", kind, (long)getpid(), report_exe);
  report->length = report->header = n<0 ? 0 : (size_t)n;
}

/* The socket lives for this one call: the host may count, close or reuse descriptors as it likes. */
static void report_send(const struct report *report){
  struct sockaddr_un to = { .sun_family = AF_UNIX };
  size_t name = strlen(report_name);
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if( fd<0 ) return;
  memcpy(to.sun_path + 1, report_name + 1, name - 1); /* the abstract namespace: sun_path[0] is 0 */
  sendto(fd, report->text, report->length, MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&to,
         (socklen_t)(offsetof(struct sockaddr_un, sun_path) + name));
  close(fd);
}

/* Adds a line; a full report is sent and goes on in a second one. */
static void report_line(struct report *report, const char *line){
  size_t length = strlen(line);
  if( report->header + 1 + length>sizeof(report->text) ) return;
  if( report->length + 1 + length>sizeof(report->text) ){
    report_send(report);
    report->length = report->header;
  }
  report->text[report->length++] = '\n';
  memcpy(report->text + report->length, line, length);
  report->length += length;
}

void turnstile_report_fact(const char *kind, const char *format, ...){
  struct report report;
  char line[2048];
  va_list args;
  if( !report_name[0] ) return;
  va_start(args, format);
  vsnprintf(line, sizeof(line), format, args);
  va_end(args);
  report_start(&report, kind);
  report_line(&report, line);
  report_send(&report);
}

static void report_text(const char *kind, const char *text){ turnstile_report_fact(kind, "%s", text); }

/* ------------------------------------------------------------ libraries: each is told of turnstile once */

enum library_state { LIBRARY_NEW, LIBRARY_ATTACHED, LIBRARY_PLAIN };

/* One SQLite library of this process, known by the address of its sqlite3_open_v2(). It stays loaded (see
** attach): a library that came to lie where another was would be taken for it. */
struct library {
  open_v2_fn open_v2;
  open_fn open;
  open16_fn open16;
  close_fn close;
  auto_extension_fn auto_extension;
  vfs_find_fn vfs_find;
  sqlite3_vfs *vfs_before, *vfs_after; /* the default VFS without and with turnstile */
  enum library_state state;
};

/* `libraries_lock` guards the table, and is held through attach(): a second thread's first open waits for the
** first's. `attaching` lets opens that an auto-extension makes meanwhile, on the same thread, pass. */
static struct library libraries[16];
static pthread_mutex_t libraries_lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int attaching;

/* A child forked while another thread was attaching has nobody who will release the lock. */
static void after_fork_in_child(void){
  libraries_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

/* One function of the object at `base`, not a namesake further down its scope. */
static void *own_symbol(void *handle, uintptr_t base, const char *name){
  struct object object;
  void *found = symbol(handle, name);
  return found && object_of(found, &object) && object.base==base ? found : NULL;
}

/* Opening one connection runs the auto-extensions, and with them the registration as default VFS, before the
** application's own open chooses its VFS. */
static int register_turnstile(struct library *lib){
  sqlite3 *db = NULL;
  int rc;
  attaching++;
  rc = lib->auto_extension((void (*)(void))turnstile_auto_init);
  if( rc==SQLITE_OK ){
    lib->vfs_before = lib->vfs_find(NULL);
    rc = lib->open_v2(":memory:", &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, NULL);
    lib->close(db);
    lib->vfs_after = lib->vfs_find(NULL);
  }
  attaching--;
  return rc;
}

static void attach(struct library *lib, const struct object *object){
  static int fork_guarded;
  void *handle = handle_of(object, RTLD_NODELETE);
  const char *missing = NULL;
  struct { const char *name; void **to; } needed[] = {
    { "sqlite3_auto_extension", (void **)&lib->auto_extension },
    { "sqlite3_close", (void **)&lib->close },
    { "sqlite3_vfs_find", (void **)&lib->vfs_find },
    { "sqlite3_load_extension", NULL }, /* absent: the build hands extensions no routine table */
  };
  int rc;
  lib->state = LIBRARY_PLAIN;
  lib->open = (open_fn)own_symbol(handle, object->base, "sqlite3_open");
  lib->open16 = (open16_fn)own_symbol(handle, object->base, "sqlite3_open16");
  for(size_t i=0; i<sizeof(needed)/sizeof(needed[0]); i++){
    void *found = own_symbol(handle, object->base, needed[i].name);
    if( !found ) missing = needed[i].name;
    if( needed[i].to ) *needed[i].to = found;
  }
  if( missing ){
    turnstile_report_fact("unreached", "%s: it has no %s()", object->name, missing);
    return;
  }
  if( !fork_guarded ) fork_guarded = pthread_atfork(NULL, NULL, after_fork_in_child)==0;
  rc = register_turnstile(lib);
  if( rc!=SQLITE_OK ){
    turnstile_report_fact("unreached", "%s: registering there failed with code %d", object->name, rc);
    return;
  }
  lib->state = LIBRARY_ATTACHED;
  turnstile_report_fact("attached", "%s", object->name);
}

/* sqlite3_reset_auto_extension() forgets us, and so does sqlite3_shutdown(), which also brings the unix VFS back
** as default. Being an auto-extension already is cheap to repeat; a default VFS that the application chose stays. */
static void attach_again(struct library *lib){
  lib->auto_extension((void (*)(void))turnstile_auto_init);
  if( lib->vfs_after!=lib->vfs_before && lib->vfs_find(NULL)==lib->vfs_before ) register_turnstile(lib);
}

/* The sqlite3_open_v2() that `caller` would have bound to without us: the program's own scope comes first, for
** libraries loaded RTLD_LOCAL too (or a caller's sqlite3_open() and sqlite3_close() would be of two libraries),
** then the caller's and what it needs. RTLD_NEXT alone misses the latter: Python, Perl and Java load theirs so. */
static open_v2_fn find_open_v2(const void *caller, struct object *library){
  static const char self;
  struct object own, from;
  void *handle, *found = symbol(RTLD_NEXT, "sqlite3_open_v2");
  if( !object_of(&self, &own) ) return NULL;
  if( found && object_of(found, library) && library->base!=own.base ) return (open_v2_fn)found;
  if( !object_of(caller, &from) || !(handle = handle_of(&from, 0)) ) return NULL;
  found = symbol(handle, "sqlite3_open_v2");
  if( found && !(object_of(found, library) && library->base!=own.base) ) found = NULL;
  dlclose(handle); /* attach() keeps the library; the caller stays as long as it runs */
  return (open_v2_fn)found;
}

/* The caller's SQLite library, with turnstile registered where that is possible; NULL: there is none. */
static struct library *library_for(const void *caller){
  struct object object = { .name = "" };
  struct library *lib = NULL;
  open_v2_fn open_v2 = find_open_v2(caller, &object);
  if( !open_v2 ){
    int known = object_of(caller, &object);
    turnstile_report_fact("unreached", "%s: it opens a database, but the SQLite library that it uses cannot be found",
                          known && object.name[0] ? object.name : report_exe);
    return NULL;
  }
  if( !attaching ) pthread_mutex_lock(&libraries_lock);
  for(size_t i=0; i<sizeof(libraries)/sizeof(libraries[0]) && !lib; i++){
    if( libraries[i].open_v2==open_v2 || !libraries[i].open_v2 ) lib = &libraries[i];
  }
  if( !lib ){
    turnstile_report_fact("unreached", "%s: too many SQLite libraries in this process", object.name);
  }else if( !lib->open_v2 ){
    lib->open_v2 = open_v2;
    attach(lib, &object);
  }else if( lib->state==LIBRARY_ATTACHED && !attaching ){
    attach_again(lib);
  }
  if( !attaching ) pthread_mutex_unlock(&libraries_lock);
  return lib;
}

/* --------------------------------------------------------------------------------------- the interposers */

static int no_library(sqlite3 **db){
  if( db ) *db = NULL;
  return SQLITE_CANTOPEN;
}

int sqlite3_open(const char *name, sqlite3 **db){
  int saved = errno;
  struct library *lib = library_for(__builtin_return_address(0));
  errno = saved;
  return lib && lib->open ? lib->open(name, db) : no_library(db);
}

int sqlite3_open_v2(const char *name, sqlite3 **db, int flags, const char *vfs){
  int saved = errno;
  struct library *lib = library_for(__builtin_return_address(0));
  errno = saved;
  return lib ? lib->open_v2(name, db, flags, vfs) : no_library(db);
}

int sqlite3_open16(const void *name, sqlite3 **db){
  int saved = errno;
  struct library *lib = library_for(__builtin_return_address(0));
  errno = saved;
  return lib && lib->open16 ? lib->open16(name, db) : no_library(db);
}

/* ------------------------------------------------------------------------------ what this process is made of */

static unsigned long long loads_reported;

struct object_list {
  struct report report;
  int index;
};

/* Lists what the parent should look at for a SQLite that is linked in, where no interposer gets. It does the
** looking: reading files costs a short program like `git status` more than all the rest. */
static int list_object(struct dl_phdr_info *info, size_t size, void *arg){
  struct object_list *list = arg;
  const char *name = info->dlpi_name;
  if( size>=offsetof(struct dl_phdr_info, dlpi_adds) + sizeof(info->dlpi_adds) ) loads_reported = info->dlpi_adds;
  char absolute[PATH_MAX];
  /* The first is the program itself, and what has no slash at all is the kernel's (linux-vdso). */
  if( !list->index++ || !name || !strchr(name, '/') ) return 0;
  if( name[0]!='/' ) name = realpath(name, absolute);
  if( name ) report_line(&list->report, name);
  return 0;
}

static void report_objects(const char *kind){
  struct object_list list;
  list.index = 0;
  report_start(&list.report, kind);
  dl_iterate_phdr(list_object, &list);
  report_send(&list.report);
}

static int count_loads(struct dl_phdr_info *info, size_t size, void *arg){
  if( size>=offsetof(struct dl_phdr_info, dlpi_adds) + sizeof(info->dlpi_adds) ){
    *(unsigned long long *)arg = info->dlpi_adds;
  }
  return 1;
}

/* The address is copied now: programs overwrite their environment. */
__attribute__((constructor))
static void hello(void){
  const char *name = secure_getenv("TURNSTILE_RUN_REPORT");
  int saved = errno;
  ssize_t n;
  if( !name || name[0]!='@' || strlen(name)>=sizeof(report_name) ) return;
  n = readlink("/proc/self/exe", report_exe, sizeof(report_exe) - 1);
  report_exe[n<0 ? 0 : n] = 0;
  strcpy(report_name, name);
  turnstile_report_files(report_text);
  report_objects("hello");
  errno = saved;
}

/* Only a process that loaded something since says more, so one that gave up its right to make sockets (seccomp)
** and loads nothing is not killed for trying. */
__attribute__((destructor))
static void goodbye(void){
  unsigned long long loads = 0;
  if( !report_name[0] ) return;
  dl_iterate_phdr(count_loads, &loads);
  if( loads!=loads_reported ) report_objects("loaded");
}
