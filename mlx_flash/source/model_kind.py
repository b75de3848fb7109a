"""Finds the kind of model that a config.json describes, without reading weights or running code of the checkpoint."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from .zoos import MLX_LM, mlx_lm_classes, random_model, zoo_of

SEE = 'The README\'s section "Which models" has the details.'


def refuse_own_code(config: Mapping[str, Any], where: object) -> None:
    """Raises UnsupportedModelError for a model that only code from its checkpoint can build.

    In both zoos, `model_file` names such code. mlx-lm runs it when it is told to trust it, and mlx-vlm always does.
    """
    if (file := config.get("model_file")) is not None:
        raise UnsupportedModelError(
            f"{where} cannot be run: its config.json names {file!r}, code in the checkpoint that builds the model, "
            f"and code from a checkpoint is never run. {SEE}"
        )


def is_mixture(config: dict[str, Any], where: object) -> bool:
    """Whether a zoo's model for this configuration has switch layers. Cheap: nothing is read or evaluated.

    where: the folder or repository of the config.json, for messages.

    Raises CheckpointError if the zoo's family for it has such layers, but the model cannot be built.
    """
    try:
        model = random_model(config)
    except Exception as error:
        zoo = zoo_of(config)
        if zoo == MLX_LM and not _may_have_switch_layers(config):
            return False
        raise CheckpointError(
            f"{zoo} cannot build the model that the config.json of {where} describes ({config['model_type']}): "
            f"{error_line(error)}. Download the checkpoint again."
        ) from None
    return model is not None and any(True for _ in switch_layers(model))


def _may_have_switch_layers(config: dict[str, Any]) -> bool:
    """Whether mlx-lm's family for a configuration imports switch layers."""
    classes = mlx_lm_classes(config)
    family = sys.modules[classes[0].__module__] if classes is not None else None
    return any(hasattr(family, name) for name in ("SwitchGLU", "SwitchMLP"))


def switch_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields (path in the model, module) of the modules that hold experts, in the order of the layers."""
    found = [(path, module) for path, module in model.named_modules() if is_switch_layer(module)]
    yield from sorted(found, key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")])


def is_switch_layer(module: Any) -> bool:
    """Whether a module multiplies each token by the matrices of the experts that it is told, whatever its class.

    Such a module takes (x, indices), and has at least two projections with a matrix for each of E experts (E, O, I).
    """
    projections = [child for child in module.children().values() if is_projection(child)]
    experts = {len(child["weight"]) for child in projections}
    return len(projections) > 1 and len(experts) == 1 and _takes_indices(module)


def is_projection(child: Any) -> bool:
    """Whether a child of a switch layer has matrices of experts."""
    weight = child.get("weight") if isinstance(child, dict) else None
    return getattr(weight, "ndim", 0) == 3 and _takes_indices(child)


def _takes_indices(module: Any) -> bool:
    """Whether a module must be called with at least two arguments."""
    parameters = inspect.signature(type(module).__call__).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) > 2  # self, x, indices


def first_line(error: BaseException) -> str:
    """The first line of an error's message. MLX's messages go on to list every way to call a function."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def error_line(error: Exception) -> str:
    """Another library's error in one line, with the class's name unless the message is a sentence; no full stop."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, RuntimeError)) and text
    return (text if plain else f"{type(error).__name__}: {text}")[:300].rstrip(".")
