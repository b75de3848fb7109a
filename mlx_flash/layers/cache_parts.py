"""The parts of a prompt cache."""

from __future__ import annotations

from typing import Any


def parts_of(cache: list[Any]) -> list[Any]:
    """The caches of all layers; those of a layer with several are listed one by one."""
    return [part for layer in cache for part in getattr(layer, "caches", [layer])]
