"""The tables of segments that reader.c turns into requests, and the sizes of requests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .unit_file import Int64Array

MERGE_BYTES = 1 << 20
"""Target size of a request. Shorter adjacent segments are merged up to about this; longer ones are cut to it."""


def as_segments(
    offsets: npt.NDArray[np.integer], addresses: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The three columns of a table of segments as C reads them: int64 (n,) each, contiguous and writable.

    lengths: one number if all have it. Raises ValueError if the columns disagree, or have no integers.
    """
    offsets, addresses = np.asarray(offsets), np.asarray(addresses)
    lengths = np.full(offsets.shape, lengths, np.int64) if isinstance(lengths, int) else np.asarray(lengths)
    if not (offsets.ndim == 1 and offsets.shape == addresses.shape == lengths.shape):
        raise ValueError(
            f"offsets, addresses and lengths must be (n,) alike but are {offsets.shape}, {addresses.shape} and "
            f"{lengths.shape}"
        )
    columns = offsets, addresses, lengths
    if any(column.dtype.kind not in "iu" for column in columns) and len(offsets):
        raise ValueError("offsets, addresses and lengths must be integers")
    return tuple(column.astype(np.int64) for column in columns)  # type: ignore[return-value]
