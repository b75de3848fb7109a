"""A lookup table whose rows stay in the checkpoint. The zoo's own module looks up the rows that were read."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UsageError
from ..flash.host_arrays import to_numpy
from ..flash.table_rows import TableRows


class StreamedTable(nn.Module):
    """Replaces a module that looks up rows of a table, such as `nn.Embedding`. ids: integers (...) -> (..., D).

    The module that it replaces makes the result, of the same rows under other numbers. The bits are therefore those of
    the resident table.
    """

    def __init__(self, inner: nn.Module, rows: TableRows) -> None:
        """inner: the module that this replaces. rows: its rows, whose tensors have the names of its arrays."""
        super().__init__()
        self._inner = inner
        self.rows = rows
        self._drop()

    def __call__(self, ids: mx.array) -> mx.array:
        wanted = to_numpy(ids).astype(np.int64)  # the table's one read-back
        count = self.rows.count
        wanted = np.where(wanted < 0, wanted + count, wanted)  # as MLX counts them
        rows, places = np.unique(wanted, return_inverse=True)
        if len(rows) and not 0 <= rows[0] <= rows[-1] < count:
            raise UsageError(
                f"A table of {count} rows was asked for rows {rows[0]} to {rows[-1]}. Check the token ids."
            )
        for name, parts in self.rows.take(rows).items():
            tensor = self.rows.tensors[name]
            self._inner[name] = mx.array(parts).view(tensor.dtype).reshape(len(rows), *tensor.shape)
        result: mx.array = self._inner(mx.array(places.reshape(ids.shape).astype(np.int32)))
        self._drop()  # else the rows of the last prompt would stay in memory
        return result

    def _drop(self) -> None:
        for name in self.rows.tensors:
            self._inner.pop(name, None)
