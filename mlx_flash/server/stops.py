"""Stop words: text is held back for as long as it may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Text goes in piece by piece and comes out up to the first of `words`, which is never shown, nor a part of it."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be shown now. Once a word is complete, `found` is set and nothing more comes."""
        if self.found:
            return ""
        text = self.held + text
        found = [(place + len(word), place) for word in self.words if (place := text.find(word)) >= 0]
        if found:
            self.found, self.held = True, ""
            return text[: min(found)[1]]  # complete first, wherever tokens begin and end
        keep = max((_overlap(text, word) for word in self.words), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The end of the text: what was held back after all."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """The most characters at the end of `text` with which `word` begins."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
