/* A pool of threads that read ranges of files straight into memory, with several reads in flight, and verify checksums.
 *
 * This is plain C, because Python threads reach the disk's rate only while the main thread is idle. It links to neither
 * Python nor MLX, so it works with every version of both. reader.py is its only caller. reader.py also bounds the size
 * of a request, and with it the size of a bounce buffer.
 *
 * A request is one contiguous range of a file, scattered in order over a run of destinations. Batches of requests are
 * served first in, first out, and several may be outstanding. The submitter chooses a batch's number, so that it knows
 * the number before any read starts. A batch stays in the pool until it is waited for or drained.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "batch.h"
#include "requests.h"

#ifdef __APPLE__
#include <pthread/qos.h>
#endif

/* Increase this whenever a signature or a table changes, so that reader.py refuses a library of another version. */
#define MF_ABI 5

#define MF_MOST_TAKEN 64 /* most requests that a thread takes at once */
#define MF_MOST_THREADS 4096
#define MF_PAGE 16384      /* bytes; at least a page of memory and a block of a disk */
#define MF_BOUNCE (2 << 20) /* bytes for each thread: a huge page, since reads into small pages are half as fast */

typedef struct {
    pthread_mutex_t lock; /* protects this struct and each batch's links, taken, unfinished, done, waiting and result */
    pthread_cond_t work;
    pthread_cond_t parked; /* for the threads beyond the first nworking, so that none of them takes a signal of `work` */
    pthread_cond_t done;
    mf_batch *batches; /* batches that were not waited for */
    int64_t unfinished; /* number of those batches that are not done */
    mf_batch *head; /* queue of batches with requests that no thread has taken yet */
    mf_batch *tail;
    int64_t last_done_ns;
    int nthreads;
    int nworking; /* the threads with a lower number read */
    int nnumbered; /* threads that have taken their number */
    char *bounce;  /* the bounce memory, which the working threads share out evenly; untouched until it is needed */
    size_t bounce_size;
    int idle;
    bool stopping;
    pthread_t threads[];
} mf_pool;

#ifdef __APPLE__
#define AWAKE_CLOCK CLOCK_UPTIME_RAW /* stops while the machine sleeps, as Python's clocks do */
#else
#define AWAKE_CLOCK CLOCK_MONOTONIC
#endif

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(AWAKE_CLOCK, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* -- the threads ------------------------------------------------------------------------------------------------ */

/* Wakes at most two threads; the caller does not hold the lock. Each of them wakes two more if work is left. Waking a
 * thread costs as much as a small read, and the submitter's time matters most, so the submitter does not wake them all.
 */
static void wake(mf_pool *pool, int64_t sleeping)
{
    for (int64_t i = 0; i < sleeping && i < 2; i++)
        pthread_cond_signal(&pool->work);
}

/* The caller holds the lock. */
static void finish_batch(mf_pool *pool, mf_batch *batch)
{
    int64_t now = now_ns();
    int64_t from = batch->submitted_ns > pool->last_done_ns ? batch->submitted_ns : pool->last_done_ns;
    batch->result.busy_ns = now > from ? now - from : 0;
    pool->last_done_ns = now;
    batch->done = true;
    pool->unfinished--;
    pthread_cond_broadcast(&pool->done);
}

/* Takes requests of the first batch in the queue, reads them and verifies them. The caller holds the lock, which is free
 * meanwhile. number: the thread's, below nworking; -1 for a thread that has no part of the bounce memory. */
static void serve(mf_pool *pool, int number)
{
    mf_batch *batch = pool->head;
    /* Guided self-scheduling. At first a thread takes many requests, so that it does not take the lock for every read.
     * Near the end it takes one at a time, so that no thread is left with a queue of its own. */
    int64_t count = (batch->nrequests - batch->taken) / (2 * pool->nworking);
    count = count < 1 ? 1 : count > MF_MOST_TAKEN ? MF_MOST_TAKEN : count;
    int64_t first = batch->taken;
    batch->taken += count;
    if (batch->taken == batch->nrequests) {
        pool->head = batch->next_to_do;
        if (pool->head == NULL)
            pool->tail = NULL;
    }
    int sleeping = pool->head == NULL ? 0 : pool->idle;
    size_t share = number < 0 ? 0 : pool->bounce_size / (size_t)pool->nworking / MF_PAGE * MF_PAGE;
    mf_bounce bounce = {number < 0 ? NULL : pool->bounce + share * (size_t)number, share};
    pthread_mutex_unlock(&pool->lock);
    wake(pool, number < 0 ? 0 : sleeping);

    mf_result failure = mf_batch_serve(batch, first, count, &bounce);

    pthread_mutex_lock(&pool->lock);
    if (failure.code != 0 && batch->result.code == 0) {
        failure.bytes = batch->result.bytes;
        failure.requests = batch->result.requests;
        batch->result = failure;
    }
    batch->unfinished -= count;
    if (batch->unfinished == 0)
        finish_batch(pool, batch);
}

static void *work(void *argument)
{
    mf_pool *pool = argument;
#ifdef __APPLE__
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
#endif
    pthread_mutex_lock(&pool->lock);
    int number = pool->nnumbered++;
    for (;;) {
        if (number >= pool->nworking && !pool->stopping) {
            pthread_cond_wait(&pool->parked, &pool->lock);
        } else if (pool->head == NULL && !pool->stopping) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        } else if (pool->head == NULL || number >= pool->nworking) {
            break;
        } else {
            serve(pool, number);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

int64_t mf_abi(void)
{
    return MF_ABI;
}

/* -- batches ---------------------------------------------------------------------------------------------------- */

/* Frees the batches that are done and that no thread waits for. The caller holds the lock. */
static void free_done(mf_pool *pool)
{
    for (mf_batch **link = &pool->batches; *link != NULL;) {
        mf_batch *batch = *link;
        if (batch->done && batch->waiting == 0) {
            *link = batch->next;
            mf_batch_free(batch);
        } else {
            link = &batch->next;
        }
    }
}

/* Returns the batch with this number, or NULL. The caller holds the lock. */
static mf_batch *find_batch(mf_pool *pool, int64_t number)
{
    mf_batch *batch = pool->batches;
    while (batch != NULL && batch->number != number)
        batch = batch->next;
    return batch;
}

/* Starts reading and returns at once: 0, ENOMEM, MF_BAD_TABLE or MF_STOPPED. Unless it returns 0, no read has started.
 *
 * number: the batch's number, used once. requests: triples (file offset, index of the first iovec, number of iovecs).
 * iovecs: pairs (address, length). checks: triples (position in the concatenated bytes of all requests, length,
 * CRC-32), ascending. The bytes of a check must be contiguous in memory; they are verified once they are in place. All
 * tables are copied. alignment: offset, address and length must be multiples of it for a read that goes straight to its
 * destination; 0 or 1 if there is no such condition. */
int64_t mf_submit(mf_pool *pool, int64_t number, int fd, int64_t alignment, const int64_t *requests, int64_t nrequests,
                  const int64_t *iovecs, int64_t niovecs, const int64_t *checks, int64_t nchecks)
{
    mf_batch *batch;
    int64_t code = mf_batch_new(fd, alignment, requests, nrequests, iovecs, niovecs, checks, nchecks, &batch);
    if (code != 0)
        return code;
    batch->number = number;

    pthread_mutex_lock(&pool->lock);
    if (pool->stopping || find_batch(pool, number) != NULL) {
        code = pool->stopping ? MF_STOPPED : MF_BAD_TABLE;
        pthread_mutex_unlock(&pool->lock);
        mf_batch_free(batch);
        return code;
    }
    batch->submitted_ns = now_ns();
    batch->next = pool->batches;
    pool->batches = batch;
    if (nrequests == 0) {
        batch->done = true;
    } else {
        pool->unfinished++;
        if (pool->tail != NULL)
            pool->tail->next_to_do = batch;
        else
            pool->head = batch;
        pool->tail = batch;
    }
    pthread_mutex_unlock(&pool->lock);
    wake(pool, nrequests);
    return 0;
}

/* Plans the requests of `n` segments of a file and submits them. Returns as mf_submit, or MF_OUTSIDE.
 *
 * offsets, addresses, lengths: (n,), in bytes. checks: as for mf_submit; a position counts the bytes of all segments. */
int64_t mf_submit_segments(mf_pool *pool, int64_t number, int fd, const mf_rules *rules, const int64_t *offsets,
                           const int64_t *addresses, const int64_t *lengths, int64_t n, const int64_t *checks,
                           int64_t nchecks)
{
    int64_t niovecs = mf_count_iovecs(offsets, lengths, n, rules);
    if (niovecs < 0)
        return niovecs;
    int64_t *tables = calloc((size_t)niovecs + 1, 5 * sizeof *tables);
    if (tables == NULL)
        return ENOMEM;
    int64_t *requests = tables, *iovecs = tables + 3 * niovecs;
    int64_t nrequests = mf_plan(offsets, addresses, lengths, n, rules, requests, iovecs);
    int64_t code = mf_submit(pool, number, fd, rules->alignment, requests, nrequests, iovecs, niovecs, checks, nchecks);
    free(tables);
    return code;
}

/* Waits until every request of the batch is read or skipped, then frees the batch. Returns 0 or MF_NO_BATCH. */
int64_t mf_wait(mf_pool *pool, int64_t number, mf_result *result)
{
    pthread_mutex_lock(&pool->lock);
    mf_batch *batch = find_batch(pool, number);
    if (batch == NULL) {
        pthread_mutex_unlock(&pool->lock);
        return MF_NO_BATCH;
    }
    batch->waiting++;
    while (!batch->done) {
        /* Reads through the page cache may end before another thread wakes up, and never need bounce memory. */
        if (pool->head == batch && batch->alignment == 1)
            serve(pool, -1);
        else
            pthread_cond_wait(&pool->done, &pool->lock);
    }
    batch->waiting--;
    *result = batch->result;
    if (batch->waiting == 0) {
        mf_batch **link = &pool->batches;
        while (*link != batch)
            link = &(*link)->next;
        *link = batch->next;
        mf_batch_free(batch);
    }
    pthread_mutex_unlock(&pool->lock);
    return 0;
}

/* Waits until every submitted batch is done, including those that the caller does not know, and frees all batches that
 * no thread waits for. */
void mf_drain(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->unfinished > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    free_done(pool);
    pthread_mutex_unlock(&pool->lock);
}

/* Returns the number of batches that were submitted and not waited for. */
int64_t mf_outstanding(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    int64_t count = 0;
    for (const mf_batch *batch = pool->batches; batch != NULL; batch = batch->next)
        count++;
    pthread_mutex_unlock(&pool->lock);
    return count;
}

/* -- the pool --------------------------------------------------------------------------------------------------- */

/* Waits until no read is in flight, and lets the first `threads` threads read from then on: at least one, at most all.
 * They share out the bounce memory anew, so a request may need at most that part of it. */
void mf_use_threads(mf_pool *pool, int64_t threads)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->unfinished > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    pool->nworking = threads < 1 ? 1 : threads > pool->nthreads ? pool->nthreads : (int)threads;
    /* All wake up, because the one that a signal has woken may be one that must not read any more. */
    pthread_cond_broadcast(&pool->work);
    pthread_cond_broadcast(&pool->parked);
    pthread_mutex_unlock(&pool->lock);
}

/* Finishes all submitted reads and ends the threads; mf_submit then returns MF_STOPPED. May be called again. */
void mf_pool_stop(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    bool stopped = pool->stopping;
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_cond_broadcast(&pool->parked);
    pthread_mutex_unlock(&pool->lock);
    if (stopped)
        return;
    for (int i = 0; i < pool->nthreads; i++)
        pthread_join(pool->threads[i], NULL);
    mf_drain(pool);
}

/* Stops and frees the pool. The pool must not be used afterwards. */
void mf_pool_free(mf_pool *pool)
{
    mf_pool_stop(pool);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->parked);
    pthread_mutex_destroy(&pool->lock);
    free(pool->bounce);
    free(pool);
}

/* Starts `threads` threads, of which the first `working` read, with bounce memory for so many. Returns NULL if a number
 * is out of range, or if memory or threads are lacking. */
mf_pool *mf_pool_new(int64_t threads, int64_t working)
{
    if (threads < 1 || threads > MF_MOST_THREADS || working < 1 || working > threads)
        return NULL;
    mf_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof pool->threads[0]);
    if (pool == NULL)
        return NULL;
    void *bounce;
    pool->bounce_size = (size_t)working * MF_BOUNCE;
    if (posix_memalign(&bounce, MF_BOUNCE, pool->bounce_size) != 0) {
        free(pool);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(bounce, pool->bounce_size, MADV_HUGEPAGE); /* only advice: if the kernel ignores it, reads are slower */
#endif
    pool->bounce = bounce;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->parked, NULL);
    pthread_cond_init(&pool->done, NULL);
    /* The threads inherit this mask, so that the host program's own threads receive its signals. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 0;
    pool->nworking = (int)working;
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
