"""How fast can missing experts be read? Times the engine's reads, without compute, beside fio's reads of that size."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.errors import UsageError
from mlx_flash.flash.experts import ExpertSlots
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.resident_weights import open_files

from .baselines.engine_switches import empty_slots
from .compare import mixture_folder
from .tools import disk, figures
from .tools.read_methods import find_fio, run_fio
from .tools.report import COLOURS, add_output_argument, environment, finish, require_plots

LAYERS = 6  # reads rotate over so many layers, so that none finds the bytes of the one before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of a mixture-of-experts checkpoint")
    parser.add_argument("--slots", type=whole_number(1), default=32, help="slots per layer (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=whole_number(1), default=5, help="rounds to take the median of (default: %(default)s)"
    )
    parser.add_argument("--no-fio", action="store_true", help="do not run fio, even if it is installed")
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    fio = None if arguments.no_fio else find_fio()
    if mixture_folder(str(arguments.model)) is None:
        raise UsageError(f"{arguments.model} is not a mixture of experts; `bench reads` measures a store's neurons.")
    mixture = open_in_place(arguments.model)
    slots = min(arguments.slots, mixture.experts)
    shared = InPlaceFiles(open_files(mixture.files, direct=True), Reader(THREADS))
    if not all(file.direct for file in shared.files):
        raise UsageError(
            f"the file system of {arguments.model} refuses reads past the page cache. Copy the model to another one."
        )
    prepared = disk.prepare(mixture.files)
    streams = [ExpertSlots(shared, tensors, slots) for tensors in list(mixture.switches.values())[:LAYERS]]
    counts = sorted({min(count, slots) for count in (1, 2, 4, 8, 16, 32)})
    rows: list[dict[str, Any]] = [{"missing": count, "ours": [], "fio": []} for count in counts]
    rng = np.random.default_rng(0)
    for _ in tqdm(range(arguments.rounds), desc="reading", unit="round", dynamic_ncols=True):
        for row in rows:
            row["ours"].append(fetches(streams, row["missing"], rng))
            piece = round(np.mean([taken["piece_bytes"] for taken in row["ours"]]) / 4096) * 4096
            depth = min(THREADS, round(row["ours"][-1]["reads"]))
            if fio is not None:
                row["fio"].append(run_fio(fio, mixture.files[0], True, max(4096, piece), depth, 0.5).bytes_per_second)
    shared.close()
    summaries = [summary(row) for row in rows]
    result = {
        "environment": environment(arguments.model),
        "model": arguments.model.resolve().name,
        "expert_bytes": mixture.expert_bytes,
        "slots": slots,
        "disk": prepared,
        "rows": summaries,
    }
    finish(arguments.output, "expert-reads", result, lambda figure: draw(figure, result), show=lambda: show(result))


def fetches(
    streams: list[ExpertSlots], missing: int, rng: np.random.Generator, seconds: float = 0.5
) -> dict[str, float]:
    """Reads `missing` experts at once, layer after layer, for `seconds`. Waits for each read before the next."""
    counters = streams[0].shared.counters
    before, began, calls = counters.copy(), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for stream in streams:
            empty_slots(stream)
            list(stream.use(np.sort(rng.choice(stream.count, missing, replace=False))))
            calls += 1
    did = counters - before
    return {
        "bytes_per_second": did.bytes / did.read_s,
        "piece_bytes": did.bytes / did.reads,
        "reads": did.reads / calls,
        "wait_s": did.wait_s / calls,
        "manage_s": did.manage_s / calls,
    }


def summary(row: dict[str, Any]) -> dict[str, Any]:
    middle: dict[str, Any] = {key: float(np.median([taken[key] for taken in row["ours"]])) for key in row["ours"][0]}
    ratios = [taken["bytes_per_second"] / rate for taken, rate in zip(row["ours"], row["fio"], strict=False)]
    return middle | {
        "missing": row["missing"],
        "fio_bytes_per_second": float(np.median(row["fio"])) if row["fio"] else None,
        "ratio": float(np.median(ratios)) if ratios else None,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}: experts of {result['expert_bytes'] / 1e6:.2f} MB; disk: {result['disk']['state']}")
    head = ["missing", "reads", "of KiB", "GB/s", "fio GB/s", "ratio", "wait ms", "manage ms"]
    rows = [
        [
            str(row["missing"]), f"{row['reads']:.0f}", f"{row['piece_bytes'] / 1024:.0f}",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['fio_bytes_per_second'] / 1e9:.2f}" if row["ratio"] else "-",
            f"{row['ratio']:.2f}" if row["ratio"] else "-",
            f"{1e3 * row['wait_s']:.2f}", f"{1e3 * row['manage_s']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    figures.table(head, rows)


def draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    at = [row["missing"] for row in result["rows"]]
    axes.plot(at, [row["bytes_per_second"] / 1e9 for row in result["rows"]], "o-", color=COLOURS["ours"], label="ours")
    if result["rows"][0]["ratio"]:
        rates = [row["fio_bytes_per_second"] / 1e9 for row in result["rows"]]
        axes.plot(at, rates, "s--", color=COLOURS["ceiling"], label="fio, pieces of that size, queue kept full")
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(count) for count in at])
    axes.set_ylim(0)
    axes.set_xlabel(f"experts that a layer lacks, of {result['expert_bytes'] / 1e6:.2f} MB")
    axes.set_ylabel("GB/s")
    axes.legend()
    figures.title(figure, "Reading the experts that a layer lacks", result["model"])
