/* A preadv that returns less than requested, for a reader built with -Dpreadv=shorter_preadv. */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

static atomic_int mode; /* 0: unchanged; 1: sometimes an odd part; 2: nothing */
static _Thread_local unsigned calls; /* counted per thread, so that no thread gets only short reads */

void shorter_set(int64_t wanted)
{
    mode = (int)wanted;
}

ssize_t shorter_preadv(int fd, const struct iovec *iovecs, int count, off_t offset)
{
    unsigned call = calls++;
    if (mode == 1 && call % 7 == 3) {
        errno = EINTR;
        return -1;
    }
    ssize_t n = preadv(fd, iovecs, count, offset);
    if (n <= 0)
        return n;
    if (mode == 1 && call % 3 != 2)
        return 1 + (ssize_t)((call * 2654435761u) % (unsigned)n);
    return mode == 2 ? 0 : n;
}
