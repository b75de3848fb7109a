/* Looks up slots for a decoded token. It runs for every layer of every token, and in NumPy took as long as a small read.
 *
 * reader.py keeps the GIL during the call, so no interrupt (Ctrl-C) finds a map or scores that are half changed.
 */
#include <stdint.h>

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
