"""MLX arrays as NumPy arrays. Every other file calls this instead of `np.array`; a test searches for exceptions.

`np.array(array)` evaluates a lazy array. If that fails (a file cannot be read, memory runs out), NumPy swallows MLX's
error and tries another protocol. By then MLX treats the array as evaluated, so the numbers are whatever was in memory.
`memoryview`, `mx.eval`, `.item()` and `.tolist()` do raise. MLX treats an array as evaluated even after a failed
evaluation, so an array that failed must not be used again.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def to_numpy(array: mx.array, dtype: Any = None, *, copy: bool = True) -> np.ndarray:
    """The array's elements, evaluated, in its own shape; bfloat16, which NumPy lacks, becomes float32.

    Args:
        array: any shape and dtype, evaluated or not.
        dtype: dtype of the result; None for the array's own.
        copy: False for a view of MLX's own memory where the dtype allows it; writing into it changes the array.

    Raises MLX's RuntimeError if the array cannot be evaluated.
    """
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)  # astype makes a copy
        copy = False
    seen = np.asarray(memoryview(array))  # type: ignore[arg-type]  # mx.array is a buffer; its stub lacks that
    return np.array(seen, dtype) if copy else np.asarray(seen, dtype)


def to_bytes(array: mx.array) -> np.ndarray:
    """The elements in row-major order as uint8 (n,), evaluated; a view of MLX's memory if it has that order.

    Raises MLX's RuntimeError if the array cannot be evaluated.
    """
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return to_numpy(array, copy=False).reshape(-1).view(np.uint8)  # NumPy flattens: MLX's axes end at 2**31 - 1
