"""The experts of one layer, read from the checkpoint's own files into slots.

units.py explains how reads get into slots and why that is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .addresses import address
from .in_place import InPlaceFiles, TensorParts
from .pool import AlignedPool, copy_rows
from .reader import Ticket, slot_functions
from .requests import MERGE_BYTES
from .self_test import check_expert_pools
from .slot_cache import NO_SLOTS
from .system import READ_ALIGNMENT
from .units import Units


@dataclass(frozen=True)
class SlotMemory:
    """The slots of a layer, by the tensors' names. pools: arrays (slots, *shape) over `memory`. addresses: where the
    pools of the streamed tensors begin, int64 (P,)."""

    memory: dict[str, AlignedPool]
    pools: dict[str, mx.array]
    addresses: np.ndarray


class ExpertSlots(Units):
    """One layer's experts behind a cache of `slots` experts.

    held: the memory of the slots, another object after `resize`.
    Raises FlashError if this machine's device does not see what the host writes into the slots.
    """

    shared: InPlaceFiles

    def __init__(
        self,
        shared: InPlaceFiles,
        tensors: dict[str, TensorParts],
        slots: int,
        window: int | None = None,
        name: str = "",
    ) -> None:
        """name: the layer's name, for messages."""
        super().__init__(shared, len(next(iter(tensors.values())).offsets), slots, window)
        shared.layers[name] = tensors
        self.tensors = tensors
        self.slot_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._tables = {name: self._read_table(t) for name, t in tensors.items() if t.is_table}
        # Laid out for `_submit`, which runs for every token: P streamed tensors, in the order of the files.
        streamed = [(name, t) for name, t in tensors.items() if not t.is_table]
        streamed.sort(key=lambda item: (item[1].file_of[0], item[1].offsets[0]))
        self._streamed = [name for name, _ in streamed]
        self._file_of = np.array([t.file_of for _, t in streamed], np.int64)  # (P, E)
        self._offsets = np.array([t.offsets for _, t in streamed], np.int64)  # (P, E)
        self._lengths = np.array([t.nbytes for _, t in streamed], np.int64)  # (P,)
        self._unit_bytes = int(self._lengths.sum())
        self._files: list[int] = np.unique(self._file_of).tolist()
        self._list_segments = slot_functions().mf_segments
        self.held = self._slots_with(self.cache.slots)

    @property
    def pools(self) -> dict[str, mx.array]:
        """For each tensor, by name, an array (slots, *shape) whose row s is the part of the expert in slot s."""
        return self.held.pools

    @property
    def unit_bytes(self) -> int:
        return self._unit_bytes

    def places(self, units: np.ndarray) -> np.ndarray:
        return np.stack((self._file_of[0, units], self._offsets[0, units]), axis=1)

    def look_up(self, needed: np.ndarray) -> np.ndarray | None:
        """The slots of the experts that a call of a few tokens needs, uint32, if all are in slots; else None.

        needed: ids of any shape, which the slots have as well. They stay in their slots until the next look-up or use.
        """
        clock, shared = self.shared.clock, self.shared
        if self.pending is not None:
            return None
        shared.evaluate_guarded()  # as in `use`
        clock.start()
        found = self.cache.look_up(needed)
        if found is not None:
            shared.counters.hits += found[1]
        clock.managed()
        return None if found is None else found[0]

    def use(
        self, experts: np.ndarray, *, meanwhile: Callable[[], None] | None = None, at_once: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yields `experts` (unique ids), which a call of the model needs, in groups. A group stays in its slots
        (`slot_of`) until the next one is asked for.

        While the caller works on a group, the next one is read if the slots hold both. meanwhile: see `Units.use`.
        at_once: for a prompt, most missing experts in a group; None for a few tokens. Without a limit and without
        `InFlightReads.overlap`, all experts are one group, if they fit.
        """
        clock, slots = self.shared.clock, self.cache.slots
        # Usually these are evaluated by now. If they were kept, the outputs of all layers would add up in memory.
        self.shared.evaluate_guarded()
        clock.start()
        self._need(experts)
        groups = self.groups(experts, at_once)
        self._start(groups[0])
        clock.managed()
        if meanwhile is not None and len(groups) == 1:
            meanwhile()
        for turn, group in enumerate(groups):
            clock.start()
            self._finish(group)
            following = groups[turn + 1] if turn + 1 < len(groups) else experts[:0]
            overlaps = 0 < len(following) <= slots - len(group)
            if overlaps:
                self._start(following, keep=group)
            clock.managed()
            if meanwhile is not None and overlaps and turn + 2 == len(groups):
                meanwhile()
            yield group
            if at_once is None and len(following):
                self.shared.begin_guarded()
            elif at_once is not None and len(groups) > 1:  # Otherwise several outputs of a prompt are in memory.
                self.shared.evaluate_guarded()
            if len(following) and not overlaps:
                clock.start()
                self._start(following)
                clock.managed()

    def groups(self, experts: np.ndarray, at_once: int | None) -> list[np.ndarray]:
        """Splits `experts` into the groups of `use`; those in slots come first. If there are several groups, each fits
        into the slots together with the next one."""
        if at_once is None and not self.shared.overlap and len(experts) <= self.cache.slots:
            return [experts]
        here = self.cache.slot_of[experts] >= 0
        present, missing = experts[here], experts[~here]
        half = max(1, self.cache.slots // 2)
        if len(experts) > self.cache.slots:
            by_turn = np.concatenate((present, missing))
            return [by_turn[i : i + half] for i in range(0, len(by_turn), half)]
        size = max(1, len(missing) if at_once is None else min(half, at_once))
        groups = [missing[i : i + size] for i in range(0, len(missing), size)]
        return [present, *groups] if len(present) or not groups else groups

    def _arrived(self, units: np.ndarray, slots: np.ndarray) -> None:
        for name, table in self._tables.items():
            self.held.memory[name].host_rows(self.tensors[name].nbytes)[slots] = table[units]

    def _submit(self, units: np.ndarray, slots: np.ndarray, tickets: list[Ticket]) -> None:
        share = len(units) * self.unit_bytes // (2 * self.shared.reader.threads) // READ_ALIGNMENT * READ_ALIGNMENT
        request_bytes = min(MERGE_BYTES, max(self.shared.shortest_request, share))
        for number in self._files:
            offsets, addresses, lengths = self._segments(number, units, slots)
            if len(offsets):
                tickets.append(
                    self.shared.reader.submit(
                        self.shared.files[number],
                        offsets,
                        addresses,
                        lengths,
                        request_bytes=request_bytes,
                        destination=self.held.memory,
                    )
                )

    def _segments(self, file: int, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """What a file has of `units`, to be read into `slots`: int64 (3, n) of offsets, which ascend, addresses and
        lengths, in bytes."""
        units, slots = np.array(units, np.int32), np.array(slots, np.int32)
        parts = len(self._lengths)
        segments = np.empty((3, parts * len(units)), np.int64)
        count = self._list_segments(
            file, address(units), address(slots), len(units), parts, self.count, address(self._offsets),
            address(self._file_of), address(self._lengths), address(self.held.addresses), address(segments),
        )  # fmt: skip
        if count < 0:
            raise MemoryError(f"There is no memory for a table of {parts * len(units)} segments.")
        return segments[:, :count]

    def _slots_with(self, slots: int, kept: np.ndarray = NO_SLOTS, hurry: bool = False) -> SlotMemory:
        memory = {
            name: AlignedPool(slots * t.nbytes, row_bytes=t.nbytes, hurry=hurry) for name, t in self.tensors.items()
        }
        pools = {
            name: pool.array.view(self.tensors[name].dtype).reshape(slots, *self.tensors[name].shape)
            for name, pool in memory.items()
        }
        mx.eval(list(pools.values()))
        check_expert_pools(memory, pools)
        for name, pool in memory.items() if len(kept) else ():
            copy_rows(self.held.memory[name], pool, self.tensors[name].nbytes, kept)
        addresses = np.array([memory[name].address for name in self._streamed], np.int64)  # (P,)
        return SlotMemory(memory, pools, addresses)

    def _take_slots(self, memory: SlotMemory) -> None:
        self.held = memory

    def _read_table(self, tensor: TensorParts) -> np.ndarray:
        """Reads all experts' parts: uint8 (E, nbytes)."""
        table = np.zeros((self.count, tensor.nbytes), np.uint8)
        for number in np.unique(tensor.file_of):
            here = np.flatnonzero(tensor.file_of == number)
            here = here[np.argsort(tensor.offsets[here], kind="stable")]
            addresses = table.ctypes.data + here.astype(np.int64) * tensor.nbytes
            self.shared.reader.read(self.shared.files[number], tensor.offsets[here], addresses, tensor.nbytes)
        return table
