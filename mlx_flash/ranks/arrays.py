"""MLX arrays in a message: types and shapes in its header, the elements one after another in its data."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np

from ..errors import UnsupportedModelError
from .messages import BadMessageError

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
MOST_SIDE = 1 << 31  # MLX counts sides in 32 bits
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


def unpacked(forms: object, data: bytes | bytearray | memoryview) -> list[mx.array]:
    """The arrays that `packed` was given. forms, data: as another process sends them. Raises BadMessageError."""
    arrays, begin = [], 0
    if not isinstance(forms, list):
        raise BadMessageError(f"a message between ranks has arrays of the form {forms!r:.100}.")
    for form in forms:
        dtype, shape = _type_and_shape(form)
        end = begin + dtype.size * prod(shape)
        if end > len(data):
            raise BadMessageError(f"a message between ranks lacks {end - len(data)} bytes of an array.")
        flat = np.frombuffer(memoryview(data)[begin:end], np.uint8)
        arrays.append(mx.array(flat).view(dtype).reshape(shape) if len(flat) else mx.zeros(shape, dtype))
        begin = end
    if begin < len(data):
        raise BadMessageError(f"a message between ranks has {len(data) - begin} bytes after its last array.")
    return arrays


def unpacked_ids(shape: object, data: bytearray | memoryview) -> tuple[np.ndarray, memoryview]:
    """The int32 ids at the beginning of a call's data, and what follows them. Raises BadMessageError."""
    sides = _sides(shape)
    nbytes = np.dtype(np.int32).itemsize * prod(sides)
    if nbytes > len(data):
        raise BadMessageError(f"a message between ranks lacks {nbytes - len(data)} bytes of ids.")
    return np.frombuffer(data, np.int32, prod(sides)).reshape(sides), memoryview(data)[nbytes:]


def unpacked_result(
    forms: object, data: bytes | bytearray | memoryview, shape: Sequence[int | None], dtype: mx.Dtype | None
) -> mx.array:
    """The one array of a result. shape: what it must be; None for a side of any length. dtype: None for any.

    Raises BadMessageError, whose sentence follows the rank's name.
    """
    arrays = unpacked(forms, data)
    if len(arrays) != 1:
        raise BadMessageError(f"it returns {len(arrays)} arrays where one is expected.")
    (array,) = arrays
    fits = array.ndim == len(shape) and all(own in (side, None) for own, side in zip(shape, array.shape, strict=True))
    if not fits or (dtype is not None and array.dtype != dtype):
        wanted = f"{list(shape)} ({dtype})".replace("None", "any")
        raise BadMessageError(f"it returns {list(array.shape)} ({array.dtype}) where {wanted} is expected.")
    return array


def _type_and_shape(form: object) -> tuple[mx.Dtype, list[int]]:
    match form:
        case [str(name), shape] if name in TYPES:
            return TYPES[name], _sides(shape)
    raise BadMessageError(f"a message between ranks has an array of the form {form!r:.100}.")


def _sides(shape: object) -> list[int]:
    if isinstance(shape, list) and all(type(side) is int and 0 <= side < MOST_SIDE for side in shape):
        return shape
    raise BadMessageError(f"a message between ranks has an array of the shape {shape!r:.100}.")
