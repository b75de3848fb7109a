"""Stop words: holds text back while it may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Passes text on, piece by piece, up to the first of `words`. No part of the stop word itself is passed on."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.held = ""
        self.found: str | None = None  # the stop word that ended the text

    def feed(self, text: str) -> str:
        """The text that may be shown now. Once a stop word is complete, `found` is set, and later calls return ""."""
        if self.found is not None:
            return ""
        text = self.held + text
        found = [(place + len(word), place, word) for word in self.words if (place := text.find(word)) >= 0]
        if found:
            _, place, self.found = min(
                found
            )  # The word that ends first counts, however the text was split into tokens.
            self.held = ""
            return text[:place]
        keep = max((_overlap(text, word) for word in self.words), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Ends the text. Returns the text that was held back."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that is a beginning of `word`, shorter than the whole word."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
