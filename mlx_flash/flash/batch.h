/* A batch of reads: its parts, how it is made from tables, and how its requests are served. Nothing here starts a
 * thread or takes a lock. reader.c does both, and documents what its lock protects.
 */
#ifndef MF_BATCH_H
#define MF_BATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Result codes. A positive code is an errno. */
#define MF_SHORT_READ (-1) /* the file ended before the wanted bytes */
#define MF_WITHHELD (-2)   /* the wanted bytes lie within the file, but the system does not return them */
#define MF_WRONG_SUM (-3)  /* the bytes read do not have the expected CRC-32 */
#define MF_NO_BATCH (-4)   /* there is no such batch: it was already waited for or drained */
#define MF_BAD_TABLE (-5)  /* a request, a destination or a check is invalid */
#define MF_STOPPED (-6)    /* the pool is stopped and accepts no more batches */
#define MF_OUTSIDE (-7)    /* a segment lies outside the file */

typedef struct { /* all fields are int64; reader.py mirrors this struct */
    int64_t code;     /* 0, or the code of the first failure, which the next five fields describe */
    int64_t offset;   /* in the file */
    int64_t wanted;   /* bytes */
    int64_t got;      /* bytes */
    int64_t expected; /* CRC-32, for MF_WRONG_SUM */
    int64_t found;    /* CRC-32, for MF_WRONG_SUM */
    int64_t busy_ns;  /* time to completion from submission, or from the previous batch's completion if later */
    int64_t bytes;    /* bytes requested from the file, alignment included */
    int64_t requests; /* reads of the file, after merging */
} mf_result;

typedef struct {
    int64_t offset;
    int64_t bytes;
    struct iovec *iovecs;
    int64_t niovecs;
    bool bounce;
    int64_t first_check; /* index of the first check with bytes of this request */
    int64_t nchecks;
} mf_request;

typedef struct {
    int64_t begin; /* position in the concatenated bytes of the batch's requests */
    int64_t length;
    const char *address;
    int64_t offset; /* in the file */
    uint32_t expected;
    int64_t last_request;
    atomic_int missing; /* requests that have yet to deliver bytes; the thread of the last one verifies the sum */
} mf_check;

typedef struct mf_batch {
    struct mf_batch *next;       /* next batch that was not waited for */
    struct mf_batch *next_to_do; /* next batch with requests that no thread has taken yet */
    int64_t number;
    int fd;
    int64_t alignment;
    int64_t nrequests;
    int64_t taken;      /* requests that threads have taken */
    int64_t unfinished; /* requests neither read nor skipped yet */
    int64_t submitted_ns;
    bool done;
    int64_t waiting; /* threads in mf_wait for this batch */
    atomic_bool failed; /* read without the lock; if set, the remaining requests are skipped */
    mf_result result;
    mf_request *requests;
    struct iovec *iovecs; /* modified by the reads */
    mf_check *checks;
} mf_batch;

typedef struct { /* where a thread reads what cannot be read straight to its destination */
    char *memory;
    size_t size;
} mf_bounce;

/* Makes a batch from copies of mf_submit's tables. Returns 0, ENOMEM or MF_BAD_TABLE. After an error, nothing stays
 * allocated. */
int64_t mf_batch_new(int fd, int64_t alignment, const int64_t *requests, int64_t nrequests, const int64_t *iovecs,
                     int64_t niovecs, const int64_t *checks, int64_t nchecks, mf_batch **made);

void mf_batch_free(mf_batch *batch);

/* Reads and verifies requests first .. first + count - 1. Returns the first failure, or code 0. After a failure in any
 * thread, the remaining requests are skipped. */
mf_result mf_batch_serve(mf_batch *batch, int64_t first, int64_t count, const mf_bounce *bounce);

#endif
