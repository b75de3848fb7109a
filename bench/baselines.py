"""The baselines: every weight, or half of them, comes from the SSD for every token; "naive" and "hybrid" loading.

Written to be as fast as reading allows: all reads are long, aligned and used where they land, the next piece is on its
way while this one is multiplied, and a layer's attention comes a layer ahead. Bundles have up and down rows side by
side, where a dense engine would have two matrices; so that nothing is copied, a piece is multiplied as one matrix
twice as long, and the products with the other part's rows are dropped.
"""

from __future__ import annotations

import time
from itertools import pairwise
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
from mlx_flash.layers.neurons import StreamedNeurons

HEAD_PIECE_BYTES = 16 << 20


def wait(streamer: Streamer, ticket: Ticket) -> None:
    """Waits for a read and counts it."""
    began = time.perf_counter()
    report = streamer.reader.wait(ticket)
    counters = streamer.counters
    counters.wait_s += time.perf_counter() - began
    counters.read_s += report.seconds
    counters.reads += report.requests
    counters.bytes += report.bytes


class _Neurons:
    """A layer's whole FFN, piece by piece: the first `resident` pieces stay in memory, the others are read."""

    def __init__(self, mlp: StreamedNeurons, layer: int, resident: int, scratch: list[AlignedPool]) -> None:
        self.mlp, self.layer, self.resident = mlp, layer, resident
        self.streamer = mlp._stream.shared
        self.layout = self.streamer.layout
        self.pools = [AlignedPool(scratch[0].nbytes) for _ in range(resident)]
        for piece, pool in enumerate(self.pools):
            self.streamer.reader.wait(self._submit(piece, pool))
        self.scratch = scratch
        self.pieces = -(-self.layout.blocks // self.layout.piece_blocks)

    def _blocks(self, piece: int) -> int:
        return min(self.layout.piece_blocks, self.layout.blocks - piece * self.layout.piece_blocks)

    def _submit(self, piece: int, pool: AlignedPool) -> Ticket:
        layout = self.layout
        offset = self.layer * layout.layer_bytes + piece * layout.piece_blocks * layout.block_bytes
        segment = (np.array([value]) for value in (offset, pool.address, self._blocks(piece) * layout.block_bytes))
        return self.streamer.reader.submit(self.streamer.file, *segment)

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        y = mx.zeros_like(flat)
        ticket = None
        if self.resident < self.pieces:
            ticket = self._submit(self.resident, self.scratch[0])
        for piece in range(self.pieces):
            if piece < self.resident:
                y = self._add(y, flat, piece, self.pools[piece])
                continue
            assert ticket is not None
            wait(self.streamer, ticket)
            turn = (piece - self.resident) % 2
            if piece + 1 < self.pieces:
                ticket = self._submit(piece + 1, self.scratch[1 - turn])
            y = self._add(y, flat, piece, self.scratch[turn])
        return (y + self.mlp.down_bias if "down_bias" in self.mlp else y).reshape(x.shape)

    def _add(self, y: mx.array, x: mx.array, piece: int, pool: AlignedPool) -> mx.array:
        """y plus what the neurons of a piece add."""
        layout, lanes, blocks = self.layout, self.layout.neurons_per_block, self._blocks(piece)
        typed = pool.array.view(getattr(mx, layout.dtype))
        strides = (layout.block_bytes // typed.dtype.size, layout.width, 1)
        rows = mx.as_strided(typed, (blocks, 2 * lanes, layout.width), strides).reshape(-1, layout.width)
        rows = rows.astype(x.dtype)
        start = piece * layout.piece_neurons
        count = min(layout.neurons - start, blocks * lanes)
        h = (x @ rows.T).reshape(-1, blocks, 2, lanes)[:, :, 0].reshape(len(x), -1)[:, :count]
        if "up_bias" in self.mlp:
            h = h + self.mlp.up_bias[start : start + count]
        h = mx.pad(mx.maximum(h, 0), [(0, 0), (0, blocks * lanes - count)]).reshape(-1, blocks, 1, lanes)
        h = mx.concatenate([mx.zeros_like(h), h], axis=2).reshape(len(x), -1)  # nothing for the up rows
        y = y + h @ rows
        mx.eval(y)
        return y


def spread_pieces(pieces: int, layers: int) -> list[int]:
    """So many pieces over the layers as evenly as possible."""
    return [(pieces * (i + 1)) // layers - (pieces * i) // layers for i in range(layers)]


def keep_some(model: Any, resident_bytes: int) -> None:
    """Gives a model that was loaded with the predictor "none" a whole FFN, `resident_bytes` of it in memory."""
    streamer = model.flash.streamer
    layout = streamer.layout
    piece_bytes = layout.piece_blocks * layout.block_bytes
    per_layer = -(-layout.blocks // layout.piece_blocks)
    pieces = min(resident_bytes // piece_bytes, per_layer * layout.layers)
    scratch = [AlignedPool(piece_bytes) for _ in range(2)]
    kept = spread_pieces(pieces, layout.layers)
    for i, layer in enumerate(model.layers):
        layer.mlp = _Neurons(layer.mlp, i, min(kept[i], per_layer), scratch)


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
        wait(self.weights.streamer, ticket)
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
            wait(self.weights.streamer, self._submit(token, 1, self.row_pool))
            rows.append(self._rows(token, 1, self.row_pool) + 0)  # a copy
            mx.eval(rows[-1])
        return mx.concatenate(rows).reshape(*tokens.shape, -1)

    def as_linear(self, h: mx.array) -> mx.array:
        mx.eval(h)
        total = self.entry.shape[0]
        ticket = self._submit(0, min(self.rows, total), self.pools[0])
        logits = []
        for turn, row in enumerate(range(0, total, self.rows)):
            wait(self.weights.streamer, ticket)
            after = row + self.rows
            if after < total:
                ticket = self._submit(after, min(self.rows, total - after), self.pools[1 - turn % 2])
            logits.append(h @ self._rows(row, min(self.rows, total - row), self.pools[turn % 2]).T)
            mx.eval(logits[-1])
        return mx.concatenate(logits, axis=-1)


def keep_nothing(model: Any, folder: Path) -> None:
    """Makes a model that was loaded with the predictor "none" read everything for every token."""
    keep_some(model, 0)
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
    for this, following in pairwise(layers):
        this.following = following
    decoder.embed_tokens = _Embedding("model.decoder.embed_tokens.weight", weights)
