#ifndef MF_REQUESTS_H
#define MF_REQUESTS_H

#include <stdint.h>

typedef struct { /* what the requests of a file must keep to, in bytes */
    int64_t file_bytes;
    int64_t alignment;     /* as for mf_submit */
    int64_t request_bytes; /* target size of a request, a multiple of `block` */
    int64_t block;         /* a long segment is cut at multiples of this */
} mf_rules;

/* Returns the number of iovecs of `n` segments, which is the most requests that they become as well, or MF_OUTSIDE if
 * a segment lies outside the file. */
int64_t mf_count_iovecs(const int64_t *offsets, const int64_t *lengths, int64_t n, const mf_rules *rules);

/* Turns segments into mf_submit's tables: requests (r, 3) and iovecs. Returns r. The tables have room for what
 * mf_count_iovecs returned.
 *
 * Adjacent segments become one request, which ends at about request_bytes. A long segment becomes several requests of
 * one iovec. An unaligned segment sends its whole request through the bounce buffer, so no aligned one joins it. No
 * request is longer than 1.5 * request_bytes + block. */
int64_t mf_plan(const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n,
                const mf_rules *rules, int64_t *requests, int64_t *iovecs);

#endif
