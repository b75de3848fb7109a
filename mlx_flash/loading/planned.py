"""A model that is ready to be loaded: everything that could be refused has been looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..text.generation_config import GenerationConfig
from .plan import Plan


class Planned(NamedTuple):
    """build: called with what is told notes; loads the weights, and returns the model."""

    plan: Plan
    tokenizer: Any
    defaults: GenerationConfig
    build: Callable[[Callable[[str], None]], Any]
