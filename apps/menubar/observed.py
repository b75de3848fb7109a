"""A state that views read, and the news that it has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kept = TypeVar("Kept", bound="DataclassInstance")


class Observed(Generic[Kept]):
    """Holds a frozen dataclass. Every change makes a new one, under `_lock`.

    on_change: called after every change of `state`, from any thread.
    """

    def __init__(self, state: Kept, on_change: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._state, self._on_change = state, on_change

    @property
    def state(self) -> Kept:
        return self._state

    def _change(self, **changes: Any) -> None:
        with self._lock:
            before, self._state = self._state, replace(self._state, **changes)
            changed = before != self._state
        if changed:
            self._on_change()
