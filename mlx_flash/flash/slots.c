/* The map of a layer's slots: looks up units, chooses what is evicted, and lists the segments of a file that are read.
 * These run for every layer of every token, and in NumPy each took as long as a small read.
 *
 * reader.py keeps the GIL during the calls, so no interrupt (Ctrl-C) finds a map or scores that are half changed.
 */
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define MF_NO_ROOM (-1) /* a unit or a slot is out of range, or there are too few slots */

/* Finds the slots of `n` units if all of them have one, and adds `use` to the score of each once. Returns the number of
 * different units. Returns 0 if a unit has no slot or is not one of the layer's `units`; then no score has changed.
 *
 * ids: (n,), few, a unit may come several times. slot_of, score: (units,). slots: (n,), the result. */
int64_t mf_look_up(const uint32_t *ids, int64_t n, const int32_t *slot_of, float *score, int64_t units, float use,
                   uint32_t *slots)
{
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] >= units || slot_of[ids[i]] < 0)
            return 0;
        slots[i] = (uint32_t)slot_of[ids[i]];
    }
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t before = 0;
        while (before < i && ids[before] != ids[i])
            before++;
        if (before == i) {
            score[ids[i]] += use;
            different++;
        }
    }
    return different;
}

/* -- making room ------------------------------------------------------------------------------------------------ */

typedef struct { /* see mf_make_room */
    const int32_t *unit_of;
    const float *score;
    const int64_t *last_used;
    int64_t oldest;
} mf_history;

/* The slot with the lowest rank is evicted first. */
static double rank(const mf_history *history, int32_t slot)
{
    int32_t unit = history->unit_of[slot];
    if (unit < 0)
        return -INFINITY;
    if (history->last_used == NULL)
        return history->score[unit];
    int64_t used = history->last_used[slot];
    return (double)(used > history->oldest ? used : history->oldest);
}

/* Whether slot a is evicted before slot b. */
static bool before(const mf_history *history, int32_t a, int32_t b)
{
    double of_a = rank(history, a), of_b = rank(history, b);
    return of_a < of_b || (of_a == of_b && a < b);
}

/* Moves the slot at `at` of a heap, whose first slot is evicted last, down to its place. */
static void sift(const mf_history *history, int32_t *heap, int64_t count, int64_t at)
{
    int32_t slot = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(history, heap[child], heap[child + 1]))
            child++;
        if (!before(history, slot, heap[child]))
            break;
        heap[at] = heap[child];
    }
    heap[at] = slot;
}

/* Puts the `count` slots that are evicted first into `chosen`, ascending, none of which has a mark. Returns false if
 * there are not enough. marks: (slots,), which changes. */
static bool choose(const mf_history *history, int64_t slots, uint8_t *marks, int32_t *chosen, int64_t count)
{
    int64_t found = 0;
    for (int32_t slot = 0; slot < slots; slot++) {
        if (marks[slot])
            continue;
        if (found < count) {
            chosen[found++] = slot;
            if (found == count)
                for (int64_t at = count / 2; at-- > 0;)
                    sift(history, chosen, count, at);
        } else if (before(history, slot, chosen[0])) {
            chosen[0] = slot;
            sift(history, chosen, count, 0);
        }
    }
    if (found < count)
        return false;
    for (int32_t slot = 0; slot < slots; slot++)
        marks[slot] = 0;
    for (int64_t i = 0; i < count; i++)
        marks[chosen[i]] = 1;
    for (int32_t slot = 0, at = 0; at < count; slot++)
        if (marks[slot])
            chosen[at++] = slot;
    return true;
}

/* Makes room for those of `n` units that have no slot: empties as many slots. First come those that are empty already,
 * then those with the lowest rank, which is the unit's score, or with a window the call that last used it, as if none
 * was older than `oldest`. Of equal ranks, the lowest slot comes first.
 *
 * units: (n,), each once, not evicted. taken: (ntaken,), slots that look empty, but are not free. slot_of, score:
 * (all,). unit_of, last_used: (slots,). last_used: NULL without a window. missing, targets: (n,), the results: units
 * without a slot, in their order, and slots for them, ascending. Returns how many they are, MF_NO_ROOM or -ENOMEM; then
 * nothing has changed. evicted: how many of the targets were occupied. */
int64_t mf_make_room(const int32_t *units, int64_t n, const int32_t *taken, int64_t ntaken, int32_t *slot_of,
                     int64_t all, int32_t *unit_of, int64_t slots, const float *score, const int64_t *last_used,
                     int64_t oldest, int32_t *missing, int32_t *targets, int64_t *evicted)
{
    mf_history history = {unit_of, score, last_used, oldest};
    int64_t count = 0;
    *evicted = 0;
    for (int64_t i = 0; i < n; i++) {
        if (units[i] < 0 || units[i] >= all)
            return MF_NO_ROOM;
        if (slot_of[units[i]] < 0)
            missing[count++] = units[i];
    }
    if (count == 0)
        return 0;
    uint8_t *marks = calloc((size_t)slots + 1, 1);
    if (marks == NULL)
        return -ENOMEM;
    bool sound = true;
    for (int64_t i = 0; i < n; i++)
        if (slot_of[units[i]] >= 0)
            marks[slot_of[units[i]]] = 1;
    for (int64_t i = 0; i < ntaken; i++) {
        sound = sound && taken[i] >= 0 && taken[i] < slots;
        if (sound)
            marks[taken[i]] = 1;
    }
    sound = sound && choose(&history, slots, marks, targets, count);
    free(marks);
    if (!sound)
        return MF_NO_ROOM;
    for (int64_t i = 0; i < count; i++) {
        int32_t unit = unit_of[targets[i]];
        if (unit >= 0) {
            slot_of[unit] = unit_of[targets[i]] = -1;
            ++*evicted;
        }
    }
    return count;
}

/* -- segments --------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t offset, address, length, turn;
} mf_segment;

static int by_offset(const void *a, const void *b)
{
    const mf_segment *first = a, *second = b;
    if (first->offset != second->offset)
        return first->offset < second->offset ? -1 : 1;
    return first->turn < second->turn ? -1 : 1;
}

/* Lists the segments of one file that bring `n` units, of `parts` parts each, into slots. Returns how many they are, or
 * -ENOMEM.
 *
 * units, slots: (n,). offsets, file_of: (parts, all), where each unit's parts lie. lengths: (parts,), bytes. addresses:
 * (parts,), of slot 0; slot s lies s * length further. segments: room for (3, parts * n): offsets, which ascend,
 * addresses and lengths, in bytes. */
int64_t mf_segments(int64_t file, const int32_t *units, const int32_t *slots, int64_t n, int64_t parts, int64_t all,
                    const int64_t *offsets, const int64_t *file_of, const int64_t *lengths, const int64_t *addresses,
                    int64_t *segments)
{
    int64_t most = parts * n, count = 0;
    mf_segment *found = malloc(((size_t)most + 1) * sizeof *found);
    if (found == NULL)
        return -ENOMEM;
    bool ascend = true;
    for (int64_t part = 0; part < parts; part++) {
        for (int64_t i = 0; i < n; i++) {
            int64_t at = part * all + units[i];
            if (file_of[at] != file)
                continue;
            found[count] = (mf_segment){offsets[at], addresses[part] + slots[i] * lengths[part], lengths[part], count};
            ascend = ascend && (count == 0 || found[count - 1].offset <= found[count].offset);
            count++;
        }
    }
    if (!ascend)
        qsort(found, (size_t)count, sizeof *found, by_offset);
    for (int64_t i = 0; i < count; i++) {
        segments[i] = found[i].offset;
        segments[most + i] = found[i].address;
        segments[2 * most + i] = found[i].length;
    }
    free(found);
    return count;
}
