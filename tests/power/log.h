/*
** The log that every recorded process appends to: one file, mapped shared, in one global order.
**
** A record's place in the order is the number that it draws from `next` (an atomic add). What an operation does to a
** file begins with a record drawn before the system call and ends with an END record drawn after it. So the order is
** honest at both ends: whatever a process does after it has learnt of an operation's end stands behind that END.
**
** Sizes are fixed, so a process that is killed between drawing and filling leaves a record of kind 0 and no hole.
*/
#ifndef POWER_LOG_H
#define POWER_LOG_H

#include <stdatomic.h>
#include <stdint.h>

#define POWER_MAGIC 0x31524557504c4f47ull
#define POWER_RECORDS (1u << 20)
#define POWER_BYTES (1ull << 30)
#define POWER_FILES (1u << 16)
#define POWER_ORDERS 16

enum kind {
  NOTHING = 0,
  WRITE = 1,    /* file, offset, length, data: begins */
  TRUNCATE = 2, /* file, offset = the size: begins */
  ALLOCATE = 3, /* file, offset, length: begins; the size grows to offset + length */
  SYNC = 4,     /* file: begins */
  SYNC_DIR = 5, /* the recorded directory: begins */
  END = 6,      /* begin = the record that it ends, result = what the system call returned, -errno if it failed */
  CREATE = 7,   /* file, data = its name: done, under the lock of names */
  UNLINK = 8,   /* file, data = its name: done, under the lock of names */
  NOTE = 9,     /* data = a text from power_note */
  STRANGE = 10, /* data = what was done that the record cannot hold: whoever reads the log must refuse it */
  SYNC_EMPTY = 20, /* never in the log: what orders call the sync of an empty file */
};

struct record {
  _Atomic uint32_t kind; /* stored last */
  uint32_t pid;
  uint32_t file;
  int32_t result;
  uint64_t offset;
  uint64_t length;
  uint64_t data; /* where in `bytes` */
  uint64_t begin;
};

/* A file that was created in the recorded directory, found by device and inode. */
struct known {
  uint64_t device;
  uint64_t inode;
  _Atomic uint32_t number; /* 0: no entry. A reused inode gets a new number */
  char name[44];
};

/* What is to happen to an operation, in any recorded process: see power_order. */
struct order {
  _Atomic uint32_t active;
  uint32_t kinds; /* bits by kind */
  int32_t pid;    /* 0: any */
  int32_t what;   /* an errno; or POWER_KILL_AFTER, POWER_KILL_BEFORE */
  _Atomic int32_t skip;
  _Atomic int32_t times; /* -1: for ever */
  _Atomic uint32_t fired;
  char suffix[36];
};

#define POWER_KILL_AFTER (-1)
#define POWER_KILL_BEFORE (-2)

struct log {
  uint64_t magic;
  uint64_t records_at, bytes_at; /* offsets in this file */
  uint64_t device, inode;        /* of the recorded directory */
  _Atomic uint64_t next;
  _Atomic uint64_t next_byte;
  _Atomic uint32_t full;      /* something did not fit: the log is worthless */
  _Atomic uint32_t names;     /* the thread that changes names or opens files */
  _Atomic uint32_t files;     /* numbers given out */
  _Atomic uint32_t sync_usec; /* how long a sync takes at least */
  char directory[512];
  struct order orders[POWER_ORDERS];
  struct known known[POWER_FILES];
};

extern struct log *power_log; /* null: this process is not recorded */

/* log.c */
struct known *power_known(int fd);
void power_lock_names(void);
void power_unlock_names(void);
struct known *power_created(int fd, const char *name);
uint64_t power_draw(enum kind kind, const struct known *file, uint64_t offset, const void *data, uint64_t length);
void power_end(uint64_t begin, int64_t result);
void power_strange(const char *what, const char *of);
int power_obey(enum kind kind, const struct known *file);

#endif
