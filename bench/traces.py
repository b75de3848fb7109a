"""Records the neurons that a model chooses, and those that are truly active, for every token of a text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import CONTEXT, PREDICTORS, PREFILL_TOKENS
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.layers.predictors import Predictor

from .compare import mixture_folder
from .tools.report import add_output_argument, environment
from .tools.texts import read_text

LEAST_TOKENS = 16  # a shorter trace is meaningless


@dataclass
class LayerTrace:
    """One layer's history. Both masks have a row for every token and are packed by `np.packbits`."""

    layer: int
    neurons: int
    neurons_per_block: int
    chosen_rows: list[np.ndarray] = field(default_factory=list)
    active_rows: list[np.ndarray] = field(default_factory=list)

    @property
    def chosen(self) -> np.ndarray:
        """bool (tokens, neurons): the predictor's choice."""
        return unpacked(self.chosen_rows, self.neurons)

    @property
    def active(self) -> np.ndarray:
        """bool (tokens, neurons): the neurons above zero before the ReLU."""
        return unpacked(self.active_rows, self.neurons)


class PredictorTap:
    """Wraps a predictor and records its choice and, if there is a `truth`, the choice of that."""

    def __init__(self, inner: Predictor, truth: Predictor | None, trace: LayerTrace) -> None:
        self.inner, self.truth, self.trace = inner, truth, trace

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        chosen, activations = self.inner(x)
        self.trace.chosen_rows.append(packed(chosen))
        if self.truth is not None:
            self.trace.active_rows.append(packed(self.truth(x)[0]))
        return chosen, activations


def packed(mask: mx.array) -> np.ndarray:
    """bool (n, F) -> uint8 (n, ceil(F / 8))"""
    return np.packbits(to_numpy(mask, copy=False), axis=1)


def unpacked(rows: list[np.ndarray], neurons: int) -> np.ndarray:
    """Inverse of `packed` over several calls -> bool (tokens, neurons)"""
    return np.unpackbits(np.concatenate(rows), axis=1, count=neurons).view(bool)


def by_block(mask: np.ndarray, neurons_per_block: int) -> np.ndarray:
    """The blocks that the engine reads for a choice of neurons. bool (tokens, neurons) -> bool (tokens, blocks)"""
    if neurons_per_block == 1:
        return mask
    return np.logical_or.reduceat(mask, np.arange(0, mask.shape[1], neurons_per_block), axis=1)


def record(model: Any, ids: list[int], prefix: list[int], name: str, active: bool = True) -> list[LayerTrace]:
    """Decodes `ids` and returns a trace of every layer that has a predictor. Switches the model's look-ahead off.

    active: whether to record the truly active neurons, which loads every layer's first projection into memory.
    """
    if is_mixture(model):
        raise UsageError(
            "this command measures neurons, and the model is a mixture of experts. Use `eviction` or `lookahead`."
        )
    model.flash.fix_look_ahead(False)  # the taps would record guesses as choices
    layout = model.flash.manifest.layout
    taps = {}
    for index, layer in enumerate(model.layers):
        mlp = layer.mlp
        if mlp.predictor is None:
            continue
        truth = mlp.exact_predictor(mx.float32) if active else None
        taps[index] = PredictorTap(mlp.predictor, truth, LayerTrace(index, layout.neurons, layout.neurons_per_block))
        mlp.predictor = taps[index]
    if not taps:
        raise UsageError("no layer of this model has a predictor, so there is nothing to trace.")
    try:
        decode(model, ids, prefix, name)
    finally:
        for index, tap in taps.items():
            model.layers[index].mlp.predictor = tap.inner
    return [tap.trace for tap in taps.values()]


def is_mixture(model: Any) -> bool:
    """Whether the model streams experts, which come from its original checkpoint."""
    return model.flash.manifest is None


def decode(model: Any, ids: list[int], prefix: list[int], name: str) -> None:
    """Runs the model over `ids` on the decode path, in windows of the planned context that begin with `prefix`.

    A call has as many tokens as the decode path takes at once. For a mixture of experts it has a whole prompt chunk,
    because the router chooses for every token alone.
    """
    from mlx_lm.models.cache import make_prompt_cache

    step = PREFILL_TOKENS if is_mixture(model) else model.flash.manifest.decode_tokens
    body = model.flash.plan.context - len(prefix)
    with tqdm(total=len(ids), desc=name, unit="token", dynamic_ncols=True) as bar:
        for begin in range(0, len(ids), body):
            here = ids[begin : begin + body]
            given = np.array([*prefix, *here], np.int32)
            cache = make_prompt_cache(model)
            for at in range(0, len(given), step):
                mx.eval(model(mx.array(given[at : at + step])[None], cache=cache))
            bar.update(len(here))


# -- shared by the commands ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, tokens: int = 8000) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text that the model was not trained on")
    parser.add_argument(
        "--tokens",
        type=whole_number(LEAST_TOKENS, 10**9),
        default=tokens,
        help="decode only the first N tokens (default: %(default)s)",
    )
    kinds = [kind for kind in PREDICTORS if kind != "none"]
    parser.add_argument(
        "--predictor",
        choices=kinds,
        default="auto",
        help="predictor that chooses the neurons (default: the store's own)",
    )
    add_output_argument(parser)


@dataclass(frozen=True)
class TracedModel:
    """A loaded model with the tokens of the text and of the calibration text."""

    model: Any
    store: Path
    ids: list[int]
    calibration_ids: list[int]
    prefix: list[int]


def head_of(traced: TracedModel, text: Path) -> dict[str, Any]:
    """The first fields of the result of every command on traces."""
    return {
        "environment": environment(traced.store),
        "text": text.name,
        "tokens": len(traced.ids),
        "predictor": traced.model.flash.predictor,
    }


@contextmanager
def opened(arguments: argparse.Namespace, say: Callable[[str], None] = lambda _: None) -> Iterator[TracedModel]:
    """Yields the model and the texts that the arguments name. Reads the text before it loads the model."""
    from mlx_flash.loading.load import load
    from mlx_flash.source.resolve import find_store

    text = read_text(arguments.text)
    store = mixture_folder(arguments.model) or find_store(arguments.model, say)
    model, tokenizer = load(store, predictor=arguments.predictor, context=CONTEXT)
    try:
        calibration = files("mlx_flash.convert").joinpath("calibration.txt").read_text(encoding="utf-8")
        ids, calibration_ids = (
            list(tokenizer.encode(each, add_special_tokens=False, verbose=False))[: arguments.tokens]
            for each in (text, calibration)
        )
        if len(ids) < LEAST_TOKENS:
            raise UsageError(f"--text {arguments.text} has {len(ids)} tokens, expected {LEAST_TOKENS} or more.")
        prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        yield TracedModel(model, store, ids, calibration_ids, prefix)
    finally:
        model.flash.close()
