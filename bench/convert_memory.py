"""Does a conversion stay within its memory? Converts in a memory cgroup that kills it if it needs more."""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.convert.checkpoint import Checkpoint
from mlx_flash.defaults import MLX_BITS
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.loading.model_types import runs_as_it_is
from mlx_flash.loading.plan import parse_memory
from mlx_flash.source.checkpoint_files import read_config, weights_in
from mlx_flash.source.children import child_environment

from .synthetic.opt_checkpoint import SHAPES, write_checkpoint
from .tools.cgroup import memory_group

ALLOWANCE_BYTES = 10**9  # on top of one layer
MLX_FORM_BYTES = 5 * 10**8  # for a conversion into MLX's form, which holds a few pieces of tensors
LAYERS = 6  # at OPT-6.7B's shape these are 2.8 GB in float16, twice the limit of a conversion
SHARDS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help=f"folder of a checkpoint (default: {LAYERS} random layers of OPT-6.7B's shape)"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="6.7b", help="shape of the random checkpoint (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for temporary files; removed at the end")
    parser.add_argument(
        "--limit",
        help="memory limit, such as 1.2GB (default: one layer plus 1 GB for a ReLU model, 0.5 GB for any other)",
    )
    parser.add_argument(
        "--bits", type=int, choices=MLX_BITS, default=16, help="convert's --bits (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    work: Path = arguments.output
    if work.exists():
        raise UsageError(f"{work} exists already. Choose another --output.")
    work.mkdir(parents=True)
    try:
        model = arguments.model
        if model is None:
            model = work / "checkpoint"
            model.mkdir()
            write_checkpoint(model, arguments.shape, "float16", 0, LAYERS, SHARDS)
        files = [model / name for name in weights_in(model).names]
        if runs_as_it_is(read_config(model), model):
            layer, limit = None, MLX_FORM_BYTES
        else:
            layer = largest_layer_bytes(Checkpoint(model))
            limit = layer + ALLOWANCE_BYTES
        limit = parse_memory(arguments.limit) if arguments.limit else limit
        size = sum(file.stat().st_size for file in files)
        if size <= limit:
            raise UsageError(
                f"{model} has {size / 1e9:.2f} GB, which fits within the limit of {limit / 1e9:.2f} GB. "
                "Choose a larger model or lower --limit."
            )
        result: dict[str, Any] = {
            "command": "convert-memory",
            "checkpoint_bytes": size,
            "files": [file.name for file in files],
            "layer_bytes": layer,
            "limit_bytes": limit,
            "bits": arguments.bits,
            **measure(model, work / "store", limit, arguments.bits),
        }
    finally:
        shutil.rmtree(work)
    show(result)
    print(json.dumps(result))
    if result["exit"]:
        raise FlashError("the conversion was killed, or failed (see above).")


def largest_layer_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of the largest layer. The first number in a tensor's name is its layer."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in checkpoint.tensors.items():
        if found := re.search(r"\.(\d+)\.", name):
            sizes[found[1]] += int(np.prod(tensor.shape)) * getattr(mx, tensor.dtype).size
    if not sizes:
        raise UsageError(f"{checkpoint.folder} has no numbered layers.")
    return max(sizes.values())


def measure(model: Path, output: Path, limit_bytes: int, bits: int) -> dict[str, int | float]:
    """Converts in a cgroup of that size, and watches the size of the output's folder."""
    highest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.05):
            highest = max(highest, folder_bytes(output.parent, output.name))

    watcher = threading.Thread(target=watch)
    with memory_group(limit_bytes) as group:
        watcher.start()
        began = time.perf_counter()
        try:
            command = [sys.executable, "-m", "mlx_flash.convert", "--model", str(model), "--output", str(output)]
            command += ["--bits", str(bits)]
            code = group.run(command, child_environment()).returncode
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - began
        peak, kills = group.peak_bytes(), group.kills()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "exit": code,
        "kills": kills,
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
        "cgroup_peak_bytes": peak,
        "store_bytes": folder_bytes(output.parent, output.name),
        "highest_disk_bytes": highest,
    }


def folder_bytes(folder: Path, prefix: str) -> int:
    """Total size of the files in the subfolders with that prefix."""
    total = 0
    for path in folder.glob(f"{prefix}*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed in the meantime
            continue
    return total


def show(result: dict[str, Any]) -> None:
    def mb(key: str) -> str:
        return f"{result[key] / 1e6:,.0f} MB"

    layer = "" if result["layer_bytes"] is None else f", its largest layer {mb('layer_bytes')}"
    print(f"\ncheckpoint         {mb('checkpoint_bytes')}{layer}")
    print(f"limit              {mb('limit_bytes')}")
    print(f"peak               {mb('peak_rss_bytes')} of the process, {mb('cgroup_peak_bytes')} with page cache")
    print(f"killed             {result['kills']}, exit code {result['exit']}")
    print(f"time               {result['seconds']:.0f} s")
    if result["store_bytes"]:
        share = result["highest_disk_bytes"] / result["store_bytes"]
        print(f"disk, at most      {mb('highest_disk_bytes')}, {share:.3f} of the finished store's {mb('store_bytes')}")
