"""One layer's neurons, read from the bundle file into MLX memory: selected ones, or all in turn.

The rule of units.py also holds for scratch memory: every graph that reads it is evaluated before it is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .files import NeuronLayout
from .inflight import InFlightReads
from .pool import AlignedPool, copy_rows
from .reader import Reader, Ticket, crc32_of_each
from .rows import BlockRows, PackedRows, StoredRows
from .self_test import check_neuron_pool, check_packed_products
from .slot_cache import NO_SLOTS
from .unit_file import UnitFile
from .unit_sums import BlockSums
from .units import Units


class NeuronFile(InFlightReads):
    """The state that the layers of one model share: the file, the reader's threads, scratch memory, counters.

    Raises FlashError if this machine's device does not see what the host writes into MLX memory.
    """

    def __init__(self, file: UnitFile, reader: Reader, layout: NeuronLayout) -> None:
        super().__init__(reader, [file])
        self.file = file
        file.name_of = layout.name_bytes
        self.layout = layout
        self.scratch = [AlignedPool(layout.piece_blocks * layout.block_bytes) for _ in range(2)]
        self.side = side_stream() if mx.default_device() == mx.cpu else None
        self.scratch_rows = [BlockRows(pool, layout, layout.parts, self.side) for pool in self.scratch]
        for pool, rows in zip(self.scratch, self.scratch_rows, strict=True):
            check_neuron_pool(pool, rows)
        if layout.quantised and self.side is None:
            check_packed_products(layout)

    def verify_unchanged(self) -> None:
        """Raises ReadError if the bundle file was changed."""
        self.file.verify_unchanged()

    def is_lost(self) -> bool:
        """Whether the bundle file went away, see `UnitFile.is_lost`."""
        return self.file.is_lost()

    def close(self) -> None:
        self.reader.close()
        self.file.close()


@functools.cache
def side_stream() -> mx.ThreadLocalStream:
    """A second CPU stream. The CPU backend has one thread per stream, and one cannot copy as fast as memory allows.

    The process has one side stream, because MLX never ends a stream or its thread.
    """
    return mx.new_thread_local_stream(mx.cpu)


def _joined(pieces: StoredRows) -> mx.array | PackedRows:
    """The rows of several rounds, concatenated."""
    if not isinstance(pieces[0], PackedRows):
        return mx.concatenate(list(pieces))  # type: ignore[arg-type]  # all have one type
    each = zip(*(piece.components for piece in pieces), strict=True)  # type: ignore[union-attr]
    packed, scales, biases = (mx.concatenate(list(parts)) for parts in each)
    return PackedRows(packed, scales, biases, pieces[0].group_size, pieces[0].bits)


@dataclass
class _Piece:
    """A piece of a layer that is being read: its destination and its read."""

    start: int
    stop: int
    rows: BlockRows
    places: np.ndarray  # int (blocks,): each block's place in the pool
    ticket: Ticket | None = None
    missing: np.ndarray | None = None  # blocks to commit to `targets` when the read is done
    targets: np.ndarray | None = None


class NeuronSlots(Units):
    """One layer of the bundle file behind a cache of `slots` blocks.

    parts: the neighbouring parts of a bundle that are kept in slots (all, or those not resident elsewhere). share: the
    blocks that are held, None for all. Neurons are then counted from the first one of the share, and blocks as well.
    Raises FlashError if this machine's device does not see what the host writes into the slots.
    """

    shared: NeuronFile

    def __init__(
        self,
        shared: NeuronFile,
        layer: int,
        slots: int,
        parts: tuple[str, ...],
        window: int | None = None,
        share: range | None = None,
    ) -> None:
        layout = shared.layout
        held = range(layout.blocks) if share is None else share
        super().__init__(shared, len(held), slots, window)
        self.layout = layout
        self.layer = layer
        self.first_neuron = held.start * layout.neurons_per_block
        self.neurons = min(held.stop * layout.neurons_per_block, layout.neurons) - self.first_neuron
        self.file_offset = layer * layout.layer_bytes + held.start * layout.block_bytes
        self.parts = parts
        self.part_offset, self.slot_bytes = layout.part_range(parts)
        self.rows = self._slots_with(self.cache.slots) if self.cache.slots else None

    @property
    def pool(self) -> AlignedPool | None:
        """The memory of the slots; None without any."""
        return None if self.rows is None else self.rows.pool

    def _slots_with(self, slots: int, kept: np.ndarray = NO_SLOTS, hurry: bool = False) -> BlockRows:
        pool = AlignedPool(slots * self.slot_bytes, row_bytes=self.slot_bytes, hurry=hurry)
        rows = BlockRows(pool, self.layout, self.parts, self.shared.side)
        check_neuron_pool(pool, rows)
        if len(kept) and self.pool is not None:
            copy_rows(self.pool, pool, self.slot_bytes, kept)
        return rows

    def _take_slots(self, memory: BlockRows) -> None:
        self.rows = memory

    @property
    def unit_bytes(self) -> int:
        return self.slot_bytes

    def places(self, units: np.ndarray) -> np.ndarray:
        offsets = self.file_offset + units.astype(np.int64) * self.layout.block_bytes
        return np.stack((np.zeros(len(units), np.int64), offsets + self.part_offset), axis=1)

    def _verify_file(self) -> None:
        """Checks once per call of the model that the file was not changed."""
        if self.layer == 0:
            self.shared.file.verify_unchanged()

    # -- decoding: the selected neurons ---------------------------------------------------------------------

    def use(
        self, ids: np.ndarray, *, meanwhile: Callable[[], None] | None = None, packed: bool = True
    ) -> Iterator[tuple[np.ndarray, StoredRows]]:
        """Yields neurons `ids` (ascending), which one or a few tokens need, in pieces of a fixed size: (ids, rows of
        each part). Missing neurons are read.

        meanwhile: see `Units.use`. packed: whether quantised rows stay packed; otherwise they are dequantised,
        (n, width). If there are fewer slots than needed blocks, a piece is read in rounds; the rows are the same.
        """
        assert self.rows is not None, "a layer without slots cannot select"
        clock = self.shared.clock
        self._verify_file()
        # The previous layer's output is evaluated by now, unless no call asked for it.
        self.shared.evaluate_guarded()
        clock.start()
        blocks = self.blocks_of(ids)
        self._need(blocks)
        at_once = len(blocks) <= self.cache.slots
        if at_once:
            self._start(blocks)
        clock.managed()
        if meanwhile is not None:
            meanwhile()
        for begin in range(0, len(ids), self.layout.piece_neurons):
            piece = ids[begin : begin + self.layout.piece_neurons]
            yield piece, self._piece_rows(piece, at_once, packed)  # Bound to no name, so that the caller can drop them.
            if begin + len(piece) < len(ids):
                # Otherwise the rows of several pieces are in memory at once.
                self.shared.evaluate_guarded()

    def prefetch(self, ids: np.ndarray) -> None:
        """Like `Units.prefetch`, for neurons `ids` (ascending)."""
        super().prefetch(self.blocks_of(ids))

    def _piece_rows(self, ids: np.ndarray, at_once: bool, packed: bool) -> StoredRows:
        """Rows of neurons of a piece. at_once: whether their blocks were all asked for."""
        assert self.rows is not None
        rows = self._take(ids) if at_once else self._take_in_rounds(ids)
        return rows if packed else self.rows.widened(rows)

    def _take(self, ids: np.ndarray) -> StoredRows:
        """Rows of neurons whose blocks are in slots or on their way."""
        assert self.rows is not None
        self.shared.clock.start()
        blocks, lanes = np.divmod(ids, self.layout.neurons_per_block)
        self._finish(blocks)
        slots = self.cache.slot_of[blocks]
        self.shared.clock.managed()
        return self.rows.take_stored(slots, lanes, self.parts)

    def _take_in_rounds(self, ids: np.ndarray) -> StoredRows:
        """Rows of neurons that may have more blocks than there are slots. Each round reads as many blocks as fit."""
        blocks, slots = self.blocks_of(ids), self.cache.slots
        of_id = ids // self.layout.neurons_per_block
        rounds = []
        for begin in range(0, len(blocks), slots):
            here = blocks[begin : begin + slots]
            self.shared.clock.start()
            self._start(here)
            self.shared.clock.managed()
            rounds.append(self._take(ids[np.searchsorted(of_id, here[0]) : np.searchsorted(of_id, here[-1], "right")]))
            if len(blocks) > slots:  # The next round overwrites these slots.
                mx.eval([each.components if isinstance(each, PackedRows) else each for each in rounds[-1]])
        if len(rounds) == 1:
            return rounds[0]
        return tuple(_joined(pieces) for pieces in zip(*rounds, strict=True))

    def blocks_of(self, ids: np.ndarray) -> np.ndarray:
        """The blocks of neurons `ids` (ascending), each once, ascending."""
        if self.layout.neurons_per_block == 1:
            return ids
        blocks = ids // self.layout.neurons_per_block
        return blocks[np.diff(blocks, prepend=-1) > 0]

    # -- prompts: every neuron in turn ----------------------------------------------------------------------

    def pieces(self) -> Generator[tuple[int, int, tuple[mx.array, ...]]]:
        """Yields all neurons in pieces of a fixed size: (start, stop, rows of each part).

        The next piece is read while the caller works on this one. The caller must evaluate everything that it
        computes from a piece before it asks for the next one.
        """
        self._verify_file()
        self.shared.clock.start()
        self._finish()
        self.cache.recover()
        with self.shared.draining():
            ready = self._start_piece(0)
            for start in range(0, self.neurons, self.layout.piece_neurons):
                piece = ready
                self._finish_piece(piece)
                if piece.stop < self.neurons:
                    ready = self._start_piece(piece.stop)
                ids = np.arange(start, piece.stop)
                blocks, lanes = np.divmod(ids, self.layout.neurons_per_block)
                first = start // self.layout.neurons_per_block
                yield start, piece.stop, piece.rows.take(piece.places[blocks - first], lanes, self.parts)

    def whole_bundles(self) -> Generator[tuple[int, int, tuple[mx.array, ...]]]:
        """Like `pieces`, with every part, without the slots, and of the whole layer.

        The store has checksums of whole blocks only. If slots hold a part of each block, the checksums of these parts
        are made here, from bytes that have just been verified.
        """
        learnt = []
        for start, stop, rows in NeuronSlots(self.shared, self.layer, 0, self.layout.parts).pieces():
            learnt.append(self._sums_in_scratch(start, stop))
            yield start, stop, rows
        if isinstance(sums := self.shared.file.sums, BlockSums):
            sums.learn(self.layer, self.parts, np.concatenate(learnt))

    def _sums_in_scratch(self, start: int, stop: int) -> np.ndarray:
        """CRC-32 sums, uint32 (blocks,), of the slots' parts of a piece that was just read into scratch memory."""
        first, end = start // self.layout.neurons_per_block, -(-stop // self.layout.neurons_per_block)
        address = self.shared.scratch[first // self.layout.piece_blocks % 2].address + self.part_offset
        return crc32_of_each(address, self.layout.block_bytes, self.slot_bytes, end - first)

    def _start_piece(self, start: int) -> _Piece:
        clock, counters, layout = self.shared.clock, self.shared.counters, self.layout
        clock.start()
        stop = min(start + layout.piece_neurons, self.neurons)
        first = start // layout.neurons_per_block
        blocks = np.arange(first, -(-stop // layout.neurons_per_block))
        absent = int(np.count_nonzero(self.cache.slot_of[blocks] < 0))
        if absent <= self.cache.free and self.rows is not None:
            self._before_writing()
            missing, targets = self.cache.reserve(blocks)
            places = self.cache.slot_of[blocks].copy()
            places[places < 0] = targets
            counters.hits += len(blocks) - absent
            counters.misses += absent
            clock.managed()
            ticket = self._submit_blocks(missing, targets) if len(missing) else None
            piece = _Piece(start, stop, self.rows, places, ticket, missing, targets)
        else:
            which = first // layout.piece_blocks % 2
            pool = self.shared.scratch[which]
            offset = self.file_offset + first * layout.block_bytes
            segment = (np.array([value]) for value in (offset, pool.address, len(blocks) * layout.block_bytes))
            # Blocks in slots are read as well, because one long read is faster than several with gaps.
            counters.misses += len(blocks)
            clock.managed()
            ticket = self.shared.reader.submit(self.shared.file, *segment, destination=pool)
            piece = _Piece(start, stop, self.shared.scratch_rows[which], np.arange(len(blocks)), ticket)
        clock.waited()
        return piece

    def _finish_piece(self, piece: _Piece) -> None:
        if piece.ticket is None:
            return
        self.shared.clock.start()
        ticket, piece.ticket = piece.ticket, None
        self.shared.wait(ticket)
        if piece.missing is not None and piece.targets is not None:
            self.cache.commit(piece.missing, piece.targets)
        self.shared.clock.waited()

    # -- reading --------------------------------------------------------------------------------------------

    def _submit(self, units: np.ndarray, slots: np.ndarray, tickets: list[Ticket]) -> None:
        tickets.append(self._submit_blocks(units, slots))

    def _arrived(self, units: np.ndarray, slots: np.ndarray) -> None:
        """Does nothing: a block is read whole."""

    def _submit_blocks(self, blocks: np.ndarray, slots: np.ndarray) -> Ticket:
        assert self.pool is not None
        layout = self.layout
        offsets = self.file_offset + blocks.astype(np.int64) * layout.block_bytes + self.part_offset
        addresses = self.pool.address + slots.astype(np.int64) * self.slot_bytes
        return self.shared.reader.submit(self.shared.file, offsets, addresses, self.slot_bytes, destination=self.pool)
