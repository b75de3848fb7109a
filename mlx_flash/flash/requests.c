/* Turns segments of a file into read requests: merges neighbours, cuts long segments, keeps aligned ones apart. */
#include "requests.h"

#include <stdbool.h>

#include "batch.h"

typedef struct {
    const mf_rules *rules;
    int64_t *requests;
    int64_t *iovecs;
    int64_t nrequests;
    int64_t niovecs;
    int64_t end;    /* of the last iovec's bytes, in the file */
    bool long_one;  /* whether the last iovec is long, so that nothing is merged with it */
    bool loose;     /* whether it is not aligned */
    int64_t run;    /* where its run of neighbours begins in the file */
    int64_t window; /* of request_bytes each, counted from there; a request ends with its window */
} mf_plan_state;

/* Long segments are cut, so that one keeps several threads busy and bounce buffers stay small. */
static int64_t pieces_of(int64_t length, int64_t request_bytes)
{
    int64_t pieces = (length + request_bytes / 2) / request_bytes;
    return pieces < 1 ? 1 : pieces;
}

int64_t mf_count_iovecs(const int64_t *offsets, const int64_t *lengths, int64_t n, const mf_rules *rules)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (offsets[i] < 0 || lengths[i] < 0 || lengths[i] > rules->file_bytes ||
            offsets[i] > rules->file_bytes - lengths[i])
            return MF_OUTSIDE;
        count += lengths[i] > 0 ? pieces_of(lengths[i], rules->request_bytes) : 0;
    }
    return count;
}

/* Adds a piece to the last request, or to a new one. */
static void add(mf_plan_state *state, int64_t offset, int64_t address, int64_t length)
{
    int64_t request_bytes = state->rules->request_bytes, alignment = state->rules->alignment;
    bool long_one = length >= request_bytes / 2; /* merging gains it nothing */
    bool loose = alignment > 1 && (offset | address | length) % alignment != 0;
    bool apart = state->niovecs == 0 || offset != state->end || long_one || state->long_one || loose != state->loose;
    if (apart)
        state->run = offset;
    int64_t window = (offset - state->run) / request_bytes;
    if (apart || window != state->window) {
        int64_t *request = &state->requests[3 * state->nrequests++];
        request[0] = offset;
        request[1] = state->niovecs;
        request[2] = 0;
    }
    state->requests[3 * state->nrequests - 1]++;
    state->iovecs[2 * state->niovecs] = address;
    state->iovecs[2 * state->niovecs + 1] = length;
    state->niovecs++;
    state->end = offset + length;
    state->long_one = long_one;
    state->loose = loose;
    state->window = window;
}

int64_t mf_plan(const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t n,
                const mf_rules *rules, int64_t *requests, int64_t *iovecs)
{
    mf_plan_state state = {.rules = rules, .requests = requests, .iovecs = iovecs};
    for (int64_t i = 0; i < n; i++) {
        if (lengths[i] == 0)
            continue;
        /* Pieces end on multiples of a block in the file, so that no block is read twice. The last one is 0.5 to 1.5
         * times as long as the others (and up to a block more). */
        int64_t pieces = pieces_of(lengths[i], rules->request_bytes), begin = 0;
        for (int64_t piece = 1; piece <= pieces; piece++) {
            int64_t end = piece < pieces ? piece * rules->request_bytes - offsets[i] % rules->block : lengths[i];
            add(&state, offsets[i] + begin, (int64_t)((uint64_t)addresses[i] + (uint64_t)begin), end - begin);
            begin = end;
        }
    }
    return state.nrequests;
}
