"""The probabilities of tokens, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..host_arrays import to_numpy
from .jobs import TokenLogprob


def logprob_of(tokenizer: Any, response: Any, before: int, top: int) -> TokenLogprob:
    """Of a response's token, which came after the token `before`, and of the `top` likeliest ones."""
    logprobs = to_numpy(response.logprobs, np.float32)  # (V,)
    best = np.argpartition(-logprobs, top)[:top] if top else np.empty(0, np.int64)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    likeliest = tuple((int(i), _text_of(tokenizer, before, int(i)), float(logprobs[i])) for i in best)
    token = response.token
    return TokenLogprob(token, _text_of(tokenizer, before, token), float(logprobs[token]), likeliest)


def within(entries: Sequence[TokenLogprob], characters: int) -> list[TokenLogprob]:
    """Those of the tokens that a text of so many characters begins with, the last perhaps in part."""
    kept: list[TokenLogprob] = []
    for entry in entries:
        if characters <= 0:
            break
        kept.append(entry)
        characters -= len(entry.text)
    return kept


def _text_of(tokenizer: Any, before: int, token: int) -> str:
    """What `token` adds to a text; alone it would lose a space in front."""
    start = tokenizer.decode([before])
    both = tokenizer.decode([before, token])
    return both[len(start) :] if both.startswith(start) else tokenizer.decode([token])
