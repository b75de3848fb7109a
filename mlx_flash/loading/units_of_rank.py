"""What another rank's parts of a mixture and of a store have in common: a share of the units, in slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx

from ..ranks.group import Call
from .runtime import Runtime


class UnitsOfRank:
    """Made with a plan; `build` of a subclass reads the share and sets both attributes."""

    questions: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self._flash: Runtime | None = None
        self._calls: Callable[[Call], mx.array | None] | None = None

    def __call__(self, call: Call) -> mx.array | None:
        """Computes a call of rank 0. Raises ReadError."""
        assert self._calls is not None
        return self._calls(call)

    @property
    def bytes_read(self) -> int:
        return 0 if self._flash is None else self._flash.streamer.counters.bytes

    def close(self) -> None:
        if self._flash is not None:
            self._flash.close()
