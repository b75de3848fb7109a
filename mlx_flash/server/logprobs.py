"""The probabilities of an answer's tokens, with the text that each token adds."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..flash.host_arrays import to_numpy
from ..text.detokenizer import Detokenizer
from .jobs import TokenLogprob


class LogprobReader:
    """Reads the probabilities of one answer, token by token, and finds the text that each token adds."""

    def __init__(self, tokenizer: Any, continues: Sequence[int]) -> None:
        """continues: the same as for the answer's own Detokenizer."""
        self._detokenizer = Detokenizer(tokenizer, continues)
        self._begin_character(0)

    def read(self, response: Any, top: int) -> TokenLogprob:
        """The log-probabilities of a response's token, which must be the next one, and of the `top` likeliest."""
        return self.read_row(response.token, to_numpy(response.logprobs, np.float32), top)

    def first(self, token: int) -> TokenLogprob:
        """The entry of a text's first token, which has no probability."""
        (added,) = self._detokenizer.added_by([token])
        self._follow(token, added)
        return TokenLogprob(token, added, None)

    def read_row(self, token: int, logprobs: np.ndarray, top: int) -> TokenLogprob:
        """Like `read`. token: the next one. logprobs: (V,), float32"""
        best = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top]
        best = best[np.argsort(-logprobs[best], kind="stable")]
        tokens = [token, *map(int, best)]
        added = self._detokenizer.added_by(tokens)
        offset = self._characters
        entries = [TokenLogprob(i, text, float(logprobs[i]), offset) for i, text in zip(tokens, added, strict=True)]
        self._follow(token, added[0])
        return TokenLogprob(token, added[0], entries[0].logprob, offset, tuple(entries[1:]))

    def _follow(self, token: int, added: bytes) -> None:
        self._detokenizer.add_token(token)
        if self._detokenizer.holds_back:
            self._characters += len(self._utf8.decode(added))
        else:
            self._begin_character(len(self._detokenizer.text))

    def _begin_character(self, characters: int) -> None:
        """characters: number of complete characters in the text."""
        self._characters = characters
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
