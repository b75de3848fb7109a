/* Runs the reader's threads on random and on hostile tables. sanitizers.sh builds it with the compiler's sanitizers.
 * Usage: reader_stress SECONDS SEED FILE. The exit code is 1 if a byte or a verdict is wrong.
 *
 * For pools of 1 to 24 threads, several submitters at once send batches of every form (merged, cut, bounced, direct,
 * empty), with right or wrong checks. The file's reads are cut short at odd places. Some batches are waited for, some
 * twice or by two threads, and some are drained instead. The number of threads that read changes meanwhile. Hostile
 * tables must be refused.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../mlx_flash/flash/batch.h"
#include "../../mlx_flash/flash/crc32.h"

typedef struct mf_pool mf_pool;
mf_pool *mf_pool_new(int64_t threads, int64_t working);
void mf_use_threads(mf_pool *pool, int64_t threads);
void mf_pool_free(mf_pool *pool);
void mf_pool_stop(mf_pool *pool);
void mf_drain(mf_pool *pool);
int64_t mf_outstanding(mf_pool *pool);
int64_t mf_submit(mf_pool *pool, int64_t number, int fd, int64_t alignment, const int64_t *requests, int64_t nrequests,
                  const int64_t *iovecs, int64_t niovecs, const int64_t *checks, int64_t nchecks);
int64_t mf_wait(mf_pool *pool, int64_t number, mf_result *result);
void shorter_set(int64_t wanted);

enum { FILE_BYTES = 1 << 20, MOST_REQUESTS = 24, MOST_IOVECS = 96, ROOM = 1 << 18, SUBMITTERS = 3 };

static unsigned char contents[FILE_BYTES];
static int direct_fd, plain_fd;
static atomic_llong numbers = 1, batches, right, wrong_sums, drained, refused, reads;

typedef struct {
    mf_pool *pool;
    unsigned seed;
    time_t until;
} task;

static unsigned below(unsigned *seed, unsigned bound)
{
    return (unsigned)rand_r(seed) % bound;
}

static void fail(const char *what)
{
    fprintf(stderr, "reader_stress: %s\n", what);
    exit(1);
}

/* Makes a batch of random requests into `room`, with checks. The check `spoilt` (-1: none) expects another sum. */
static int64_t make_batch(unsigned *seed, unsigned char *room, int64_t *requests, int64_t *iovecs, int64_t *checks,
                          int64_t *counts, unsigned char *expected, bool *spoilt, int64_t alignment)
{
    int64_t nrequests = below(seed, MOST_REQUESTS + 1), niovecs = 0, nchecks = 0, at = 0;
    int64_t unit = alignment > 1 && below(seed, 3) ? 4096 : 1 + below(seed, 700);
    *spoilt = false;
    int64_t done = 0;
    for (; done < nrequests; done++) {
        int64_t count = 1 + below(seed, 4), bytes = 0;
        int64_t offset = (int64_t)below(seed, FILE_BYTES / 2) / unit * unit;
        if (niovecs + count > MOST_IOVECS || at + count * unit > ROOM - 8192)
            break;
        requests[3 * done] = offset;
        requests[3 * done + 1] = niovecs;
        requests[3 * done + 2] = count;
        for (int64_t i = 0; i < count; i++) {
            iovecs[2 * niovecs] = (int64_t)(intptr_t)(room + at);
            iovecs[2 * niovecs + 1] = unit;
            memcpy(expected + at, contents + offset + bytes, (size_t)unit);
            bytes += unit;
            at += unit;
            niovecs++;
        }
    }
    /* All destinations are adjacent in `room`, so a check may span destinations and requests. */
    for (int64_t from = 0; from < at;) {
        int64_t length = 1 + below(seed, (unsigned)(3 * unit));
        if (length > at - from)
            length = at - from;
        if (below(seed, 4)) {
            uint32_t sum = mf_crc32(0, expected + from, (size_t)length);
            if (below(seed, 200) == 0) {
                sum ^= 1u << below(seed, 32);
                *spoilt = true;
            }
            checks[3 * nchecks] = from;
            checks[3 * nchecks + 1] = length;
            checks[3 * nchecks + 2] = sum;
            nchecks++;
        }
        from += length;
    }
    counts[0] = done;
    counts[1] = niovecs;
    counts[2] = nchecks;
    return at;
}

typedef struct {
    mf_pool *pool;
    int64_t number;
} second;

static void *wait_too(void *argument)
{
    second *same = argument;
    mf_result result;
    mf_wait(same->pool, same->number, &result);
    return NULL;
}

static void hostile(unsigned *seed, mf_pool *pool, unsigned char *room)
{
    const int64_t wild[] = {-1, INT64_MIN, INT64_MAX, (int64_t)1 << 61, -4096, INT64_MAX - 4095, 7};
    int64_t value = wild[below(seed, 7)], here = (int64_t)(intptr_t)room;
    int64_t request[3] = {0, 0, 1}, iovec[2] = {here, 512}, check[3] = {0, 512, 0};
    int64_t nrequests = 1, niovecs = 1, nchecks = 1, alignment = 1;
    unsigned kind = below(seed, 11);
    if (value == 7 && (kind == 0 || kind == 3 || kind == 5 || kind == 6 || kind == 10))
        value = -7; /* 7 would be allowed there */
    switch (kind) {
    case 0: request[0] = value; break;
    case 1: request[1] = value; break;
    case 2: request[2] = value; break;
    case 3: iovec[1] = value; break;
    case 4: iovec[0] = value == 7 ? 0 : value < 0 ? value : INT64_MAX; break;
    case 5: check[0] = value; break;
    case 6: check[1] = value; break;
    case 7: check[2] = value == 7 ? -7 : value; break;
    case 8: nrequests = value < 0 ? value : INT64_MAX; break;
    case 9: niovecs = value < 0 ? value : INT64_MAX; break;
    default: alignment = value; break;
    }
    int64_t number = atomic_fetch_add(&numbers, 1);
    int64_t code = mf_submit(pool, number, plain_fd, alignment, request, nrequests, iovec, niovecs, check, nchecks);
    if (code == 0) {
        fprintf(stderr, "kind %u value %lld\n", kind, (long long)value);
        fail("a hostile table was taken");
    }
    atomic_fetch_add(&refused, 1);
}

static void *submit_random(void *argument)
{
    task *own = argument;
    unsigned char *memory, *room, *expected = malloc(ROOM);
    int64_t requests[3 * MOST_REQUESTS], iovecs[2 * MOST_IOVECS], counts[3];
    int64_t *checks = malloc(3 * ROOM * sizeof *checks);
    if (posix_memalign((void **)&memory, 4096, ROOM + 4096) != 0 || expected == NULL || checks == NULL)
        fail("no memory");
    while (time(NULL) < own->until) {
        bool direct = below(&own->seed, 2), spoilt;
        int64_t alignment = direct ? 4096 : below(&own->seed, 2);
        room = memory + (below(&own->seed, 3) ? 0 : below(&own->seed, 4096));
        memset(memory, 0xAB, ROOM + 4096);
        int64_t used =
            make_batch(&own->seed, room, requests, iovecs, checks, counts, expected, &spoilt, alignment);
        int64_t number = atomic_fetch_add(&numbers, 1);
        int64_t code = mf_submit(own->pool, number, direct ? direct_fd : plain_fd, alignment, requests, counts[0],
                                 iovecs, counts[1], checks, counts[2]);
        if (code != 0)
            fail("a sound table was refused");
        atomic_fetch_add(&batches, 1);
        atomic_fetch_add(&reads, counts[0]);
        if (below(&own->seed, 16) == 0)
            hostile(&own->seed, own->pool, room);
        if (below(&own->seed, 12) == 0) {
            mf_drain(own->pool); /* also drains the other submitters' batches; their mf_wait then reports that */
            mf_result result;
            if (mf_wait(own->pool, number, &result) != MF_NO_BATCH)
                fail("a drained batch was still there");
            atomic_fetch_add(&drained, 1);
            if (!spoilt && memcmp(room, expected, (size_t)used) != 0)
                fail("wrong bytes after a drain");
            continue;
        }
        pthread_t thread;
        second same = {own->pool, number};
        bool twice = below(&own->seed, 8) == 0 && pthread_create(&thread, NULL, wait_too, &same) == 0;
        mf_result result;
        code = mf_wait(own->pool, number, &result);
        if (twice)
            pthread_join(thread, NULL);
        if (code == MF_NO_BATCH)
            continue; /* another submitter drained it, or the other thread took it */
        if (spoilt ? result.code != MF_WRONG_SUM : result.code != 0)
            fail("a wrong verdict");
        if (spoilt) {
            if (result.found == result.expected || result.offset < 0 || result.offset + result.wanted > FILE_BYTES)
                fail("a wrong report");
            atomic_fetch_add(&wrong_sums, 1);
        } else if (memcmp(room, expected, (size_t)used) != 0 || room[used] != 0xAB) {
            fail("wrong bytes");
        } else {
            atomic_fetch_add(&right, 1);
        }
        if (mf_wait(own->pool, number, &result) != MF_NO_BATCH)
            fail("a batch was waited for twice");
    }
    free(memory);
    free(expected);
    free(checks);
    return NULL;
}

int main(int count, char **arguments)
{
    if (count != 4)
        fail("usage: reader_stress SECONDS SEED FILE");
    int seconds = atoi(arguments[1]);
    unsigned seed = (unsigned)atoi(arguments[2]);
    for (size_t i = 0; i < FILE_BYTES; i++)
        contents[i] = (unsigned char)rand_r(&seed);
    int fd = open(arguments[3], O_CREAT | O_TRUNC | O_RDWR, 0600);
    if (fd < 0 || write(fd, contents, FILE_BYTES) != FILE_BYTES || fsync(fd) != 0)
        fail("the file cannot be written");
    plain_fd = fd;
#ifdef O_DIRECT
    direct_fd = open(arguments[3], O_RDONLY | O_DIRECT);
#endif
    if (direct_fd <= 0)
        direct_fd = open(arguments[3], O_RDONLY);
    shorter_set(1);
    time_t end = time(NULL) + seconds;
    int pools = 0;
    for (; time(NULL) < end; pools++) {
        int threads = 1 + 7 * pools % 24; /* 1, 8, 15, 22, 5, ... */
        mf_pool *pool = mf_pool_new(threads, (threads + 1) / 2);
        if (pool == NULL)
            fail("no pool");
        pthread_t submitters[SUBMITTERS];
        task tasks[SUBMITTERS];
        for (int i = 0; i < SUBMITTERS; i++) {
            tasks[i] = (task){pool, seed + (unsigned)(31 * pools + i), time(NULL) + 1};
            if (pthread_create(&submitters[i], NULL, submit_random, &tasks[i]) != 0)
                fail("no thread");
        }
        for (int change = 0; change < 50; change++) {
            mf_use_threads(pool, 1 + below(&seed, (unsigned)threads));
            usleep(10000);
        }
        for (int i = 0; i < SUBMITTERS; i++)
            pthread_join(submitters[i], NULL);
        if (mf_outstanding(pool) != 0)
            fail("something is still under way");
        if (pools % 2)
            mf_pool_stop(pool);
        mf_pool_free(pool);
    }
    printf("%d pools of 1 to 24 threads, %lld batches with %lld requests: %lld right, %lld wrong sums found, "
           "%lld drained; %lld hostile tables refused\n",
           pools, (long long)batches, (long long)reads, (long long)right, (long long)wrong_sums, (long long)drained,
           (long long)refused);
    return 0;
}
