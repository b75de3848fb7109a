"""What MLX computes with here, and whether it computes correctly. It runs in a process of its own: on a machine that
MLX does not expect, its import may end the process."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .told import Facts, from_child, part, told

DEVICE, TESTS = "device", "tests"  # the arguments of this module
SLOTS, ROWS, WIDTH = 6, 64, 512
TOLERANCE = 1e-4  # of float32 products, relative to the largest number


def device() -> Facts:
    """kind: "gpu" or "cpu". architecture (of the GPU), memory_bytes, recommended_bytes (the most that Metal wants a
    process to use): None where MLX does not tell."""
    return from_child("device", DEVICE)


def self_tests() -> Facts:
    """For each test True, or None with the reason in "unknown": shared_memory (the device sees what the host writes
    into pools), reader (it reads the bytes that are in a file, past the page cache and through it), packed_products
    (products with quantised rows), products (matrix products)."""
    return from_child("device", TESTS)


def _device() -> Facts:
    import mlx.core as mx

    kind = "gpu" if mx.default_device() == mx.gpu else "cpu"
    info = mx.device_info()
    return told(
        {
            "kind": lambda: kind,
            "architecture": lambda: info.get("architecture"),
            "memory_bytes": lambda: info.get("memory_size"),
            "recommended_bytes": lambda: info.get("max_recommended_working_set_size"),
        }
    )


def _self_tests() -> Facts:
    tests: dict[str, Callable[[], bool]] = {
        "shared_memory": _test_shared_memory,
        "reader": _test_reader,
        "packed_products": _test_packed_products,
        "products": _test_products,
    }
    return told(tests)


def _test_shared_memory() -> bool:
    import mlx.core as mx

    from ..flash.pool import AlignedPool
    from ..flash.self_test import check_expert_pools

    pool = AlignedPool(SLOTS * ROWS * WIDTH * 4, row_bytes=ROWS * WIDTH * 4)
    check_expert_pools({"weight": pool}, {"weight": pool.array.view(mx.float32).reshape(SLOTS, ROWS, WIDTH)})
    return True


def _test_reader() -> bool:
    import numpy as np

    from ..errors import ReadError
    from ..flash.reader import Reader
    from ..flash.system import READ_ALIGNMENT
    from ..flash.unit_file import UnitFile
    from ..source.cached import PROBE, cache_folder
    from .cache_contents import writable

    folder = cache_folder() if writable(cache_folder()) else None  # None for the system's own temporary folder
    contents = np.random.default_rng(0).integers(0, 256, 64 * READ_ALIGNMENT, np.uint8)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PROBE) as name, Reader(4) as reader:
        path = Path(name) / "test"
        path.write_bytes(contents.tobytes())
        for direct in (True, False):
            with UnitFile(path, direct) as file:
                offsets = np.array([0, 5 * READ_ALIGNMENT, 40 * READ_ALIGNMENT + 17])
                lengths = np.array([READ_ALIGNMENT, 3 * READ_ALIGNMENT, 1001])
                found = np.zeros(lengths.sum(), np.uint8)
                addresses = found.ctypes.data + np.cumsum(lengths) - lengths
                reader.read(file, offsets, addresses, lengths)
            wanted = np.concatenate([contents[o : o + n] for o, n in zip(offsets, lengths, strict=True)])
            if not np.array_equal(found, wanted):
                raise ReadError("the reader returns other bytes than those in the file")
    return True


def _test_packed_products() -> bool:
    from ..flash.files import NeuronLayout
    from ..flash.self_test import check_packed_products

    for bits in (4, 8):
        check_packed_products(NeuronLayout.plan("float16", 1, 1024, WIDTH, ("gate", "up", "down"), bits))
    return True


def _test_products() -> bool:
    import mlx.core as mx
    import numpy as np

    from ..errors import FlashError
    from ..flash.host_arrays import to_numpy

    random = np.random.default_rng(0)
    for tokens in (1, 8, 65):
        x, w = random.standard_normal((tokens, WIDTH), np.float32), random.standard_normal((ROWS, WIDTH), np.float32)
        found, expected = to_numpy(mx.array(x) @ mx.array(w).T), x.astype(np.float64) @ w.T
        if not np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max():
            raise FlashError("matrix products are wrong on this device with this version of MLX")
    return True


if __name__ == "__main__":
    gather: dict[str, Callable[[], Any]] = {DEVICE: _device, TESTS: _self_tests}
    print(json.dumps(part(gather[sys.argv[1]])))
