"""Builds mlx-vlm's model of a checkpoint from tensors that are handed to it, and makes it look like one of mlx-lm's."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashError
from ..source.remote_code import refusing_remote_code
from ..source.zoos import TEXT
from ..text.draft_head import HiddenStates
from ..text.token_loop import cached_tokens

# What mlx-vlm's `load_model` calls to read a file of tensors, to rename the tensors, and to put them into the model.
READ, RENAME, FILL = "_load_safetensors", "sanitize_weights", "load_model_weights"

# Most tokens of a call that takes the path of decoded tokens. Beyond them, the DeepSeek V4 of mlx-vlm 0.7.10 takes that
# of prompts (DECODE_BLOCK_SIZE), which computes other numbers, and not by rounding alone.
MOST_POSITIONS = 8

Weights = dict[str, mx.array]
Sanitize = Callable[[Weights], Weights]


def load_by_mlx_vlm(
    folder: Path, watch: Callable[[Sanitize, Callable[[], Any]], Weights], images: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Calls mlx-vlm's `load_model` lazily. Returns (text model in mlx-lm's form, configuration).

    images: whether to keep the vision part. Otherwise whatever a text does not need is left out of the model, and not
    read.

    folder: a folder with the configuration, and one file without tensors; mlx-vlm reads and writes such files itself,
    so it is not given the checkpoint's. watch(sanitize, model): calls `sanitize` with the checkpoint's tensors, not yet
    read, and returns what it makes of them: the model's parameters. `model` returns the model after that.
    """
    filled: list[tuple[Any, dict[str, Any], Weights, dict[str, Any]]] = []

    def note(model: Any, config: dict[str, Any], weights: Weights, _: Path, **options: Any) -> Any:
        filled.append((model, config, weights, options))
        return model

    with refusing_remote_code():
        from mlx_vlm import utils

        def rename(model: Any, *rest: Any) -> Weights:
            if getattr(getattr(model, "config", None), "model_path", None) is not None:
                model.config.model_path = None  # or a model reads tensors from the folder itself
            return utils.sanitize_weights(model, *rest)  # type: ignore[no-any-return]

        def sanitize(given: Weights) -> Weights:
            _replaced(utils.load_model, {READ: lambda _: given, RENAME: rename, FILL: note})(folder, lazy=True)
            return filled[-1][2]

        weights = watch(sanitize, lambda: filled[-1][0])
        model, config, _, options = filled[-1]  # `watch` calls it twice
        if not images:
            for name in [name for name in model if name != TEXT]:
                model[name] = None
            weights = {name: array for name, array in weights.items() if name.startswith(f"{TEXT}.")}
        utils.load_model_weights(model, config, weights, folder, **options)
    return as_text_model(model), config


def as_text_model(model: Any) -> Any:
    """The same model, whose call takes tokens (B, T) and a prompt cache and returns logits (B, T, V), like mlx-lm's.

    Its calls with a prompt cache note their hidden states in its `states`, unless that is None.
    """
    from mlx_vlm.models.cache import make_prompt_cache

    kind: Any = type(model)

    class TextModel(kind):  # type: ignore[misc]
        most_positions = MOST_POSITIONS
        states: HiddenStates | None = None

        def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
            text = self[TEXT]
            sight = getattr(cache[0], "sight", None) if cache else None
            if sight is not None:  # the prompt has images
                if self.states is not None:
                    self.states.forget()
                return sight(text, inputs, cache)  # type: ignore[no-any-return]
            if hasattr(text, "_rope_deltas"):
                # These belong to the last prompt with images. Where they are kept, a text counts its tokens.
                text._position_ids, text._rope_deltas = None, mx.zeros((inputs.shape[0], 1), mx.int32)
            if self.states is None or not cache:
                return text(inputs, cache=cache).logits  # type: ignore[no-any-return]
            place = cached_tokens(cache)
            found = text(inputs, cache=cache, return_hidden=True)
            self.states.note(cache, place, found.hidden_states)
            return found.logits  # type: ignore[no-any-return]

        @property
        def layers(self) -> Any:
            return self[TEXT].layers

        def make_cache(self) -> Any:
            return make_prompt_cache(self[TEXT])

    model.__class__ = TextModel
    return model


def _replaced(function: Any, names: dict[str, Any]) -> Any:
    """The same function, with other values for some of its module's names. The module itself does not change."""
    if missing := [name for name in names if name not in function.__globals__]:
        import mlx_vlm

        raise FlashError(
            f"mlx-vlm {mlx_vlm.__version__} cannot be used: its loader has no {missing[0]}. "
            "Install one that was tried: pip install 'mlx-vlm==0.7.10'."
        )
    copied = types.FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
