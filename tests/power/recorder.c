/*
** Records what programs do to the files of one directory: loaded by LD_PRELOAD into each of them, it stands between
** them and libc. Clients of any SQLite, the extension and the broker all reach their files through libc, so one record
** holds them all. POWER_LOG names the log (log.h); without it nothing is recorded.
**
** -shm files are left out: they are memory, SQLite builds them anew after a crash. What cannot be recorded (a shared
** writable mapping, O_APPEND, rename) is entered as STRANGE, and the checker refuses such a log. That nothing was
** missed is checked too: the record, played to its end, must give the files that lie in the directory.
*/
#define _GNU_SOURCE
#include "log.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The libc function of this name, looked up once. */
#define REAL(name) \
  static __typeof__(name) *real; \
  if( real==0 ) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The name within the recorded directory, or null: another place, or a file that is not recorded. */
static const char *recorded_name(const char *path){
  if( power_log==0 || path==0 ) return 0;
  size_t n = strlen(power_log->directory), l = strlen(path);
  if( strncmp(path, power_log->directory, n)!=0 || path[n]!='/' || strchr(path + n + 1, '/') ) return 0;
  return l>=4 && strcmp(path + l - 4, "-shm")==0 ? 0 : path + n + 1;
}

/* Ends an operation: the record, what an order says, errno. */
static int64_t ended(uint64_t begin, int64_t result, int order){
  int error = errno;
  power_end(begin, result<0 ? -error : result);
  if( order==POWER_KILL_AFTER ) raise(SIGKILL);
  errno = error;
  return result;
}

/* An operation that an order lets fail, or ends the process before: it is in the record, and was never done. Without an end
** it might be in any later image, though who came after it has seen that it is not there. */
static int64_t refused(uint64_t begin, int order){
  errno = order==POWER_KILL_BEFORE ? EINTR : order;
  int64_t result = ended(begin, -1, 0);
  if( order==POWER_KILL_BEFORE ) raise(SIGKILL);
  return result;
}

/* -------------------------------------------------------------------------------------------------- names */

/*
** open() of a recorded file. Whether it was there decides what is recorded, so O_CREAT is split in two: open what is
** there, else create exclusively. With the lock of names held nobody can come between, but for unrecorded processes.
*/
static int open_recorded(int (*real)(const char *, int, ...), const char *path, const char *name, int flags, mode_t mode){
  int fd;
  if( flags & O_APPEND ) power_strange("opened with O_APPEND", name);
  power_lock_names();
  fd = flags & O_EXCL && flags & O_CREAT ? -1 : real(path, flags & ~O_CREAT, mode);
  if( fd>=0 && (flags & O_TRUNC) ) power_strange("opened with O_TRUNC", name);
  if( fd>=0 && power_known(fd)==0 && (flags & O_ACCMODE)!=O_RDONLY ) power_strange("there before the record began", name);
  if( fd<0 && (flags & O_CREAT) ){
    fd = real(path, flags | O_EXCL, mode);
    if( fd>=0 ) power_draw(CREATE, power_created(fd, name), 0, name, strlen(name));
  }
  int error = errno;
  power_unlock_names();
  errno = error;
  return fd;
}

#define OPEN(function) \
  int function(const char *path, int flags, ...){ \
    REAL(function); \
    mode_t mode = 0; \
    if( flags & (O_CREAT|O_TMPFILE) ){ \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, mode_t); \
      va_end(more); \
    } \
    const char *name = recorded_name(path); \
    return name ? open_recorded(real, path, name, flags, mode) : real(path, flags, mode); \
  }

OPEN(open)
OPEN(open64)

#define OPENAT(function) \
  int function(int at, const char *path, int flags, ...){ \
    REAL(function); \
    mode_t mode = 0; \
    if( flags & (O_CREAT|O_TMPFILE) ){ \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, mode_t); \
      va_end(more); \
    } \
    struct stat st; \
    if( power_log && (flags & O_CREAT) && path[0]!='/' && at>=0 && fstat(at, &st)==0 \
     && st.st_dev==power_log->device && st.st_ino==power_log->inode ) power_strange("openat creates", path); \
    const char *name = recorded_name(path); \
    return name ? open_recorded(open, path, name, flags, mode) : real(at, path, flags, mode); \
  }

OPENAT(openat)
OPENAT(openat64)

int unlink(const char *path){
  REAL(unlink);
  const char *name = recorded_name(path);
  if( name==0 ) return real(path);
  power_lock_names();
  int rc = real(path), error = errno;
  if( rc==0 ) power_draw(UNLINK, 0, 0, name, strlen(name));
  power_unlock_names();
  errno = error;
  return rc;
}

int unlinkat(int at, const char *path, int flags){
  REAL(unlinkat);
  struct stat st;
  if( power_log && at>=0 && path[0]!='/' && fstat(at, &st)==0
   && st.st_dev==power_log->device && st.st_ino==power_log->inode ) power_strange("unlinkat", path);
  return recorded_name(path) ? unlink(path) : real(at, path, flags);
}

int rename(const char *from, const char *to){
  REAL(rename);
  if( recorded_name(from) || recorded_name(to) ) power_strange("rename", from);
  return real(from, to);
}

/* --------------------------------------------------------------------------------------------------- data */

static ssize_t write_recorded(struct known *file, int fd, const void *from, size_t n, off_t at){
  static ssize_t (*real)(int, const void *, size_t, off_t);
  if( real==0 ) real = (__typeof__(real))dlsym(RTLD_NEXT, "pwrite64");
  if( file==0 ) return real(fd, from, n, at);
  uint64_t begin = power_draw(WRITE, file, (uint64_t)at, from, n);
  int order = power_obey(WRITE, file);
  if( order!=0 && order!=POWER_KILL_AFTER ) return refused(begin, order);
  return ended(begin, real(fd, from, n, at), order);
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t at){
  return write_recorded(power_known(fd), fd, from, n, at);
}

ssize_t pwrite64(int fd, const void *from, size_t n, off_t at){
  return write_recorded(power_known(fd), fd, from, n, at);
}

ssize_t write(int fd, const void *from, size_t n){
  REAL(write);
  struct known *file = power_known(fd);
  if( file==0 ) return real(fd, from, n);
  off_t at = lseek(fd, 0, SEEK_CUR);
  ssize_t done = write_recorded(file, fd, from, n, at);
  if( done>0 ) lseek(fd, at + done, SEEK_SET);
  return done;
}

/* Nobody is known to use these here: a log in which somebody did is refused, not wrong. */
#define VECTOR(function) \
  ssize_t function(int fd, const struct iovec *v, int n, off_t at){ \
    REAL(function); \
    struct known *file = power_known(fd); \
    if( file ) power_strange(#function, file->name); \
    return real(fd, v, n, at); \
  }

VECTOR(pwritev)
VECTOR(pwritev64)

#define MAP(function) \
  void *function(void *at, size_t n, int protection, int flags, int fd, off_t offset){ \
    REAL(function); \
    if( power_log && fd>=0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) ){ \
      struct known *file = power_known(fd); \
      if( file ) power_strange("mapped for writing", file->name); \
    } \
    return real(at, n, protection, flags, fd, offset); \
  }

MAP(mmap)
MAP(mmap64)

static int sized(int (*real)(int, off_t), int fd, off_t size){
  struct known *file = power_known(fd);
  if( file==0 ) return real(fd, size);
  uint64_t begin = power_draw(TRUNCATE, file, (uint64_t)size, 0, 0);
  int order = power_obey(TRUNCATE, file);
  if( order!=0 && order!=POWER_KILL_AFTER ) return (int)refused(begin, order);
  return (int)ended(begin, real(fd, size), order);
}

int ftruncate(int fd, off_t size){
  REAL(ftruncate);
  return sized(real, fd, size);
}

int ftruncate64(int fd, off_t size){
  REAL(ftruncate64);
  return sized(real, fd, size);
}

int posix_fallocate(int fd, off_t offset, off_t n){
  REAL(posix_fallocate);
  struct known *file = power_known(fd);
  if( file==0 ) return real(fd, offset, n);
  uint64_t begin = power_draw(ALLOCATE, file, (uint64_t)offset, 0, (uint64_t)n);
  int rc = real(fd, offset, n);
  power_end(begin, -rc);
  return rc;
}

int fallocate(int fd, int mode, off_t offset, off_t n){
  REAL(fallocate);
  struct known *file = power_known(fd);
  if( file==0 ) return real(fd, mode, offset, n);
  if( mode ) power_strange("fallocate with a mode", file->name);
  uint64_t begin = power_draw(ALLOCATE, file, (uint64_t)offset, 0, (uint64_t)n);
  return (int)ended(begin, real(fd, mode, offset, n), 0);
}

/* -------------------------------------------------------------------------------------------------- syncs */

static int synced(int (*real)(int), int fd){
  struct known *file = power_known(fd);
  struct stat st;
  if( power_log==0 || fstat(fd, &st)!=0 ) return real(fd);
  int directory = st.st_dev==power_log->device && st.st_ino==power_log->inode;
  if( file==0 && !directory ) return real(fd);
  uint64_t begin = power_draw(directory ? SYNC_DIR : SYNC, file, 0, 0, 0);
  int order = file ? power_obey(st.st_size ? SYNC : SYNC_EMPTY, file) : 0;
  if( order!=0 && order!=POWER_KILL_AFTER ) return (int)refused(begin, order);
  /* The recorded directory is usually memory, where a sync takes no time; on a disk others go on meanwhile. */
  struct timespec delay = {0, power_log->sync_usec * 1000l};
  if( delay.tv_nsec ) nanosleep(&delay, 0);
  return (int)ended(begin, real(fd), order);
}

int fsync(int fd){
  REAL(fsync);
  return synced(real, fd);
}

int fdatasync(int fd){
  REAL(fdatasync);
  return synced(real, fd);
}
