"""The memory that a prompt's images take while the vision part reads them and after it, from the model's own graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .graph_memory import Evaluation, peak_bytes, trace


@dataclass(frozen=True)
class ImageNeeds:
    """The memory for a prompt of `tokens` tokens with the largest images, in bytes, and for each further token.

    reading: while the vision part reads them. held: what the model sees of the prompt, until all of it is read.
    """

    tokens: int
    reading: float
    held: float
    reading_per_token: float
    held_per_token: float

    def at(self, context: int) -> tuple[int, int]:
        """(reading, held) for a prompt that fills the context."""
        more = max(0, context - self.tokens)
        return round(self.reading + more * self.reading_per_token), round(self.held + more * self.held_per_token)


NO_IMAGES = ImageNeeds(0, 0, 0, 0, 0)


def prompt_bytes(inputs: dict[str, Any]) -> int:
    """Bytes of what the model takes for a prompt. inputs: from `ImageProcessor.largest`."""
    return sum(value.nbytes for value in inputs.values() if isinstance(value, mx.array))


def image_needs(model: Any, inputs: dict[str, Any], longer: dict[str, Any]) -> ImageNeeds:
    """The memory that images take. Nothing is evaluated, and the model does not change.

    model: mlx-vlm's, with its vision part. inputs, longer: from `ImageProcessor.largest`; `longer` has more text.
    Raises ValueError for a model that MLX cannot describe, and whatever the model raises.
    """
    (tokens, reading, held), (most, more_reading, more_held) = (_needs_of(model, each) for each in (inputs, longer))
    further = max(1, most - tokens)
    return ImageNeeds(
        tokens, reading, held, max(0, more_reading - reading) / further, max(0, more_held - held) / further
    )


def _needs_of(model: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """(tokens, reading, held) of a prompt."""
    weights: Any = tree_flatten(model.parameters())
    names = [name for name, _ in weights]
    stand_ins = [mx.zeros(array.shape, array.dtype) for _, array in weights]
    given = {name: value for name, value in inputs.items() if value is not None}
    ids, pixels, mask = given.pop("input_ids"), given.pop("pixel_values"), given.pop("attention_mask", None)
    held = 0

    def call(*arrays: mx.array) -> list[mx.array]:
        nonlocal held
        model.load_weights(list(zip(names, arrays, strict=False)), strict=False)
        seen = model.get_input_embeddings(ids, arrays[-1], mask=mask, **given).to_dict().values()
        nested = [value if isinstance(value, (list, tuple)) else [value] for value in seen]
        found = [array for values in nested for array in values if isinstance(array, mx.array)]
        held = sum(array.nbytes for array in found)
        return found

    try:
        graph = trace(call, *stand_ins, pixels)
    finally:
        model.load_weights(weights, strict=False)
    evaluated = Evaluation([array.name for array in graph.outputs])
    late = mx.default_device() != mx.cpu
    return ids.shape[1], pixels.nbytes + peak_bytes(graph, [evaluated], [], late), held
