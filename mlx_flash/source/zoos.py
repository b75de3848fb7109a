"""The two zoos that build models: mlx-lm for every type that it has, else mlx-vlm. No family is named here.

Both are imported inside functions, because they take seconds. Neither is given a way to run code of a checkpoint.
"""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from ..flash.random_state import kept_random_state
from .remote_code import refusing_remote_code

MLX_LM, MLX_VLM = "mlx-lm", "mlx-vlm"
INSTALL_MLX_VLM = "pip install 'mlx-flash-runtime[vlm]'"
TEXT = "language_model"  # where mlx-vlm's models have their text model


def zoo_of(config: dict[str, Any]) -> str | None:
    """The zoo that builds the model of a configuration; None if neither has its type."""
    if mlx_lm_classes(config) is not None:
        return MLX_LM
    return MLX_VLM if mlx_vlm_module(config) is not None else None


def types_of_zoos() -> set[str]:
    """The model types that the zoos have a file for. `zoo_of` answers for certain, and slower."""
    from mlx_lm.utils import MODEL_REMAPPING

    types = {str(name) for name in MODEL_REMAPPING}
    for zoo in ("mlx_lm", "mlx_vlm"):
        found = find_spec(zoo)
        folders = found.submodule_search_locations if found is not None else None
        types |= {module.name for module in iter_modules([f"{folder}/models" for folder in folders or ()])}
    return types


def random_model(config: dict[str, Any]) -> Any | None:
    """The zoo's model of a configuration, with random weights that are not evaluated; None if neither has its type.

    Raises what the zoo raises for a configuration that does not describe a model.
    """
    if (classes := mlx_lm_classes(config)) is None:
        return random_mlx_vlm_model(config)
    model_class, args_class = classes
    with kept_random_state():
        return model_class(args_class.from_dict(config))


def random_mlx_vlm_model(config: dict[str, Any]) -> Any | None:
    """The same of mlx-vlm. A model that does not write text counts as none."""
    if (module := mlx_vlm_module(config)) is None:
        return None
    with kept_random_state():
        model = _mlx_vlm_model(module, config)
    return model if TEXT in model else None


def mlx_lm_classes(config: dict[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's (Model, ModelArgs) for a configuration; None if it has none, or if only mlx-vlm takes its settings."""
    from mlx_lm.utils import _get_classes

    try:
        classes: tuple[Any, Any] = _get_classes(config)
    except Exception:  # The configuration lacks something, so the model cannot be run.
        return None
    try:
        classes[1].from_dict(config)
    except Exception:  # mlx-lm lacks a part of the model, or the configuration does not describe one.
        return None if mlx_vlm_module(config) is not None else classes
    return classes


def mlx_vlm_module(config: dict[str, Any]) -> Any | None:
    """mlx-vlm's module for a configuration; None if it has none, or is not installed."""
    if not isinstance(config.get("model_type"), str) or not mlx_vlm_is_installed():
        return None
    with refusing_remote_code():
        from mlx_vlm.utils import get_model_type

        try:
            name = str(get_model_type(config))
        except Exception:  # A value is not what mlx-vlm expects.
            return None
        if not name.isidentifier() or find_spec(f"mlx_vlm.models.{name}") is None:
            return None
        module = import_module(f"mlx_vlm.models.{name}")
    return module if hasattr(module, "Model") and hasattr(module, "ModelConfig") else None


def has_vision(config: dict[str, Any]) -> bool:
    """Whether a configuration describes a part that reads images."""
    return bool(config.get("vision_config") or config.get("vision_n_layers"))


def mlx_vlm_is_installed() -> bool:
    """Whether mlx-vlm can be imported. It is not imported."""
    return "mlx_vlm" in sys.modules or find_spec("mlx_vlm") is not None


def _mlx_vlm_model(module: Any, config: dict[str, Any]) -> Any:
    """mlx-vlm's model of a configuration, as its `load_model` makes it, with random weights."""
    from mlx_vlm.utils import update_module_configs

    config = copy.deepcopy(config)
    config.setdefault("text_config", config.pop("llm_config", {}))
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    settings = module.ModelConfig.from_dict(config)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    return module.Model(update_module_configs(settings, module, config, parts))
