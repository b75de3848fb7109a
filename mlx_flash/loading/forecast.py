"""Forecasts how fast a model will speak within its plan, before its weights are loaded.

Three things are measured: how fast the disk gives what tokens read, how long the zoo's code computes without reading,
and how well both run side by side. The rest follows from the order in which a token does them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FlashError
from ..flash.disk_rate import ReadTrial
from ..flash.layer_ring import BUFFERS
from ..flash.reader import Reader
from .in_place_model import InPlaceModel
from .in_place_plan import InPlacePlan
from .kept_rates import Rate, keep_rate, kept_rates
from .layer_trial import TokenSeconds, token_seconds
from .layer_weights import LayerWeights, spread
from .options import LoadOptions
from .resident_weights import open_files

BATCHES = 64  # of experts, drawn to measure the disk with


@dataclass(frozen=True)
class Forecast:
    """The expected time of a decoded token.

    bytes_per_token: bytes that a token reads. read_s, compute_s: seconds of its reads and of its computation, each
    alone. token_s: seconds of the token, in which they overlap. even: whether the bytes assume that a router chooses
    all experts equally often.
    """

    bytes_per_token: int
    read_s: float
    compute_s: float
    token_s: float
    even: bool

    @property
    def disk_rate(self) -> float:
        """Bytes per second."""
        return self.bytes_per_token / self.read_s

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.token_s

    def describe(self) -> str:
        """One sentence for the user."""
        rate = self.tokens_per_second
        about = f"about {rate:.2g} tokens per second" if rate >= 0.1 else f"about {1 / rate:.0f} seconds per token"
        words = f"every token reads {self.bytes_per_token / 1e9:.3g} GB"
        if self.even:
            words = f"a token reads {self.bytes_per_token / 1e9:.3g} GB if all experts are chosen equally often"
        bound = ", bound by computing" if self.compute_s > self.read_s else ""
        return f"forecast: {words}; this disk reads {self.disk_rate / 1e9:.2g} GB/s: {about}{bound}"


def forecast(mixture: InPlaceModel, plan: InPlacePlan, choices: int, options: LoadOptions) -> Forecast | None:
    """The forecast for a plan; None if nothing is read, or if the model cannot be tried without its weights.

    choices: number of experts that a token names in a layer. It takes a second or two, and no more memory than the
    plan. Raises ReadError.
    """
    missing = [choices * (1 - min(1.0, count / mixture.experts)) for count in plan.expert_slots]
    of_experts = round(sum(missing) * mixture.expert_bytes)
    layers = [layer for _, layer in spread(mixture.layers, plan.pinned)] if plan.layer_bytes_per_token else []
    if not of_experts and not layers:
        return None
    batches = [np.concatenate([tensor.segments for tensor in layer.tensors]) for layer in layers]
    rates: list[Rate] = []

    def beside(compute: Callable[[], object]) -> None:
        if batches:
            rates.append(disk.rate("layers", batches, BUFFERS, compute))

    with contextlib.closing(_Disk(mixture, options)) as disk:
        try:
            computing = token_seconds(mixture, min([choices, *plan.expert_slots]), beside)
        except FlashError:
            raise
        except Exception:  # whatever a model raises that is called in another way than it expects
            return None
        reads = [int(batch[:, 2].sum()) / rates[0].bytes_per_second for batch in batches]
        exposed = rates[0].exposed if rates else 1.0
        token_s = _overlapped_s(_computed_between(layers, computing), reads, exposed)
        if of_experts:
            at_once = max(min(each, count) for each, count in zip(missing, plan.expert_slots, strict=True))
            rate = disk.rate(f"{round(at_once)} experts", _batches_of_experts(mixture, at_once), 1)
            reads.append(of_experts / rate.bytes_per_second)
            token_s += reads[-1]  # A layer's experts are known when it needs them, so nothing computes meanwhile.
    nbytes = plan.layer_bytes_per_token + of_experts
    return Forecast(nbytes, sum(reads), computing.total, token_s, even=of_experts > 0)


def _overlapped_s(computed: Sequence[float], reads: Sequence[float], exposed: float) -> float:
    """The seconds of a token that computes while layers are read.

    computed: seconds between two waits for a layer, that layer's own included. reads: seconds of those layers' reads;
    none if no layer is read. exposed: see `ReadTrial.exposed_share`.

    With two buffers, a layer's read begins when the last but one has computed. So a layer computes while the next one
    is read, and the two after them begin when both have ended. The longer one counts, and of the shorter one that share
    which does not run beside it.
    """
    if not reads:
        return sum(computed)
    pairs = zip(computed, [*reads[1:], reads[0]], strict=True)
    return sum(max(here, read) + exposed * min(here, read) for here, read in pairs)


def _computed_between(layers: Sequence[LayerWeights], computing: TokenSeconds) -> list[float]:
    """A token's seconds from one wait for a layer to the next, see `_overlapped_s`. layers: those that are read."""
    number_of = {id(layer.module): number for number, layer in enumerate(layers)}
    computed = [0.0] * max(1, len(layers))
    now = 0
    for module, seconds in computing.layers:
        computed[now] += seconds
        now = (number_of.get(id(module), now - 1) + 1) % len(computed)
    computed[now] += computing.outside  # like the layers before the first wait of the next token
    return computed


def _batches_of_experts(mixture: InPlaceModel, at_once: float) -> list[np.ndarray]:
    """What a layer reads at once, for layers and experts drawn at random. at_once: experts that it reads so."""
    random = np.random.default_rng(0)
    layers = list(mixture.switches.values())
    batches = []
    for _ in range(BATCHES):
        tensors = [tensor for tensor in layers[random.integers(len(layers))].values() if not tensor.is_table]
        count = len(tensors[0].offsets)
        chosen = random.choice(count, min(count, max(1, round(at_once))), replace=False)
        parts = [(t.file_of[chosen], t.offsets[chosen], np.full(len(chosen), t.nbytes)) for t in tensors]
        batches.append(np.concatenate([np.stack(part, axis=1) for part in parts]).astype(np.int64))
    return batches


class _Disk:
    """Measures how fast a checkpoint's units are read, or remembers what was measured within the last day."""

    def __init__(self, mixture: InPlaceModel, options: LoadOptions) -> None:
        self._files = open_files(mixture.files, options.io == "direct")
        self._reader = Reader(options.threads)
        state, way = os.stat(mixture.files[0]), "direct" if self._files[0].direct else "buffered"
        self._name = f"{state.st_dev}-{state.st_ino}-{state.st_size}, {way}, {options.threads} threads"

    def rate(
        self,
        kind: str,
        batches: Sequence[np.ndarray],
        in_flight: int,
        compute: Callable[[], object] | None = None,
    ) -> Rate:
        """kind: of the units. batches, in_flight: see `ReadTrial`. compute: what runs beside the reads; None for
        nothing. Raises ReadError."""
        name = f"{kind} of {self._name}"
        if (rate := kept_rates().get(name)) is None:
            trial = ReadTrial(self._files, self._reader, batches)
            measured = trial.rate(in_flight)
            rate = Rate(measured, 1.0 if compute is None else trial.exposed_share(measured, compute))
            keep_rate(name, rate)
        return rate

    def close(self) -> None:
        self._reader.close()
        for file in self._files:
            file.close()
