"""Reports how far the loading of a model is, to whoever watches it in the same thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Tell = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)

_watcher: ContextVar[Tell | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(tell: Tell) -> Iterator[None]:
    """Passes the progress of the loads inside this context to `tell`."""
    token = _watcher.set(tell)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell_progress(stage: str, done: int, total: int) -> None:
    if (tell := _watcher.get()) is not None:
        tell(stage, done, total)
