"""Activations that leave most neurons exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..flash.files import is_finite_number

KINDS = ("relu", "relu2", "drelu")


@dataclass(frozen=True)
class Activation:
    """A neuron's activation, from the pre-activation u of the up projection and, in a gated FFN, g of the gate.

    | kind    | ungated     | gated              | known as                                                      |
    |---------|-------------|--------------------|---------------------------------------------------------------|
    | `relu`  | r(u)        | r(g) u             | ReLU, ReGLU; with a threshold FATReLU (ProSparse, section 3.3) |
    | `relu2` | r(u)^2      | r(g)^2 u           | squared ReLU (Primer)                                         |
    | `drelu` |             | r(g) max(u, 0)     | dReLU (TurboSparse, section 3)                                |

    where r(v) = v if v > threshold, else 0. Raises ValueError for an unknown kind or a threshold below 0.
    """

    kind: str = "relu"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        sound = is_finite_number(self.threshold) and self.threshold >= 0
        if self.kind not in KINDS or not sound:
            raise ValueError(
                f"activation {self.kind!r} with threshold {self.threshold!r:.80}: expected one of {', '.join(KINDS)} "
                "and a threshold of at least 0"
            )
        object.__setattr__(self, "threshold", float(self.threshold))  # a JSON integer may have any size

    def __call__(self, *before: Any, xp: ModuleType = mx) -> Any:
        """before: (u,) or (g, u), each (..., F), of `xp` (mlx.core or numpy) -> (..., F), 0 where inactive."""
        first = before[0]
        h = xp.maximum(first, 0) if self.threshold == 0 else xp.where(first > self.threshold, first, 0)
        if self.kind == "relu2":
            h = h * h
        if len(before) == 2:
            h = h * (xp.maximum(before[1], 0) if self.kind == "drelu" else before[1])
        return h

    def score(self, *before: Any, xp: ModuleType = mx) -> Any:
        """Arguments of `__call__` -> (..., F), above 0 where the neuron is active.

        Without dReLU, a gated neuron counts as active even if its up pre-activation is exactly 0.
        """
        first = before[0] - self.threshold if self.threshold else before[0]
        return xp.minimum(first, before[1]) if self.kind == "drelu" and len(before) == 2 else first

    def may_fire(self, first: mx.array) -> mx.array:
        """Whether each neuron can be active, judged by its first pre-activation alone (the gate's if there is one).

        first: (..., F) -> bool (..., F)
        """
        return first > self.threshold
