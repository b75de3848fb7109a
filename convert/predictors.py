"""Making predictors from calibration activations, and measuring them. All in NumPy, seeded: same input, same bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.flash.files import ITEM_BYTES, NeuronLayout

from .tensors import write_safetensors

HELD_OUT = 4  # every 4th sequence is not trained on: thresholds and reports come from it
SHADOW_GROUP = 64
SHADOW_PIECE = 32 * SHADOW_GROUP  # neurons that are made coarse at once
EPOCHS = 8
BATCH = 256


@dataclass(frozen=True)
class Sample:
    """What one layer did on calibration text. N tokens, D the width, F neurons; float32."""

    x: np.ndarray  # (N, D): the FFN's inputs
    before: np.ndarray  # (N, F): scores, above 0 where a neuron is active; without a gate its pre-activations
    up: np.ndarray  # (F, D): the projection whose sign decides: the gate if there is one, else up
    up_bias: np.ndarray  # (F,): its bias, less the activation's threshold
    held_out: np.ndarray  # bool (N,): tokens that thresholds and reports come from, and training does not see


@dataclass(frozen=True)
class LayerPredictor:
    """One layer's predictor: arrays to store (the threshold folded into `c`) and what was measured held out."""

    arrays: dict[str, mx.array]
    recall: float
    predicted: float  # share of the neurons that is chosen
    active: float  # share that is truly active


def low_rank_size(width: int) -> int:
    """The paper takes 128 at a width of 4096, and 1024 in the last four layers; this lies between."""
    return max(32, width // 16)


def stored_bytes(layout: NeuronLayout, bits: int) -> int:
    """About what both kinds take for all layers."""
    rank, item = low_rank_size(layout.width), ITEM_BYTES[layout.dtype]
    lowrank = rank * (layout.width + layout.neurons) * item + layout.neurons * 4
    shadow = layout.neurons * layout.width * bits // 8
    shadow += 2 * layout.neurons * layout.width // SHADOW_GROUP * item + layout.neurons * 4
    return layout.layers * (lowrank + shadow)


def lowrank_predictor(sample: Sample, recall: float, seed: int, dtype: mx.Dtype) -> LayerPredictor:
    """The paper's predictor (section 3.1): x A B + c, trained to say which neurons are positive.

    Starts from the best rank-r approximation of the pre-activations on the training part (reduced-rank
    regression by a randomised range finder), then Adam on a logistic loss in which positives and negatives weigh
    the same in total.
    """
    rng = np.random.default_rng(seed)
    up, held_out = sample.up, sample.held_out
    rank = min(low_rank_size(up.shape[1]), *up.shape)
    train_x, train_y = sample.x[~held_out], sample.before[~held_out]
    positive = train_y > 0
    scale = np.float32(3.0) / max(train_y.std(), np.float32(1e-6))  # a spread that a logistic loss can work with
    centred = train_y
    centred -= sample.up_bias
    basis = np.linalg.qr(centred.T @ rng.standard_normal((len(centred), rank + 8), dtype=np.float32))[0]
    for _ in range(2):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    top = np.linalg.svd(centred @ basis, full_matrices=False)[2][:rank]  # (r, r + 8)
    b = np.ascontiguousarray((basis @ top.T).T)  # (r, F), orthonormal rows
    a = (up.T @ b.T) * scale  # (D, r)
    c = sample.up_bias * scale
    a, b, c = _train_logistic(train_x, positive, a, b, c, rng)
    arrays = {name: mx.array(value).astype(dtype) for name, value in (("a", a), ("b", b))}
    a, b = (np.array(arrays[name].astype(mx.float32)) for name in ("a", "b"))
    return _with_threshold(arrays, sample.x[held_out] @ a @ b + c, c, sample, recall)


def _train_logistic(
    x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimises the mean weighted logistic loss of s = x a b + c against y in {0, 1} by Adam."""
    active = max(1e-4, float(y.mean()))
    weight_on, weight_off = np.float32(0.5 / active), np.float32(0.5 / (1 - min(active, 0.9999)))
    parameters = [a, b, c]
    means = [np.zeros_like(p) for p in parameters]
    squares = [np.zeros_like(p) for p in parameters]
    # Steps in proportion to each matrix's own scale.
    rates = [np.float32(2e-3) * max(float(np.abs(p).mean()), 1e-3) * 10 for p in (a, b)] + [np.float32(2e-2)]
    steps = EPOCHS * -(-len(x) // BATCH)
    step = 0
    for _ in range(EPOCHS):
        order = rng.permutation(len(x))
        for begin in range(0, len(x), BATCH):
            rows = order[begin : begin + BATCH]
            batch, wanted = x[rows], y[rows]
            thin = batch @ parameters[0]  # (n, D) @ (D, r)
            score = np.clip(thin @ parameters[1] + parameters[2], -30, 30)
            error = 1 / (1 + np.exp(-score)) - wanted
            error *= np.where(wanted, weight_on, weight_off) / len(error)
            gradients = [batch.T @ (error @ parameters[1].T), thin.T @ error, error.sum(axis=0)]
            step += 1
            decay = np.float32(1 - step / (steps + 1))
            for i, gradient in enumerate(gradients):
                means[i] = np.float32(0.9) * means[i] + np.float32(0.1) * gradient
                squares[i] = np.float32(0.99) * squares[i] + np.float32(0.01) * gradient**2
                mean = means[i] / np.float32(1 - 0.9**step)
                square = squares[i] / np.float32(1 - 0.99**step)
                parameters[i] = parameters[i] - rates[i] * decay * mean / (np.sqrt(square) + np.float32(1e-8))
    return parameters[0], parameters[1], parameters[2]


def shadow_predictor(sample: Sample, recall: float, bits: int, dtype: mx.Dtype) -> LayerPredictor | None:
    """The up projection at `bits` bits; no training. None where the layer does not divide into groups."""
    if len(sample.up) % SHADOW_GROUP:
        return None
    x = sample.x[sample.held_out]
    score = np.empty((len(x), len(sample.up)), np.float32)
    parts = []
    for begin in range(0, len(sample.up), SHADOW_PIECE):  # a piece in memory at a time
        end = begin + SHADOW_PIECE
        transposed = mx.array(np.ascontiguousarray(sample.up[begin:end].T)).astype(dtype)  # (D, f)
        parts.append(mx.quantize(transposed, group_size=SHADOW_GROUP, bits=bits))
        coarse = mx.dequantize(*parts[-1], group_size=SHADOW_GROUP, bits=bits)
        score[:, begin:end] = x @ np.array(coarse.astype(mx.float32))
    score += sample.up_bias
    joined = [mx.concatenate(list(arrays), axis=1) for arrays in zip(*parts, strict=True)]
    arrays = dict(zip(("weight", "scales", "biases"), joined, strict=True))
    return _with_threshold(arrays, score, sample.up_bias, sample, recall)


def _with_threshold(
    arrays: dict[str, mx.array], score: np.ndarray, c: np.ndarray, sample: Sample, recall: float
) -> LayerPredictor:
    """Folds into c the threshold that catches `recall` of the active neurons held out; measures what it chooses.

    score: (n, F) for the held-out tokens; c: (F,).
    """
    active = sample.before[sample.held_out] > 0
    half = len(active) // 2  # the threshold comes from one half, what is reported of it from the other
    positives = score[:half][active[:half]]
    threshold = np.float32(np.quantile(positives, 1 - recall)) if len(positives) else np.float32(0)
    score, active = score[half:], active[half:]
    chosen = score > threshold
    arrays = {**arrays, "c": mx.array((c - threshold).astype(np.float32))}
    return LayerPredictor(
        arrays,
        recall=float((chosen & active).sum() / max(1, active.sum())),
        predicted=float(chosen.mean()),
        active=float(active.mean()),
    )


def write_layer(path: Path, predictor: LayerPredictor) -> None:
    measured = {name: getattr(predictor, name) for name in ("recall", "predicted", "active")}
    tensors = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in predictor.arrays.items()]
    write_safetensors(path, tensors, metadata={"measured": json.dumps(measured)})


def read_layer(path: Path) -> tuple[dict[str, mx.array], dict[str, float]] | None:
    """Its arrays, not yet read, and what was measured; None if there is no such file, or no whole one."""
    if not path.exists():
        return None
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        return arrays, json.loads(metadata["measured"])
    except (RuntimeError, KeyError, ValueError):
        return None


def load_array(path: Path, name: str) -> mx.array:
    arrays: Any = mx.load(str(path))
    return arrays[name]
