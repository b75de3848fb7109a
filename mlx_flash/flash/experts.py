"""The experts of one layer, read from the checkpoint's own files into slots.

The rule of neurons.py holds here too: before a slot is written, every graph that reads it has been evaluated.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .inflight import InFlightReads
from .pool import AlignedPool
from .reader import Reader, Ticket
from .requests import MERGE_BYTES
from .self_test import check_expert_pools
from .slot_cache import SlotCache
from .system import READ_ALIGNMENT
from .unit_file import UnitFile

SHORTEST_REQUEST = 128 << 10  # bytes; a layer's few missing experts are read in pieces no shorter (bench/RESULTS.md)
NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of a layer's experts: where in which files each expert's part of it lies, contiguous."""

    file_of: np.ndarray  # int (E,): number of the file
    offsets: np.ndarray  # int64 (E,): bytes
    shape: tuple[int, ...]  # of one expert's part
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Of one expert's part."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size

    @property
    def is_table(self) -> bool:
        """Whether an expert's part is a vector or a number (a bias, a global scale): that is kept, not streamed."""
        return len(self.shape) < 2


class ExpertFiles(InFlightReads):
    """What the layers of one model share: the checkpoint's files, the reader's threads, counters."""

    def __init__(self, files: Sequence[UnitFile], reader: Reader) -> None:
        super().__init__(reader)
        self.files = files
        self.layers: dict[str, dict[str, ExpertTensor]] = {}  # every stream's tensors, by its name
        for number, file in enumerate(files):
            file.name_of = functools.partial(name_experts, self.layers, number)
        self.held: list[mx.array] = []  # outputs of graphs that read slots, of any layer

    def settle(self) -> None:
        """Evaluates the pending outputs of all layers and drops them: a layer's output may be large."""
        held, self.held = self.held, []  # first: what cannot be evaluated is not tried for ever
        if held:
            mx.eval(held)

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone has written into one of the files."""
        for file in self.files:
            file.verify_unchanged()

    def close(self) -> None:
        self.reader.close()
        for file in self.files:
            file.close()


def name_experts(layers: dict[str, dict[str, ExpertTensor]], number: int, offset: int, length: int) -> str:
    """Names the experts that `length` bytes at `offset` of a file belong to, for messages; "" if none does."""
    for layer, tensors in layers.items():
        for tensor, place in tensors.items():
            overlaps = (place.offsets < offset + length) & (place.offsets + place.nbytes > offset)
            if len(found := np.flatnonzero(overlaps & (place.file_of == number))):
                experts = f"expert {found[0]}" if len(found) == 1 else f"experts {found[0]}-{found[-1]}"
                return f"{layer}, {experts}, {tensor}"
    return ""


@dataclass(frozen=True)
class _Flight:
    """Experts on their way into a layer's slots."""

    tickets: list[Ticket]
    experts: np.ndarray
    slots: np.ndarray
    guess: bool  # nobody has asked for them yet


class ExpertSlots:
    """One layer's experts behind a cache of `slots` of them.

    pools: for each tensor, by name, an array (slots, *shape) whose row s is the part of the expert in slot s.
    Raises FlashError if this machine's device does not see what the host writes into the slots.
    """

    def __init__(
        self,
        shared: ExpertFiles,
        tensors: dict[str, ExpertTensor],
        slots: int,
        window: int | None = None,
        name: str = "",
    ) -> None:
        """name: of the layer, for messages."""
        self.shared = shared
        shared.layers[name] = tensors
        self.tensors = tensors
        self.experts = len(next(iter(tensors.values())).offsets)
        self.cache = SlotCache(self.experts, slots, window)
        self._memory = {
            name: AlignedPool(self.cache.slots * t.nbytes, row_bytes=t.nbytes) for name, t in tensors.items()
        }
        self.pools = {name: self._typed(name) for name in tensors}
        mx.eval(list(self.pools.values()))
        self._tables = {name: self._read_table(t) for name, t in tensors.items() if t.is_table}
        # For every token, so laid out for it. P streamed tensors, those that lie first in the files first.
        streamed = [(t, self._memory[name].address) for name, t in tensors.items() if not t.is_table]
        streamed.sort(key=lambda item: (item[0].file_of[0], item[0].offsets[0]))
        self._file_of = np.array([t.file_of for t, _ in streamed])  # (P, E)
        self._offsets = np.array([t.offsets for t, _ in streamed])  # (P, E)
        self._addresses = np.array([[address] for _, address in streamed], np.int64)  # (P, 1)
        self._lengths = np.array([[t.nbytes] for t, _ in streamed], np.int64)  # (P, 1)
        self.flight: _Flight | None = None
        check_expert_pools(self._memory, self.pools)

    @property
    def all_resident(self) -> bool:
        """Whether every expert is in its slot, so that nothing will be read any more."""
        return self.cache.resident == self.experts

    def hold(self, *outputs: mx.array) -> None:
        """Names graphs that read the slots: they are evaluated before those are written again."""
        self.shared.held += outputs

    def settle(self) -> None:
        """Evaluates pending outputs, of all layers, now: MLX cannot evaluate them in another thread."""
        self.shared.settle()

    def use(self, experts: np.ndarray) -> None:
        """A call of the model needs `experts` (unique ids): they are the last to be evicted."""
        if (flight := self.flight) is not None:
            used = int(np.isin(flight.experts, experts).sum())
            if flight.guess:
                self.shared.counters.early += used
                self.shared.counters.vain += len(flight.experts) - used
                self.flight = replace(flight, guess=False)
            if len(experts) + len(flight.experts) - used > self.cache.slots:  # what is in vain must make room
                self.land()
        began = time.perf_counter()
        here = self.cache.tick(experts)
        self.shared.counters.hits += here
        self.shared.counters.misses += len(experts) - here
        self.shared.counters.manage_s += time.perf_counter() - began

    def read_ahead(self, experts: np.ndarray, keep: np.ndarray) -> None:
        """Starts to read `experts`, which are missing, as far as they fit: the token under way may need them here.

        None of `keep`, which are here, makes room for them. What was read in vain costs time, never changes a result.
        """
        self.land()  # what was in vain for the token before
        self.begin(experts[: self.cache.slots - len(keep)], keep, guess=True)

    def begin(self, experts: np.ndarray, keep: np.ndarray | None = None, guess: bool = False) -> None:
        """Starts to read those of `experts` (unique ids, at most as many as slots) that are missing and not on their
        way. None of `keep`, which are here, makes room for them."""
        began = time.perf_counter()
        before = self.flight or _Flight([], NOTHING, NOTHING, guess)
        wanted = experts if keep is None else np.concatenate((keep, experts))
        if len(before.experts):
            wanted = wanted[~np.isin(wanted, before.experts)]
        missing, slots = self.cache.reserve(wanted, taken=before.slots)
        if len(missing):
            settling = time.perf_counter()
            self.settle()
            began += time.perf_counter() - settling  # what the device still did is compute
            with self.shared.draining():
                if self.flight is None:
                    self.shared.flying.append(self)  # first: whatever interrupts this, `drain` finds the flight
                tickets = list(before.tickets)
                both = np.concatenate((before.experts, missing)), np.concatenate((before.slots, slots))
                self.flight = _Flight(tickets, *both, guess)
                self._submit(missing, slots, tickets)
        self.shared.counters.manage_s += time.perf_counter() - began

    def land(self, experts: np.ndarray | None = None) -> None:
        """Waits for what is on its way, which is then here; not if `experts` are here without it."""
        flight = self.flight
        if flight is None or (experts is not None and (self.cache.slot_of[experts] >= 0).all()):
            return
        began = time.perf_counter()
        with self.shared.draining():
            for ticket in flight.tickets:
                self.shared.wait(ticket)
            self.flight = None  # first: interrupted here, nobody waits for these tickets once more
            self.shared.flying.remove(self)
        for name, table in self._tables.items():
            self._rows_of(name)[flight.slots] = table[flight.experts]
        self.cache.commit(flight.experts, flight.slots)
        self.shared.counters.wait_s += time.perf_counter() - began

    def _submit(self, experts: np.ndarray, slots: np.ndarray, tickets: list[Ticket]) -> None:
        lengths = np.repeat(self._lengths, len(experts))  # (P * n,), as all of these
        addresses = (self._addresses + self._lengths * slots).ravel()
        offsets, file_of = self._offsets[:, experts].ravel(), self._file_of[:, experts].ravel()
        share = int(lengths.sum()) // (2 * self.shared.reader.threads) // READ_ALIGNMENT * READ_ALIGNMENT
        request_bytes = min(MERGE_BYTES, max(SHORTEST_REQUEST, share))
        for number in np.unique(file_of):
            here = np.flatnonzero(file_of == number)
            here = here[np.argsort(offsets[here], kind="stable")]
            file = self.shared.files[number]
            tickets.append(
                self.shared.reader.submit(
                    file,
                    offsets[here],
                    addresses[here],
                    lengths[here],
                    request_bytes=request_bytes,
                    destination=self._memory,
                )
            )

    def _typed(self, name: str) -> mx.array:
        tensor = self.tensors[name]
        return self._memory[name].array.view(tensor.dtype).reshape(self.cache.slots, *tensor.shape)

    def _rows_of(self, name: str) -> np.ndarray:
        """The slots as the host writes them: uint8 (slots, nbytes)."""
        memory = self._memory[name]
        raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
        return np.ctypeslib.as_array(raw).reshape(self.cache.slots, -1)

    def _read_table(self, tensor: ExpertTensor) -> np.ndarray:
        """All experts' parts: uint8 (E, nbytes)."""
        table = np.zeros((self.experts, tensor.nbytes), np.uint8)
        for number in np.unique(tensor.file_of):
            here = np.flatnonzero(tensor.file_of == number)
            here = here[np.argsort(tensor.offsets[here], kind="stable")]
            addresses = table.ctypes.data + here.astype(np.int64) * tensor.nbytes
            self.shared.reader.read(self.shared.files[number], tensor.offsets[here], addresses, tensor.nbytes)
        return table
