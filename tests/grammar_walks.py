"""Answers made of random tokens among those that a grammar allows."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flash.text.detokenizer import Detokenizer
from mlx_flash.text.grammar import Constraint, Grammar, Grammars
from mlx_flash.text.token_bytes import token_bytes

MOST_TOKENS = 3000


class Walks:
    """Random walks with one tokenizer."""

    def __init__(self, tokenizer: Any, more: int = 0, **settings: Any) -> None:
        """more: logits beyond the tokenizer's vocabulary. settings: those of mlx-lm's TokenizerWrapper."""
        self.tokenizer = TokenizerWrapper(tokenizer, Detokenizer, **settings)
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1 + more
        self.grammars = Grammars(self.tokenizer, self.vocabulary)
        texts, _ = token_bytes(tokenizer, self.vocabulary)
        # Tokens that end a JSON text, an argument or a word. Without a preference for them, strings hardly ever end.
        self.closing = np.array([bool(text) and text[:1] in b'"}])<\n' for text in texts])

    def tokens(self, grammar: Grammar, seed: int) -> list[int] | None:
        """The tokens of an answer, without the one that ends it; None if it did not end in time."""
        rng = random.Random(seed)
        constraint = grammar.begin()
        found: list[int] = []
        for _ in range(MOST_TOKENS):
            token = self.choose(constraint, rng, len(found))
            constraint.accept(token)
            if token in self.tokenizer.eos_token_ids:
                assert constraint.ended and constraint.can_end
                return found
            found.append(token)
        return None

    def choose(self, constraint: Constraint, rng: random.Random, length: int) -> int:
        allowed = constraint.allowed()
        wanted = allowed & self.closing if rng.random() < 0.3 + length / 500 else allowed
        if rng.random() < length / 500 and constraint.can_end:
            wanted = np.isin(np.arange(self.vocabulary), list(self.tokenizer.eos_token_ids)) & allowed
        return int(rng.choice(np.flatnonzero(wanted if wanted.any() else allowed)))

    def text(self, grammar: Grammar, seed: int) -> str | None:
        """The text of an answer, decoded as the runtime decodes it."""
        tokens = self.tokens(grammar, seed)
        if tokens is None:
            return None
        detokenizer = Detokenizer(self.tokenizer)
        text = ""
        for token in tokens:
            detokenizer.add_token(token)
            text += detokenizer.last_segment
        detokenizer.finalize()
        return text + detokenizer.last_segment


def allowed_ids(constraint: Constraint, dtype: mx.Dtype = mx.float32) -> list[int]:
    """The ids whose logits `mask` keeps."""
    size = constraint.allowed().size
    masked = constraint.mask(mx.ones((1, size), dtype))
    assert masked.dtype == dtype and masked.shape == (1, size)
    return np.flatnonzero(np.array(masked.astype(mx.float32))[0] == 1).tolist()
