/* A library to preload. It lets the reads of a process pass at a fixed number of bytes per second.
 *
 * Every preadv takes its turn: it may return when a disk of that rate, which serves one read after the other, would have
 * served it and all reads before it, and not before a latency has passed. A read that the real disk serves later than
 * that is not delayed. Reads through the page cache may be let through, as if all of the file were in it. pacing.py
 * builds the library and sets the rate; a process whose environment has PACED_BYTES_PER_SECOND begins with that rate.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t bytes_per_second; /* 0: not paced */
static int64_t latency_ns;       /* of each read; several wait at once */
static int only_direct;          /* whether reads through the page cache are let through */
static int64_t free_at_ns; /* when the disk would have served all reads that have begun */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void paced_set(int64_t rate, int64_t latency, int direct)
{
    pthread_mutex_lock(&lock);
    bytes_per_second = rate;
    latency_ns = latency;
    only_direct = direct;
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void begin(void)
{
    const char *rate = getenv("PACED_BYTES_PER_SECOND");
    if (rate != NULL)
        paced_set(atoll(rate), 0, 0);
}

/* Returns when a read of so many bytes, which begins now, may return; 0 if it is not paced. */
static int64_t turn(int fd, int64_t bytes)
{
    pthread_mutex_lock(&lock);
    int64_t now = now_ns(), end = 0;
    if (bytes_per_second > 0 && (!only_direct || fcntl(fd, F_GETFL) & O_DIRECT)) {
        int64_t begin = free_at_ns > now ? free_at_ns : now;
        end = free_at_ns = begin + (int64_t)((double)bytes * 1e9 / (double)bytes_per_second);
        end = end > now + latency_ns ? end : now + latency_ns;
    }
    pthread_mutex_unlock(&lock);
    return end;
}

static ssize_t paced(ssize_t (*real)(int, const struct iovec *, int, off_t), int fd, const struct iovec *iovecs,
                     int count, off_t offset)
{
    int64_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += (int64_t)iovecs[i].iov_len;
    int64_t end = turn(fd, bytes);
    ssize_t result = real(fd, iovecs, count, offset);
    int before = errno;
    struct timespec until = {end / 1000000000, end % 1000000000};
    while (end > 0 && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
    errno = before;
    return result;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t preadv(int fd, const struct iovec *iovecs, int count, off_t offset)
{
    REAL(preadv);
    return paced(real, fd, iovecs, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *iovecs, int count, off64_t offset)
{
    REAL(preadv64);
    return paced(real, fd, iovecs, count, offset);
}
