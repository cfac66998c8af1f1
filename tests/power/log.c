/*
** Appending to the log, what is known of files, and orders. See log.h.
*/
#define _GNU_SOURCE
#include "log.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct log *power_log;
static size_t mapped;

static struct record *records(void){
  return (struct record *)((char *)power_log + power_log->records_at);
}

static char *bytes(void){
  return (char *)power_log + power_log->bytes_at;
}

/* Opens a log, in place of another. A process that was started under the recorder is recorded in it, and any can
** note and order. */
void power_attach(const char *path){
  /* By system call: the interposers of this library are not to see it. */
  int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR|O_CLOEXEC, 0);
  struct stat st;
  if( fd<0 || fstat(fd, &st)!=0 ){
    fprintf(stderr, "power: cannot open the log %s: %s\n", path, strerror(errno));
    abort();
  }
  struct log *log = mmap(0, (size_t)st.st_size, PROT_READ|PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if( log==MAP_FAILED || log->magic!=POWER_MAGIC ){
    fprintf(stderr, "power: %s is no log\n", path);
    abort();
  }
  if( power_log ) munmap(power_log, mapped);
  power_log = log;
  mapped = (size_t)st.st_size;
}

__attribute__((constructor)) static void attach(void){
  const char *path = getenv("POWER_LOG");
  if( path && *path ) power_attach(path);
}

/* Makes an empty log for what happens in `directory`. Not in a recorded process. 0, or an errno. */
int power_make(const char *path, const char *directory, unsigned sync_usec){
  uint64_t records_at = (sizeof(struct log) + 4095) & ~4095ull;
  uint64_t bytes_at = records_at + POWER_RECORDS * sizeof(struct record);
  struct stat st;
  if( strlen(directory)>=sizeof(power_log->directory) ) return ENAMETOOLONG;
  if( stat(directory, &st)!=0 ) return errno;
  int fd = open(path, O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0666);
  if( fd<0 ) return errno;
  if( ftruncate(fd, (off_t)(bytes_at + POWER_BYTES))!=0 ){ close(fd); return errno; }
  struct log *log = mmap(0, sizeof(struct log), PROT_READ|PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if( log==MAP_FAILED ) return errno;
  log->records_at = records_at;
  log->bytes_at = bytes_at;
  log->device = st.st_dev;
  log->inode = st.st_ino;
  log->sync_usec = sync_usec;
  strcpy(log->directory, directory);
  log->magic = POWER_MAGIC;
  munmap(log, sizeof(struct log));
  return 0;
}

uint64_t power_draw(enum kind kind, const struct known *file, uint64_t offset, const void *data, uint64_t length){
  uint64_t at = 0;
  if( data ){
    at = atomic_fetch_add(&power_log->next_byte, length);
    if( at + length > POWER_BYTES ){
      power_log->full = 1;
      return 0;
    }
    memcpy(bytes() + at, data, length);
  }
  uint64_t number = atomic_fetch_add(&power_log->next, 1);
  if( number>=POWER_RECORDS ){
    power_log->full = 1;
    return 0;
  }
  struct record *r = &records()[number];
  r->pid = (uint32_t)getpid();
  r->file = file ? file->number : 0;
  r->offset = offset;
  r->length = length;
  r->data = at;
  atomic_store(&r->kind, kind);
  return number;
}

void power_end(uint64_t begin, int64_t result){
  uint64_t number = atomic_fetch_add(&power_log->next, 1);
  if( number>=POWER_RECORDS ){
    power_log->full = 1;
    return;
  }
  struct record *r = &records()[number];
  r->pid = (uint32_t)getpid();
  r->result = (int32_t)result;
  r->begin = begin;
  atomic_store(&r->kind, END);
}

void power_strange(const char *what, const char *of){
  char text[600];
  int n = snprintf(text, sizeof text, "%s: %s", what, of);
  power_draw(STRANGE, 0, 0, text, (uint64_t)(n<(int)sizeof text ? n : (int)sizeof text - 1));
}

/* For programs under the record: a text of theirs takes its place in the order. */
void power_note(const char *text){
  if( power_log ) power_draw(NOTE, 0, 0, text, strlen(text));
}

/* -------------------------------------------------------------------------------------------------- files */

/* Names change, and files are opened, one at a time: so a file is in the log before anybody else can write to it.
** A holder that was killed is found by its death. */
void power_lock_names(void){
  uint32_t me = (uint32_t)getpid(), free = 0;
  while( !atomic_compare_exchange_strong(&power_log->names, &free, me) ){
    uint32_t holder = free;
    if( kill((pid_t)holder, 0)!=0 && errno==ESRCH
     && atomic_compare_exchange_strong(&power_log->names, &holder, me) ) return;
    free = 0;
    sched_yield();
  }
}

void power_unlock_names(void){
  atomic_store(&power_log->names, 0);
}

static struct known *entry(uint64_t device, uint64_t inode){
  uint64_t h = (inode * 0x9e3779b97f4a7c15ull) ^ device;
  for(uint32_t i=0; i<POWER_FILES; i++){
    struct known *k = &power_log->known[(h + i) % POWER_FILES];
    if( k->number==0 || (k->device==device && k->inode==inode) ) return k;
  }
  power_log->full = 1;
  return 0;
}

/* The recorded file that is open on `fd`, or null. */
struct known *power_known(int fd){
  struct stat st;
  if( power_log==0 || fstat(fd, &st)!=0 || !S_ISREG(st.st_mode) ) return 0;
  struct known *k = entry(st.st_dev, st.st_ino);
  return k && k->number ? k : 0;
}

/* A file has just been created. With the lock of names held. */
struct known *power_created(int fd, const char *name){
  struct stat st;
  if( fstat(fd, &st)!=0 ) return 0;
  struct known *k = entry(st.st_dev, st.st_ino);
  if( k==0 ) return 0;
  if( strlen(name)>=sizeof(k->name) ) power_strange("a name that is too long", name);
  k->device = st.st_dev;
  k->inode = st.st_ino;
  strncpy(k->name, name, sizeof(k->name) - 1);
  k->number = atomic_fetch_add(&power_log->files, 1) + 1;
  return k;
}

/* ------------------------------------------------------------------------------------------------- orders */

/*
** From now on, what operations of `kinds` (bits 1<<kind) do to files whose name ends in `suffix`, in process `pid` or in
** any (0): the first `skip` pass, the next `times` (-1: all) fail with errno `what`, or end the process by SIGKILL
** after (-1) or before (-2) they are done. Returns the order's number, for power_fired and power_cancel; -1: no room.
*/
int power_order(unsigned kinds, const char *suffix, int pid, int skip, int times, int what){
  if( power_log==0 || strlen(suffix)>=sizeof(power_log->orders[0].suffix) ) return -1;
  for(int i=0; i<POWER_ORDERS; i++){
    struct order *o = &power_log->orders[i];
    uint32_t free = 0;
    if( !atomic_compare_exchange_strong(&o->active, &free, 2) ) continue;
    o->kinds = kinds;
    o->pid = pid;
    o->what = what;
    o->skip = skip;
    o->times = times;
    o->fired = 0;
    strcpy(o->suffix, suffix);
    o->active = 1;
    return i;
  }
  return -1;
}

unsigned power_fired(int order){
  return power_log->orders[order].fired;
}

void power_cancel(int order){
  power_log->orders[order].active = 0;
}

static int ends_in(const char *name, const char *suffix){
  size_t n = strlen(name), s = strlen(suffix);
  return n>=s && strcmp(name + n - s, suffix)==0;
}

static int next_is_due(struct order *o){
  if( o->skip>0 && atomic_fetch_sub(&o->skip, 1)>0 ) return 0;
  if( o->times<0 ) return 1;
  return o->times>0 && atomic_fetch_sub(&o->times, 1)>0;
}

/* What an order says of this operation: 0, an errno, POWER_KILL_AFTER or POWER_KILL_BEFORE. */
int power_obey(enum kind kind, const struct known *file){
  for(int i=0; i<POWER_ORDERS; i++){
    struct order *o = &power_log->orders[i];
    if( o->active!=1 || !(o->kinds & (1u<<kind)) || !ends_in(file->name, o->suffix) ) continue;
    if( o->pid && o->pid!=getpid() ) continue;
    if( !next_is_due(o) ) continue;
    atomic_fetch_add(&o->fired, 1);
    return o->what;
  }
  return 0;
}
