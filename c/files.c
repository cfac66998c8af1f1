/*
** The libc lane: under LD_PRELOAD, what a hidden SQLite's unix VFS asks of the C library arrives here. All other files
** cost a look at one byte: `kinds[fd]` (src/posix/table.rs) is 0 for them, and they go on to the C library.
**
** A database is known by SQLite's first lock: a read lock on the one byte at 0x40000000. Its `-shm`, `-wal` and `-journal`
** are known by their names, beside a database that is known.
**
** May be called before any constructor, from signal handlers, and in a child of vfork(2): for files that are not marked
** nothing is done but the call.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* Before 1.2.4 musl's headers define the 64-bit names away. Its programs call them all the same: Rust's do. */
#undef open64
#undef fcntl64
#undef pread64
#undef pwrite64
#undef ftruncate64
#undef posix_fallocate64
#undef mmap64

enum kind { PLAIN = 1, DATABASE = 2, SHM = 3, WAL = 4, JOURNAL = 5 };
#define FILES (1 << 20)
#define PENDING_BYTE 0x40000000
#define HERE ((uintptr_t)__builtin_return_address(0))

/* src/posix/abi.rs. */
extern const struct turnstile_files {
  unsigned char *kinds;
  unsigned *known; /* how many are marked */
  void (*report)(void (*)(const char *kind, const char *text));
  int (*lock)(int fd, int command, struct flock *lock, uintptr_t caller, int *result);
  int (*open_companion)(const char *name, uintptr_t caller);
  void (*opened)(int fd, const char *name, uintptr_t caller);
  void *(*close)(int fd);
  void (*closed)(void *known);
  int (*io)(int fd, int64_t end, int writes);
  int (*believed)(int fd);
  int (*map)(int fd, uint64_t end);
  void (*mapped)(uintptr_t address, size_t length);
  void (*unmapped)(uintptr_t address);
  int (*unlink)(const char *name, uintptr_t caller);
  int (*sleep)(uint64_t micros, uintptr_t caller);
} turnstile_files;

void turnstile_report_files(void (*by)(const char *kind, const char *text)){
  turnstile_files.report(by);
}

/* The C library's own function. Not found (another C library, without the 64-bit names): `or`'s. */
static void *next(void **known, const char *name, const char *or){
  void *found = __atomic_load_n(known, __ATOMIC_RELAXED);
  if( !found ){
    found = dlsym(RTLD_NEXT, name);
    if( !found && or ) found = dlsym(RTLD_NEXT, or);
    __atomic_store_n(known, found, __ATOMIC_RELAXED);
  }
  return found;
}
#define REAL(type, name, or) static void *known_; __typeof__(type) real_ = (__typeof__(type))next(&known_, name, or)

static int kind_of(int fd){
  return fd>=0 && fd<FILES ? __atomic_load_n(&turnstile_files.kinds[fd], __ATOMIC_RELAXED) : 0;
}

static int ends_with(const char *name, const char *suffix){
  size_t length = name ? strlen(name) : 0;
  size_t end = strlen(suffix);
  return length>end && memcmp(name + length - end, suffix, end)==0;
}

/* ------------------------------------------------------------------------------------------ open and close */

typedef int (*open_fn)(const char *, int, ...);

/* The number was another file's, which was closed where it was not seen. */
static void forget(int fd){
  int saved = errno;
  turnstile_files.closed(turnstile_files.close(fd));
  errno = saved;
}

static int opened(int fd, const char *name, uintptr_t caller){
  if( kind_of(fd) ) forget(fd);
  if( fd>=0 && name && __atomic_load_n(turnstile_files.known, __ATOMIC_RELAXED) ){
    turnstile_files.opened(fd, name, caller);
  }
  return fd;
}

/* WALs and journals are the kernel's, but turnstile may have to make them, or refuse them. */
static int opens_companion(const char *name, uintptr_t caller, int *fd){
  return (ends_with(name, "-shm") || ends_with(name, "-wal") || ends_with(name, "-journal"))
      && (*fd = turnstile_files.open_companion(name, caller))!=-2;
}

#define OPEN(function, or)                                                       \
  int function(const char *name, int flags, ...){                                \
    REAL(open_fn, #function, or);                                                \
    mode_t mode = 0;                                                             \
    int fd;                                                                      \
    if( (flags & O_CREAT) || (flags & O_TMPFILE)==O_TMPFILE ){                   \
      va_list args;                                                              \
      va_start(args, flags);                                                     \
      mode = va_arg(args, mode_t);                                               \
      va_end(args);                                                              \
    }                                                                            \
    if( opens_companion(name, HERE, &fd) ) return fd;                                  \
    return opened(real_(name, flags, mode), name, HERE);                         \
  }
OPEN(open, NULL)
OPEN(open64, "open")

static int closed(void *known, int rc){
  int saved = errno;
  turnstile_files.closed(known);
  errno = saved;
  return rc;
}

/* A mark that is left in a child of vfork(2) is the parent's, and stays. */
int close(int fd){
  REAL(int (*)(int), "close", NULL);
  void *known;
  if( !kind_of(fd) ) return real_(fd);
  known = turnstile_files.close(fd);
  return closed(known, real_(fd));
}

int dup2(int from, int to){
  REAL(int (*)(int, int), "dup2", NULL);
  void *known;
  if( from==to || !kind_of(to) ) return real_(from, to);
  known = turnstile_files.close(to);
  return closed(known, real_(from, to));
}

int dup3(int from, int to, int flags){
  REAL(int (*)(int, int, int), "dup3", NULL);
  void *known;
  if( from==to || !kind_of(to) ) return real_(from, to, flags);
  known = turnstile_files.close(to);
  return closed(known, real_(from, to, flags));
}

static void forget_from(unsigned first, unsigned last){
  if( last>=FILES ) last = FILES - 1;
  for(unsigned fd=first; fd<=last && fd>=first; fd++){
    if( kind_of((int)fd) ) forget((int)fd);
  }
}

#define TURNSTILE_CLOSE_RANGE_CLOEXEC (1U << 2)
int close_range(unsigned first, unsigned last, int flags){
  if( !((unsigned)flags & TURNSTILE_CLOSE_RANGE_CLOEXEC) ) forget_from(first, last);
  return (int)syscall(SYS_close_range, first, last, flags);
}

void closefrom(int first){
  REAL(void (*)(int), "closefrom", NULL);
  forget_from(first<0 ? 0 : (unsigned)first, FILES - 1);
  if( real_ ) real_(first);
  else syscall(SYS_close_range, first<0 ? 0 : first, ~0U, 0); /* musl has none: who calls it has looked for one by name */
}

/* ---------------------------------------------------------------------------------------------------- locks */

typedef int (*fcntl_fn)(int, int, ...);

static int is_first_lock(int command, const struct flock *lock){
  return command!=F_GETLK && lock->l_type==F_RDLCK && lock->l_start==PENDING_BYTE && lock->l_len==1;
}

static int lock_call(fcntl_fn real, int fd, int command, void *argument, uintptr_t caller){
  int result;
  if( (command==F_SETLK || command==F_SETLKW || command==F_GETLK) && argument && kind_of(fd)!=PLAIN
   && (kind_of(fd) || is_first_lock(command, argument))
   && turnstile_files.lock(fd, command, argument, caller, &result) ){
    return result;
  }
  return real(fd, command, argument);
}

#define FCNTL(function, or)                                                      \
  int function(int fd, int command, ...){                                        \
    REAL(fcntl_fn, #function, or);                                               \
    void *argument;                                                              \
    va_list args;                                                                \
    va_start(args, command);                                                     \
    argument = va_arg(args, void *);                                             \
    va_end(args);                                                                \
    return lock_call(real_, fd, command, argument, HERE);                        \
  }
FCNTL(fcntl, NULL)
FCNTL(fcntl64, "fcntl")

/* -------------------------------------------------------------------------------------- reading and writing */

static int may(int fd, int64_t end, int writes){
  int kind = kind_of(fd);
  int error = kind==DATABASE || kind==WAL || (kind==JOURNAL && writes) ? turnstile_files.io(fd, end, writes) : 0;
  if( error ) errno = error;
  return !error;
}

/* Read first, looked after: whether it was a member's file is known afterwards only. */
static ssize_t believed(int fd, ssize_t got){
  int kind = kind_of(fd);
  int error = got>=0 && (kind==DATABASE || kind==WAL || kind==JOURNAL) ? turnstile_files.believed(fd) : 0;
  if( !error ) return got;
  errno = error;
  return -1;
}

ssize_t read(int fd, void *to, size_t size){
  REAL(ssize_t (*)(int, void *, size_t), "read", NULL);
  if( !kind_of(fd) ) return real_(fd, to, size);
  return may(fd, -1, 0) ? believed(fd, real_(fd, to, size)) : -1;
}

ssize_t write(int fd, const void *from, size_t size){
  REAL(ssize_t (*)(int, const void *, size_t), "write", NULL);
  return kind_of(fd) && !may(fd, -1, 1) ? -1 : real_(fd, from, size);
}

#define AT(function, or, buffer, writes)                                         \
  ssize_t function(int fd, buffer data, size_t size, off_t offset){              \
    REAL(ssize_t (*)(int, buffer, size_t, off_t), #function, or);                \
    if( !kind_of(fd) ) return real_(fd, data, size, offset);                     \
    if( !may(fd, offset + (int64_t)size, writes) ) return -1;                    \
    if( writes ) return real_(fd, data, size, offset);                           \
    return believed(fd, real_(fd, data, size, offset));                          \
  }
AT(pread, NULL, void *, 0)
AT(pread64, "pread", void *, 0)
AT(pwrite, NULL, const void *, 1)
AT(pwrite64, "pwrite", const void *, 1)

/* The wal-index is as long as it will ever be, and everybody's. */
#define TRUNCATE(function, or)                                                   \
  int function(int fd, off_t size){                                              \
    REAL(int (*)(int, off_t), #function, or);                                    \
    if( kind_of(fd)==SHM ) return 0;                                             \
    return kind_of(fd) && !may(fd, -1, 1) ? -1 : real_(fd, size);                \
  }
TRUNCATE(ftruncate, NULL)
TRUNCATE(ftruncate64, "ftruncate")

#define ALLOCATE(function, or)                                                   \
  int function(int fd, off_t offset, off_t size){                                \
    REAL(int (*)(int, off_t, off_t), #function, or);                             \
    if( kind_of(fd)==SHM ) return 0;                                             \
    return kind_of(fd) && !may(fd, -1, 1) ? EIO : real_(fd, offset, size);       \
  }
ALLOCATE(posix_fallocate, NULL)
ALLOCATE(posix_fallocate64, "posix_fallocate")

int fchown(int fd, uid_t user, gid_t group){
  REAL(int (*)(int, uid_t, gid_t), "fchown", NULL);
  return kind_of(fd)==SHM ? 0 : real_(fd, user, group);
}

int fchmod(int fd, mode_t mode){
  REAL(int (*)(int, mode_t), "fchmod", NULL);
  return kind_of(fd)==SHM ? 0 : real_(fd, mode);
}

int unlink(const char *name){
  REAL(int (*)(const char *), "unlink", NULL);
  int ours = ends_with(name, "-shm") || ends_with(name, "-journal");
  switch( ours ? turnstile_files.unlink(name, HERE) : 0 ){
    case 0: return real_(name);
    case 1: return 0;
    default: errno = EIO; return -1;
  }
}

/* ------------------------------------------------------------------------------------------------- mappings */

static unsigned maps; /* of wal-indexes */

static void *map(void *at, size_t length, int protection, int flags, int fd, off_t offset){
  return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
}

typedef void *(*mmap_fn)(void *, size_t, int, int, int, off_t);

/* Allocators call it before there is anything to look it up with. */
#define MMAP(function, or)                                                                             \
  void *function(void *at, size_t length, int protection, int flags, int fd, off_t offset){            \
    void *mapped;                                                                                      \
    int error;                                                                                         \
    if( !(flags & MAP_ANONYMOUS) && kind_of(fd)==DATABASE ){                                           \
      errno = ENODEV; /* SQLite reads then: what is only looked at in memory is not asked for here */  \
      return MAP_FAILED;                                                                               \
    }                                                                                                  \
    if( (flags & MAP_ANONYMOUS) || kind_of(fd)!=SHM ) return map(at, length, protection, flags, fd, offset); \
    if( (error = turnstile_files.map(fd, (uint64_t)offset + length))!=0 ){                             \
      errno = error;                                                                                   \
      return MAP_FAILED;                                                                               \
    }                                                                                                  \
    mapped = map(at, length, protection, flags, fd, offset);                                           \
    if( mapped!=MAP_FAILED ){                                                                          \
      turnstile_files.mapped((uintptr_t)mapped, length);                                               \
      __atomic_fetch_add(&maps, 1, __ATOMIC_RELAXED);                                                  \
    }                                                                                                  \
    return mapped;                                                                                     \
  }
MMAP(mmap, NULL)
MMAP(mmap64, "mmap")

int munmap(void *at, size_t length){
  if( __atomic_load_n(&maps, __ATOMIC_RELAXED) ) turnstile_files.unmapped((uintptr_t)at);
  return (int)syscall(SYS_munmap, at, length);
}

/* --------------------------------------------------------------------------------------------------- sleeps */

int usleep(useconds_t micros){
  REAL(int (*)(useconds_t), "usleep", NULL);
  return turnstile_files.sleep(micros, HERE) ? 0 : real_(micros);
}

int nanosleep(const struct timespec *time, struct timespec *left){
  REAL(int (*)(const struct timespec *, struct timespec *), "nanosleep", NULL);
  if( time && time->tv_sec==0 && time->tv_nsec>=0 && turnstile_files.sleep((uint64_t)time->tv_nsec/1000, HERE) ){
    if( left ) memset(left, 0, sizeof(*left));
    return 0;
  }
  return real_(time, left);
}
