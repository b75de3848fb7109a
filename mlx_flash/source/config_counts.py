"""Counts in a config.json against what the checkpoint holds: nothing is built for a billion layers that are not there.

A model is built from its configuration alone, an object for each layer at least, before any tensor is asked for.
"""

from __future__ import annotations

import re
from typing import Any

# How configurations call what there is an object for; the last words of a key, such as num_hidden_layers, n_layer.
_LAYERS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?|loops?)$")
_OTHERS = re.compile(r"(?:^|_)(?:heads?|experts?|groups?|mult|embedders?|codebooks?)$")
_LISTS = re.compile(r"(?:^|_)(?:layers?|blocks?|types?|pattern|configs?)$")

FEW = 256
"""So many objects cost nothing. Some keys, such as max_window_layers, keep the value of a larger sibling."""


def count_problem(config: Any, tensors: int, longest: int, depth: int = 0) -> str | None:
    """Which count in a configuration, or in a part of it, is more than the checkpoint can have; None if all fit.

    tensors: of the checkpoint, at least one per layer. longest: its longest dimension, at least one row per head or
    expert.
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
