"""Do the zeros inside ReLU experts pay? Traces a small mixture; replays slots of experts, neurons and blocks of them.

The mixture comes from `python -m mlx_flash.demo.train_mixture --form nemotron_h` or `--form relu_gated`, or is another
one with such experts that mlx-lm builds. It is held in memory whole. What is read per token at the size of a published
model is computed from the replay; so is the time that an Apple disk takes for it, by two published rates. Reads of the
same sizes are measured on this disk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import ALIGNMENT, round_up
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.source.checkpoint_files import read_config
from mlx_flash.text.tokenizer import load_tokenizer

from . import expert_neurons as replay
from .ordering import M5_PRO
from .reads import add_file_arguments, opened_file
from .tools.figures import table
from .tools.read_methods import Pieces, keep_full
from .tools.report import environment
from .tools.texts import read_text
from .traces import LEAST_TOKENS, packed, unpacked

SHARES = (0.125, 0.25, 0.5)  # memory, of all experts' bytes
BITS = (16, 8, 4)
GROUP = 64  # weights that share a scale and a bias of 2 bytes each
LONGEST = 512  # tokens of a window
ROUNDS, SECONDS = 3, 0.25  # of a measurement of reads


@dataclass(frozen=True)
class Published:
    """The expert shapes of a published model."""

    name: str
    width: int
    size: int  # neurons of an expert
    choices: int
    layers: int  # with experts
    parts: int

    def neuron_bytes(self, bits: int, parts: int) -> int:
        """Bytes of so many of a neuron's rows, with their scales."""
        row = self.width * bits // 8 + (0 if bits == 16 else self.width // GROUP * 4)
        return parts * row


NEMOTRON = Published("Nemotron-3-Nano", width=2688, size=1856, choices=6, layers=23, parts=2)
SMALL_THINKER = Published("SmallThinker-21BA3B", width=2560, size=768, choices=6, layers=52, parts=3)


class ReluGate(nn.Module):
    """ReLU on the gate, which mlx-lm's gated experts lack. up, gate: (..., F) -> (..., F)"""

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return nn.relu(gate) * up


class ExpertTap(nn.Module):
    """Wraps a layer's experts and records which are used and which of their neurons fire."""

    def __init__(self, inner: Any, parts: int) -> None:
        super().__init__()
        self.inner, self.parts = inner, parts
        self.deciding = inner.gate_proj if parts == 3 else inner.fc1
        self.expert_rows: list[np.ndarray] = []
        self.active_rows: list[np.ndarray] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        before = self.deciding(mx.expand_dims(x, (-2, -3)), indices)  # (..., K, 1, F)
        self.expert_rows.append(to_numpy(indices.reshape(-1, indices.shape[-1]).astype(mx.int32)))
        self.active_rows.append(packed((before > 0).reshape(-1, indices.shape[-1] * before.shape[-1])))
        result: mx.array = self.inner(x, indices)
        return result

    def trace(self, layer: int) -> replay.ExpertTrace:
        experts = np.concatenate(self.expert_rows)
        count, size, _ = self.deciding.weight.shape
        active = unpacked(self.active_rows, experts.shape[1] * size).reshape(*experts.shape, size)
        return replay.ExpertTrace(layer, experts, active, count, self.parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of the mixture")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text that the model was not trained on")
    parser.add_argument(
        "--tokens",
        type=whole_number(LEAST_TOKENS, 10**9),
        default=3000,
        help="run only the first N tokens (default: %(default)s)",
    )
    add_file_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    held_out, known = traces_of(arguments.model, read_text(arguments.text), arguments.tokens)
    published = NEMOTRON if held_out[0].parts == NEMOTRON.parts else SMALL_THINKER
    with opened_file(arguments) as (_, file):
        rates = measure(file, sizes_of(published))
    disks: dict[str, Seconds] = {
        "Apple": lambda reads, each: M5_PRO.seconds(reads, reads * each),
        "here": lambda reads, each: reads * each / rates[each],
    }
    result: dict[str, Any] = {
        "command": "relu-experts",
        "environment": environment(arguments.model),
        "tokens": len(held_out[0].experts),
        "zeros": [replay.zeros(trace) for trace in held_out],
        "touched": replay.touched(held_out, known),
        "published": asdict(published),
        "disk": {"name": M5_PRO.name, "bytes_per_second_here": rates},
        "break_even": break_even(published, disks),
        "shares": [],
    }
    for share in tqdm(SHARES, desc="caches", unit="share", dynamic_ncols=True):
        ways, split = replay.compare(held_out, known, share)
        rows = [{"way": w.way, "found": w.found, "bytes": w.bytes, "times": times(w, published, disks)} for w in ways]
        rules = replay.by_rule(held_out, share)
        result["shares"].append({"share": share, "split": split, "ways": rows, "misses_by_rule": rules})
    show(result)
    print(json.dumps(result))


# -- tracing -------------------------------------------------------------------------------------------------


def traces_of(folder: Path, text: str, tokens: int) -> tuple[list[replay.ExpertTrace], list[replay.ExpertTrace]]:
    """The traces of the text and of the calibration text, a trace for every layer with experts."""
    from mlx_lm.utils import load_model

    config = read_config(folder)
    model: Any = load_model(folder, trust_remote_code=False)[0]
    model.set_dtype(mx.float32)
    tokenizer = load_tokenizer(folder, config)
    calibration = files("mlx_flash.convert").joinpath("calibration.txt").read_text(encoding="utf-8")
    window = min(LONGEST, config.get("max_position_embeddings", LONGEST))
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    found = []
    for name, each in {"held-out text": text, "calibration text": calibration}.items():
        ids = list(tokenizer.encode(each, add_special_tokens=False, verbose=False))[:tokens]
        if len(ids) < LEAST_TOKENS:
            raise UsageError(f"the {name} has {len(ids)} tokens, expected {LEAST_TOKENS} or more.")
        found.append(record(model, config, ids, prefix, window, name))
    return found[0], found[1]


def record(
    model: Any, config: dict[str, Any], ids: list[int], prefix: list[int], window: int, name: str
) -> list[replay.ExpertTrace]:
    """Runs the model over `ids`, in windows that begin with `prefix`, and returns a trace of every layer with experts.

    Raises UsageError if there is none, or if no neuron of its experts can be exactly zero.
    """
    taps, places = [], []
    for index, layer in enumerate(model.layers):
        for block in layer.modules():
            for key, child in block.children().items():
                if (parts := parts_of(child, config)) is not None:
                    places.append((index, block, key, child))
                    taps.append(ExpertTap(child, parts))
                    block[key] = taps[-1]
    if not taps:
        raise UsageError(
            "no layer of this model has experts with ReLU. Train one: `python -m mlx_flash.demo.train_mixture`."
        )
    step = window - len(prefix)
    try:
        for begin in tqdm(range(0, len(ids), step), desc=name, unit="window", dynamic_ncols=True):
            mx.eval(model(mx.array([*prefix, *ids[begin : begin + step]])[None]))
    finally:
        for _, block, key, child in places:
            block[key] = child
    return [tap.trace(index) for tap, (index, *_) in zip(taps, places, strict=True)]


def parts_of(module: Any, config: dict[str, Any]) -> int | None:
    """The matrices of each expert, if the module is mlx-lm's experts and they have ReLU, else None.

    mlx-lm gives gated experts SiLU, whatever the configuration says. They get the ReLU that it names.
    """
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    if isinstance(module, SwitchMLP):
        return 2 if isinstance(module.activation, (nn.ReLU, nn.ReLU2)) else None
    if isinstance(module, SwitchGLU) and config.get("hidden_act") == "relu":
        module.activation = ReluGate()
        return 3
    return None


# -- the size of a published model ----------------------------------------------------------------------------

Seconds = Callable[[float, int], float]  # (reads, bytes of each) -> seconds


def matrix_bytes(published: Published, bits: int) -> int:
    """Bytes that reading one matrix of an expert takes: whole blocks of the disk."""
    return round_up(published.size * published.neuron_bytes(bits, 1), ALIGNMENT)


def block_bytes(published: Published, bits: int, neurons: int, parts: int) -> int:
    """Bytes that reading so many parts of so many neurons takes: whole blocks of the disk."""
    return round_up(neurons * published.neuron_bytes(bits, parts), ALIGNMENT)


def sizes_of(published: Published) -> list[int]:
    """The sizes of all reads, in bytes."""
    sizes = {matrix_bytes(published, bits) for bits in BITS}
    for parts in (published.parts - 1, published.parts):
        sizes |= {block_bytes(published, bits, neurons, parts) for bits in BITS for neurons in replay.BLOCKS}
    return sorted(sizes)


def measure(file: UnitFile, sizes: list[int]) -> dict[int, float]:
    """Bytes per second of random reads of each size, the queue kept full; medians of ROUNDS interleaved rounds."""
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with Reader(THREADS) as reader:
        for seed in range(ROUNDS):
            for size in sizes:
                rates[size].append(keep_full(reader, Pieces(file, size, seed), SECONDS).bytes_per_second)
    return {size: float(np.median(found)) for size, found in rates.items()}


def times(way: replay.Reads, published: Published, disks: dict[str, Seconds]) -> list[dict[str, Any]]:
    """Reads, bytes and seconds of a token of the published model, by bits and disk. Its rates are the replay's.

    "at best": the time if each expert's missing blocks are read one by one or its matrices whole, whichever is faster.
    """
    pairs, rows = published.layers * published.choices, []
    for bits in BITS:
        if way.way in {replay.by_copy(other) for other in replay.STORED_BITS if int(other) != bits}:
            continue  # the copy's share of the memory is that of other bits
        matrix = matrix_bytes(published, bits)
        blocks = published.size / way.neurons  # of an expert
        block = block_bytes(published, bits, way.neurons, way.parts_of_block)
        matrices = way.whole * published.parts + way.deciding  # (P,)
        reads = matrices + way.blocks * blocks
        row: dict[str, Any] = {"bits": bits, "reads": pairs * float(reads.mean())}
        row["bytes"] = pairs * float((matrices * matrix + way.blocks * blocks * block).mean())
        for name, seconds in disks.items():
            singly = way.blocks * (seconds(blocks, block) if block else 0)
            at_once = np.where(way.blocks > 0, seconds(way.parts_of_block, matrix), 0)
            base = matrices * seconds(1, matrix)
            row[name] = pairs * float((base + singly).mean())
            row[f"{name} at best"] = pairs * float((base + np.minimum(singly, at_once)).mean())
        rows.append(row)
    return rows


def break_even(published: Published, disks: dict[str, Seconds]) -> list[dict[str, Any]]:
    """The share of an expert's blocks from which on reading it whole takes less time, with nothing in memory."""
    rows = []
    for bits in BITS:
        for neurons in replay.BLOCKS:
            block = block_bytes(published, bits, neurons, published.parts)
            row: dict[str, Any] = {"bits": bits, "neurons": neurons, "block_bytes": block}
            for name, seconds in disks.items():
                whole = seconds(published.parts, matrix_bytes(published, bits))
                row[name] = whole / seconds(published.size / neurons, block)
            rows.append(row)
    return rows


# -- showing -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    print(
        "\nInside chosen experts: what is exactly zero, and how much of what fires also fired at the expert's last use"
    )
    head = ["layer", "zeros", "in the densest tenth of tokens", "fires again", "by popularity alone"]
    keys = ("zeros", "zeros_of_the_densest_tenth", "again", "again_by_chance")
    average = {"layer": "mean"} | {key: np.mean([row[key] for row in result["zeros"]]) for key in keys}
    table(head, [[str(row["layer"]), *(f"{row[key]:.1%}" for key in keys)] for row in [*result["zeros"], average]])
    print("\nBlocks of a chosen expert with a neuron that fires, by storage order")
    orders = [key for key in result["touched"][0] if key != "neurons"]
    rows = [[str(row["neurons"]), *(f"{row[order]:.1%}" for order in orders)] for row in result["touched"]]
    table(["neurons", *orders], rows)
    name, disks = result["published"]["name"], ("Apple", "here")
    print(
        f"\n{name}: share of an expert's blocks from which on it is faster whole ({result['disk']['name']}: computed)"
    )
    head = ["bits", "neurons", "bytes", *disks, "MB/s here"]
    rows = []
    for row in result["break_even"]:
        rate = result["disk"]["bytes_per_second_here"][row["block_bytes"]] / 1e6
        shares = [f"{row[disk]:.1%}" for disk in disks]
        rows.append([str(row["bits"]), str(row["neurons"]), f"{row['block_bytes']:,}", *shares, f"{rate:.0f}"])
    table(head, rows)
    for part in result["shares"]:
        show_share(part, name)


def show_share(part: dict[str, Any], published: str) -> None:
    print(
        f"\nMemory for {part['share']:.1%} of the experts' bytes. Where deciding matrices are read whole, they have "
        f"{part['split']:.0%} of it.\nfound: share of the neurons that fire. read: of the bytes of a token's experts. "
        f"The rest is {published}'s, computed: MB per token, ms per token,\nand ms at best, where an expert's missing "
        "neurons are read with all others if that is faster."
    )
    head = ["", "found", "read"]
    for bits in BITS:
        head += [f"{bits} bits: MB", "Apple", "at best", "here", "at best"]
    rows = []
    for row in part["ways"]:
        cells = [row["way"], f"{row['found']:.1%}", f"{row['bytes']:.1%}"]
        by_bits = {each["bits"]: each for each in row["times"]}
        for bits in BITS:
            if each := by_bits.get(bits):
                cells.append(f"{each['bytes'] / 1e6:.0f}")
                keys = (f"{disk}{best}" for disk in ("Apple", "here") for best in ("", " at best"))
                cells += [f"{each[key] * 1e3:.0f}" for key in keys]
            else:
                cells += ["-"] * 5
        rows.append(cells)
    table(head, rows)
    for unit, rules in part["misses_by_rule"].items():
        print(f"{unit}s missing, of what a token needs: " + ", ".join(f"{rule} {v:.1%}" for rule, v in rules.items()))
