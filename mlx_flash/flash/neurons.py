"""One layer's units, brought from the bundle file into MLX memory: by selection or all in turn.

Host writes into an MLX buffer are invisible to MLX, so one rule holds everywhere here: before a slot or a
scratch buffer is written, every graph that reads it has been evaluated (`hold`, `settle`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .files import NeuronLayout
from .inflight import InFlightReads
from .pool import AlignedPool
from .reader import Reader, Ticket, crc32_of_each
from .rows import BlockRows, PackedRows, StoredRows
from .self_test import check_neuron_pool, check_packed_products
from .slot_cache import SlotCache
from .unit_file import UnitFile
from .unit_sums import BlockSums

FADING = 0.9  # of what is remembered about guesses, per guess


class NeuronFile(InFlightReads):
    """What the layers of one model share: the file, the reader's threads, scratch memory, counters.

    Raises FlashError if this machine's device does not see what the host writes into MLX memory.
    """

    def __init__(self, file: UnitFile, reader: Reader, layout: NeuronLayout) -> None:
        super().__init__(reader)
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
        """Raises ReadError if someone has written into the bundle file."""
        self.file.verify_unchanged()

    def close(self) -> None:
        self.reader.close()
        self.file.close()


@functools.cache
def side_stream() -> mx.ThreadLocalStream:
    """The CPU backend has a thread per stream, and one thread cannot copy as fast as memory allows.

    One for the process: MLX ends neither a stream nor its thread.
    """
    return mx.new_thread_local_stream(mx.cpu)


def _joined(pieces: StoredRows) -> mx.array | PackedRows:
    """The rows of several rounds, one behind the other."""
    if not isinstance(pieces[0], PackedRows):
        return mx.concatenate(list(pieces))  # type: ignore[arg-type]  # all are alike
    each = zip(*(piece.components for piece in pieces), strict=True)  # type: ignore[union-attr]
    packed, scales, biases = (mx.concatenate(list(parts)) for parts in each)
    return PackedRows(packed, scales, biases, pieces[0].group_size, pieces[0].bits)


@dataclass
class _Piece:
    """A piece of a layer on its way: where it will be, and the read that brings it."""

    start: int
    stop: int
    rows: BlockRows
    places: np.ndarray  # int: the pool's place of every block of the piece
    ticket: Ticket | None = None
    missing: np.ndarray | None = None  # blocks to commit to `targets` when the read is done
    targets: np.ndarray | None = None


@dataclass(frozen=True)
class _Flight:
    """Blocks on their way into a layer's slots."""

    ticket: Ticket
    blocks: np.ndarray
    slots: np.ndarray


class NeuronSlots:
    """One layer of the bundle file behind a cache of `slots` blocks.

    parts: the neighbouring parts of a bundle that are kept in slots (all, or those not resident elsewhere).
    Raises FlashError if this machine's device does not see what the host writes into the slots.
    """

    def __init__(
        self, shared: NeuronFile, layer: int, slots: int, parts: tuple[str, ...], window: int | None = None
    ) -> None:
        layout = shared.layout
        self.shared = shared
        self.layout = layout
        self.layer = layer
        self.parts = parts
        self.cache = SlotCache(layout.blocks, slots, window)
        self.part_offset, self.slot_bytes = layout.part_range(parts)
        self.pool = (
            AlignedPool(self.cache.slots * self.slot_bytes, row_bytes=self.slot_bytes) if self.cache.slots else None
        )
        self.rows = BlockRows(self.pool, layout, parts, shared.side) if self.pool else None
        if self.pool is not None and self.rows is not None:
            check_neuron_pool(self.pool, self.rows)
        self._held: tuple[mx.array, ...] = ()
        self.flight: _Flight | None = None
        self._begun = False  # all that the current token needs was asked for at once
        self.used_early = self.vain_early = 0.0  # blocks read ahead that were needed and that were not, lately

    @property
    def all_resident(self) -> bool:
        """Whether every block is in its slot, so that nothing will be read any more."""
        return self.cache.resident == self.layout.blocks

    def hold(self, *outputs: mx.array) -> None:
        """Names graphs that read this layer's memory: they are evaluated before that is written again."""
        self._held += outputs

    def settle(self) -> None:
        """Evaluates pending outputs now, because MLX cannot evaluate them in another thread."""
        held, self._held = self._held, ()  # first: what cannot be evaluated is not tried for ever
        if held:
            mx.eval(held)

    def _verify_file(self) -> None:
        """Once per call of the model: nobody has written into the file."""
        if self.layer == 0:
            self.shared.file.verify_unchanged()

    # -- decoding: the selected neurons ---------------------------------------------------------------------

    def read_ahead(self, ids: np.ndarray) -> None:
        """Starts to read what is missing of neurons `ids` (ascending), which the token under way may need here.

        A guess: what was read in vain costs time, never changes a result. Nothing is done where it would not fit.
        """
        if self.flight is not None or self.all_resident:
            return
        began = time.perf_counter()
        blocks = self._blocks_of(ids)
        if len(blocks) <= self.cache.slots:
            with self.shared.draining():
                self._start(blocks)
        self.shared.counters.manage_s += time.perf_counter() - began

    def begin(self, ids: np.ndarray) -> None:
        """A token (or a few) needs neurons `ids`, ascending: they are the last to be evicted.

        Starts to read those that are missing, so that the caller can do something else before `gather`.
        """
        self._verify_file()
        self.settle()  # the last token's are by now, unless nobody asked for its logits
        early = self._land()
        began = time.perf_counter()
        blocks = self._blocks_of(ids)
        here = self.cache.tick(blocks)
        self._begun = len(blocks) <= self.cache.slots
        if early is not None and self._begun:  # else they may have gone again before they are used
            wanted = np.zeros(self.layout.blocks, np.bool_)
            wanted[blocks] = True
            used = int(np.count_nonzero(wanted[early]))
            vain = len(early) - used
            self.used_early = FADING * self.used_early + used
            self.vain_early = FADING * self.vain_early + vain
            counters = self.shared.counters
            counters.early += used
            counters.vain += vain
            counters.misses += used
            counters.hits -= used  # they are here, and are counted as such below
        if self._begun:
            self._count(len(blocks), here)
            if here < len(blocks):
                with self.shared.draining():
                    self._start(blocks)
        self.shared.counters.manage_s += time.perf_counter() - began

    def gather(self, ids: np.ndarray) -> tuple[mx.array, ...]:
        """Rows of neurons `ids` (ascending, at least one), read if they are missing: one (n, width) array per part."""
        stored = self.gather_stored(ids)
        assert self.rows is not None
        return self.rows.widened(stored)

    def gather_stored(self, ids: np.ndarray) -> StoredRows:
        """The same without dequantising.

        Where the slots are fewer than the blocks needed it goes in rounds; the result is the same.
        """
        assert self.rows is not None, "a layer without slots cannot select"
        self._land()
        lanes = ids % self.layout.neurons_per_block
        of_id = ids // self.layout.neurons_per_block
        blocks = self._blocks_of(ids)
        rounds = []
        for begin in range(0, len(blocks), self.cache.slots):
            here = blocks[begin : begin + self.cache.slots]
            self._fetch(here)
            chosen = slice(np.searchsorted(of_id, here[0]), np.searchsorted(of_id, here[-1], side="right"))
            rounds.append(self.rows.take_stored(self.cache.slot_of[of_id[chosen]], lanes[chosen], self.parts))
            if len(blocks) > self.cache.slots:  # the next round writes over these slots
                mx.eval([each.components if isinstance(each, PackedRows) else each for each in rounds[-1]])
        if len(rounds) == 1:
            return rounds[0]
        return tuple(_joined(pieces) for pieces in zip(*rounds, strict=True))

    def _blocks_of(self, ids: np.ndarray) -> np.ndarray:
        if self.layout.neurons_per_block == 1:
            return ids
        blocks = ids // self.layout.neurons_per_block
        return blocks[np.diff(blocks, prepend=-1) > 0]

    def _fetch(self, blocks: np.ndarray) -> None:
        """Brings in what `begin` did not ask for already."""
        began = time.perf_counter()
        here = int(np.count_nonzero(self.cache.slot_of[blocks] >= 0))
        if not self._begun:
            self._count(len(blocks), here)
        if here < len(blocks):
            with self.shared.draining():
                self._start(blocks)
        self.shared.counters.manage_s += time.perf_counter() - began
        self._land()

    def _count(self, needed: int, here: int) -> None:
        self.shared.counters.hits += here
        self.shared.counters.misses += needed - here

    def _start(self, blocks: np.ndarray) -> None:
        """Makes room for `blocks` and submits the reads of those that are missing."""
        missing, targets = self.cache.reserve(blocks)
        if len(missing):
            began = time.perf_counter()
            self.settle()
            settled = time.perf_counter()  # what the device still did is compute
            self.shared.flying.append(self)  # first: whatever interrupts this, `drain` finds the flight
            self.flight = _Flight(self._submit_blocks(missing, targets), missing, targets)
            submitted = time.perf_counter()
            self.shared.counters.wait_s += submitted - settled
            self.shared.counters.manage_s -= submitted - began  # which the caller measures around this

    def _land(self) -> np.ndarray | None:
        """Waits for what is on its way, which is then here. Returns its blocks; None if there was nothing."""
        if self.flight is None:
            return None
        began = time.perf_counter()
        flight = self.flight
        with self.shared.draining():
            self.shared.wait(flight.ticket)
            self.flight = None  # first: interrupted here, nobody waits for these tickets once more
            self.shared.flying.remove(self)
        waited = time.perf_counter()
        self.cache.commit(flight.blocks, flight.slots)
        self.shared.counters.wait_s += waited - began
        self.shared.counters.manage_s += time.perf_counter() - waited
        return flight.blocks

    # -- prompts: every neuron in turn ----------------------------------------------------------------------

    def pieces(self) -> Generator[tuple[int, int, tuple[mx.array, ...]]]:
        """All neurons in pieces of a fixed size: (start, stop, rows of each part).

        The next piece is read while the caller works on this one. The caller must have evaluated what it
        made of a piece before it asks for the next.
        """
        self._verify_file()
        self._land()
        with self.shared.draining():
            ready = self._start_piece(0)
            for start in range(0, self.layout.neurons, self.layout.piece_neurons):
                piece = ready
                self._finish_piece(piece)
                if piece.stop < self.layout.neurons:
                    ready = self._start_piece(piece.stop)
                ids = np.arange(start, piece.stop)
                blocks, lanes = np.divmod(ids, self.layout.neurons_per_block)
                first = start // self.layout.neurons_per_block
                yield start, piece.stop, piece.rows.take(piece.places[blocks - first], lanes, self.parts)

    def whole_bundles(self) -> Generator[tuple[int, int, tuple[mx.array, ...]]]:
        """Like `pieces`, with every part and past the slots.

        Where a slot holds a part of each block, whose sums the store does not have, they are made here, of bytes that
        have just been compared.
        """
        learnt = []
        for start, stop, rows in NeuronSlots(self.shared, self.layer, 0, self.layout.parts).pieces():
            learnt.append(self._sums_in_scratch(start, stop))
            yield start, stop, rows
        if isinstance(sums := self.shared.file.sums, BlockSums):
            sums.learn(self.layer, self.parts, np.concatenate(learnt))

    def _sums_in_scratch(self, start: int, stop: int) -> np.ndarray:
        """Of what slots hold of the blocks of a piece that has just been read into scratch memory."""
        first, end = start // self.layout.neurons_per_block, -(-stop // self.layout.neurons_per_block)
        address = self.shared.scratch[first // self.layout.piece_blocks % 2].address + self.part_offset
        return crc32_of_each(address, self.layout.block_bytes, self.slot_bytes, end - first)

    def _start_piece(self, start: int) -> _Piece:
        began = time.perf_counter()
        layout, counters = self.layout, self.shared.counters
        handing_over = 0.0
        stop = min(start + layout.piece_neurons, layout.neurons)
        first = start // layout.neurons_per_block
        blocks = np.arange(first, -(-stop // layout.neurons_per_block))
        absent = int(np.count_nonzero(self.cache.slot_of[blocks] < 0))
        if absent <= self.cache.free and self.rows is not None:
            self.settle()
            began = time.perf_counter()  # what the device still had to do is compute, not management
            missing, targets = self.cache.reserve(blocks)
            handing_over -= time.perf_counter()
            ticket = self._submit_blocks(missing, targets) if len(missing) else None
            handing_over += time.perf_counter()
            places = self.cache.slot_of[blocks].copy()
            places[places < 0] = targets
            piece = _Piece(start, stop, self.rows, places, ticket, missing, targets)
            counters.hits += len(blocks) - absent
            counters.misses += absent
        else:
            which = first // layout.piece_blocks % 2
            pool = self.shared.scratch[which]
            offset = self.layer * layout.layer_bytes + first * layout.block_bytes
            segment = (np.array([value]) for value in (offset, pool.address, len(blocks) * layout.block_bytes))
            handing_over -= time.perf_counter()
            ticket = self.shared.reader.submit(self.shared.file, *segment, destination=pool)
            handing_over += time.perf_counter()
            piece = _Piece(start, stop, self.shared.scratch_rows[which], np.arange(len(blocks)), ticket)
            counters.misses += len(blocks)  # those in a slot are read as well: one long read is faster than gaps
        counters.wait_s += handing_over
        counters.manage_s += time.perf_counter() - began - handing_over
        return piece

    def _finish_piece(self, piece: _Piece) -> None:
        if piece.ticket is None:
            return
        began = time.perf_counter()
        ticket, piece.ticket = piece.ticket, None
        self.shared.wait(ticket)
        if piece.missing is not None and piece.targets is not None:
            self.cache.commit(piece.missing, piece.targets)
        self.shared.counters.wait_s += time.perf_counter() - began

    # -- reading --------------------------------------------------------------------------------------------

    def _submit_blocks(self, blocks: np.ndarray, slots: np.ndarray) -> Ticket:
        assert self.pool is not None
        layout = self.layout
        offsets = self.layer * layout.layer_bytes + blocks.astype(np.int64) * layout.block_bytes + self.part_offset
        addresses = self.pool.address + slots.astype(np.int64) * self.slot_bytes
        return self.shared.reader.submit(self.shared.file, offsets, addresses, self.slot_bytes, destination=self.pool)
