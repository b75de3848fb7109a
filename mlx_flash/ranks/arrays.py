"""MLX arrays in a message: types and shapes in its header, the elements one after another in its data."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np

from ..errors import UnsupportedModelError
from .messages import BadMessageError

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
Form = list[str | list[int]]  # such as ["float32", [1, 2048]]


def packed(arrays: Sequence[mx.array]) -> tuple[list[Form], bytes]:
    """The forms of the arrays and their elements in row-major order. All that is lazy is evaluated at once.

    Raises UnsupportedModelError for a type that is not in TYPES.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    for array in arrays:
        if array.dtype not in names:
            raise UnsupportedModelError(f"a layer takes or returns {array.dtype}, which is not sent to other ranks.")
    mx.eval(arrays)
    forms: list[Form] = [[names[array.dtype], list(array.shape)] for array in arrays]
    return forms, b"".join(memoryview(array).tobytes() for array in arrays)  # type: ignore[arg-type]


def unpacked(forms: Sequence[Form], data: bytearray | memoryview) -> list[mx.array]:
    """The arrays that `packed` was given. Raises BadMessageError."""
    arrays, begin = [], 0
    for name, shape in forms:
        if name not in TYPES or not isinstance(shape, list):
            raise BadMessageError(f"a message between ranks has an array of the form {[name, shape]}.")
        dtype = TYPES[name]
        end = begin + dtype.size * prod(shape)
        flat = np.frombuffer(memoryview(data)[begin:end], np.uint8)
        if len(flat) != end - begin:
            raise BadMessageError(f"a message between ranks lacks {end - len(data)} bytes of an array.")
        arrays.append(mx.array(flat).view(dtype).reshape(shape) if len(flat) else mx.zeros(shape, dtype))
        begin = end
    return arrays
