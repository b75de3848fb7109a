"""How ranks agree on the text that their KV caches hold.

Each rank has the whole model's prompt cache. The layers that other ranks compute have small entries in it: one of two
numbers for each token, a digest of the text up to there. So whatever is done to rank 0's cache (trimming, copying,
writing it to a file) is done to the digests as well, and the newest one tells which text a rank must hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import numpy as np

from ..flash.host_arrays import to_numpy
from .cache_parts import parts_of

CACHES = ("KVCache", "RotatingKVCache")
ZOO_CACHES = "mlx_lm.models.cache"
DIGEST_BYTES = 8


def counts_tokens(part: Any) -> bool:
    """Whether a layer's cache is one that other ranks can follow."""
    return type(part).__module__ == ZOO_CACHES and type(part).__name__ in CACHES


def digests_of(before: bytes, ids: Sequence[int]) -> list[bytes]:
    """The digests of a text after each of `ids`. before: the digest of the text before them, b"" for none."""
    found = []
    for token in ids:
        before = blake2b(before + int(token).to_bytes(4, "little"), digest_size=DIGEST_BYTES).digest()
        found.append(before)
    return found


def marks_of(digests: Sequence[bytes]) -> mx.array:
    """Digests as the keys of a cache: int32 (1, 1, T, 2)."""
    return mx.array(np.frombuffer(b"".join(digests), np.int32).reshape(1, 1, len(digests), 2))


def no_marks(tokens: int, rows: int = 1) -> mx.array:
    """Keys of the same form for a cache whose digests nobody reads."""
    return mx.zeros((rows, 1, tokens, 2), mx.int32)


def count_tokens(part: Any, marks: mx.array) -> None:
    """Makes a layer's cache count tokens. marks: int32 (B, 1, T, 2)."""
    part.update_and_fetch(marks, marks[..., :1])


def newest_digest(part: Any) -> bytes:
    """The digest that `count_tokens` put last into a cache that is not empty."""
    last = getattr(part, "_idx", part.offset) - 1
    return to_numpy(part.keys[0, 0, last]).tobytes()


def trims(cache: list[Any]) -> bool:
    """Whether tokens can be taken back out of a prompt cache."""
    return all(part.is_trimmable() for part in parts_of(cache))
