"""The baseline that keeps nothing: every weight comes from the SSD for every token, as the paper's "naive" loading.

The feed-forward part streams with the engine itself (no predictor, no slots). What the engine keeps resident is
streamed here, at the disk's sequential rate: a layer's attention in one piece, a layer ahead, and the output matrix
piece by piece. Everything is read in aligned pieces and used where it lands, so nothing slows it down but the disk.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.flash.checksums import TensorEntry, read_header
from mlx_flash.flash.files import Manifest, round_up
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import READ_ALIGNMENT, Ticket, UnitFile
from mlx_flash.flash.stream import Streamer

HEAD_PIECE_BYTES = 16 << 20


class _Weights:
    """model.safetensors, read range by range with the engine's reader and counted in its counters."""

    def __init__(self, folder: Path, streamer: Streamer) -> None:
        self.path = folder / Manifest.resident_file
        self.entries: dict[str, TensorEntry] = read_header(self.path)[1]
        self.file = UnitFile(self.path)
        self.streamer = streamer

    def submit(self, begin: int, end: int, pool: AlignedPool) -> Ticket:
        """Reads bytes begin .. end, widened to whole blocks as far as the file goes, to the pool's start."""
        first = begin // READ_ALIGNMENT * READ_ALIGNMENT
        last = min(round_up(end, READ_ALIGNMENT), self.file.size)
        segment = (np.array([value]) for value in (first, pool.address, last - first))
        return self.streamer.reader.submit(self.file, *segment)

    def wait(self, ticket: Ticket) -> None:
        import time

        began = time.perf_counter()
        report = self.streamer.reader.wait(ticket)
        counters = self.streamer.counters
        counters.wait_s += time.perf_counter() - began
        counters.read_s += report.seconds
        counters.reads += report.requests
        counters.bytes += report.bytes

    def view(self, name: str, pool: AlignedPool, begin: int) -> mx.array:
        """The float32 tensor where it lies in a pool that bytes from `begin` on were read into."""
        entry = self.entries[name]
        offset = entry.begin - begin // READ_ALIGNMENT * READ_ALIGNMENT
        count = (entry.end - entry.begin) // 4
        array = pool.array.view(mx.float32)[offset // 4 : offset // 4 + count].reshape(entry.shape)
        mx.eval(array)
        return array


class _Attention:
    """A layer's attention whose weights arrive while the layer before it is computed."""

    def __init__(self, inner: nn.Module, prefix: str, weights: _Weights, pools: list[AlignedPool], turn: int) -> None:
        names = [name for name in weights.entries if name.startswith(prefix)]
        self.inner, self.weights = inner, weights
        self.begin = min(weights.entries[name].begin for name in names)
        self.end = max(weights.entries[name].end for name in names)
        self.pool = pools[turn % 2]
        self.following: _Attention | None = None
        self.ticket: Ticket | None = None
        self.places = [name.removeprefix(prefix).rpartition(".") for name in names]
        self.prefix = prefix

    def start(self) -> None:
        if self.ticket is None:
            self.ticket = self.weights.submit(self.begin, self.end, self.pool)

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        mx.eval(x)  # so that nothing unevaluated reads the buffer that is filled next
        self.start()
        assert self.ticket is not None
        ticket, self.ticket = self.ticket, None
        self.weights.wait(ticket)
        if self.following is not None:
            self.following.start()
        for module, _, attribute in self.places:
            view = self.weights.view(f"{self.prefix}{module}.{attribute}", self.pool, self.begin)
            setattr(self.inner[module], attribute, view)
        y: mx.array = self.inner(x, *rest)
        mx.eval(y)
        return y


class _Embedding:
    """The token table, tied to the output: single rows on the way in, all of it in pieces on the way out."""

    def __init__(self, name: str, weights: _Weights) -> None:
        entry = weights.entries[name]
        self.weights, self.entry = weights, entry
        self.row_bytes = entry.shape[1] * 4
        self.rows = HEAD_PIECE_BYTES // self.row_bytes
        self.pools = [AlignedPool(HEAD_PIECE_BYTES + 2 * READ_ALIGNMENT) for _ in range(2)]
        self.row_pool = AlignedPool(round_up(self.row_bytes, READ_ALIGNMENT) + READ_ALIGNMENT)

    def _submit(self, row: int, rows: int, pool: AlignedPool) -> Ticket:
        begin = self.entry.begin + row * self.row_bytes
        return self.weights.submit(begin, begin + rows * self.row_bytes, pool)

    def _rows(self, row: int, rows: int, pool: AlignedPool) -> mx.array:
        offset = (self.entry.begin + row * self.row_bytes) % READ_ALIGNMENT // 4
        return pool.array.view(mx.float32)[offset : offset + rows * self.row_bytes // 4].reshape(rows, -1)

    def __call__(self, tokens: mx.array) -> mx.array:
        rows = []
        for token in np.array(tokens).reshape(-1).tolist():
            self.weights.wait(self._submit(token, 1, self.row_pool))
            rows.append(self._rows(token, 1, self.row_pool) + 0)  # a copy
            mx.eval(rows[-1])
        return mx.concatenate(rows).reshape(*tokens.shape, -1)

    def as_linear(self, h: mx.array) -> mx.array:
        mx.eval(h)
        total = self.entry.shape[0]
        ticket = self._submit(0, min(self.rows, total), self.pools[0])
        logits = []
        for turn, row in enumerate(range(0, total, self.rows)):
            self.weights.wait(ticket)
            after = row + self.rows
            if after < total:
                ticket = self._submit(after, min(self.rows, total - after), self.pools[1 - turn % 2])
            logits.append(h @ self._rows(row, min(self.rows, total - row), self.pools[turn % 2]).T)
            mx.eval(logits[-1])
        return mx.concatenate(logits, axis=-1)


def stream_everything(model: Any, folder: Path) -> None:
    """Makes a model that was loaded with the predictor "none" and no slots keep nothing else either."""
    weights = _Weights(folder, model.flash.streamer)
    decoder = model.model.decoder
    layers = []
    prefixes = [f"model.decoder.layers.{i}.self_attn." for i in range(len(model.layers))]
    sizes = []
    for prefix in prefixes:
        entries = [entry for name, entry in weights.entries.items() if name.startswith(prefix)]
        sizes.append(max(e.end for e in entries) - min(e.begin for e in entries))
    pools = [AlignedPool(round_up(max(sizes), READ_ALIGNMENT) + 2 * READ_ALIGNMENT) for _ in range(2)]
    for i, (layer, prefix) in enumerate(zip(model.layers, prefixes, strict=True)):
        layer.self_attn = _Attention(layer.self_attn, prefix, weights, pools, i)
        layers.append(layer.self_attn)
    for this, following in itertools.pairwise(layers):
        this.following = following
    decoder.embed_tokens = _Embedding("model.decoder.embed_tokens.weight", weights)
