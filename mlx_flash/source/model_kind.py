"""Finds the kind of model that a config.json describes, without reading weights or running code of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from ..flash.random_state import kept_random_state

SEE = 'The README\'s section "Which models" has the details.'


def refuse_own_code(config: Mapping[str, Any], where: object) -> None:
    """Raises UnsupportedModelError for a model that only code from its checkpoint can build.

    In mlx-lm, `model_file` names such code, and mlx-lm runs it when it is told to trust it.
    """
    if (file := config.get("model_file")) is not None:
        raise UnsupportedModelError(
            f"{where} cannot be run: its config.json names {file!r}, code in the checkpoint that builds the model, "
            f"and code from a checkpoint is never run. {SEE}"
        )


def is_mixture(config: dict[str, Any], where: object) -> bool:
    """Whether mlx-lm's model for this configuration has switch layers. Cheap: nothing is read or evaluated.

    where: the folder or repository of the config.json, for messages.

    Raises CheckpointError if mlx-lm's family for it has such layers, but the model cannot be built.
    """
    if (classes := _mlx_lm_classes(config)) is None:
        return False
    model_class, args_class = classes
    try:
        with kept_random_state():
            return any(True for _ in switch_layers(model_class(args_class.from_dict(config))))
    except Exception as error:
        family = sys.modules[model_class.__module__]
        if not any(hasattr(family, name) for name in ("SwitchGLU", "SwitchMLP")):
            return False
        raise CheckpointError(
            f"mlx-lm cannot build the model that the config.json of {where} describes ({config['model_type']}): "
            f"{error_line(error)}. Download the checkpoint again."
        ) from None


def switch_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields (path in the model, module) of the mlx-lm modules that hold experts, in the order of the layers."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, (SwitchGLU, SwitchMLP))]
    yield from sorted(found, key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")])


def mlx_lm_knows(config: dict[str, Any]) -> bool:
    """Whether mlx-lm has a model of this configuration's type."""
    return _mlx_lm_classes(config) is not None


def _mlx_lm_classes(config: dict[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's (Model, ModelArgs) for a configuration; None if it has none. Only modules of mlx-lm are imported."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)  # type: ignore[no-any-return]
    except Exception:  # The configuration lacks something, so the model cannot be run.
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message. MLX's messages go on to list every way to call a function."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def error_line(error: Exception) -> str:
    """Another library's error in one line, with the class's name unless the message is a sentence; no full stop."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, RuntimeError)) and text
    return (text if plain else f"{type(error).__name__}: {text}")[:300].rstrip(".")
