#ifndef MF_CRC32_H
#define MF_CRC32_H

#include <stddef.h>
#include <stdint.h>

/* zlib's crc32. crc: 0, or the CRC-32 of the preceding bytes. */
uint32_t mf_crc32(uint32_t crc, const void *bytes, size_t count);

#endif
