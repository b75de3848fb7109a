/* zlib's CRC-32, as fast as a core reads memory. It verifies blocks while they are read.
 *
 * A message is a polynomial over GF(2), whose first bit is the highest power of x. Its CRC is the remainder of its
 * division by P. The lowest bit of a byte comes first, so everything here is bit-reversed: in a 32-bit state, bit 31 is
 * x^0 and bit 0 is x^31.
 */
#include "crc32.h"

#include <stdbool.h>
#include <string.h>

#define POLYNOMIAL 0xEDB88320u

static uint32_t tables[8][256]; /* tables[k][b]: the state after byte b and k zero bytes, from the state 0 */

static uint32_t by_tables(uint32_t state, const unsigned char *from, size_t count)
{
    for (; count >= 8; from += 8, count -= 8) {
        uint32_t first = state ^ ((uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                                  (uint32_t)from[3] << 24);
        state = tables[7][first & 0xff] ^ tables[6][first >> 8 & 0xff] ^ tables[5][first >> 16 & 0xff] ^
                tables[4][first >> 24] ^ tables[3][from[4]] ^ tables[2][from[5]] ^ tables[1][from[6]] ^
                tables[0][from[7]];
    }
    for (; count > 0; from++, count--)
        state = tables[0][(state ^ *from) & 0xff] ^ state >> 8;
    return state;
}

#if defined(__x86_64__)

#include <immintrin.h>

static uint64_t over_64[2], over_16[2]; /* factors that move the two halves of 16 bytes past 64 or 16 bytes */

static bool instructions_there(void)
{
    return __builtin_cpu_supports("pclmul");
}

/* x^power mod P, as a state. */
static uint32_t power_of_x(int power)
{
    uint32_t state = 0x80000000u;
    while (power-- > 0)
        state = state >> 1 ^ (state & 1 ? POLYNOMIAL : 0);
    return state;
}

/* The product of two bit-reversed halves has one factor x too many, so each power is one less. The first half of 16
 * bytes is 64 bits further from the end than the second. */
static void prepare(void)
{
    over_64[0] = (uint64_t)power_of_x(8 * 64 + 63) << 32;
    over_64[1] = (uint64_t)power_of_x(8 * 64 - 1) << 32;
    over_16[0] = (uint64_t)power_of_x(8 * 16 + 63) << 32;
    over_16[1] = (uint64_t)power_of_x(8 * 16 - 1) << 32;
}

__attribute__((target("pclmul"))) static inline __m128i moved(__m128i sixteen, __m128i over, __m128i onto)
{
    __m128i first = _mm_clmulepi64_si128(sixteen, over, 0x00), second = _mm_clmulepi64_si128(sixteen, over, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), onto);
}

/* Folds 64 bytes onto the next 64 by carry-less multiplication, which keeps the remainder, until 16 bytes with the same
 * remainder are left. */
__attribute__((target("pclmul"))) static uint32_t by_instructions(uint32_t state, const unsigned char *from,
                                                                  size_t count)
{
    if (count < 64)
        return by_tables(state, from, count);
    const __m128i *next = (const __m128i *)from;
    __m128i over = _mm_loadu_si128((const __m128i *)over_64);
    __m128i a = _mm_xor_si128(_mm_loadu_si128(next), _mm_cvtsi32_si128((int)state));
    __m128i b = _mm_loadu_si128(next + 1), c = _mm_loadu_si128(next + 2), d = _mm_loadu_si128(next + 3);
    for (next += 4, count -= 64; count >= 64; next += 4, count -= 64) {
        a = moved(a, over, _mm_loadu_si128(next));
        b = moved(b, over, _mm_loadu_si128(next + 1));
        c = moved(c, over, _mm_loadu_si128(next + 2));
        d = moved(d, over, _mm_loadu_si128(next + 3));
    }
    over = _mm_loadu_si128((const __m128i *)over_16);
    a = moved(moved(moved(a, over, b), over, c), over, d);
    for (; count >= 16; next++, count -= 16)
        a = moved(a, over, _mm_loadu_si128(next));
    unsigned char left[16];
    _mm_storeu_si128((__m128i *)left, a);
    return by_tables(by_tables(0, left, sizeof left), (const unsigned char *)next, count);
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32) /* every Apple chip has it */

#include <arm_acle.h>

static bool instructions_there(void)
{
    return true;
}

static void prepare(void)
{
}

static uint32_t by_instructions(uint32_t state, const unsigned char *from, size_t count)
{
    for (; count >= 8; from += 8, count -= 8) {
        uint64_t eight;
        memcpy(&eight, from, sizeof eight);
        state = __crc32d(state, eight);
    }
    for (; count > 0; from++, count--)
        state = __crc32b(state, *from);
    return state;
}

#else

static bool instructions_there(void)
{
    return false;
}

static void prepare(void)
{
}

#define by_instructions by_tables

#endif

static bool has_instructions;

__attribute__((constructor)) static void fill_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; bit++)
            state = state >> 1 ^ (state & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = state;
    }
    for (int zeros = 1; zeros < 8; zeros++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t before = tables[zeros - 1][byte];
            tables[zeros][byte] = before >> 8 ^ tables[0][before & 0xff];
        }
    prepare();
    has_instructions = instructions_there();
}

uint32_t mf_crc32(uint32_t crc, const void *bytes, size_t count)
{
    return ~(has_instructions ? by_instructions(~crc, bytes, count) : by_tables(~crc, bytes, count));
}

/* Writes the CRC-32 of `count` ranges of `length` bytes to `sums`. The ranges start `stride` bytes apart, the first at
 * `bytes`. */
void mf_crc32_each(const void *bytes, int64_t stride, int64_t length, int64_t count, uint32_t *sums)
{
    for (int64_t i = 0; i < count; i++)
        sums[i] = mf_crc32(0, (const char *)bytes + i * stride, (size_t)length);
}

/* For tests: uses the processor's instructions if `instructions` is set and the processor has them, else tables. */
uint32_t mf_crc32_by(int64_t instructions, const void *bytes, int64_t count)
{
    return ~(instructions && has_instructions ? by_instructions(~0u, bytes, (size_t)count)
                                               : by_tables(~0u, bytes, (size_t)count));
}
