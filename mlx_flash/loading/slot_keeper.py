"""Gives slots back to the system while it is short of memory, and takes them again later.

The text does not depend on the number of slots. So other programs may have their memory at any time, and only hits are
lost. Slots change between two calls of a layer, one layer at a time. A layer gives half of its slots: it gets new
ones, its best units are copied into them, and the old ones are freed. So as much is freed as is written. Were all
layers to give a little, nearly all units would have to be copied, and that takes longer than other programs wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..flash.filling import fill, whole_layers
from ..flash.pressure import Level, Pressure, memory_pressure
from ..flash.stats import Clock, Counters
from ..flash.system import large_memory_given_back
from ..flash.units import Units
from ..layers.experts import StreamedExperts
from .plan import MLX_CACHE_BYTES, Plan

CHECK_S = 0.25  # shortest time between two looks at the system
MARGIN, MOST_MARGIN_BYTES = 0.05, 10**9  # share of the usable memory that stays free beside the plan, and its limit
GIVEN_AT = {Level.WARNING: 1 / 8, Level.CRITICAL: 1 / 4}  # share of all slots that a level asks for at a time
MOST_GIVEN_AT = {Level.WARNING: 1 / 2, Level.CRITICAL: 1.0}  # in all: a small Mac may be at the first level for hours
LEVEL_S = {Level.WARNING: 3.0, Level.CRITICAL: 1.0}  # time that a level gets to fall before it asks for more
CALM_S, MOST_CALM_S = 10.0, 320.0  # time without pressure until slots are taken again
TAKE_S = 1.0  # time between two steps of taking
TAKEN = 1 / 128  # share of all slots that a step takes


class Streams(Protocol):
    counters: Counters
    clock: Clock


class SlotKeeper:
    """Decides how many slots the layers of a model have. `check` is called before a call of a streamed layer."""

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[Any],
        streamer: Streams,
        signal: Callable[[], Pressure] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """layers: streamed ones; those that are not divided into slots are left alone. signal: None for the system's
        own."""
        self._layers = [layer for layer in layers if isinstance(layer.units, Units)]
        self._most = [layer.units.cache.slots for layer in self._layers]
        self._least = [min(max(1, plan.units.least), most) for most in self._most]
        self._planned_bytes = plan.total
        self._streamer, self._signal, self._clock = streamer, signal or memory_pressure, clock
        self._next_check = self._next_level = self._next_take = 0.0
        self._pressed_at = 0.0
        self._calm_s = CALM_S
        self._took = False  # whether slots were taken since the last were given back
        self._margin: float | None = None
        self.level = Level.NORMAL

    @property
    def given_bytes(self) -> int:
        """Bytes of the plan's slots that the layers do not have now."""
        now = sum(layer.units.cache.slots * layer.units.slot_bytes for layer in self._layers)
        return self.slots_bytes - now

    @property
    def slots_bytes(self) -> int:
        """Bytes of the slots that the plan has."""
        return sum(most * layer.units.slot_bytes for most, layer in zip(self._most, self._layers, strict=True))

    def check(self, x: mx.array | None = None) -> None:
        """Looks at the system, at most every CHECK_S, and changes slots if that is due.

        x: the input of the layer that is called, if one is. It is evaluated before slots change: its graph reads the
        slots of earlier layers that were never looked up, and would keep them in memory beside the new ones.

        Raises ReadError if a read into such slots fails.
        """
        now = self._clock()
        if now < self._next_check or self._most == self._least:
            return
        self._next_check = now + CHECK_S
        try:
            pressure = self._signal()
        except OSError:  # such as too many open files; the next look may succeed
            return
        self.level = pressure.level
        spare = self._spare(pressure)
        if wanted := self._wanted(pressure.level, spare, now):
            if self._took:
                self._calm_s, self._took = min(2 * self._calm_s, MOST_CALM_S), False
            self._pressed_at = now
            self._change(self._lowered(wanted), pressure.available, x)
        elif pressure.level > Level.NORMAL:
            self._pressed_at = now
        elif self.given_bytes and now - self._pressed_at >= self._calm_s and now >= self._next_take:
            self._next_take = now + TAKE_S
            raised = self._raised(int(TAKEN * self.slots_bytes), pressure.available)
            more = sum(self._bytes_after(*each) for each in enumerate(raised)) - self.slots_bytes + self.given_bytes
            if spare is None or spare - more >= 2 * (self._margin or 0):
                self._took = True
                self._change(raised, pressure.available, x)
                if not self.given_bytes:
                    self._calm_s = CALM_S

    def _spare(self, pressure: Pressure) -> float | None:
        """The bytes that would be left if this process took all that its plan allows now; None if it is not known."""
        if pressure.usable is None:
            return None
        spare = pressure.usable - (self._planned_bytes - self.given_bytes)
        if self._margin is None:  # A limit that is hardly above the plan, as a container's may be, leaves no margin.
            self._margin = min(MARGIN * pressure.usable, MOST_MARGIN_BYTES, max(0, spare) / 3)
        return spare

    def _wanted(self, level: Level, spare: float | None, now: float) -> int:
        """The bytes to give back now."""
        wanted = 0.0
        if spare is not None and self._margin is not None and spare < self._margin:
            wanted = 2 * self._margin - spare
        if level > Level.NORMAL and now >= self._next_level:
            self._next_level = now + LEVEL_S[level]
            left = MOST_GIVEN_AT[level] * self.slots_bytes - self.given_bytes
            wanted = max(wanted, min(GIVEN_AT[level] * self.slots_bytes, left))
        return int(wanted)

    def _slots_after(self, layer: int, halvings: int) -> int:
        return max(self._least[layer], self._most[layer] >> halvings)

    def _halvings(self) -> list[int]:
        """How often the slots of each layer were halved, as far as their number tells."""
        found = []
        for number, layer in enumerate(self._layers):
            halvings, slots = 0, layer.units.cache.slots
            while self._slots_after(number, halvings) > slots:
                halvings += 1
            found.append(halvings)
        return found

    def _bytes_of(self, layer: int, halving: int) -> int:
        """Bytes that a halving of a layer gives back. halving: its number, from 1 on."""
        slots = self._slots_after(layer, halving - 1) - self._slots_after(layer, halving)
        return int(slots * self._layers[layer].units.slot_bytes)

    def _lowered(self, wanted: int) -> list[int]:
        """The halvings with which `wanted` bytes more are given back, or all that can be. The last layers go first."""
        halvings = self._halvings()
        while wanted > 0:
            higher = [i for i, done in enumerate(halvings) if self._bytes_of(i, done + 1)]
            if not higher:
                break
            layer = min(reversed(higher), key=lambda i: halvings[i])
            halvings[layer] += 1
            wanted -= self._bytes_of(layer, halvings[layer])
        return halvings

    def _raised(self, step: int, available: int | None) -> list[int]:
        """The halvings with which about `step` bytes, of one layer at least, are taken again.

        Layers with the fewest slots go first, but those that have room for new slots beside the old ones go before the
        others, which lose their units once more.
        """
        halvings, room = self._halvings(), self._room(available)
        while step > 0:
            halved = [i for i, done in enumerate(halvings) if done]
            if not halved:
                break
            fitting = [i for i in halved if self._bytes_after(i, halvings[i] - 1) <= room]
            layer = max(fitting or halved, key=lambda i: halvings[i])
            more = self._bytes_of(layer, halvings[layer])
            halvings[layer] -= 1
            step, room = step - more, room - more
        return halvings

    def _bytes_after(self, layer: int, halvings: int) -> int:
        return int(self._slots_after(layer, halvings) * self._layers[layer].units.slot_bytes)

    def _room(self, available: int | None) -> int:
        """Bytes that new slots may have while the old ones are still there: what MLX may keep of freed buffers and what
        was given back, but no more than three quarters of what is available."""
        planned = MLX_CACHE_BYTES + self.given_bytes
        return planned if available is None else min(planned, available * 3 // 4)

    def _change(self, halvings: list[int], available: int | None, x: mx.array | None) -> None:
        """Halves and doubles the slots of the layers, one after the other.

        available: bytes that can be allocated now, if that is known. x: see `check`.
        """
        if halvings == self._halvings():
            return
        if x is not None:
            mx.eval(x)
        clock = self._streamer.clock
        clock.start()
        with large_memory_given_back():
            mx.clear_cache()  # The plan has room for what MLX may keep; new slots are there beside the old ones.
            try:
                for layer, (before, after) in enumerate(zip(self._halvings(), halvings, strict=True)):
                    if after != before:
                        freed = self._bring(layer, self._slots_after(layer, after), available)
                        available = None if available is None else available + freed
            except (MemoryError, RuntimeError):  # MLX cannot allocate. The layer keeps the slots that it has.
                pass
        clock.managed()

    def _bring(self, layer: int, slots: int, available: int | None) -> int:
        """Gives a layer another number of slots, and returns how many bytes that frees.

        The memory in use stays within the plan and within what is available. If there is no room for the new slots
        beside the old ones, the layer's units are dropped first.
        """
        units = self._layers[layer].units
        before = units.cache.slots
        try:
            if slots * units.slot_bytes > self._room(available):
                self._resize(layer, self._least[layer])
            self._resize(layer, slots)
            if slots == units.count:
                fill(whole_layers([units]))  # A layer with all of its units is never looked up.
        finally:
            freed = int((before - units.cache.slots) * units.slot_bytes)
            if freed > 0:
                self._streamer.counters.given_back += freed
            else:
                self._streamer.counters.taken_again -= freed
        return freed

    def _resize(self, layer: int, slots: int) -> None:
        streamed = self._layers[layer]
        streamed.units.resize(slots)
        if isinstance(streamed, StreamedExperts):
            streamed.follow_slots()
        mx.clear_cache()
