"""Rank 0's side of loading a model over several ranks: it asks, divides, and lets all ranks load at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FlashError
from ..ranks.group import Group
from .options import LoadOptions
from .rank_questions import question
from .rank_shares import Capacity


class Ranks:
    """The ranks that one model is loaded on. Use it in one thread.

    name: what the user calls the model; None for the demo model.
    """

    def __init__(self, group: Group, name: str | None, options: LoadOptions) -> None:
        self.group = group
        self._name, self._options = name, options
        self._building: threading.Thread | None = None
        self._failed: BaseException | None = None

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Frees what the other ranks have loaded if the load fails in this context."""
        try:
            yield
        except Exception:  # After Ctrl-C, the process ends, and they do.
            self.close()
            raise

    def capacities(self, own: Capacity, kind: str, folder: Path, **more: Any) -> list[Capacity]:
        """What every rank offers, rank 0 first. The other arguments are those of `question`. Raises FlashError."""
        answers = self.group.ask({"plan": question(kind, self._name, folder, self._options, **more)})
        try:
            return [own, *(Capacity.of_answer(answer) for answer in answers)]
        except (KeyError, TypeError, ValueError):
            raise FlashError("a rank has answered something else than what it offers; use one version.") from None

    def begin(self, share: dict[str, Any]) -> None:
        """Lets the other ranks load their shares. `finish` waits for that."""

        def ask() -> None:
            try:
                self.group.ask({"build": share})
            except BaseException as error:
                self._failed = error

        self._building = threading.Thread(target=ask, daemon=True)
        self._building.start()

    def finish(self) -> None:
        """Waits until all ranks have loaded. Raises FlashError with the sentence of one that could not."""
        if self._building is not None:
            self._building.join()
            self._building = None
            if self._failed is not None:
                raise self._failed

    def close(self) -> None:
        """Frees what the other ranks hold of the model. They stay for the next one."""
        with contextlib.suppress(FlashError):
            self.finish()
        with contextlib.suppress(FlashError):  # A rank that has gone holds nothing.
            self.group.ask({"unload": {}})
