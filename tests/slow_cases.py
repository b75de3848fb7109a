"""Cases of a test that differ from those in the suite only in a setting: `pytest -m slow` runs them."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def others(cases: list[Any], suite: list[Any]) -> list[Any]:
    """The cases of the suite, and the others as slow ones."""
    return [*suite, *(slow(*(case if isinstance(case, tuple) else (case,))) for case in cases if case not in suite)]
