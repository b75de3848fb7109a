"""The echo of a prompt in its answer, with the probabilities of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..flash.host_arrays import to_numpy
from .jobs import Piece, TokenLogprob
from .logprobs import LogprobReader

if TYPE_CHECKING:
    import mlx.core as mx

LOGITS_BYTES = 4 << 20  # of one chunk of the prompt, in float32; a few copies of them fit into the plan's work space


class PromptEcho:
    """Reads the probabilities of a prompt's tokens from the logits of its chunks."""

    def __init__(self, tokenizer: Any, ids: list[int], top: int) -> None:
        """top: number of likeliest tokens to report for each token."""
        self.ids, self.top = ids, top
        self._reader = LogprobReader(tokenizer, [])
        self._entries = [self._reader.first(ids[0])]

    def read(self, logits: mx.array) -> None:
        """Takes the logits (T, V) after the next T tokens of the prompt."""
        import mlx.core as mx

        rows = logits.astype(mx.float32)
        logprobs = to_numpy(rows - mx.logsumexp(rows, axis=-1, keepdims=True), np.float32)  # (T, V)
        for row in logprobs:
            token = self.ids[len(self._entries)]
            self._entries.append(self._reader.read_row(token, row, self.top))

    def piece(self, text: str) -> Piece:
        """The prompt's text with what was read."""
        entries: list[TokenLogprob] = self._entries
        return Piece(text, tuple(entries))


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text of a prompt, as that of an answer is made."""
    from ..text.detokenizer import Detokenizer

    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def chunk_for(vocabulary: int, most: int) -> int:
    """The number of prompt tokens whose logits are computed at once. most: the largest chunk."""
    return max(1, min(most, LOGITS_BYTES // (4 * vocabulary)))
