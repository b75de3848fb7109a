"""Checks the counts in a config.json against the checkpoint's tensors.

A model is built from its configuration alone, with at least one object per layer, before any tensor is read. Without
this check, a config.json that claims a billion layers would use up all memory.
"""

from __future__ import annotations

import re
from typing import Any

# The last words of keys that count objects, such as num_hidden_layers or n_layer.
_LAYERS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?|loops?)$")
_OTHERS = re.compile(r"(?:^|_)(?:heads?|experts?|groups?|mult|embedders?|codebooks?)$")
_LISTS = re.compile(r"(?:^|_)(?:layers?|blocks?|types?|pattern|configs?)$")

FEW = 256
"""Up to this many objects cost nothing. Some keys, such as max_window_layers, keep the value of a larger sibling."""


def count_problem(config: Any, tensors: int, longest: int, depth: int = 0) -> str | None:
    """Names a count in a configuration, or in a part of it, that is too large for the checkpoint; None if all fit.

    tensors: number of tensors in the checkpoint (at least one per layer). longest: its longest dimension (at least one
    row per head or expert).
    """
    if depth > 32:
        return "it is nested more than 32 deep"
    if isinstance(config, list):
        return next((found for part in config if (found := count_problem(part, tensors, longest, depth + 1))), None)
    if not isinstance(config, dict):
        return None
    for key, value in config.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if _LAYERS.search(key) and value > max(tensors, FEW):
                return f"{key} is {value!s:.20}, and the checkpoint has {tensors} tensors"
            if _OTHERS.search(key) and value > max(tensors, longest, FEW):
                return f"{key} is {value!s:.20}, and no dimension of the checkpoint's tensors is above {longest}"
        elif isinstance(value, (list, str)) and _LISTS.search(key) and len(value) > max(tensors, FEW):
            return f"{key} has {len(value)} items, and the checkpoint has {tensors} tensors"
        if found := count_problem(value, tensors, longest, depth + 1):
            return f"{key}: {found}"
    return None
