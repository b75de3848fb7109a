"""The bytes that each token adds to a text, for grammars, which decide token by token what may follow."""

from __future__ import annotations

from typing import Any

from ..errors import GrammarError
from .detokenizer import BYTE_TOKEN, byte_values, cleans_up, decoder_types

SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # steps of decoders of pieces with "▁"


def token_bytes(tokenizer: Any, vocabulary: int) -> tuple[list[bytes], set[int]]:
    """The bytes of the tokens 0 to vocabulary - 1, b"" for those that add no text, and the ids of special tokens.

    tokenizer: a tokenizer of transformers, or mlx-lm's wrapper of one. The bytes of a special token are its name.

    Raises GrammarError for a tokenizer whose tokens have no bytes of their own: its decoder puts spaces between words,
    or removes some again.
    """
    tokenizer = getattr(tokenizer.decode, "__self__", tokenizer)  # the one inside a wrapper
    byte_level = _is_byte_level(tokenizer)
    as_bytes = byte_level or "ByteFallback" in decoder_types(tokenizer) or hasattr(tokenizer, "sp_model")
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if 0 <= number < vocabulary}
    special = {number for number in tokenizer.all_special_ids if 0 <= number < vocabulary}
    # An added token like <tool_call> is a marker, even where its file does not call it special. A text spells it.
    special |= {number for number, token in added.items() if token.special or _is_marker(token.content)}
    known = min(vocabulary, max(len(tokenizer), max(added, default=-1) + 1))
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    texts = [b""] * vocabulary
    for number, name in enumerate(names):
        if name is None:  # a gap in the vocabulary
            continue
        if number in special or number in added:
            texts[number] = (added[number].content if number in added else name).encode()
        elif byte_level:
            values = [byte_values().get(character) for character in name]
            texts[number] = b"" if None in values else bytes(value for value in values if value is not None)
        elif as_bytes and (byte := BYTE_TOKEN.fullmatch(name)):
            texts[number] = bytes([int(byte[1], 16)])
        else:
            texts[number] = name.replace("▁", " ").encode(errors="ignore")
    return texts, special


def _is_marker(content: str) -> bool:
    return len(content) > 2 and content.startswith("<") and content.endswith(">")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are in the byte-level alphabet, else in pieces with "▁". Raises GrammarError for others."""
    steps = decoder_types(tokenizer)
    if not cleans_up(tokenizer):
        if "ByteLevel" in steps:
            return True
        spaced = steps and set(steps) <= SENTENCEPIECE_STEPS and {"Replace", "Metaspace"} & set(steps)
        if spaced or hasattr(tokenizer, "sp_model"):
            return False
    reason = "cleans up spaces" if cleans_up(tokenizer) else f"has the decoder {' + '.join(steps) or 'of its class'}"
    raise GrammarError(
        f"this model's answers cannot be held to a grammar: its tokenizer ({type(tokenizer).__name__}) {reason}. "
        "Byte-level and sentencepiece tokenizers can be. Ask for plain text, or use another model."
    )
