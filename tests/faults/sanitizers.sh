#!/usr/bin/env bash
# Builds the C reader with the compiler's sanitizers and drives it with random and hostile tables (reader_stress.c).
# Usage: tests/faults/sanitizers.sh [SECONDS per build, 30] [SEED, 1]. CC chooses the compiler. Ends with 0 if all is well.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../mlx_flash/flash
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset LD_PRELOAD
export TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1

for kinds in address,undefined thread; do
    flags=(-std=gnu11 -g -O1 -Wall -Wextra -pthread "-fsanitize=$kinds" -fno-sanitize-recover=all)
    # The reader's own reads are cut short at odd places; what shorter.c calls is the system's preadv.
    "${CC:-cc}" "${flags[@]}" -Dpreadv=shorter_preadv -c "$source/batch.c" -o "$work/batch.o"
    "${CC:-cc}" "${flags[@]}" -o "$work/stress" "$here/reader_stress.c" "$here/shorter.c" "$source/reader.c" \
        "$source/crc32.c" "$source/requests.c" "$source/slots.c" "$work/batch.o"
    echo -n "$kinds: "
    "$work/stress" "${1:-30}" "${2:-1}" "$work/file"
done
