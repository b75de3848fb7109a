"""Runs calibration text through a model layer by layer, with one layer's weights in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import CheckpointError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.system import return_freed_memory
from mlx_flash.layers.activations import Activation

from .numpy_matrix import HostLinear, NumpyMatrix, row_pieces

SEQUENCE_TOKENS = 128
BATCH_SEQUENCES = 8  # sequences at once; a layer's weights are converted to float32 once per batch

Choose = Callable[[np.ndarray], np.ndarray]  # x (N, D) -> bool (N, F)


@dataclass
class PredictedPass:
    """A second pass over some sequences, in which each FFN uses only its predicted neurons."""

    hidden: list[mx.array]  # (B, T, D) each; changed in place
    choose: Choose | None = None  # predictor of the current layer, dropped after it; None: all neurons


def calibration_sequences(token_ids: list[int], prefix: list[int], tokens: int, positions: int) -> np.ndarray:
    """Cuts text into sequences that each begin with `prefix` (the tokenizer's opening token).

    Returns int32 (sequences, length): about `tokens` tokens in all, fewer if the text is short; at least one sequence.
    """
    length = min(SEQUENCE_TOKENS, positions)
    body = length - len(prefix)
    count = max(1, min(tokens // length, len(token_ids) // body))
    if len(token_ids) < body:  # A very short text becomes one short sequence.
        return np.array([prefix + token_ids], np.int32)
    step = (len(token_ids) - body) // max(1, count - 1) if count > 1 else 0  # Spread them over the whole text.
    return np.array([prefix + token_ids[i * step : i * step + body] for i in range(count)], np.int32)


@dataclass(frozen=True)
class NumpyFFN:
    """One layer's FFN, computed by NumPy on the host."""

    activation: Activation
    matrices: tuple[NumpyMatrix, ...]  # (F, D) each: up, or gate and up
    up_bias: np.ndarray  # (F,), float32
    down: NumpyMatrix  # (F, D)
    down_bias: np.ndarray  # (D,), float32

    def before(self, x: np.ndarray) -> list[np.ndarray]:
        """The pre-activations of every matrix, (N, F) each. x: (N, D)."""
        products = [matrix.rows_dot(x) for matrix in self.matrices]
        products[-1] += self.up_bias
        return products


class _Recorder:
    """Replaces a layer's FFN: records its inputs, and computes it on the host."""

    def __init__(self, ffn: NumpyFFN) -> None:
        self.ffn = ffn
        self.inputs: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        self.recording = True
        self.choose: Choose | None = None  # chooses the neurons that compute; None: all

    def __call__(self, x: mx.array) -> mx.array:
        flat = to_numpy(x, np.float32).reshape(-1, x.shape[-1])
        before = self.ffn.before(flat)
        if self.recording:
            self.inputs.append(flat)
            self.scores.append(self.ffn.activation.score(*before, xp=np))
        hidden = self.ffn.activation(*before, xp=np)
        del before
        if self.choose is not None:
            hidden *= self.choose(flat)
        y = self.ffn.down.sum_of_rows(hidden) + self.ffn.down_bias  # (N, F) @ (F, D)
        return mx.array(y).reshape(x.shape).astype(x.dtype)


def join(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenates the rows of all parts, (n, C) each. Empties the list meanwhile, so that no row stays twice."""
    result = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    end = len(result)
    while parts:
        part = parts.pop()
        result[end - len(part) : end] = part
        end -= len(part)
    return result


def embed(model: Any, sequences: np.ndarray) -> list[mx.array]:
    """The inputs of the first layer: (B, T, D) for each batch of the sequences (S, T)."""
    batches = range(0, len(sequences), BATCH_SEQUENCES)
    hidden = [model.embed(mx.array(sequences[i : i + BATCH_SEQUENCES])) for i in batches]
    mx.eval(hidden)
    return hidden


def layer_activations(
    model: Any,
    hidden: list[mx.array],
    followings: list[PredictedPass],
    load_ffn: Callable[[int], NumpyFFN],
) -> Iterator[tuple[np.ndarray, np.ndarray, NumpyFFN]]:
    """Yields for each layer (FFN inputs (N, D), scores (N, F), FFN). A score above 0 means that a neuron is active.

    Arrays are float32; N = sequences x length, in order. hidden: the inputs of the first layer (`embed`), changed in
    place. After each layer, the caller may set the `choose` of each PredictedPass before it asks for the next layer.

    The model's layers are consumed: each one is dropped after use. Raises CheckpointError if a layer's output is not
    finite.
    """
    for index in range(len(model.layers)):
        layer = model.layers[index]
        recorder = _Recorder(load_ffn(index))
        layer.mlp = recorder
        if mx.default_device() == mx.cpu:
            for name, module in list(layer.self_attn.items()):
                if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                    layer.self_attn[name] = HostLinear(module)  # Set as an item, so that `name in self_attn` is true.
        _advance(layer, hidden)
        if not all(mx.isfinite(batch).all().item() for batch in hidden):
            raise CheckpointError(
                f"layer {index} gives numbers that are not finite on the calibration text. Does config.json belong to "
                "these weights? Download the checkpoint again, or choose a wider --dtype."
            )
        recorder.recording = False
        yield join(recorder.inputs), join(recorder.scores), recorder.ffn  # No reference to the first two is kept.
        for following in followings:
            recorder.choose, following.choose = following.choose, None
            _advance(layer, following.hidden)
        model.layers[index] = None
        del layer, recorder
        return_freed_memory()


def _advance(layer: Any, hidden: list[mx.array]) -> None:
    for i in range(len(hidden)):
        hidden[i] = layer(hidden[i], "causal", None)
        mx.eval(hidden[i])


def perplexity(model: Any, hidden: mx.array, sequences: np.ndarray) -> float:
    """The perplexity of all tokens except the first of each sequence.

    hidden: (S, T, D), the outputs of the last layer for the sequences (S, T). Logits are computed for a few positions
    at a time. On the CPU, the model's linear layers are replaced by ones that compute in NumPy.
    """
    if mx.default_device() == mx.cpu:
        for _, module in list(model.named_modules()):
            for name, child in list(module.items()):
                if isinstance(child, (nn.Linear, nn.QuantizedLinear)):
                    module[name] = HostLinear(child)
    nats, tokens = 0.0, 0
    for states, sequence in zip(hidden, sequences, strict=True):
        for begin, end in row_pieces((len(sequence) - 1, model.args.vocab_size), 4):
            logits = to_numpy(model.head(states[None, begin:end])[0], np.float32)  # (t, V)
            logits -= logits.max(axis=-1, keepdims=True)
            expected = np.take_along_axis(logits, sequence[begin + 1 : end + 1, None], axis=-1)[:, 0]
            nats += float((np.log(np.exp(logits, out=logits).sum(axis=-1)) - expected).sum())
            tokens += len(expected)
    return math.exp(min(700.0, nats / max(1, tokens)))
