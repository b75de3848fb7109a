"""The baselines "naive" and "hybrid": all weights, or half of them, come from the SSD for every token.

They are written to be as fast as reading allows. They read the up and down projections as whole matrices
(`write_matrices` undoes the bundles), in long, aligned pieces that are used without a copy. The next piece is always
being read, across layers, and attention weights are read one layer ahead. "dense" keeps everything in memory.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_flash.errors import FlashError, ReadError, UsageError
from mlx_flash.flash.files import Manifest, NeuronLayout, round_up
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.neurons import NeuronFile
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Ticket
from mlx_flash.flash.safetensors_file import TensorEntry, read_header
from mlx_flash.flash.system import READ_ALIGNMENT
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.layers.neurons import StreamedNeurons
from mlx_flash.source.cached import MATRICES, in_use

PIECE_BYTES = 16 << 20
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}  # safetensors' name -> dtype


def wait(streamer: NeuronFile, ticket: Ticket) -> None:
    """Waits for a read and counts it."""
    began = time.perf_counter()
    streamer.wait(ticket)
    streamer.counters.wait_s += time.perf_counter() - began


def write_matrices(store: Path, layout: NeuronLayout, path: Path) -> None:
    """Writes every layer's up projection, then its down projection, in the pieces that a dense engine would read.

    A piece is `rows_of_piece` neurons: (D, n) of the up projection, (n, D) of the down projection, which are the
    fastest orientations for BLAS. Writes to a temporary file and renames it, so that the file at `path` is complete.
    Raises UsageError if the disk has too little room or another process writes the same file, ReadError if the store
    ends early.
    """
    needed = layout.layers * 2 * layout.neurons * layout.row_bytes
    if (free := shutil.disk_usage(path.parent).free) < 1.02 * needed:
        raise UsageError(
            f"the baselines need {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free. "
            "Free some room there, or pass another folder as --matrices."
        )
    partial = path.with_name(path.name + ".partial")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is writing {path}. Wait for it, or choose another folder.") from None
        try:
            file.truncate(0)
            _write_pieces(store / Manifest.neurons_file, layout, file, needed)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def matrices_problem(manifest: Manifest) -> str | None:
    """The reason why the baselines cannot run a model, or None. They support OPT and its FFN without a gate only."""
    if manifest.model_type == "opt":
        return None
    return f"the baselines only run OPT, and this model's type is {manifest.model_type}"


@contextmanager
def kept_matrices(store: Path, manifest: Manifest, folder: Path | None) -> Iterator[Path]:
    """Yields the file of a store's matrices. folder: keeps it; None: a temporary folder beside the store.

    The file's name contains the checksum of the store's checksums, so every store has its own file.
    """
    if problem := matrices_problem(manifest):
        raise UsageError(f"{problem}. Choose the store of another model.")
    digest = manifest.files[Manifest.neurons_checksums_file]["sha256"]
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(_temporary_folder(store))
        path = folder / f"matrices-{digest[:12]}.bin"
        if not path.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_matrices(store, manifest.layout, path)
            except OSError as error:
                raise FlashError(
                    f"the baselines' matrices cannot be written into {folder} ({error.strerror}): "
                    "free some room there, or pass another folder as --matrices."
                ) from None
        yield path


@contextmanager
def _temporary_folder(store: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=MATRICES, dir=store.resolve().parent))
    except OSError as error:
        raise UsageError(f"the folder of the store cannot be written to ({error}). Pass --matrices.") from None
    with in_use(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_pieces(neurons_file: Path, layout: NeuronLayout, file: BinaryIO, total: int) -> None:
    per_block = layout.neurons_per_block * layout.row_bytes
    with (
        neurons_file.open("rb") as source,
        tqdm(total=total, unit="B", unit_scale=True, desc="matrices", dynamic_ncols=True) as bar,
    ):
        for layer in range(layout.layers):
            source.seek(layer * layout.layer_bytes)
            raw = np.frombuffer(source.read(layout.blocks * layout.block_bytes), np.uint8)
            if len(raw) < layout.blocks * layout.block_bytes:
                raise ReadError(
                    f"{neurons_file} ends within layer {layer}: it was cut while it was in use. "
                    "Do not change the files of a store while a model runs. Start again."
                )
            blocks = raw.reshape(layout.blocks, layout.block_bytes)
            for part in range(2):
                packed = blocks[:, part * per_block : (part + 1) * per_block].reshape(-1)
                items = packed.view(f"u{layout.row_bytes // layout.width}").reshape(-1, layout.width)[: layout.neurons]
                for start in range(0, layout.neurons, rows_of_piece(layout)):
                    piece = items[start : start + rows_of_piece(layout)]
                    bar.update(file.write((piece.T.copy() if part == 0 else piece).data))
        file.flush()
        os.fsync(file.fileno())


class _PieceConveyor:
    """Reads the pieces of all layers in order, again for every token. One piece is always being read."""

    def __init__(self, streamer: NeuronFile, matrices: UnitFile, piece_bytes: int) -> None:
        self.streamer, self.matrices = streamer, matrices
        self.places: list[tuple[int, int]] = []  # offset in the file, bytes
        self.scratch = [AlignedPool(piece_bytes) for _ in range(2)]
        self.turn = 0
        self.ticket: Ticket | None = None

    def read(self, place: tuple[int, int], pool: AlignedPool) -> Ticket:
        segment = (np.array([value]) for value in (place[0], pool.address, place[1]))
        return self.streamer.reader.submit(self.matrices, *segment)

    def take(self) -> AlignedPool:
        """Returns the next piece. Arrays made from the last piece must be evaluated: its memory is reused."""
        if self.ticket is None:
            self._start()
        assert self.ticket is not None
        wait(self.streamer, self.ticket)
        pool = self.scratch[self.turn % 2]
        self.turn += 1
        self._start()
        return pool

    def _start(self) -> None:
        self.ticket = self.read(self.places[self.turn % len(self.places)], self.scratch[self.turn % 2])


class _Neurons:
    """A layer's whole FFN in pieces. The first `resident` pieces stay in memory; the others are read for each call."""

    def __init__(self, mlp: StreamedNeurons, layer: int, resident: int, conveyor: _PieceConveyor) -> None:
        # Take only the biases from the layer, so that its unused slots are freed.
        self.biases = {name: mlp[name] for name in ("up_bias", "down_bias") if name in mlp}
        self.conveyor, self.layout = conveyor, mlp.units.layout
        rows, neurons = rows_of_piece(self.layout), self.layout.neurons
        self.pieces = [
            (part, start, min(rows, neurons - start)) for part in range(2) for start in range(0, neurons, rows)
        ]
        row_bytes = self.layout.row_bytes
        places = [
            (((2 * layer + part) * neurons + start) * row_bytes, count * row_bytes)
            for part, start, count in self.pieces
        ]
        self.resident = [AlignedPool(nbytes) for _, nbytes in places[:resident]]
        for place, pool in zip(places, self.resident, strict=False):
            conveyor.streamer.reader.wait(conveyor.read(place, pool))
        conveyor.places += places[resident:]

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        hidden: list[mx.array] = []
        y = mx.zeros_like(flat)
        for piece, (part, start, count) in enumerate(self.pieces):
            pool = self.resident[piece] if piece < len(self.resident) else self.conveyor.take()
            nbytes = count * self.layout.row_bytes
            matrix = pool.array.reshape(-1)[:nbytes].view(getattr(mx, self.layout.dtype)).astype(x.dtype)
            if part == 0:
                h = flat @ matrix.reshape(-1, count)  # (N, D) @ (D, n)
                if "up_bias" in self.biases:
                    h = h + self.biases["up_bias"][start : start + count]
                hidden.append(mx.maximum(h, 0))
                mx.eval(hidden)
            else:
                y = y + hidden.pop(0) @ matrix.reshape(count, -1)  # (N, n) @ (n, D)
                mx.eval(y)
        return (y + self.biases["down_bias"] if "down_bias" in self.biases else y).reshape(x.shape)


def rows_of_piece(layout: NeuronLayout) -> int:
    """Rows of a matrix that are read and multiplied at once: about PIECE_BYTES in whole disk blocks, at most all."""
    step = READ_ALIGNMENT // math.gcd(READ_ALIGNMENT, layout.row_bytes)
    return min(layout.neurons, max(step, PIECE_BYTES // layout.row_bytes // step * step))


def spread_pieces(pieces: int, layers: int) -> list[int]:
    """Distributes pieces over the layers as evenly as possible."""
    return [(pieces * (i + 1)) // layers - (pieces * i) // layers for i in range(layers)]


def keep_some(model: Any, matrices: Path, resident_bytes: int) -> int:
    """Gives a model that was loaded with the predictor "none" whole FFNs, with `resident_bytes` of them in memory.

    Returns the bytes in memory, rounded to whole pieces.
    """
    layout = model.flash.streamer.layout
    rows = rows_of_piece(layout)
    per_layer = 2 * -(-layout.neurons // rows)
    pieces = min(resident_bytes // (rows * layout.row_bytes), per_layer * layout.layers)
    conveyor = _PieceConveyor(model.flash.streamer, UnitFile(matrices), rows * layout.row_bytes)
    for i, (layer, kept) in enumerate(zip(model.layers, spread_pieces(pieces, layout.layers), strict=True)):
        layer.mlp = _Neurons(layer.mlp, i, kept, conveyor)
    return sum(pool.nbytes for layer in model.layers for pool in layer.mlp.resident)


class _Weights:
    """Reads byte ranges of model.safetensors with the engine's reader and counts them in its counters."""

    def __init__(self, folder: Path, streamer: NeuronFile, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self.path = folder / Manifest.resident_file
        self.entries: dict[str, TensorEntry] = read_header(self.path)[1]
        self.file = UnitFile(self.path)
        self.streamer = streamer

    def submit(self, begin: int, end: int, pool: AlignedPool) -> Ticket:
        """Reads bytes `begin` to `end` into the pool's start, widened to whole blocks within the file."""
        first = begin // READ_ALIGNMENT * READ_ALIGNMENT
        last = min(round_up(end, READ_ALIGNMENT), self.file.size)
        segment = (np.array([value]) for value in (first, pool.address, last - first))
        return self.streamer.reader.submit(self.file, *segment)

    def view(self, name: str, pool: AlignedPool, begin: int) -> mx.array:
        """A view of the tensor in a pool that holds the bytes from `begin` on, or a copy if it must be widened."""
        entry = self.entries[name]
        return self.typed(entry, pool, entry.begin - begin // READ_ALIGNMENT * READ_ALIGNMENT, entry.shape)

    def typed(self, entry: TensorEntry, pool: AlignedPool, offset: int, shape: tuple[int, ...]) -> mx.array:
        """Elements of a tensor from byte `offset` of a pool on, in the compute dtype."""
        dtype = DTYPES[entry.dtype]
        first = offset // dtype.size
        array = pool.array.view(dtype)[first : first + math.prod(shape)].reshape(shape).astype(self.dtype)
        mx.eval(array)
        return array


class _Attention:
    """A layer's attention with weights that are read while the layer before is computed."""

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
        mx.eval(x)  # nothing unevaluated may depend on the buffer that is filled next
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
    """A token table. Inputs read single rows; the output projection reads the whole table in pieces."""

    def __init__(self, name: str, weights: _Weights) -> None:
        entry = weights.entries[name]
        self.weights, self.entry = weights, entry
        self.row_bytes = (entry.end - entry.begin) // entry.shape[0]
        self.rows = max(1, PIECE_BYTES // self.row_bytes)
        self.pools = [AlignedPool(PIECE_BYTES + 2 * READ_ALIGNMENT) for _ in range(2)]
        self.row_pool = AlignedPool(round_up(self.row_bytes, READ_ALIGNMENT) + READ_ALIGNMENT)

    def _submit(self, row: int, rows: int, pool: AlignedPool) -> Ticket:
        begin = self.entry.begin + row * self.row_bytes
        return self.weights.submit(begin, begin + rows * self.row_bytes, pool)

    def _rows(self, row: int, rows: int, pool: AlignedPool) -> mx.array:
        offset = (self.entry.begin + row * self.row_bytes) % READ_ALIGNMENT
        return self.weights.typed(self.entry, pool, offset, (rows, self.entry.shape[1]))

    def __call__(self, tokens: mx.array) -> mx.array:
        rows = []
        for token in to_numpy(tokens).reshape(-1).tolist():
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


def keep_nothing(model: Any, folder: Path, matrices: Path, dtype: mx.Dtype) -> int:
    """Makes a model that was loaded with the predictor "none" read every matrix for every token.

    Norms, biases of the FFN and the position table stay in memory. Returns their stored bytes.
    """
    keep_some(model, matrices, 0)
    weights = _Weights(folder, model.flash.streamer, dtype)
    prefixes = [f"model.decoder.layers.{i}.self_attn." for i in range(len(model.layers))]
    sizes = []
    for prefix in prefixes:
        entries = [entry for name, entry in weights.entries.items() if name.startswith(prefix)]
        sizes.append(max(e.end for e in entries) - min(e.begin for e in entries))
    pools = [AlignedPool(round_up(max(sizes), READ_ALIGNMENT) + 2 * READ_ALIGNMENT) for _ in range(2)]
    layers = []
    for i, (layer, prefix) in enumerate(zip(model.layers, prefixes, strict=True)):
        layer.self_attn = _Attention(layer.self_attn, prefix, weights, pools, i)
        layers.append(layer.self_attn)
    for this, following in pairwise(layers):
        this.following = following
    tables = ["model.decoder.embed_tokens.weight"]
    model.model.decoder.embed_tokens = _Embedding(tables[0], weights)
    if "lm_head" in model:
        tables.append("lm_head.weight")
        model.lm_head = _Embedding(tables[1], weights).as_linear
    read = sum(sizes) + sum(weights.entries[name].end - weights.entries[name].begin for name in tables)
    return sum(entry.end - entry.begin for entry in weights.entries.values()) - read
