"""Compares predictors on held-out text: recall, share of chosen neurons, bytes, time, perplexity."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.convert.imported import find_predictors
from mlx_flash.defaults import CONTEXT, STORED_PREDICTORS
from mlx_flash.errors import UsageError
from mlx_flash.layers.predictors import Predictor
from mlx_flash.loading.plan import parse_memory
from mlx_flash.source.resolve import demo_folder, find_checkpoint

from .tools.report import COLOURS, SERIES, add_output_argument, environment, finish, require_plots
from .tools.score import score


class Audit:
    """Wraps a predictor and compares its choice with the truth: counts active, chosen and correctly chosen neurons."""

    def __init__(self, inner: Predictor, truth: Predictor) -> None:
        self.inner, self.truth = inner, truth
        self.counts = np.zeros(4, np.int64)  # active, chosen, both, all

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        chosen, activations = self.inner(x)
        active, _ = self.truth(x)
        sums = (active.sum(), chosen.sum(), mx.logical_and(active, chosen).sum())
        self.counts += [*(int(s.item()) for s in sums), active.size]  # type: ignore[arg-type]
        return chosen, activations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="checkpoint to convert, once for each of --bits (default: the packaged demo model)"
    )
    parser.add_argument("--text", type=Path, required=True, help="file of held-out plain text")
    parser.add_argument(
        "--tokens", type=whole_number(0, 10**9), default=0, help="score only the first N tokens (default: all)"
    )
    parser.add_argument(
        "--recall", default="0.97", help="comma-separated list of recall targets (default: %(default)s)"
    )
    parser.add_argument("--predictor-memory", metavar="SIZE", help="size of the low-rank predictors, as in `convert`")
    parser.add_argument("--predictor-from", metavar="DIR_OR_ID", help="predictors to import, as in `convert`")
    add_output_argument(parser)
    parser.add_argument(
        "--bits", default="2,3", help="comma-separated list of bits of the shadow predictor (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --text {arguments.text}: {error}") from None
    source = demo_folder() if arguments.model is None else find_checkpoint(arguments.model)
    try:
        recalls = [float(value) for value in arguments.recall.split(",")]
        widths = [int(value) for value in arguments.bits.split(",")]
    except ValueError as error:
        raise UsageError(f"--recall and --bits must be numbers separated by commas: {error}") from None
    if len(text.split()) < 2:
        raise UsageError(f"--text {arguments.text} has fewer than two words. Choose a longer text.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        for bits in widths:
            seconds: dict[str, float] = {}
            manifest = convert(source, store, settings(arguments, bits), overwrite=True, seconds=seconds)
            if not rows:
                rows = [measure(store, kind, text, arguments.tokens) for kind in ("none", "exact")]
            kinds = [kind for kind in manifest.predictors if kind == "shadow" or bits == widths[0]]
            for recall, kind in itertools.product(recalls, kinds):
                row = measure(store, kind, text, arguments.tokens, recall)
                row |= {"target": recall, "seconds_to_make": seconds[kind]}
                row["predictor"] += f" {bits} bits" if kind == "shadow" else ""
                rows.append(row)
    show(rows)
    result = {"environment": environment(source), "text": arguments.text.name, "model": source.name, "rows": rows}
    finish(arguments.output, "predictors", result, lambda figure: draw(figure, result), size=(8, 4.8))


def settings(arguments: argparse.Namespace, bits: int) -> Settings:
    return Settings(
        shadow_bits=bits,
        predictor_memory=None if arguments.predictor_memory is None else parse_memory(arguments.predictor_memory),
        predictor_from=None if arguments.predictor_from is None else find_predictors(arguments.predictor_from),
    )


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table. `target` is the recall that the threshold was set for on calibration text."""
    columns = {"target": ".2f", "recall": ".2%", "active": ".2%", "chosen": ".2%", "seconds_to_make": ".2f"}
    heads = ("target", "recall", "active", "chosen", "made in s", "ratio", "MB", "ms/token", "perplexity")
    print(f"{'predictor':<15}" + "".join(f"{head:>11}" for head in heads))
    for row in rows:
        cells = [format(row[key], spec) if key in row else "-" for key, spec in columns.items()]
        cells.append(f"{row['chosen'] / row['active']:.2f}" if "chosen" in row else "-")
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{row['ms_per_token']:.2f}", f"{row['perplexity']:.3f}"]
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        print(f"{row['predictor']:<15}" + "".join(f"{cell:>11}" for cell in cells) + f"  {change:+.2%}")


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Draws the chosen share against the rise of perplexity. The lower left corner is best."""
    rows = [row for row in result["rows"] if "chosen" in row]
    dense = result["rows"][0]["perplexity"]
    axes = figure.add_subplot()
    kinds = sorted({row["predictor"] for row in rows})
    for kind, colour in zip(kinds, SERIES, strict=False):
        own = sorted((row for row in rows if row["predictor"] == kind), key=lambda row: row["chosen"])
        x = [100 * row["chosen"] for row in own]
        y = [max(1e-3, 100 * (row["perplexity"] / dense - 1)) for row in own]
        axes.plot(x, y, "o-", color=colour, lw=1.2, ms=5)
        for row, a, b in zip(own, x, y, strict=True):
            axes.annotate(f"{row['target']:.2f}", (a, b), (5, 4), textcoords="offset points", fontsize=7)
        axes.annotate(
            f"{kind}, {own[-1]['bytes'] / 1e6:.2f} MB",
            (x[-1], y[-1]),
            (9, -11),
            textcoords="offset points",
            color=colour,
            fontsize=9,
        )
    active = 100 * rows[0]["active"]
    axes.axvline(active, color=COLOURS["ceiling"], lw=0.8, ls=":")
    axes.annotate(
        "truly active",
        (active, 1),
        (3, -2),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=8,
        textcoords="offset points",
    )
    axes.set_yscale("log")
    axes.margins(x=0.22, y=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("neurons chosen, % (upper bound of the neurons read)")
    axes.set_ylabel("rise of perplexity, % (log scale)")
    axes.set_title(f"The cost of a predictor's mistakes, {result['text']}; numbers: recall target")


def measure(store: Path, kind: str, text: str, tokens: int, recall: float | None = None) -> dict[str, Any]:
    """One predictor's row. Recall and shares count neurons over all layers and scored tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_flash.loading.load import load

    model, tokenizer = load(store, predictor=kind, recall=recall, context=CONTEXT)
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))[: tokens or None]
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    seconds = seconds_per_token(model, prefix + ids[:128])
    audits = [
        audit(layer.mlp) for layer in model.layers if kind in STORED_PREDICTORS and layer.mlp.predictor is not None
    ]
    with tqdm(total=len(ids), desc=kind, unit="token", dynamic_ncols=True) as bar:
        result = score(
            model,
            lambda: make_prompt_cache(model),
            ids,
            prefix,
            model.flash.plan.context,
            model.flash.manifest.decode_tokens,
            bar.update,
        )
    row: dict[str, Any] = {
        "predictor": kind,
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "bytes": model.flash.plan.demand.predictors,
        "ms_per_token": seconds * 1e3,
    }
    if audits:
        counts = np.array([a.counts for a in audits])
        active, chosen, both, everything = counts.sum(axis=0).tolist()
        row |= {"recall": both / active, "active": active / everything, "chosen": chosen / everything}
        row["active_by_layer"] = (counts[:, 0] / counts[:, 3]).round(4).tolist()
        row["chosen_by_layer"] = (counts[:, 1] / counts[:, 3]).round(4).tolist()
    model.flash.close()
    return row


def audit(mlp: Any) -> Audit:
    """Wraps a layer's predictor in an Audit."""
    truth = mlp.exact_predictor(mx.float32)
    result = Audit(mlp.predictor, truth)
    mlp.predictor = result
    return result


def seconds_per_token(model: Any, ids: list[int]) -> float:
    """Median time of a decoded token with every neuron in a slot. Times the second of two equal passes."""
    from mlx_lm.models.cache import make_prompt_cache

    times = []
    for timed in (False, True):
        cache = make_prompt_cache(model)
        for token in ids:
            began = time.perf_counter()
            mx.eval(model(mx.array([[token]]), cache=cache))
            if timed:
                times.append(time.perf_counter() - began)
    return float(np.median(times))
