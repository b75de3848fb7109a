"""The layers that do not fit into memory, read from the checkpoint's own files into a ring of buffers.

Every token needs every layer, in the same order. So the next layer to read is certain, and a read starts as soon as a
buffer is free: while one layer computes, the next one is on its way. A layer that was just used is the last to be used
again, so no policy of eviction helps here. Layers that fit are pinned in memory, and only the others pass through the
ring.

units.py has the rule for writes. Here it is kept by `release`, which evaluates whatever the layer computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .files import round_up
from .in_place import InPlaceFiles, TensorParts
from .pool import AlignedPool
from .reader import Ticket
from .self_test import check_expert_pools
from .slot_cache import EventLog

FileReads = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""The number of a file, and offsets, addresses and lengths of reads from it, int64 (n,) each."""

BUFFERS = 2  # one layer computes while the next is read; more buffers would take memory from pinned layers
TENSOR_ALIGNMENT = 64  # bytes; the start of every tensor in a buffer


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer.

    begin: its first byte in a buffer. segments: its bytes in the files, in order: int64 (n, 3) of file, offset, length.
    """

    name: str
    parts: TensorParts
    begin: int
    segments: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts.offsets), *self.parts.shape)

    @property
    def nbytes(self) -> int:
        return len(self.parts.offsets) * self.parts.nbytes


def lay_out(tensors: Iterable[tuple[str, TensorParts]]) -> list[LayerTensor]:
    """The layout of a layer's tensors in a buffer, in the order of their files, which reads them with the fewest seeks.

    tensors: name and places, whose parts are the tensor's parts along its first axis.
    """
    ordered = sorted(tensors, key=lambda item: (item[1].file_of[0], item[1].offsets[0]))
    placed, begin = [], 0
    for name, parts in ordered:
        placed.append(LayerTensor(name, parts, begin, _segments(parts)))
        begin = round_up(begin + placed[-1].nbytes, TENSOR_ALIGNMENT)
    return placed


def buffer_bytes(tensors: Sequence[LayerTensor]) -> int:
    """Bytes of a buffer that holds these tensors."""
    return round_up(tensors[-1].begin + tensors[-1].nbytes, TENSOR_ALIGNMENT) if tensors else 0


def _segments(parts: TensorParts) -> np.ndarray:
    """Joins parts that follow each other in a file: int64 (n, 3) of file, offset, length."""
    starts = np.ones(len(parts.offsets), np.bool_)
    starts[1:] = (parts.offsets[1:] != parts.offsets[:-1] + parts.nbytes) | (parts.file_of[1:] != parts.file_of[:-1])
    first = np.flatnonzero(starts)
    lengths = np.diff(np.append(first, len(starts))) * parts.nbytes
    return np.stack((parts.file_of[first], parts.offsets[first], lengths), axis=1).astype(np.int64)


class LayerMap:
    """Which of a model's layers are in memory, for observers: it has the public attributes of a SlotCache.

    slot_of: int32 (layers,), -1 for a layer that is not in memory. event_log: None to record no uses and reads.
    """

    def __init__(self, layers: int, streamed: Sequence[int] = ()) -> None:
        """streamed: the numbers of the layers that pass through the ring."""
        self.slot_of = np.arange(layers, dtype=np.int32)
        self.slot_of[list(streamed)] = -1
        self.pinned = np.flatnonzero(self.slot_of >= 0)
        self.slots = len(self.pinned) + min(BUFFERS, len(streamed))
        self.event_log: EventLog | None = None

    @property
    def resident(self) -> int:
        return int(np.count_nonzero(self.slot_of >= 0))


class LayerRing:
    """The buffers that the streamed layers of a model share.

    Layers are numbered 0 to len(layers) - 1, in the order in which a token uses them.

    numbers: for each of them, its number among all layers of the model. count: the number of all layers.
    Raises FlashError if this machine's device does not see what the host writes into the buffers.
    """

    def __init__(
        self, shared: InPlaceFiles, layers: Sequence[Sequence[LayerTensor]], numbers: Sequence[int], count: int
    ) -> None:
        self.shared, self.layers, self.numbers = shared, layers, numbers
        self.map = LayerMap(count, numbers)
        size = max(buffer_bytes(tensors) for tensors in layers)
        # Rows, because MLX has no flat byte arrays beyond 2 GiB.
        self._pools = [AlignedPool(size, row_bytes=TENSOR_ALIGNMENT) for _ in range(min(BUFFERS, len(layers)))]
        self.holds = [-1] * len(self._pools)  # the layer whose bytes are in each buffer; -1 for none
        # The reads on their way: buffer -> (layer, tickets). None after an error dropped them (`InFlightReads.drain`).
        self.pending: dict[int, tuple[int, list[Ticket]]] | None = None
        self._views: dict[tuple[int, int], list[mx.array]] = {}
        self._reads: dict[tuple[int, int], list[FileReads]] = {}
        for tensors in layers:
            shared.tensors.update({tensor.name: tensor.parts for tensor in tensors})
        check_expert_pools(
            {str(n): pool for n, pool in enumerate(self._pools)},
            {str(n): pool.array for n, pool in enumerate(self._pools)},
        )

    def views(self, layer: int, buffer: int = 0) -> list[mx.array]:
        """The tensors of a layer as arrays in a buffer. They have the layer's numbers while the buffer holds it."""
        if (layer, buffer) not in self._views:
            pool = self._pools[buffer]
            found = [_view(pool.array, tensor) for tensor in self.layers[layer]]
            mx.eval(found)
            for view, tensor in zip(found, self.layers[layer], strict=True):
                pool.must_hold(view, tensor.begin)
            self._views[layer, buffer] = found
        return self._views[layer, buffer]

    def use(self, layer: int) -> list[mx.array]:
        """Waits until the layer is in a buffer, and returns its tensors there. They stay until `release`."""
        clock, counters = self.shared.clock, self.shared.counters
        clock.start()
        used = self.map.pinned if layer == 0 else self.map.pinned[:0]
        counters.hits += len(used)
        counters.misses += 1
        if (log := self.map.event_log) is not None:
            log.used.append(np.append(used, self.numbers[layer]))
        buffer = self._buffer_of(layer)
        if buffer is None:
            buffer = self._start(layer)
        if self.pending is not None and buffer in self.pending:
            self._finish(buffer)
        views = self.views(layer, buffer)
        clock.managed()
        return views

    def release(self, layer: int, outputs: Sequence[mx.array]) -> None:
        """Ends the use of a layer. outputs: everything that was computed from its tensors; it is evaluated here.

        Then reads of the following layers start, as far as there are buffers.
        """
        mx.eval(outputs)
        clock = self.shared.clock
        clock.start()
        for ahead in range(1, len(self._pools) + 1):
            following = (layer + ahead) % len(self.layers)
            if self._buffer_of(following) is None:
                self._start(following, keep=range(layer + 1, layer + ahead))
        clock.managed()

    def _buffer_of(self, layer: int) -> int | None:
        """The buffer that holds a layer or receives it."""
        for buffer, (coming, _) in (self.pending or {}).items():
            if coming == layer:
                return buffer
        return self.holds.index(layer) if layer in self.holds else None

    def _start(self, layer: int, keep: Iterable[int] = ()) -> int:
        """Starts to read a layer into a buffer that holds none of the layers `keep`, and returns the buffer.

        No graph reads that buffer any more: `release` evaluated what did.
        """
        kept = {self._buffer_of(number % len(self.layers)) for number in keep}
        buffer = next(number for number in range(len(self._pools)) if number not in kept)
        if self.pending is not None and buffer in self.pending:  # an earlier call ended before it needed them
            self._finish(buffer)
        if (held := self.holds[buffer]) >= 0:
            self.map.slot_of[self.numbers[held]] = -1
        self.holds[buffer] = -1
        with self.shared.draining():
            if self not in self.shared.loading:
                self.shared.loading.append(self)  # First, so that `drain` finds the reads after an interrupt.
            if self.pending is None:
                self.pending = {}
            tickets: list[Ticket] = []
            self.pending[buffer] = (layer, tickets)
            self._submit(layer, buffer, tickets)
        self.shared.clock.waited()
        return buffer

    def _submit(self, layer: int, buffer: int, tickets: list[Ticket]) -> None:
        """Submits the reads of a layer and appends their tickets."""
        if (layer, buffer) not in self._reads:
            self._reads[layer, buffer] = _reads_of(self.layers[layer], self._pools[buffer].address)
        for number, offsets, addresses, lengths in self._reads[layer, buffer]:
            file = self.shared.files[number]
            tickets.append(
                self.shared.reader.submit(file, offsets, addresses, lengths, destination=self._pools[buffer])
            )

    def _finish(self, buffer: int) -> None:
        """Waits until a buffer has received its layer."""
        assert self.pending is not None
        layer, tickets = self.pending[buffer]
        self.shared.clock.managed()
        with self.shared.draining():
            for ticket in tickets:
                self.shared.wait(ticket)
            del self.pending[buffer]
            self.holds[buffer] = layer
            self.map.slot_of[self.numbers[layer]] = len(self.map.pinned) + buffer
            if (log := self.map.event_log) is not None:
                log.read.append(np.array([self.numbers[layer]]))
            if not self.pending:
                self.shared.loading.remove(self)
                self.pending = None
        self.shared.clock.waited()


def _reads_of(tensors: Sequence[LayerTensor], address: int) -> list[FileReads]:
    """The reads of tensors into a buffer at an address, file by file."""
    segments = np.concatenate([tensor.segments for tensor in tensors])  # (n, 3)
    addresses = np.concatenate(
        [address + t.begin + np.cumsum(t.segments[:, 2]) - t.segments[:, 2] for t in tensors]
    )  # (n,)
    reads = []
    for number in np.unique(segments[:, 0]).tolist():
        here = np.flatnonzero(segments[:, 0] == number)
        here = here[np.argsort(segments[here, 1], kind="stable")]
        reads.append((number, segments[here, 1], addresses[here], segments[here, 2]))
    return reads


def _view(pool: mx.array, tensor: LayerTensor) -> mx.array:
    """A tensor in a buffer. pool: uint8 (rows, TENSOR_ALIGNMENT). The result shares the pool's memory."""
    first, last = tensor.begin // TENSOR_ALIGNMENT, -(-(tensor.begin + tensor.nbytes) // TENSOR_ALIGNMENT)
    numbers = tensor.nbytes // tensor.parts.dtype.size
    return pool[first:last].view(tensor.parts.dtype).reshape(-1)[:numbers].reshape(tensor.shape)
