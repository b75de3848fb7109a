"""Divides the units of a model among ranks by what each rank's memory holds and how fast its disk reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor


@dataclass(frozen=True)
class Capacity:
    """What one rank offers.

    host: the machine's name. budget: of its process, in bytes. slots: units of all layers together that it has room
    for; of a dense model, bytes. rate: bytes per second of its disk; 0 if it was not measured, because all units fit.
    """

    host: str
    budget: int
    slots: int
    rate: float

    def as_answer(self) -> dict[str, object]:
        return {"host": self.host, "budget": self.budget, "slots": self.slots, "rate": self.rate}

    @staticmethod
    def of_answer(answer: dict[str, object]) -> Capacity:
        """Raises KeyError, TypeError or ValueError for another rank's answer that is not one."""
        host, budget, slots, rate = (answer[name] for name in ("host", "budget", "slots", "rate"))
        return Capacity(str(host), int(budget), int(slots), float(rate))  # type: ignore[call-overload, arg-type]


def units_of_ranks(units: int, ranks: Sequence[Capacity]) -> list[float]:
    """How many of all layers' units each rank holds, not rounded.

    If all fit into slots, the shares are in proportion to these. Otherwise a rank holds what its slots do, and reads a
    part of the rest in proportion to its disk's rate.
    """
    slots = [min(units, rank.slots) for rank in ranks]
    if (fitting := sum(slots)) >= units:
        return [units * each / fitting for each in slots]
    rates = [rank.rate for rank in ranks]
    if not sum(rates):
        rates = [1.0] * len(ranks)
    return [each + (units - fitting) * rate / sum(rates) for each, rate in zip(slots, rates, strict=True)]


def units_of_layers(layers: Sequence[int], wanted: Sequence[float]) -> list[list[int]]:
    """For each layer, how many units each rank holds: at least one.

    layers: the number of units of each layer, at least that of the ranks. wanted: of each rank, in all layers together.
    What rounding takes from a rank in one layer it gets in a later one.
    """
    total, ranks = sum(layers), range(len(wanted))
    due, counts = [0.0] * len(wanted), []
    for units in layers:
        due = [due[rank] + wanted[rank] * units / total for rank in ranks]
        here = [max(1, floor(due[rank])) for rank in ranks]
        while sum(here) < units:
            here[max(ranks, key=lambda rank: due[rank] - here[rank])] += 1
        while sum(here) > units:
            here[max((rank for rank in ranks if here[rank] > 1), key=lambda rank: here[rank] - due[rank])] -= 1
        due = [due[rank] - here[rank] for rank in ranks]
        counts.append(here)
    return counts


def slots_of_layers(slots: int, held: Sequence[int]) -> list[int]:
    """A rank's slots of each layer: one for every unit that it holds, if there are enough, else even numbers.

    slots: in all layers together, at least one for each. held: the units that the rank holds of each layer.
    """
    found = [min(1, each) for each in held]
    left = slots - sum(found)
    while left > 0 and (open_layers := [layer for layer, each in enumerate(held) if found[layer] < each]):
        more = max(1, left // len(open_layers))
        for layer in open_layers[:left]:
            given = min(more, held[layer] - found[layer], left)
            found[layer] += given
            left -= given
    return found


def described(
    names: Sequence[str], ranks: Sequence[Capacity], counts: Sequence[Sequence[int]], units: str
) -> Iterator[str]:
    """The lines of the plan about the ranks. names: of their machines. counts: of each layer, the units that each rank
    holds. units: what is divided."""
    total = sum(map(sum, counts))
    for rank, (name, capacity) in enumerate(zip(names, ranks, strict=True)):
        held = [each[rank] for each in counts]
        slots = slots_of_layers(capacity.slots, held)
        least, most = min(held), max(held)
        each = f"{least}" if least == most else f"{least} to {most}"
        where = "all in slots"
        if sum(slots) < sum(held):
            where = f"{sum(slots) / sum(held):.0%} of them in slots; its disk reads {capacity.rate / 1e9:.2g} GB/s"
        share = f"{each} {units} of each layer ({sum(held) / total:.0%}), {where}"
        yield f"  rank {rank:<12}{capacity.budget / 1e9:8.3f} GB  {name}: {share}"
