"""Changes JSON trees and the files built around them, so that a fuzzer gets past the first brace."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 4096, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, 1 << 62, 1 << 63),
    *(1 << 64, 10**30, -(1 << 63), 0.0, 0.5, -0.0, 1e-45, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "x", "..", "../x", "/etc/passwd", "a/b", "\ud800", "\u2028", "é" * 50, "F32", "U8", "1", "auto"),
    *([], {}, [[]], [None], [0] * 40, {"": {}}, {"a": {"a": {"a": 1}}}),
)


def mutated(rng: random.Random, tree: Any) -> Any:
    """A JSON value with a few places changed in place, or another value instead of it."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        holder, key = rng.choice(places)
        _change(rng, holder, key, places)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below `tree`."""
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            left.append(holder[key])
    return found


def _change(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    value = holder[key]
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "__metadata__", str(key) + "x", "\ud800"))] = holder.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(value, int) and not isinstance(value, bool):
        holder[key] = value + rng.choice((-1, 1, -value, value, 1 << 32, -2 * value))
    elif kind == 4 and isinstance(value, list):
        holder[key] = value * rng.choice((0, 2, 3)) if len(value) < 1000 else value[:1]
    elif kind == 5 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = value[:at] + rng.choice(("\0", "\ud800", "𐍈", "/", value, "%", "{{")) + value[at:]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Changes, removes or inserts a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and changed:
            changed[at % len(changed)] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.choice((1, 1, 8, 200))]
        elif kind == 2:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
        else:
            changed[at:at] = rng.choice((b"[" * 3000, b'{"":' * 3000, b"\xff\xfe", b"1" * 5000, b"\\ud800", b"}{"))
    return bytes(changed)


def json_text(rng: random.Random, data: bytes) -> bytes:
    """Mutates a JSON text as a tree. Mutates the bytes in one of four cases, and if the text is not JSON."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return flipped(rng, data)
    return flipped(rng, data) if rng.randrange(4) == 0 else json.dumps(mutated(rng, tree)).encode()


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Mutates the header of a safetensors file as a tree and keeps its length right, or mutates the bytes."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    if rng.randrange(4) == 0:
        return flipped(rng, data)
    text = json_text(rng, text)
    rest = rest if rng.randrange(4) else flipped(rng, rest)
    return len(text).to_bytes(8, "little") + text + rest


Mutator = Callable[[random.Random, bytes], bytes]
