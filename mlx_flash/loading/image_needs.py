"""The memory that a prompt's images take while the vision part reads them, from the model's own graph."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .graph_memory import Evaluation, peak_bytes, trace


def prompt_bytes(inputs: dict[str, Any]) -> int:
    """Bytes of what the model takes for a prompt. inputs: from `ImageProcessor.largest`."""
    return sum(value.nbytes for value in inputs.values() if isinstance(value, mx.array))


def image_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """The most bytes that the vision part takes for a prompt. Nothing is evaluated, and the model does not change.

    model: mlx-vlm's, with its vision part. inputs: from `ImageProcessor.largest`.
    Raises ValueError for a model that MLX cannot describe, and whatever the model raises.
    """
    weights: Any = tree_flatten(model.parameters())
    names = [name for name, _ in weights]
    stand_ins = [mx.zeros(array.shape, array.dtype) for _, array in weights]
    given = {name: value for name, value in inputs.items() if value is not None}
    ids, pixels, mask = given.pop("input_ids"), given.pop("pixel_values"), given.pop("attention_mask", None)

    def call(*arrays: mx.array) -> list[mx.array]:
        model.load_weights(list(zip(names, arrays, strict=False)), strict=False)
        seen = model.get_input_embeddings(ids, arrays[-1], mask=mask, **given).to_dict().values()
        nested = [value if isinstance(value, (list, tuple)) else [value] for value in seen]
        return [array for values in nested for array in values if isinstance(array, mx.array)]

    try:
        graph = trace(call, *stand_ins, pixels)
    finally:
        model.load_weights(weights, strict=False)
    evaluated = Evaluation([array.name for array in graph.outputs])
    late = mx.default_device() != mx.cpu
    return pixels.nbytes + peak_bytes(graph, [evaluated], [], late)
