"""Running calibration text through a model layer by layer, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

SEQUENCE_TOKENS = 128


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


class _Recorder:
    """Stands where the FFN stood: keeps its input, computes it on the host.

    NumPy's own BLAS is some 30 times faster at this than the one of MLX's Linux wheel, and on any machine
    these weights are used once only.
    """

    def __init__(self, up: np.ndarray, up_bias: np.ndarray, down: np.ndarray, down_bias: np.ndarray) -> None:
        self.up, self.up_bias, self.down, self.down_bias = up, up_bias, down, down_bias
        self.inputs: list[np.ndarray] = []
        self.activations: list[np.ndarray] = []

    def __call__(self, x: mx.array) -> mx.array:
        flat = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        before = flat @ self.up.T + self.up_bias  # (N, D) @ (D, F)
        self.inputs.append(flat)
        self.activations.append(before)
        y = np.maximum(before, 0) @ self.down + self.down_bias
        return mx.array(y).reshape(x.shape).astype(x.dtype)


class _HostLinear:
    """A linear layer on the host, for the same reason."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = np.array(linear.weight.astype(mx.float32))
        self.bias = np.array(linear.bias.astype(mx.float32)) if "bias" in linear else np.float32(0)

    def __call__(self, x: mx.array) -> mx.array:
        flat = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        return mx.array(flat @ self.weight.T + self.bias).reshape(*x.shape[:-1], -1).astype(x.dtype)


def layer_activations(
    model: Any,
    sequences: np.ndarray,
    load_ffn: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each layer in turn: (FFN inputs (N, D), pre-activations (N, F), up projection (F, D)), float32.

    N = sequences x length, in order. load_ffn(layer) -> up (F, D), up bias (F,), down (F, D), down bias (D,).
    The model's layers are consumed: each is dropped after its turn.
    """
    hidden = [model.embed(mx.array(s[None])) for s in sequences]
    mx.eval(hidden)
    for index in range(len(model.layers)):
        layer = model.layers[index]
        up, up_bias, down, down_bias = load_ffn(index)
        recorder = _Recorder(up, up_bias, down, down_bias)
        layer.mlp = recorder
        if mx.default_device() == mx.cpu:
            for name, module in list(layer.self_attn.items()):
                if isinstance(module, nn.Linear):
                    setattr(layer.self_attn, name, _HostLinear(module))
        for i in range(len(hidden)):
            hidden[i] = layer(hidden[i], "causal", None)
            mx.eval(hidden[i])
        inputs, activations = np.concatenate(recorder.inputs), np.concatenate(recorder.activations)
        model.layers[index] = None
        del layer, recorder, up_bias, down, down_bias  # not kept while the caller works
        yield inputs, activations, up
