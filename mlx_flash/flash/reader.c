/* A pool of threads that read ranges of files straight into memory, several reads in flight at once, and compare what
 * came with checksums.
 *
 * Plain C without Python and without MLX: Python threads reach the disk's rate only while the main thread is idle,
 * and a library that links to neither works with every version of both. reader.py is its only caller and bounds the
 * size of a request, and with it the size of a bounce buffer.
 *
 * A request is one contiguous range of a file, scattered in order over a run of destinations. Batches of requests are
 * served first in, first out; several may be outstanding. A batch has a number that its submitter chose, so that the
 * submitter knows it before there is a read to forget. A batch is kept here until it was waited for.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "batch.h"

#ifdef __APPLE__
#include <pthread/qos.h>
#endif

/* Raised whenever a signature or a table changes, so that a library left over from another version is refused. */
#define MF_ABI 2

#define MF_MOST_TAKEN 64 /* requests that one thread takes at once */
#define MF_MOST_THREADS 4096

typedef struct {
    pthread_mutex_t lock; /* over everything here and over a batch's links, taken, unfinished, done, waiting, result */
    pthread_cond_t work;
    pthread_cond_t done;
    mf_batch *batches; /* that were not waited for */
    int64_t unfinished; /* of them */
    mf_batch *head; /* those with requests that no thread has taken yet */
    mf_batch *tail;
    int64_t last_done_ns;
    int nthreads;
    int idle;
    bool stopping;
    pthread_t threads[];
} mf_pool;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* -- the threads ------------------------------------------------------------------------------------------------ */

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
    pool->unfinished--;
    pthread_cond_broadcast(&pool->done);
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
            pool->head = batch->next_to_do;
            if (pool->head == NULL)
                pool->tail = NULL;
        }
        int sleeping = pool->head == NULL ? 0 : pool->idle;
        pthread_mutex_unlock(&pool->lock);
        wake(pool, sleeping);

        mf_result failure = mf_batch_serve(batch, first, count, &bounce);

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

/* -- batches ---------------------------------------------------------------------------------------------------- */

/* Under the lock: what is done and nobody waits for. */
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

/* Under the lock; NULL if there is none. */
static mf_batch *find_batch(mf_pool *pool, int64_t number)
{
    mf_batch *batch = pool->batches;
    while (batch != NULL && batch->number != number)
        batch = batch->next;
    return batch;
}

/* Starts reading and returns at once: 0, ENOMEM, MF_BAD_TABLE or MF_STOPPED; nothing was begun unless it is 0.
 *
 * number: of the batch, used once. requests: triples (file offset, index of the first iovec, number of iovecs). iovecs:
 * pairs (address, length). checks: triples (where in the bytes of all requests, one behind the other; length; CRC-32),
 * ascending, each of bytes that end up side by side; they are compared once they are in place. All tables are copied.
 * alignment: what offset, address and length must be multiples of for a read that goes straight to its destination; 0
 * or 1 if nothing is demanded. */
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

/* Waits until every request of the batch was read or skipped, and forgets the batch. 0, or MF_NO_BATCH. */
int64_t mf_wait(mf_pool *pool, int64_t number, mf_result *result)
{
    pthread_mutex_lock(&pool->lock);
    mf_batch *batch = find_batch(pool, number);
    if (batch == NULL) {
        pthread_mutex_unlock(&pool->lock);
        return MF_NO_BATCH;
    }
    batch->waiting++;
    while (!batch->done)
        pthread_cond_wait(&pool->done, &pool->lock);
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

/* Waits until nothing that was submitted is unfinished, whoever knows of it, and forgets all of it. */
void mf_drain(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->unfinished > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    free_done(pool);
    pthread_mutex_unlock(&pool->lock);
}

/* Batches that were submitted and not waited for. */
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

/* Finishes what was submitted and ends the threads; from then on mf_submit refuses. May be called again. */
void mf_pool_stop(mf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    bool stopped = pool->stopping;
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    if (stopped)
        return;
    for (int i = 0; i < pool->nthreads; i++)
        pthread_join(pool->threads[i], NULL);
    mf_drain(pool);
}

/* Nobody may use the pool any more. */
void mf_pool_free(mf_pool *pool)
{
    mf_pool_stop(pool);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* NULL if memory or threads are lacking. */
mf_pool *mf_pool_new(int64_t threads)
{
    if (threads < 1 || threads > MF_MOST_THREADS)
        return NULL;
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
