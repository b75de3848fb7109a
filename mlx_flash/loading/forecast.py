"""Forecasts how fast a model will speak within its plan, before its weights are loaded."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from ..flash.disk_rate import disk_rate
from ..flash.reader import Reader
from ..flash.unit_file import UnitFile
from ..source.cached import DISK_RATES
from ..source.resolve import cache_folder
from .in_place_model import InPlaceModel
from .in_place_plan import InPlacePlan, WeightBytes

RATE_LIFE_S = 24 * 3600  # a measured rate is used for so long
TRIALS = 5  # of the products; the median counts


@dataclass(frozen=True)
class Forecast:
    """The expected time of a decoded token.

    bytes_per_token: bytes that a token reads. disk_rate: bytes per second of the disk. compute_s: seconds of the
    products with the weights of layers and experts, which overlap with reading. head_s: seconds of the products outside
    the layers, such as the output head's. They do not overlap, because by then the buffers are full. even: whether the
    bytes assume that a router chooses all experts equally often.
    """

    bytes_per_token: int
    disk_rate: float
    compute_s: float
    head_s: float
    even: bool

    @property
    def read_s(self) -> float:
        return self.bytes_per_token / self.disk_rate

    @property
    def tokens_per_second(self) -> float:
        return 1 / (max(self.read_s, self.compute_s) + self.head_s)

    def describe(self) -> str:
        """One sentence for the user."""
        rate = self.tokens_per_second
        about = f"about {rate:.2g} tokens per second" if rate >= 0.1 else f"about {1 / rate:.0f} seconds per token"
        words = f"every token reads {self.bytes_per_token / 1e9:.3g} GB"
        if self.even:
            words = f"a token reads {self.bytes_per_token / 1e9:.3g} GB if all experts are chosen equally often"
        bound = ", bound by computing" if self.compute_s + self.head_s > self.read_s else ""
        return f"forecast: {words}; this disk reads {self.disk_rate / 1e9:.2g} GB/s: {about}{bound}"


def forecast(mixture: InPlaceModel, plan: InPlacePlan, choices: int, direct: bool, threads: int) -> Forecast | None:
    """The forecast for a plan; None if nothing is read, or if the checkpoint is too small to measure the disk with it.

    choices: number of experts that a token names in a layer. direct: whether reads go past the page cache. threads:
    number of reader threads. It takes up to a second. Raises ReadError.
    """
    slots = plan.expert_slots
    missing = sum(choices * (1 - min(1.0, count / mixture.experts)) for count in slots)
    experts = round(missing * mixture.expert_bytes)
    if not (wanted := plan.layer_bytes_per_token + experts):
        return None
    largest = max(mixture.files, key=lambda file: file.stat().st_size)
    if (rate := _rate_of(largest, direct, threads)) is None:
        return None
    in_layers = sum(tensor.nbytes for layer in mixture.layers for tensor in layer.tensors)
    computed = in_layers + choices * len(slots) * mixture.expert_bytes
    each = _seconds_per_byte(mixture)
    return Forecast(wanted, rate, computed * each, sum(WeightBytes.of(mixture).outside) * each, even=experts > 0)


def _rate_of(path: Path, direct: bool, threads: int) -> float | None:
    """The rate of the disk that a file lies on, in bytes per second, measured now or within the last day."""
    with UnitFile(path, direct) as file:
        key = f"{os.stat(path).st_dev} {'direct' if file.direct else 'buffered'} {threads} threads"
        kept = _kept_rates()
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            rate, measured = map(float, kept[key])
            if 1 <= rate < math.inf and 0 <= time.time() - measured < RATE_LIFE_S:
                return rate
        reader = Reader(threads)
        try:
            measured_rate = disk_rate(file, reader)
        finally:
            reader.close()
    if measured_rate is not None:
        _keep_rates({**kept, key: [round(measured_rate), int(time.time())]})
    return measured_rate


def _kept_rates() -> dict[str, Any]:
    with contextlib.suppress(OSError, UsageError, ValueError, RecursionError):
        path = cache_folder() / DISK_RATES
        kept = json.loads(path.read_text()) if path.is_file() else {}  # a named pipe would wait for ever
        return kept if isinstance(kept, dict) else {}
    return {}


def _keep_rates(rates: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, UsageError):  # no folder to write to: the next forecast measures again
        path = cache_folder() / DISK_RATES
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(rates))
        partial.replace(path)


def _seconds_per_byte(mixture: InPlaceModel) -> float:
    """Seconds that products with one token take for each byte of their matrices, from the matrices of the first layer.

    0 for a layer without a matrix of a kind that is known here.
    """
    found = [module for layer in mixture.layers[:1] for _, module in layer.module.named_modules()]
    modules: list[Any] = [module for module in found if isinstance(module, (nn.Linear, nn.QuantizedLinear))]
    if not modules:
        return 0.0
    held = [{name: array for name, array in module.items() if isinstance(array, mx.array)} for module in modules]
    inputs = [_input_of(module) for module in modules]
    seconds = []
    try:
        for module, arrays in zip(modules, held, strict=True):
            module.update({name: mx.zeros(array.shape, array.dtype) for name, array in arrays.items()})
        mx.eval(inputs, [module.parameters() for module in modules])
        for _ in range(TRIALS):
            started = time.perf_counter()
            mx.eval([module(x) for module, x in zip(modules, inputs, strict=True)])
            seconds.append(time.perf_counter() - started)
    finally:
        for module, arrays in zip(modules, held, strict=True):
            module.update(arrays)
    return statistics.median(seconds) / sum(array.nbytes for arrays in held for array in arrays.values())


def _input_of(module: Any) -> mx.array:
    """One token for a linear module: ones, (1, D)."""
    weight = module["weight"]
    if isinstance(module, nn.QuantizedLinear):
        return mx.ones((1, weight.shape[-1] * 32 // module.bits), mx.float32)
    return mx.ones((1, weight.shape[-1]), weight.dtype)
