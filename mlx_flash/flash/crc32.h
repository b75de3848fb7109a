#ifndef MF_CRC32_H
#define MF_CRC32_H

#include <stddef.h>
#include <stdint.h>

/* zlib's crc32: start with 0, or with the sum of the bytes before these. */
uint32_t mf_crc32(uint32_t crc, const void *bytes, size_t count);

#endif
