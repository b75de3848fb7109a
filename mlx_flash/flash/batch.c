/* Reads the requests of a batch, verifies their checksums and rejects invalid tables. */
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "crc32.h"

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

#define MF_MOST_ALIGNMENT (2 << 20) /* bytes */
#define MF_MOST ((int64_t)1 << 60) /* upper bound of offsets, lengths and counts: a sum of a few cannot overflow */
#define MF_MOST_FRUITLESS 8        /* consecutive reads without a usable byte, after which the request fails */

/* -- reading and comparing -------------------------------------------------------------------------------------- */

/* Reads into the iovecs until `need` bytes are in place. The iovecs may have room for more; this modifies them. */
static int64_t read_range(int fd, struct iovec *iovecs, int64_t niovecs, int64_t offset, int64_t need,
                          int64_t alignment, int64_t *got)
{
    int fruitless = 0;
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
        /* A direct read can only continue at a multiple of the alignment. Bytes past the last one are read again. */
        int64_t advance = n - n % alignment;
        if (advance == 0) {
            struct stat status;
            if (fstat(fd, &status) != 0)
                return errno;
            bool at_the_end = offset + *got + n >= status.st_size;
            if (!at_the_end && ++fruitless < MF_MOST_FRUITLESS)
                continue;
            *got += n;
            return at_the_end ? MF_SHORT_READ : MF_WITHHELD;
        }
        fruitless = 0;
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

/* Reads the aligned range around the request into the thread's part of the bounce memory and copies the wanted bytes
 * out. */
static int64_t read_bounced(int fd, const mf_request *request, int64_t alignment, const mf_bounce *bounce,
                            int64_t *got)
{
    int64_t head = request->offset % alignment;
    size_t size = (size_t)((head + request->bytes + alignment - 1) / alignment * alignment);
    *got = 0;
    if (bounce->size < size)
        return ENOBUFS; /* reader.py sends no such request */
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

/* Verifies the checks that this request completes; called when its bytes are in place. The bytes may still be in the
 * processor's cache, and other threads wait for the disk meanwhile. */
static mf_result compare(mf_batch *batch, const mf_request *request)
{
    mf_result failure = {0};
    for (int64_t i = request->first_check; i < request->first_check + request->nchecks; i++) {
        mf_check *check = &batch->checks[i];
        if (atomic_fetch_sub_explicit(&check->missing, 1, memory_order_acq_rel) > 1)
            continue;
        uint32_t found = mf_crc32(0, check->address, (size_t)check->length);
        if (found != check->expected) {
            failure.code = MF_WRONG_SUM;
            failure.offset = check->offset;
            failure.wanted = failure.got = check->length;
            failure.expected = check->expected;
            failure.found = found;
            break;
        }
    }
    return failure;
}

mf_result mf_batch_serve(mf_batch *batch, int64_t first, int64_t count, const mf_bounce *bounce)
{
    mf_result failure = {0};
    for (int64_t i = first; i < first + count && failure.code == 0; i++) {
        if (atomic_load_explicit(&batch->failed, memory_order_relaxed))
            break;
        const mf_request *request = &batch->requests[i];
        int64_t got, code;
        if (request->bounce)
            code = read_bounced(batch->fd, request, batch->alignment, bounce, &got);
        else
            code = read_range(batch->fd, request->iovecs, request->niovecs, request->offset, request->bytes,
                              batch->alignment, &got);
        if (code == 0) {
            failure = compare(batch, request);
        } else {
            failure.code = code;
            failure.offset = request->offset;
            failure.wanted = request->bytes;
            failure.got = got;
        }
    }
    if (failure.code != 0)
        atomic_store_explicit(&batch->failed, true, memory_order_relaxed);
    return failure;
}

/* -- the tables ------------------------------------------------------------------------------------------------- */

void mf_batch_free(mf_batch *batch)
{
    free(batch->requests);
    free(batch->iovecs);
    free(batch->checks);
    free(batch);
}

static bool within(int64_t value, int64_t least, int64_t most)
{
    return least <= value && value <= most;
}

/* Records the address of every check that has bytes in this destination. check: the first check that may have some.
 * request: the request's index. from: bytes of the batch before this destination. Returns false if the bytes of a check
 * are not contiguous in memory. */
static bool place_checks(mf_batch *batch, mf_check *check, mf_check *end, int64_t request, int64_t from,
                         const struct iovec *iovec, int64_t offset)
{
    int64_t length = (int64_t)iovec->iov_len;
    for (; check < end && check->begin < from + length; check++) {
        int64_t skip = check->begin - from;
        const char *address = (const char *)((intptr_t)iovec->iov_base + skip);
        if (skip >= 0) {
            check->address = address;
            check->offset = offset + skip;
        } else if (check->address != address) {
            return false;
        }
        if (check->last_request != request) {
            check->last_request = request;
            atomic_fetch_add_explicit(&check->missing, 1, memory_order_relaxed);
            batch->requests[request].nchecks++;
        }
    }
    return true;
}

/* Fills the batch from the tables. Returns false if a table is invalid. */
static bool fill_batch(mf_batch *batch, const int64_t *requests, const int64_t *iovecs, int64_t niovecs,
                       const int64_t *checks, int64_t nchecks)
{
    int64_t alignment = batch->alignment;
    for (int64_t i = 0; i < niovecs; i++) {
        if (!within(iovecs[2 * i], 1, INT64_MAX - MF_MOST) || !within(iovecs[2 * i + 1], 1, MF_MOST))
            return false;
        batch->iovecs[i].iov_base = (void *)(intptr_t)iovecs[2 * i];
        batch->iovecs[i].iov_len = (size_t)iovecs[2 * i + 1];
    }
    int64_t end = 0;
    for (int64_t i = 0; i < nchecks; i++) {
        const int64_t *row = &checks[3 * i];
        if (!within(row[0], end, MF_MOST) || !within(row[1], 1, MF_MOST) || !within(row[2], 0, UINT32_MAX))
            return false;
        mf_check *check = &batch->checks[i];
        check->begin = row[0];
        check->length = row[1];
        check->expected = (uint32_t)row[2];
        check->last_request = -1;
        atomic_init(&check->missing, 0);
        end = row[0] + row[1];
    }
    int64_t position = 0; /* bytes of the batch so far */
    int64_t first_check = 0;
    for (int64_t i = 0; i < batch->nrequests; i++) {
        mf_request *request = &batch->requests[i];
        int64_t offset = requests[3 * i], first = requests[3 * i + 1], count = requests[3 * i + 2];
        if (!within(offset, 0, MF_MOST) || !within(first, 0, niovecs - 1) || !within(count, 1, niovecs - first))
            return false;
        while (first_check < nchecks && batch->checks[first_check].begin + batch->checks[first_check].length <= position)
            first_check++;
        request->offset = offset;
        request->iovecs = batch->iovecs + first;
        request->niovecs = count;
        request->bounce = offset % alignment != 0;
        request->first_check = first_check;
        mf_check *end_of_checks = batch->checks + nchecks, *check = batch->checks + first_check;
        for (int64_t j = 0; j < count; j++) {
            const struct iovec *iovec = &request->iovecs[j];
            int64_t length = (int64_t)iovec->iov_len;
            if ((intptr_t)iovec->iov_base % alignment != 0 || length % alignment != 0)
                request->bounce = true;
            if (length > MF_MOST - request->bytes || position > MF_MOST)
                return false;
            while (check < end_of_checks && check->begin + check->length <= position)
                check++;
            if (!place_checks(batch, check, end_of_checks, i, position, iovec, offset + request->bytes))
                return false;
            request->bytes += length;
            position += length;
        }
        int64_t read = (offset % alignment + request->bytes + alignment - 1) / alignment * alignment;
        if (read > MF_MOST - batch->result.bytes)
            return false;
        batch->result.bytes += read;
    }
    return end <= position; /* whether every check has all its bytes */
}

int64_t mf_batch_new(int fd, int64_t alignment, const int64_t *requests, int64_t nrequests, const int64_t *iovecs,
                     int64_t niovecs, const int64_t *checks, int64_t nchecks, mf_batch **made)
{
    const int64_t most = MF_MOST / (int64_t)sizeof(mf_check); /* entries in a table */
    if (!within(alignment, 0, MF_MOST_ALIGNMENT) || !within(nrequests, 0, most) || !within(niovecs, 0, most) ||
        !within(nchecks, 0, most))
        return MF_BAD_TABLE;
    mf_batch *batch = calloc(1, sizeof *batch);
    if (batch == NULL)
        return ENOMEM;
    batch->requests = calloc((size_t)nrequests + 1, sizeof(mf_request)); /* + 1: calloc(0) may return NULL */
    batch->iovecs = calloc((size_t)niovecs + 1, sizeof(struct iovec));
    batch->checks = calloc((size_t)nchecks + 1, sizeof(mf_check));
    if (batch->requests == NULL || batch->iovecs == NULL || batch->checks == NULL) {
        mf_batch_free(batch);
        return ENOMEM;
    }
    batch->fd = fd;
    batch->alignment = alignment < 1 ? 1 : alignment;
    batch->nrequests = batch->unfinished = batch->result.requests = nrequests;
    atomic_init(&batch->failed, false);
    if (!fill_batch(batch, requests, iovecs, niovecs, checks, nchecks)) {
        mf_batch_free(batch);
        return MF_BAD_TABLE;
    }
    *made = batch;
    return 0;
}
