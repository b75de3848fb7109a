"""The host's share of a token: models that compute next to nothing, beside twins with everything in memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_flash.flash.reader import Reader
from mlx_flash.flash.slot_cache import NO_SLOTS, EventLog

from .synthetic.tiny_models import LAYERS, Twins, tiny_mixture, tiny_neurons
from .tools.evaluations import counted
from .tools.figures import table
from .tools.report import environment
from .tools.self_times import SelfTimes

TOKENS = 2  # different ones, in turn: half the slots hold the units of both
WARM_UP = 6  # rounds of them that are not measured
COUNTED = 2  # rounds that evaluations are counted in
STEPS_SHARE = 4  # one of so many pairs' tokens is decoded again, to divide its time into steps
MISSES = 0.1
CONFIDENCE = 0.95
READ_BACK, EVALUATE, BOOK, SUBMIT, WAIT, GRAPH, REST = (
    "read-back",
    "other evaluations",
    "book-keeping",
    "submission",
    "wait for reads",
    "graph of the layer",
    "rest of the graph",
)
STEPS = (READ_BACK, EVALUATE, BOOK, SUBMIT, WAIT, GRAPH, REST)


@dataclass(frozen=True)
class Condition:
    """What a measurement is made in. slots: share of the units that have one; None for all, filled beforehand.

    misses: share of a token's units that have lost their slot when it begins. overlap: see `InFlightReads`.
    """

    text: str
    slots: float | None
    misses: float = 0.0
    overlap: bool = True


HITS = Condition("all hits, half the slots", 0.5)
RESIDENT = Condition("all resident", None)
CONDITIONS = {
    "mixture": (
        HITS,
        Condition("10 % misses, overlapped", 0.5, MISSES),
        Condition("10 % misses, one pass", 0.5, MISSES, overlap=False),
        RESIDENT,
    ),
    "neurons": (HITS, Condition("10 % misses", 0.5, MISSES), RESIDENT),
}


def measure(pairs: int, layers: int = LAYERS) -> dict[str, Any]:
    """Rows of both kinds of model in every condition. pairs: tokens that each model decodes in a condition."""
    result: dict[str, Any] = {"command": "host", "tiny": True, "layers": layers, "pairs": pairs, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        result["environment"] = environment(Path(folder))
        for kind, conditions in CONDITIONS.items():
            for condition in conditions:
                twins = _open(kind, Path(folder) / kind, layers, condition)
                try:
                    row = {"model": kind, "condition": condition.text, **_row(twins, condition, pairs)}
                finally:
                    twins.close()
                result["rows"].append(row)
    return result


def _open(kind: str, folder: Path, layers: int, condition: Condition) -> Twins:
    if kind == "neurons":
        return tiny_neurons(folder, layers, condition.slots)
    from .synthetic.tiny_models import MIXTURE

    return tiny_mixture(folder, layers, None if condition.slots is None else round(condition.slots * MIXTURE.experts))


def _row(twins: Twins, condition: Condition, pairs: int) -> dict[str, Any]:
    twins.shared.overlap = condition.overlap
    run = _Run(twins, condition.misses)
    run.warm_up()
    before = twins.shared.counters.copy()
    ours, theirs = run.pairs(pairs)
    used = twins.shared.counters - before
    layers = len(twins.layers)
    with counted(twins.shared.reader) as counts:
        for token in run.tokens * COUNTED:
            run.decode(twins.model, token, run.prepare)
    calls = COUNTED * TOKENS * layers
    steps = run.steps(max(TOKENS, pairs // STEPS_SHARE))
    ratios, processor_ratios = (ours / theirs).T.tolist()
    return {
        "ours_ms": 1e3 * median(ours[:, 0].tolist()),
        "twin_ms": 1e3 * median(theirs[:, 0].tolist()),
        "ratio": median(ratios),
        "processor_ratio": median(processor_ratios),
        "interval": median_interval(ratios),
        "hits": used.hits / max(1, used.hits + used.misses) if used.hits + used.misses else 1.0,
        # The model's logits are evaluated once a token, in the twin as well.
        "waits_per_layer": (counts.waits - COUNTED * TOKENS) / calls,
        "begun_per_layer": counts.begun / calls,
        "c_calls_per_layer": counts.c_calls / calls,
        "us_per_layer": {step: 1e6 * seconds / layers for step, seconds in steps.items()},
    }


class _Run:
    """Decodes the tokens with a model and its twin, in one context each."""

    def __init__(self, twins: Twins, misses: float) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.twins, self.misses = twins, misses
        self.rng = np.random.default_rng(1)
        self.tokens: list[int] = np.random.default_rng(0).integers(4, 4000, TOKENS).tolist()
        self.caches = {id(model): make_prompt_cache(model) for model in (twins.model, twins.twin)}
        self.needed: dict[int, list[np.ndarray]] = {}  # the units of each layer that a token needed

    def decode(self, model: Any, token: int, prepare: Callable[[int], None] | None = None) -> tuple[float, float]:
        """Seconds of one token, always at the same position: by the clock, and of all processors. prepare: called
        before, untimed."""
        if prepare is not None:
            prepare(token)
        cache = self.caches[id(model)]
        began, busy = time.perf_counter(), time.process_time()
        mx.eval(model(mx.array([[token]]), cache=cache))
        took = time.perf_counter() - began, time.process_time() - busy
        for each in cache:
            each.trim(1)
        return took

    def warm_up(self) -> None:
        for model in (self.twins.model, self.twins.twin):
            mx.eval(model(mx.array([self.tokens]), cache=self.caches[id(model)]))
        books = [layer.units.cache for layer in self.twins.layers]
        for token in self.tokens * WARM_UP:
            for book in books:
                book.event_log = EventLog()
            self.decode(self.twins.model, token)
            self.decode(self.twins.twin, token)
            logs = [book.event_log.used for book in books]
            self.needed[token] = [used[-1] if used else NO_SLOTS for used in logs]  # none if nothing is looked up
        for book in books:
            book.event_log = None

    def prepare(self, token: int) -> None:
        """Empties the slots of some of the units that a token needs."""
        for layer, needed in zip(self.twins.layers, self.needed[token], strict=True):
            book = layer.units.cache
            lost = needed[self.rng.random(len(needed)) < self.misses]
            slots = book.slot_of[lost]
            lost, slots = lost[slots >= 0], slots[slots >= 0]
            book.unit_of[slots] = book.slot_of[lost] = -1
            book.resident -= len(lost)

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of `count` tokens, of the model and of its twin, who take turns in going first: by the clock, and of
        all processors."""
        ours, theirs = np.empty((count, 2)), np.empty((count, 2))
        for turn in range(count):
            token = self.tokens[turn % TOKENS]
            for first in (turn % 2 == 0, turn % 2 == 1):
                if first:
                    ours[turn] = self.decode(self.twins.model, token, self.prepare)
                else:
                    theirs[turn] = self.decode(self.twins.twin, token)
        return ours, theirs

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of each step in a token, means of `count` tokens. The timers themselves take some of them."""
        times = SelfTimes()
        with timed(self.twins, times):
            for turn in range(count):
                token = self.tokens[turn % TOKENS]
                self.prepare(token)
                with times.span(REST):
                    self.decode(self.twins.model, token)
        return {step: times.seconds[step] / count for step in STEPS}


@contextmanager
def timed(twins: Twins, times: SelfTimes) -> Iterator[None]:
    """Charges the steps of the streamed layers to `times`."""
    from mlx_flash.layers import experts, neurons

    units, layer = type(twins.layers[0].units), type(twins.layers[0])
    module = experts if hasattr(experts, layer.__name__) else neurons
    with ExitStack() as patches:
        for owner, name, step in (
            (mx, "eval", EVALUATE),
            (mx, "async_eval", EVALUATE),
            (module, "to_numpy", READ_BACK),
            (Reader, "submit", SUBMIT),
            (Reader, "wait", WAIT),
            (layer, "__call__", GRAPH),
        ):
            patches.enter_context(patch.object(owner, name, times.function(getattr(owner, name), step)))
        patches.enter_context(patch.object(units, "use", times.generator(units.use, BOOK)))
        if hasattr(units, "look_up"):
            patches.enter_context(patch.object(units, "look_up", times.function(units.look_up, BOOK)))
        yield


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of the median, from the order of the values alone."""
    ordered, count = sorted(values), len(values)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * count**0.5 / 2
    low, high = int(max(0, np.floor(count / 2 - reach))), int(min(count - 1, np.ceil(count / 2 + reach)))
    return ordered[low], ordered[high]


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['layers']} layers that compute next to nothing; ms per token, medians of {result['pairs']} pairs; "
        f"the ratio's median, with its {CONFIDENCE:.0%} interval; CPU: the ratio of processor time\n"
    )
    head = ["model", "condition", "ours", "twin", "ratio", "interval", "CPU", "hits", "waits", "begun", "C calls"]
    rows = []
    for row in result["rows"]:
        low, high = row["interval"]
        cells = [f"{row['ours_ms']:.1f}", f"{row['twin_ms']:.1f}", f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}"]
        cells += [f"{row['processor_ratio']:.3f}", f"{row['hits']:.1%}"]
        cells += [f"{row[f'{name}_per_layer']:.2f}" for name in ("waits", "begun", "c_calls")]
        rows.append([row["model"], row["condition"], *cells])
    table(head, rows)
    print("\nmicroseconds per layer; the evaluation of the logits is among the other evaluations")
    table(
        ["model", "condition", *STEPS],
        [
            [row["model"], row["condition"], *(f"{row['us_per_layer'][step]:.0f}" for step in STEPS)]
            for row in result["rows"]
        ],
    )
    print(json.dumps(result))
