"""A model that is ready to be loaded, after all checks that could refuse it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..text.generation_config import GenerationConfig
from .draft_model import PlannedDrafts
from .forecast import Foresight
from .plan import Plan


class Planned(NamedTuple):
    """A model that is ready to be loaded.

    build: loads the weights and returns the model; it passes notes to the function that it is called with.
    plan_for: makes the plan of another budget and context, in bytes and tokens; it raises BudgetError. foresight:
    forecasts the model's speed; None where that cannot be. drafts: what will draft tokens; None for nothing. folder: of
    the store or the checkpoint that is read.
    """

    plan: Plan
    tokenizer: Any
    defaults: GenerationConfig
    build: Callable[[Callable[[str], None]], Any]
    plan_for: Callable[[int, int], Any]
    foresight: Foresight | None = None
    drafts: PlannedDrafts | None = None
    folder: Path | None = None
