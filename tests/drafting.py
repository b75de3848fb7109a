"""Drafters for tests: one that is told the text, and one that remembers earlier texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.text.drafts import Drafter, Drafting, NgramDrafter


class Told:
    """Drafts the tokens of a known text. Every `wrong`-th token of the text is drafted wrongly."""

    def __init__(self, text: list[int], wrong: int) -> None:
        self.text, self.wrong, self.made = text, wrong, 0

    def add(self, tokens: Sequence[int]) -> None:
        self.made += len(tokens)

    def read(self) -> None: ...

    def propose(self, count: int) -> list[int]:
        places = range(self.made, min(self.made + count, len(self.text)))
        return [self._other(self.text[at]) if (at + 1) % self.wrong == 0 else self.text[at] for at in places]

    def _other(self, token: int) -> int:
        return token - 1 if token else 1  # A model cannot look up a token beyond its vocabulary.

    def end(self) -> None: ...


@dataclass
class Telling(Drafting):
    """text: the whole text, with the prompt. wrong: see `Told`."""

    text: list[int] = field(default_factory=list)
    wrong: int = 10**9

    def begin(self, sampler: Any, vocabulary: int, cache: list[Any]) -> Drafter:
        return Told(self.text, self.wrong)


@dataclass
class Remembering(Drafting):
    """Drafts with n-grams that include those of all earlier texts."""

    texts: list[int] = field(default_factory=list)

    def begin(self, sampler: Any, vocabulary: int, cache: list[Any]) -> Drafter:
        remembering = self

        class Drafter(NgramDrafter):
            def add(self, tokens: Sequence[int]) -> None:
                super().add(tokens)
                remembering.texts.extend(tokens)

        made = NgramDrafter.__new__(Drafter)
        NgramDrafter.__init__(made)
        NgramDrafter.add(made, remembering.texts)
        return made
