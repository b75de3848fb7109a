"""Decodes several sequences together, one token each per step, so that they share what the step reads.

The rows of a batch may join and leave between two steps. A prompt is read alone, into a prompt cache of its own, which
then joins the others in mlx-lm's batch caches. A row's bits are those of mlx-lm's batch of the same rows, and not those
of the row alone.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..flash.host_arrays import to_numpy
from .token_loop import Chooser, Token


class DecodeBatch:
    """The rows that are decoded now."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: list[Any] = []  # mlx-lm's batch cache of every layer
        self._fed: list[int] = []  # the token that each row feeds next
        self._choose: list[Chooser] = []

    def __len__(self) -> int:
        return len(self._fed)

    def join(self, cache: list[Any], token: int, choose: Chooser) -> None:
        """Adds a row at the end. cache: holds all its tokens but the last, `token`. It must not be used any more."""
        for number, part in enumerate(cache):
            made = part.merge([part])
            if self._fed:
                self._cache[number].extend(made)
            else:
                self._cache.append(made)
            mx.eval(self._cache[number].state)  # one layer after the other, so that only one of them exists twice
        self._fed.append(token)
        self._choose.append(choose)

    def step(self) -> list[Token]:
        """Feeds each row's newest token. Returns the tokens that follow, one for each row."""
        logits = self._model(mx.array(self._fed)[:, None], cache=self._cache)[:, -1, :]  # (B, V)
        rows = [choose(logits[row : row + 1]) for row, choose in enumerate(self._choose)]
        mx.eval(rows)
        self._fed = [int(to_numpy(chosen).item()) for chosen, _ in rows]
        for choose, token in zip(self._choose, self._fed, strict=True):
            choose.took(token)
        self._model.flash.verify_unchanged()
        return [Token(token, logprobs, False) for token, (_, logprobs) in zip(self._fed, rows, strict=True)]

    def leave(self, row: int) -> list[Any]:
        """Takes a row out. Returns its prompt cache, which holds all its tokens but the newest."""
        found = [part.extract(row) for part in self._cache]
        mx.eval([part.state for part in found])
        keep = [other for other in range(len(self)) if other != row]
        for part in self._cache if keep else ():
            part.filter(keep)
            mx.eval(part.state)
        if not keep:
            self._cache = []
        del self._fed[row], self._choose[row]
        return found
