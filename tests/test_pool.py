"""Memory pools: MLX reads what the host writes at the pool's address, without a copy."""

from __future__ import annotations

import ctypes
import gc

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import UsageError
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.system import POOL_ALIGNMENT


def write(address: int, values: np.ndarray) -> None:
    ctypes.memmove(address, values.ctypes.data, values.nbytes)


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 4097, 1 << 20])
@pytest.mark.parametrize("alignment", [16, 4096, POOL_ALIGNMENT, 65536])
def test_size_start_and_contents(nbytes: int, alignment: int) -> None:
    pool = AlignedPool(nbytes, alignment)
    assert (pool.nbytes, pool.array.nbytes, pool.array.shape, pool.array.dtype) == (nbytes, nbytes, (nbytes,), mx.uint8)
    assert pool.address % alignment == 0
    assert mx.max(pool.array).item() == 0
    values = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    write(pool.address, values)
    assert np.array_equal(np.array(pool.array), values)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32])
def test_views_made_before_a_write_see_it(dtype: mx.Dtype) -> None:
    rows, row_bytes = 8, 4096
    pool = AlignedPool(rows * row_bytes, row_bytes=row_bytes)
    view = pool.array.view(dtype)
    mx.eval(view)
    ones = mx.ones((row_bytes // dtype.size,), dtype)
    write(pool.address + 3 * row_bytes, np.array(ones.view(mx.uint8)))
    assert mx.sum(view.astype(mx.float32), axis=1).tolist() == [0, 0, 0, ones.size, 0, 0, 0, 0]
    assert mx.array_equal(mx.take(view, mx.array([3, 3]), axis=0), mx.stack([ones, ones]))
    write(pool.address + 3 * row_bytes, np.zeros(row_bytes, np.uint8))
    assert mx.max(view.astype(mx.float32)).item() == 0


def test_the_buffer_stays_where_it_is() -> None:
    """Computations over the pool, and names that come and go, neither move nor reuse its memory."""
    pool = AlignedPool(1 << 20)
    for value in (1, 2, 3):
        ctypes.memset(pool.address, value, pool.nbytes)
        total = mx.sum((pool.array + 0).astype(mx.int32))
        assert total.item() == value * pool.nbytes
        del total
        gc.collect()
    assert np.array(pool.array, copy=False).ctypes.data == pool.address


def test_rows_that_are_no_multiple_of_a_word() -> None:
    pool = AlignedPool(30, row_bytes=10)
    write(pool.address, np.arange(30, dtype=np.uint8))
    assert pool.array.tolist() == np.arange(30).reshape(3, 10).tolist()


@pytest.mark.parametrize(
    ("nbytes", "alignment", "row_bytes"),
    [
        (0, 4096, None),
        (-1, 4096, None),
        (10, 100, None),
        (10, 4, None),
        (10, 4096, 3),
        (10, 4096, 0),
        (2**31, 4096, None),
        (2**40, 4096, 4096),
        (2**31 + 2**13, 4096, 2**20 + 4),
    ],
)
def test_impossible_pools_are_refused(nbytes: int, alignment: int, row_bytes: int | None) -> None:
    with pytest.raises(UsageError):
        AlignedPool(nbytes, alignment, row_bytes)
