"""MLX's arrays as NumPy's. Every other file calls this instead of `np.array`: a test searches for the rest.

`np.array(array)` evaluates a lazy array, and when that fails (a file that cannot be read, memory that runs out) NumPy
swallows MLX's error and tries another protocol, by which time MLX takes the array for evaluated: the numbers are then
what happened to be in memory. `memoryview`, `mx.eval`, `.item()` and `.tolist()` do raise. After a failed evaluation
MLX takes the array for evaluated all the same, so an array that failed must not be used again.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def to_numpy(array: mx.array, dtype: Any = None, *, copy: bool = True) -> np.ndarray:
    """The array's elements, evaluated, in its own shape; bfloat16, which NumPy lacks, becomes float32.

    Args:
        array: any shape and dtype, evaluated or not.
        dtype: of the result; None for the array's own.
        copy: False for a view of MLX's own memory where the dtype allows it; writing into it changes the array.

    Raises RuntimeError, MLX's, if the array cannot be evaluated.
    """
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)  # a copy already
        copy = False
    seen = np.asarray(memoryview(array))  # type: ignore[arg-type]  # a buffer, which its stub does not say
    return np.array(seen, dtype) if copy else np.asarray(seen, dtype)


def to_bytes(array: mx.array) -> np.ndarray:
    """The elements in row order as uint8 (n,), evaluated: a view of MLX's memory where they lie in that order there.

    Raises RuntimeError, MLX's, if the array cannot be evaluated.
    """
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return to_numpy(array, copy=False).reshape(-1).view(np.uint8)  # flat here: MLX's axes end at 2**31 - 1
