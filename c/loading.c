/*
** Which SQLite a library reaches is decided when it is loaded. dlopen() and dlmopen() are interposed for the two ways
** to load one past the interposers of preload.c.
**
** Both end in a tail call, in every build: the C library takes the caller's run path from the return address.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "preload.h"

#ifdef __clang__
#define TAIL_CALLS
#else
#define TAIL_CALLS __attribute__((optimize("O2")))
#endif

/* Tests take a rule away by its name (src/planted.rs); in no other build. */
#ifdef TURNSTILE_PLANTED_BUILD
static int planted(const char *rule){
  const char *named = getenv("TURNSTILE_PLANTED");
  return named && !strcmp(named, rule);
}
#else
#define planted(rule) 0
#endif

static void *next(void **known, const char *name){
  void *found = __atomic_load_n(known, __ATOMIC_RELAXED);
  if( !found ){
    found = dlsym(RTLD_NEXT, name);
    __atomic_store_n(known, found, __ATOMIC_RELAXED);
  }
  return found;
}

turnstile_dlopen_fn turnstile_real_dlopen(void){
  static void *known;
  return (turnstile_dlopen_fn)next(&known, "dlopen");
}

/* --------------------------------------------------------------------------------------- RTLD_DEEPBIND */

#ifdef RTLD_DEEPBIND

static int is_sqlite(const char *name){
  const char *slash = strrchr(name, '/');
  return strcasestr(slash ? slash + 1 : name, "sqlite")!=NULL;
}

/* `length` bytes of the file at `offset`, which may be any number that stands in it; 0: they are not there. */
static int read_part(int fd, void *into, size_t length, uint64_t offset){
  return offset<=INT64_MAX && pread(fd, into, length, (off_t)offset)==(ssize_t)length;
}

/* Where in the file lies what is loaded at `address`; 0: nowhere. */
static uint64_t place_of(const ElfW(Phdr) *parts, int count, uint64_t address){
  for(int i=0; i<count; i++){
    if( parts[i].p_type==PT_LOAD && address>=parts[i].p_vaddr && address - parts[i].p_vaddr<parts[i].p_filesz ){
      return parts[i].p_offset + (address - parts[i].p_vaddr);
    }
  }
  return 0;
}

/* Whether one of the libraries that the file asks for is SQLite's. Its tables are read by small parts, and what it
** says of them is only used to read on. */
static int names_sqlite(int fd, const ElfW(Phdr) *parts, int count){
  const ElfW(Phdr) *dynamic = NULL;
  uint64_t names = 0;
  for(int i=0; i<count; i++) if( parts[i].p_type==PT_DYNAMIC ) dynamic = &parts[i];
  if( !dynamic ) return 0;
  for(int pass=0; pass<2; pass++){ /* first where the names are, then which */
    for(uint64_t at=0; at<dynamic->p_filesz && at<(1<<16); at += sizeof(ElfW(Dyn))){
      ElfW(Dyn) entry;
      char name[64] = "";
      if( !read_part(fd, &entry, sizeof(entry), dynamic->p_offset + at) || entry.d_tag==DT_NULL ) break;
      if( entry.d_tag==DT_STRTAB && pass==0 ) names = place_of(parts, count, entry.d_un.d_ptr);
      if( entry.d_tag!=DT_NEEDED || pass==0 || !names ) continue;
      if( pread(fd, name, sizeof(name) - 1, (off_t)(names + entry.d_un.d_val))>0 && is_sqlite(name) ) return 1;
    }
  }
  return 0;
}

static int needs_sqlite(const char *path){
  ElfW(Ehdr) head;
  ElfW(Phdr) parts[32];
  int found = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if( fd<0 ) return 0;
  if( read_part(fd, &head, sizeof(head), 0) && !memcmp(head.e_ident, ELFMAG, SELFMAG)
   && head.e_phentsize==sizeof(parts[0]) && head.e_phnum<=32
   && read_part(fd, parts, head.e_phnum*sizeof(parts[0]), head.e_phoff) ){
    found = names_sqlite(fd, parts, head.e_phnum);
  }
  close(fd);
  return found;
}

/* PHP loads its modules so, which puts their own libsqlite3 before any interposer. The flag is cleared for objects that
** are SQLite by their name or need it: others may depend on it. */
__attribute__((noinline)) /* its buffers must be gone at the tail call */
static int reachable(const char *file, int flags){
  int saved = errno;
  if( !file || !(flags & RTLD_DEEPBIND) || planted("deepbind_kept") ) return flags;
  if( is_sqlite(file) || (strchr(file, '/') && needs_sqlite(file)) ) flags &= ~RTLD_DEEPBIND;
  errno = saved;
  return flags;
}
#else
static int reachable(const char *file, int flags){ return file ? flags : flags; }
#endif

TAIL_CALLS
void *dlopen(const char *file, int flags){
  return turnstile_real_dlopen()(file, reachable(file, flags));
}

/* --------------------------------------------------------------------------------- namespaces (glibc alone) */

#ifdef LM_ID_BASE

typedef void *(*dlmopen_fn)(Lmid_t, const char *, int);

/* What is preloaded is in the first namespace alone: said, not prevented, for the copies are the point of the call. */
__attribute__((noinline))
static void say_apart(const char *file){
  char absolute[PATH_MAX];
  int saved = errno;
  const char *name = file && strchr(file, '/') ? realpath(file, absolute) : file;
  if( name ) turnstile_report_fact("apart", "%s", name);
  errno = saved;
}

TAIL_CALLS
void *dlmopen(Lmid_t space, const char *file, int flags){
  static void *known;
  if( space!=LM_ID_BASE && !planted("dlmopen_unsaid") ) say_apart(file);
  return ((dlmopen_fn)next(&known, "dlmopen"))(space, file, space==LM_ID_BASE ? reachable(file, flags) : flags);
}
#endif
