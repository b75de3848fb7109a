"""Rotary settings of a configuration: transformers 4 has them at the top level, transformers 5 in `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_lm.models.base import BaseModelArgs


def at_top_level(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in transformers 4's form, with `rope_theta`, `partial_rotary_factor` and `rope_scaling`."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, Mapping):
        return dict(config)
    flat = {key: nested[key] for key in ("rope_theta", "partial_rotary_factor") if nested.get(key) is not None}
    if nested.get("rope_type", "default") != "default":
        flat["rope_scaling"] = nested
    return {**config, **flat}


class RopeArgs(BaseModelArgs):
    """A base class of ModelArgs that reads both forms. Raises ValueError for settings that mlx-lm cannot use."""

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Any:
        flat = at_top_level(params)
        if problem := _problem(flat):
            raise ValueError(problem)
        return super().from_dict(flat)

    def refuse_rope_scaling(self) -> None:
        """Raises ValueError for a rope_scaling, which the model would ignore."""
        scaling: Any = getattr(self, "rope_scaling", None)
        if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
            raise ValueError(f"rope_scaling is {scaling}, which is not supported for this model type: expected none")


def _problem(config: Mapping[str, Any]) -> str | None:
    """Returns what mlx-lm would fail on, or ignore, in a configuration from `at_top_level`; or None."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), (Mapping, type(None))):
            return f"{key} is {config[key]!r:.80}, expected an object or null"
    scaling = config.get("rope_scaling")
    if scaling and not isinstance(scaling.get("rope_type", scaling.get("type")), str):
        return f"rope_scaling is {dict(scaling)!r:.80}, expected a rope_type in it"
    for key, most in (("rope_theta", math.inf), ("partial_rotary_factor", 1)):
        value = config.get(key, 1)
        if type(value) not in (int, float) or not 0 < value <= most or math.isinf(value):
            return f"{key} is {value!r:.80}, expected a number above 0" + (f", at most {most}" if most == 1 else "")
    return None
