"""Running calibration text through a model layer by layer, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.layers.activations import Activation

from .host import HostLinear, HostMatrix

SEQUENCE_TOKENS = 128
BATCH_SEQUENCES = 8  # at once: a layer's weights are widened as often as there are batches


def calibration_sequences(token_ids: list[int], prefix: list[int], tokens: int, positions: int) -> np.ndarray:
    """Cuts text into sequences that each begin with `prefix` (the tokenizer's opening token).

    Returns int32 (sequences, length): about `tokens` in all, fewer if the text is short, at least one sequence.
    """
    length = min(SEQUENCE_TOKENS, positions)
    body = length - len(prefix)
    count = max(1, min(tokens // length, len(token_ids) // body))
    if len(token_ids) < body:  # a very short text: one short sequence
        return np.array([prefix + token_ids], np.int32)
    step = (len(token_ids) - body) // max(1, count - 1) if count > 1 else 0  # spread over the whole text
    return np.array([prefix + token_ids[i * step : i * step + body] for i in range(count)], np.int32)


@dataclass(frozen=True)
class HostFFN:
    """One layer's FFN for the host."""

    activation: Activation
    matrices: tuple[HostMatrix, ...]  # (F, D) each: up, or gate and up
    up_bias: np.ndarray  # (F,), float32
    down: HostMatrix  # (F, D)
    down_bias: np.ndarray  # (D,), float32

    def before(self, x: np.ndarray) -> list[np.ndarray]:
        """The pre-activations of every matrix, (N, F) each. x: (N, D)."""
        products = [matrix.rows_dot(x) for matrix in self.matrices]
        products[-1] += self.up_bias
        return products


class _Recorder:
    """Stands where the FFN stood: keeps its input, computes it on the host."""

    def __init__(self, ffn: HostFFN) -> None:
        self.ffn = ffn
        self.inputs: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []

    def __call__(self, x: mx.array) -> mx.array:
        flat = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        before = self.ffn.before(flat)
        self.inputs.append(flat)
        self.scores.append(self.ffn.activation.score(*before, xp=np))
        y = self.ffn.down.sum_of_rows(self.ffn.activation(*before, xp=np)) + self.ffn.down_bias  # (N, F) @ (F, D)
        return mx.array(y).reshape(x.shape).astype(x.dtype)


def join(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of all parts, (n, C) each. Empties the list on the way: no row is in memory twice for long."""
    result = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    end = len(result)
    while parts:
        part = parts.pop()
        result[end - len(part) : end] = part
        end -= len(part)
    return result


def layer_activations(
    model: Any,
    sequences: np.ndarray,
    load_ffn: Callable[[int], HostFFN],
) -> Iterator[tuple[np.ndarray, np.ndarray, HostFFN]]:
    """For each layer in turn: (FFN inputs (N, D), scores (N, F) which are above 0 where a neuron is active, the FFN).

    float32; N = sequences x length, in order.
    The model's layers are consumed: each is dropped after its turn.
    """
    batches = range(0, len(sequences), BATCH_SEQUENCES)
    hidden = [model.embed(mx.array(sequences[i : i + BATCH_SEQUENCES])) for i in batches]  # (B, T, D)
    mx.eval(hidden)
    for index in range(len(model.layers)):
        layer = model.layers[index]
        recorder = _Recorder(load_ffn(index))
        layer.mlp = recorder
        if mx.default_device() == mx.cpu:
            for name, module in list(layer.self_attn.items()):
                if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                    setattr(layer.self_attn, name, HostLinear(module))
        for i in range(len(hidden)):
            hidden[i] = layer(hidden[i], "causal", None)
            mx.eval(hidden[i])
        model.layers[index] = None
        inputs, scores, ffns = recorder.inputs, recorder.scores, [recorder.ffn]
        del layer, recorder
        yield join(inputs), join(scores), ffns.pop()  # not kept while the caller works
