"""Makes and measures predictors from calibration activations. NumPy, seeded: the same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.errors import UsageError
from mlx_flash.flash.files import ITEM_BYTES, NeuronLayout
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.stored_tensors import StoredTensors

from . import lowrank
from .sample import Sample
from .tensors import write_safetensors

HELD_OUT = 4  # Every 4th sequence is held out; thresholds and reports come from it.
SHADOW_GROUP = 64
SHADOW_PIECE = 32 * SHADOW_GROUP  # neurons that are quantised at once
LOWRANK_SHARE = 0.1  # share of the FFN's bytes, about the size of the shadow (bench/results/predictors.md)
RECALLS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)  # targets in every table


def lowrank_memory(layout: NeuronLayout, wanted: int | None) -> int:
    """Memory in bytes for the low-rank predictors of all layers.

    wanted: the user's limit in bytes; None: a share of the FFN's size before quantisation. Raises UsageError if even
    the smallest rank does not fit.
    """
    least = layout.layers * lowrank.LEAST_RANK * (layout.neurons + layout.width) * ITEM_BYTES[layout.dtype]
    if wanted is None:
        numbers = layout.layers * layout.neurons * layout.width * len(layout.parts)
        return max(least, int(LOWRANK_SHARE * numbers * ITEM_BYTES[layout.dtype]))
    if wanted < least:
        raise UsageError(
            f"the memory for low-rank predictors is {wanted / 1e6:.3f} MB; this model needs at least "
            f"{-(-least // 1000)}KB, a rank of {lowrank.LEAST_RANK} in each layer. Raise --predictor-memory."
        )
    return wanted


def shadow_bytes(layout: NeuronLayout, bits: int) -> int:
    """The approximate size in bytes of the shadows of all layers."""
    scales = 2 * layout.neurons * layout.width // SHADOW_GROUP * ITEM_BYTES[layout.dtype]
    return layout.layers * (layout.neurons * layout.width * bits // 8 + scales + layout.neurons * 4)


@dataclass(frozen=True)
class LayerPredictor:
    """One layer's predictor: the arrays to store (with the threshold in `c`), and its held-out measurements."""

    arrays: dict[str, mx.array]
    recall: float
    predicted: float  # share of the neurons that it chooses
    active: float  # share of the neurons that are active
    rank: int | None  # None for a kind without a rank
    table: dict[str, list[float]]  # threshold, caught, predicted: one number for each of `recalls`


def make_lowrank(sample: Sample, recall: float, memory_bytes: int, seed: int, dtype: mx.Dtype) -> LayerPredictor:
    """The paper's predictor (section 3.1), with the rank that this layer needs and `memory_bytes` allow."""
    largest = lowrank.largest_rank(memory_bytes, sum(sample.up.shape) * dtype.size)
    a, b, c = lowrank.fit(sample, recall, largest, seed)
    arrays = {"a": mx.array(a).astype(dtype), "b": mx.array(b).astype(dtype), "c": mx.array(c)}
    return with_thresholds(arrays, sample, recall)


def make_shadow(sample: Sample, recall: float, bits: int, dtype: mx.Dtype) -> LayerPredictor:
    """The up projection in `bits` bits, without training. F must be a multiple of SHADOW_GROUP."""
    parts = []
    for begin in range(0, sample.up.shape[0], SHADOW_PIECE):  # one piece in memory at a time
        transposed = mx.array(sample.up.rows(begin, begin + SHADOW_PIECE).T.copy())  # (D, f)
        parts.append(mx.quantize(transposed.astype(dtype), group_size=SHADOW_GROUP, bits=bits))
        mx.eval(parts[-1])
    joined = [mx.concatenate(list(arrays), axis=1) for arrays in zip(*parts, strict=True)]
    arrays = dict(zip(("weight", "scales", "biases"), joined, strict=True))
    return with_thresholds({**arrays, "c": mx.array(sample.up_bias)}, sample, recall)


def make_imported(arrays: dict[str, np.ndarray], sample: Sample, recall: float, dtype: mx.Dtype) -> LayerPredictor:
    """A published predictor, from `imported.map_layer`, with thresholds from our calibration text."""
    stored = {name: mx.array(value).astype(dtype) for name, value in arrays.items()}
    return with_thresholds({**stored, "c": mx.zeros((sample.up.shape[0],))}, sample, recall)


def score(arrays: dict[str, mx.array], x: np.ndarray) -> np.ndarray:
    """The scores of a stored predictor of any kind, computed on the host. Above 0, a neuron is chosen.

    x: (N, D) -> (N, F), float32.
    """
    if "weight" in arrays:
        packed, scales, biases = (arrays[name] for name in ("weight", "scales", "biases"))
        bits = 32 * packed.shape[1] // (SHADOW_GROUP * scales.shape[1])
        result = np.empty((len(x), len(arrays["c"])), np.float32)
        for begin in range(0, result.shape[1], SHADOW_PIECE):  # one piece in memory at a time
            end = begin + SHADOW_PIECE
            groups = slice(begin // SHADOW_GROUP, end // SHADOW_GROUP)
            words = packed[:, begin * bits // 32 : end * bits // 32]
            coarse = mx.dequantize(
                words, scales[:, groups], biases[:, groups], group_size=SHADOW_GROUP, bits=bits
            )  # (D, f)
            result[:, begin:end] = x @ _host(coarse)
        return result + _host(arrays["c"])
    thin = x @ _host(arrays["a"])  # (N, D) @ (D, r)
    if "h" in arrays:
        thin = np.maximum(thin + _host(arrays["h"]), 0)
    return thin @ _host(arrays["b"]) + _host(arrays["c"])


def chosen(arrays: dict[str, mx.array], x: np.ndarray) -> np.ndarray:
    """The neurons that a stored predictor chooses. x: (N, D) -> bool (N, F)."""
    return score(arrays, x) > 0


def _host(array: mx.array) -> np.ndarray:
    return to_numpy(array, np.float32, copy=False)


def held_out_tokens(sequences: int, length: int) -> np.ndarray:
    """The mask of held-out tokens, bool (sequences x length): whole sequences, or the second half of a short text."""
    held_out = np.repeat(np.arange(sequences) % HELD_OUT == HELD_OUT - 1, length)
    if not held_out.any():  # There are too few sequences to hold one out.
        held_out[len(held_out) // 2 :] = True
    return held_out


def with_thresholds(arrays: dict[str, mx.array], sample: Sample, recall: float) -> LayerPredictor:
    """Adds thresholds to a predictor and measures it on the held-out tokens.

    The threshold that finds the share `recall` of the active neurons is subtracted from `c`. The table has thresholds
    for other recalls as well, as differences from that one.
    """
    active = sample.before[sample.held_out] > 0
    scores = score(arrays, sample.x[sample.held_out])
    half = len(active) // 2  # Thresholds come from the first half, measurements from the second.
    targets = recalls(recall)
    positives = scores[:half][active[:half]]
    thresholds = np.zeros(len(targets), np.float32)
    if len(positives):
        thresholds = np.quantile(positives, [1 - target for target in targets]).astype(np.float32)
    here = targets.index(recall)
    scores, active = scores[half:], active[half:]
    masks = [scores > threshold for threshold in thresholds]
    caught = [float((mask & active).sum() / max(1, active.sum())) for mask in masks]
    predicted = [float(mask.mean()) for mask in masks]
    arrays = {**arrays, "c": arrays["c"] - mx.array(thresholds[here])}
    return LayerPredictor(
        arrays,
        recall=caught[here],
        predicted=predicted[here],
        active=float(active.mean()),
        rank=arrays["a"].shape[1] if "a" in arrays else None,
        table={
            "threshold": [float(threshold - thresholds[here]) for threshold in thresholds],
            "caught": caught,
            "predicted": predicted,
        },
    )


def recalls(target: float) -> list[float]:
    """The targets of a table, ascending, including the predictor's own target."""
    return sorted({*RECALLS, target})


def write_layer(path: Path, predictor: LayerPredictor, written: Callable[[dict[str, int]], None]) -> None:
    """Writes a predictor to a file. written: called with the checksums before the file is renamed to `path`."""
    measured = {name: getattr(predictor, name) for name in ("recall", "predicted", "active", "rank", "table")}
    tensors = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in predictor.arrays.items()]
    write_safetensors(path, tensors, metadata={"measured": json.dumps(measured)}, written=written)


def measured_of(tensors: StoredTensors) -> dict[str, Any]:
    """The measurements that `write_layer` stored with the predictor."""
    result: dict[str, Any] = json.loads(json.loads(tensors.header[8:])["__metadata__"]["measured"])
    return result
