"""How a configuration says what is rotated: transformers 4 at its top level, transformers 5 in `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lm.models.base import BaseModelArgs


def at_top_level(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 wrote it: `rope_theta`, `partial_rotary_factor`, `rope_scaling`."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, Mapping):
        return dict(config)
    flat = {key: nested[key] for key in ("rope_theta", "partial_rotary_factor") if nested.get(key) is not None}
    if nested.get("rope_type", "default") != "default":
        flat["rope_scaling"] = nested
    return {**config, **flat}


class RopeArgs(BaseModelArgs):
    """A base for ModelArgs that reads both forms."""

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Any:
        return super().from_dict(at_top_level(params))

    def refuse_rope_scaling(self) -> None:
        """For models that would ignore it. Raises ValueError."""
        scaling: Any = getattr(self, "rope_scaling", None)
        if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
            raise ValueError(f"rope_scaling is {scaling}, which is not supported for this model type: expected none")
