/* A pool of threads that read ranges of files straight into memory, several reads in flight at once.
 *
 * Plain C without Python and without MLX: Python threads reach the disk's rate only while the main thread is idle,
 * and a library that links to neither works with every version of both. reader.py is its only caller and bounds the
 * size of a request, and with it the size of a bounce buffer.
 *
 * A request is one contiguous range of a file, scattered in order over a run of destinations. Batches of requests are
 * served first in, first out; several may be outstanding.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifdef __APPLE__
#include <pthread/qos.h>
#endif

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

/* Raised whenever a signature or a table below changes, so that a library left over from another version is refused. */
#define MF_ABI 1

#define MF_SHORT_READ (-1) /* the file ended before the wanted bytes */
#define MF_MOST_TAKEN 64   /* requests that one thread takes at once */
#define MF_HUGE_PAGE (2 << 20) /* bytes; a bounce buffer is whole ones: reads into small pages are half as fast */

typedef struct { /* all int64, mirrored by reader.py */
    int64_t code;     /* 0, MF_SHORT_READ or an errno; the next three describe the request that failed first */
    int64_t offset;   /* in the file */
    int64_t wanted;   /* bytes */
    int64_t got;      /* bytes */
    int64_t busy_ns;  /* time from submission, or from the completion of the batch before, to completion */
    int64_t bytes;    /* asked of the file, alignment included */
} mf_result;

typedef struct {
    int64_t offset;
    int64_t bytes;
    struct iovec *iovecs;
    int64_t niovecs;
    bool bounce;
} mf_request;

typedef struct mf_batch {
    struct mf_batch *next;
    int fd;
    int64_t alignment;
    int64_t nrequests;
    int64_t taken;      /* requests handed to a thread */
    int64_t unfinished; /* requests not yet accounted for */
    int64_t submitted_ns;
    bool done;
    atomic_bool failed; /* read without the lock, to skip what is left */
    mf_result result;
    mf_request *requests;
    struct iovec *iovecs; /* consumed by the reads */
} mf_batch;

typedef struct {
    pthread_mutex_t lock; /* over everything here and over a batch's taken, unfinished, done and result */
    pthread_cond_t work;
    pthread_cond_t done;
    mf_batch *head; /* batches with requests that no thread has taken yet */
    mf_batch *tail;
    int64_t last_done_ns;
    int nthreads;
    int idle;
    bool stopping;
    pthread_t threads[];
} mf_pool;

typedef struct {
    char *memory;
    size_t size;
} mf_bounce;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Reads into the iovecs until `need` bytes are there; they may have room for more. Changes the iovecs. */
static int64_t read_range(int fd, struct iovec *iovecs, int64_t niovecs, int64_t offset, int64_t need,
                          int64_t alignment, int64_t *got)
{
    *got = 0;
    while (*got < need) {
        int count = niovecs < IOV_MAX ? (int)niovecs : IOV_MAX;
        ssize_t n = preadv(fd, iovecs, count, (off_t)(offset + *got));
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (*got + n >= need) {
            *got = need;
            return 0;
        }
        /* A direct read can only go on from a multiple of the alignment; one that stopped elsewhere met the end of
         * the file, and going back to the multiple below finds that out. */
        int64_t advance = n - n % alignment;
        if (advance == 0) {
            *got += n;
            return MF_SHORT_READ;
        }
        *got += advance;
        while (advance > 0 && (size_t)advance >= iovecs->iov_len) {
            advance -= (int64_t)iovecs->iov_len;
            iovecs++;
            niovecs--;
        }
        if (advance > 0) {
            iovecs->iov_base = (char *)iovecs->iov_base + advance;
            iovecs->iov_len -= (size_t)advance;
        }
    }
    return 0;
}

/* Reads the aligned range around the request into the thread's own buffer and copies the wanted bytes out. */
static int64_t read_bounced(int fd, const mf_request *request, int64_t alignment, mf_bounce *bounce, int64_t *got)
{
    int64_t head = request->offset % alignment;
    size_t size = (size_t)((head + request->bytes + alignment - 1) / alignment * alignment);
    *got = 0;
    if (bounce->size < size) {
        void *memory;
        size_t room = (size + MF_HUGE_PAGE - 1) / MF_HUGE_PAGE * MF_HUGE_PAGE;
        free(bounce->memory);
        bounce->memory = NULL;
        bounce->size = 0;
        if (posix_memalign(&memory, MF_HUGE_PAGE, room) != 0)
            return ENOMEM;
#ifdef MADV_HUGEPAGE
        madvise(memory, room, MADV_HUGEPAGE); /* advice: where it is not taken, reads are slower */
#endif
        bounce->memory = memory;
        bounce->size = room;
    }
    struct iovec whole = {bounce->memory, size};
    int64_t code = read_range(fd, &whole, 1, request->offset - head, head + request->bytes, alignment, got);
    *got = *got > head ? *got - head : 0;
    if (code != 0)
        return code;
    const char *from = bounce->memory + head;
    for (int64_t i = 0; i < request->niovecs; i++) {
        memcpy(request->iovecs[i].iov_base, from, request->iovecs[i].iov_len);
        from += request->iovecs[i].iov_len;
    }
    return 0;
}

/* Two threads at most, without the lock. Each wakes two more if work is left, so that the submitter, whose time it is
 * that counts, does not wake all of them one by one: that costs as much as a small read each. */
static void wake(mf_pool *pool, int64_t sleeping)
{
    for (int64_t i = 0; i < sleeping && i < 2; i++)
        pthread_cond_signal(&pool->work);
}

/* Under the lock. */
static void finish_batch(mf_pool *pool, mf_batch *batch)
{
    int64_t now = now_ns();
    int64_t from = batch->submitted_ns > pool->last_done_ns ? batch->submitted_ns : pool->last_done_ns;
    batch->result.busy_ns = now > from ? now - from : 0;
    pool->last_done_ns = now;
    batch->done = true;
    pthread_cond_broadcast(&pool->done);
}

/* Reads requests first .. first + count - 1; returns the result of the one that failed, or code 0. */
static mf_result serve(mf_batch *batch, int64_t first, int64_t count, mf_bounce *bounce)
{
    mf_result failure = {0};
    for (int64_t i = first; i < first + count; i++) {
        if (atomic_load_explicit(&batch->failed, memory_order_relaxed))
            break;
        const mf_request *request = &batch->requests[i];
        int64_t got, code;
        if (request->bounce)
            code = read_bounced(batch->fd, request, batch->alignment, bounce, &got);
        else
            code = read_range(batch->fd, request->iovecs, request->niovecs, request->offset, request->bytes,
                              batch->alignment, &got);
        if (code != 0) {
            failure.code = code;
            failure.offset = request->offset;
            failure.wanted = request->bytes;
            failure.got = got;
            atomic_store_explicit(&batch->failed, true, memory_order_relaxed);
            break;
        }
    }
    return failure;
}

static void *work(void *argument)
{
    mf_pool *pool = argument;
    mf_bounce bounce = {NULL, 0};
#ifdef __APPLE__
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
#endif
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->head == NULL && !pool->stopping) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        mf_batch *batch = pool->head;
        if (batch == NULL)
            break;
        /* Guided self-scheduling: many at first, so that the lock is not taken once per read, and one at a time near
         * the end, so that no thread is left with a queue of its own. */
        int64_t count = (batch->nrequests - batch->taken) / (2 * pool->nthreads);
        count = count < 1 ? 1 : count > MF_MOST_TAKEN ? MF_MOST_TAKEN : count;
        int64_t first = batch->taken;
        batch->taken += count;
        if (batch->taken == batch->nrequests) {
            pool->head = batch->next;
            if (pool->head == NULL)
                pool->tail = NULL;
        }
        int sleeping = pool->head == NULL ? 0 : pool->idle;
        pthread_mutex_unlock(&pool->lock);
        wake(pool, sleeping);

        mf_result failure = serve(batch, first, count, &bounce);

        pthread_mutex_lock(&pool->lock);
        if (failure.code != 0 && batch->result.code == 0) {
            failure.bytes = batch->result.bytes;
            batch->result = failure;
        }
        batch->unfinished -= count;
        if (batch->unfinished == 0)
            finish_batch(pool, batch);
    }
    pthread_mutex_unlock(&pool->lock);
    free(bounce.memory);
    return NULL;
}

int64_t mf_abi(void)
{
    return MF_ABI;
}

/* Finishes what was submitted and ends the threads. Every batch must have been waited for, or is lost. */
void mf_pool_free(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->nthreads; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* NULL if memory or threads are lacking. */
mf_pool *mf_pool_new(int64_t threads)
{
    mf_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof pool->threads[0]);
    if (pool == NULL)
        return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    /* The threads inherit the mask: the host program's signals are for its own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 0;
    /* No request comes before this returns, so no thread uses nthreads while it is being counted. */
    while (started < threads && pthread_create(&pool->threads[started], NULL, work, pool) == 0)
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool->nthreads = started;
    if (started < threads) {
        mf_pool_free(pool);
        return NULL;
    }
    return pool;
}

static void free_batch(mf_batch *batch)
{
    free(batch->requests);
    free(batch->iovecs);
    free(batch);
}

/* Starts reading and returns at once; NULL if memory is lacking.
 *
 * requests: triples (file offset, index of the first iovec, number of iovecs). iovecs: pairs (address, length), every
 * length above zero. Both are copied. alignment: what offset, address and length must be multiples of for a read that
 * goes straight to its destination; 0 or 1 if nothing is demanded. */
mf_batch *mf_submit(mf_pool *pool, int fd, int64_t alignment, const int64_t *requests, int64_t nrequests,
                    const int64_t *iovecs, int64_t niovecs)
{
    if (alignment < 1)
        alignment = 1;
    mf_batch *batch = calloc(1, sizeof *batch);
    if (batch == NULL)
        return NULL;
    batch->requests = malloc((size_t)(nrequests + 1) * sizeof(mf_request)); /* + 1: malloc(0) may be NULL */
    batch->iovecs = malloc((size_t)(niovecs + 1) * sizeof(struct iovec));
    if (batch->requests == NULL || batch->iovecs == NULL) {
        free_batch(batch);
        return NULL;
    }
    batch->fd = fd;
    batch->alignment = alignment;
    batch->nrequests = batch->unfinished = nrequests;
    atomic_init(&batch->failed, false);
    for (int64_t i = 0; i < niovecs; i++) {
        batch->iovecs[i].iov_base = (void *)(intptr_t)iovecs[2 * i];
        batch->iovecs[i].iov_len = (size_t)iovecs[2 * i + 1];
    }
    for (int64_t i = 0; i < nrequests; i++) {
        mf_request *request = &batch->requests[i];
        request->offset = requests[3 * i];
        request->iovecs = batch->iovecs + requests[3 * i + 1];
        request->niovecs = requests[3 * i + 2];
        request->bytes = 0;
        request->bounce = request->offset % alignment != 0;
        for (int64_t j = 0; j < request->niovecs; j++) {
            int64_t length = (int64_t)request->iovecs[j].iov_len;
            request->bytes += length;
            if ((intptr_t)request->iovecs[j].iov_base % alignment != 0 || length % alignment != 0)
                request->bounce = true;
        }
        int64_t head = request->offset % alignment;
        batch->result.bytes += (head + request->bytes + alignment - 1) / alignment * alignment;
    }

    pthread_mutex_lock(&pool->lock);
    batch->submitted_ns = now_ns();
    if (nrequests == 0) {
        batch->done = true;
    } else {
        if (pool->tail != NULL)
            pool->tail->next = batch;
        else
            pool->head = batch;
        pool->tail = batch;
    }
    pthread_mutex_unlock(&pool->lock);
    wake(pool, nrequests);
    return batch;
}

/* Waits until every request of the batch was read or skipped, and frees the batch. */
void mf_wait(mf_pool *pool, mf_batch *batch, mf_result *result)
{
    pthread_mutex_lock(&pool->lock);
    while (!batch->done)
        pthread_cond_wait(&pool->done, &pool->lock);
    *result = batch->result;
    pthread_mutex_unlock(&pool->lock);
    free_batch(batch);
}
