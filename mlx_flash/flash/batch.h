/* A batch of reads: what it consists of, how its tables are taken over, how one of its requests is served. Nothing here
 * knows of threads; reader.c does, and says what its lock is over.
 */
#ifndef MF_BATCH_H
#define MF_BATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Codes; those above zero are an errno. */
#define MF_SHORT_READ (-1) /* the file ended before the wanted bytes */
#define MF_WITHHELD (-2)   /* the wanted bytes lie within the file, and the system does not return them */
#define MF_WRONG_SUM (-3)  /* what was read does not have the CRC-32 that was expected */
#define MF_NO_BATCH (-4)   /* there is no such batch: it was waited for, or drained */
#define MF_BAD_TABLE (-5)  /* a request, a destination or a check that cannot be */
#define MF_STOPPED (-6)    /* the pool takes nothing any more */

typedef struct { /* all int64, mirrored by reader.py */
    int64_t code;     /* 0, or what happened to the request, or to the check, that failed first: */
    int64_t offset;   /* in the file */
    int64_t wanted;   /* bytes */
    int64_t got;      /* bytes */
    int64_t expected; /* the CRC-32, with MF_WRONG_SUM */
    int64_t found;
    int64_t busy_ns;  /* time from submission, or from the completion of the batch before, to completion */
    int64_t bytes;    /* asked of the file, alignment included */
} mf_result;

typedef struct {
    int64_t offset;
    int64_t bytes;
    struct iovec *iovecs;
    int64_t niovecs;
    bool bounce;
    int64_t first_check; /* of those with bytes of this request */
    int64_t nchecks;
} mf_request;

typedef struct {
    int64_t begin; /* in the bytes of the batch, request after request */
    int64_t length;
    const char *address;
    int64_t offset; /* in the file */
    uint32_t expected;
    int64_t last_request;
    atomic_int missing; /* requests that still have to bring bytes; the thread that brings the last ones compares */
} mf_check;

typedef struct mf_batch {
    struct mf_batch *next;       /* of those that were not waited for */
    struct mf_batch *next_to_do; /* of those with requests that no thread has taken yet */
    int64_t number;
    int fd;
    int64_t alignment;
    int64_t nrequests;
    int64_t taken;      /* requests handed to a thread */
    int64_t unfinished; /* requests not yet accounted for */
    int64_t submitted_ns;
    bool done;
    int64_t waiting; /* threads in mf_wait for this batch */
    atomic_bool failed; /* read without the lock, to skip what is left */
    mf_result result;
    mf_request *requests;
    struct iovec *iovecs; /* consumed by the reads */
    mf_check *checks;
} mf_batch;

typedef struct {
    char *memory;
    size_t size;
} mf_bounce;

/* A batch made of mf_submit's tables, which are copied. 0, ENOMEM or MF_BAD_TABLE; nothing is left behind then. */
int64_t mf_batch_new(int fd, int64_t alignment, const int64_t *requests, int64_t nrequests, const int64_t *iovecs,
                     int64_t niovecs, const int64_t *checks, int64_t nchecks, mf_batch **made);

void mf_batch_free(mf_batch *batch);

/* Reads and compares requests first .. first + count - 1; returns what failed first, or code 0. After a failure in any
 * thread what is left is skipped. */
mf_result mf_batch_serve(mf_batch *batch, int64_t first, int64_t count, mf_bounce *bounce);

#endif
