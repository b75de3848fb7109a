"""Finds the classes, the family and the activation of the model in a config.json, or why it cannot be run."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, get_args, get_type_hints

from .. import models
from ..errors import UnsupportedModelError
from ..layers.activations import Activation
from ..models.family import Family
from ..source.model_kind import SEE, is_mixture, refuse_own_code
from ..source.zoos import INSTALL_MLX_VLM, MLX_LM, mlx_vlm_is_installed, zoo_of

AS_IT_IS = "which needs no conversion: its layers are streamed. Run it as it is."
# Errors that mlx-lm's models raise for a configuration that does not describe a model.
CONFIG_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError)


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """(Model, ModelArgs) for a configuration, in mlx-lm's form. Raises UnsupportedModelError."""
    if (module := _module(config.get("model_type"))) is None:
        raise UnsupportedModelError(f"no model of type {config.get('model_type')!r} is known here.")
    return module.Model, module.ModelArgs


def model_arguments(args_class: Any, config: dict[str, Any]) -> Any:
    """The model's arguments. Raises one of CONFIG_ERRORS, ValueError for a number that does not have its field's type.

    For 4.0 heads, MLX only says "std::bad_cast", and only when it computes.
    """
    args = args_class.from_dict(config)
    for name, hint in get_type_hints(args_class).items():
        kinds = {hint, *get_args(hint)} - {type(None)}
        value = getattr(args, name, None)
        if kinds == {int} and value is not None and type(value) is not int:
            raise ValueError(f"{name} is {value!r:.80}, expected a whole number")
        if kinds == {float} and value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r:.80}, expected a number")
    return args


def family_types() -> list[str]:
    """The model types whose neurons can be streamed: those that have a file with a FAMILY in models/."""
    return sorted(name for _, name, _ in iter_modules(models.__path__) if _module(name) is not None)


def family_of(config: dict[str, Any], where: object) -> Family:
    """The family of a checkpoint's configuration. Raises UnsupportedModelError, naming what was found."""
    refuse_own_code(config, where)
    model_type = config.get("model_type")
    if (module := _module(model_type)) is not None:
        return module.FAMILY  # type: ignore[no-any-return]
    if is_mixture(config, where):
        raise UnsupportedModelError(
            f"{where} is a mixture of experts ({model_type}), which needs no conversion. Run it as it is."
        )
    if zoo_of(config) is not None:
        raise UnsupportedModelError(f"{where} is a dense model ({model_type}), {AS_IT_IS}")
    families = ", ".join(family_types())
    if mlx_vlm_is_installed():
        zoos, more = "neither mlx_flash nor the installed mlx-lm and mlx-vlm know", ""
    else:
        zoos = "neither mlx_flash nor the installed mlx-lm knows"
        more = f" mlx-vlm, which is not installed, may know it: `{INSTALL_MLX_VLM}`."
    raise UnsupportedModelError(
        f"{where} is of model type {model_type!r}, which {zoos}.{more} Two kinds are run: ReLU models ({families}), "
        f"and every model that mlx-lm or mlx-vlm knows. {SEE}"
    )


def runs_as_it_is(config: dict[str, Any], where: object) -> bool:
    """Whether a dense model's checkpoint is run as it is, by layers; False for one whose neurons are streamed.

    Raises UnsupportedModelError, naming what was found.
    """
    refuse_own_code(config, where)
    if (module := _module(config.get("model_type"))) is None:
        if zoo_of(config) is not None:
            return True
        family_of(config, where)  # raises the error
    else:
        found = config.get(module.FAMILY.activation_key, module.FAMILY.default_activation)
        if found == module.FAMILY.default_activation and zoo_of(config) == MLX_LM:
            return found not in module.FAMILY.activations
    activation_of(config, where)
    return False


def activation_of(config: dict[str, Any], where: object) -> Activation:
    """The activation of a configuration's model. Raises UnsupportedModelError, naming what was found."""
    family = family_of(config, where)
    found = config.get(family.activation_key)
    unnamed = ""
    if found is None:
        found, key, wanted = family.default_activation, family.activation_key, next(iter(family.activations))
        remedy = f'if its own code computes {wanted}, add "{key}": "{wanted}"'
        unnamed = f" by default (its config.json has no {key}; {remedy})"
    if not isinstance(found, str) or found not in family.activations:
        # For these types, mlx-lm computes the default activation, whatever the configuration says.
        if found == family.default_activation and zoo_of(config) == MLX_LM:
            raise UnsupportedModelError(
                f"{where} uses the activation {found!r}{unnamed}, which leaves no neuron exactly zero. It is a dense "
                f"model ({config.get('model_type')}), {AS_IT_IS}"
            )
        raise UnsupportedModelError(
            f"{where} uses the activation {found!r}{unnamed}, which neither mlx_flash nor mlx-lm computes for "
            f"{config.get('model_type')}: mlx_flash computes {' or '.join(family.activations)}. "
            f"Use {family.instead} instead."
        )
    try:
        return family.activation_named(found, config)
    except ValueError as error:
        raise UnsupportedModelError(f"{where}: {error}.") from None


def _module(model_type: object) -> ModuleType | None:
    """The module of a model type; None if there is none."""
    name = f"{models.__name__}.{model_type}"
    if not str(model_type).isidentifier() or find_spec(name) is None:
        return None
    module = import_module(name)
    return module if hasattr(module, "FAMILY") else None
