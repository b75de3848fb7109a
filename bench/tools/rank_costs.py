"""What several machines cost and bring per token: the model to compare measurements with, and to compute others from.

A layer's experts are shared out over N ranks. Rank 0 sends the ids and the layer's input, x, to the others; each of
them multiplies its own experts and returns their outputs, y. All bytes pass rank 0's own connection to the link. So the
messages of a layer, its exchange, take

    exchange = 2 * control + (N-1) * (x_bytes + y_bytes) / rate

seconds, where `control` is the time of a short message one way. A token takes, with L layers and each rank reading its
own missing experts,

    token = resident + L * exchange + L * expert_bytes / disk * largest(missing, N)

where `largest` is the expected number of missing experts on the rank that has most of them, and `resident` all work
that one rank does alone. Reading that overlaps with the exchange is not counted, so the model is pessimistic there.

MLX's own group would do the same in a ring: x goes down the chain 0, 1, ..., N-1, and then, in N-1 steps, every rank
passes the outputs of one rank on. With `message` as the time of an empty message between neighbours, that takes

    ring = max(control, (N-1) * (message + x_bytes / rate)) + (N-1) * (message + y_bytes / rate)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Link:
    """message_s: of an empty message from neighbour to neighbour. control_s: of a control message, one way."""

    message_s: float
    control_s: float
    bytes_per_second: float


def exchange_seconds(link: Link, ranks: int, x_bytes: float, y_bytes: float) -> float:
    """All messages of one layer, without any work between them. y_bytes: of one rank's outputs."""
    if ranks == 1:
        return 0.0
    return 2 * link.control_s + (ranks - 1) * (x_bytes + y_bytes) / link.bytes_per_second


def gather_seconds(link: Link, ranks: int, y_bytes: float) -> float:
    """A gather in MLX's ring."""
    return (ranks - 1) * (link.message_s + y_bytes / link.bytes_per_second)


def ring_seconds(link: Link, ranks: int, x_bytes: float, y_bytes: float) -> float:
    """The messages of one layer in MLX's ring."""
    if ranks == 1:
        return 0.0
    return max(link.control_s, gather_seconds(link, ranks, x_bytes)) + gather_seconds(link, ranks, y_bytes)


def largest_share(experts: int, chosen: float, ranks: int) -> float:
    """The expected number of `chosen` experts of a layer on the rank that has most of them.

    The experts are dealt evenly, and every set of that many is equally likely. P(most <= m) is the coefficient of
    z**chosen in the product over the ranks of sum_{j <= m} C(n_r, j) z**j, divided by C(experts, chosen). A mean number
    that is not whole lies between its neighbours.
    """
    whole = int(chosen)
    below = _largest_share(experts, whole, ranks)
    return below + (chosen - whole) * (_largest_share(experts, whole + 1, ranks) - below) if chosen > whole else below


def _largest_share(experts: int, chosen: int, ranks: int) -> float:
    held = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    expected = 0.0
    for most in range(chosen):
        product = np.ones(1)
        for n in held:
            product = np.convolve(product, [comb(n, j) for j in range(most + 1)])[: chosen + 1]
        at_most = product[chosen] / comb(experts, chosen) if len(product) > chosen else 0.0
        expected += 1 - at_most
    return expected


def token_seconds(resident_s: float, layers: int, exchange_s: float, read_s: float) -> float:
    """read_s: of a layer, on the rank that reads most."""
    return resident_s + layers * (exchange_s + read_s)
