"""Does it pay to read Gemma 3n's active neurons one by one? Times its sparse FFN against reading whole layers.

One side reads up, down and gate of every layer in a ring of buffers. The other keeps the gate in memory, and reads the
active neurons (up row and down column, beside each other) that are not in slots. Both are the engine's own parts, and
take turns. Weights are random. The neurons that a token shares with the one before are drawn, because random inputs
have none in common. `topk-hits` says how many are missing with so many slots.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.neuron_file import quantised, write_neurons
from mlx_flash.defaults import BITS, THREADS
from mlx_flash.flash.files import Manifest, NeuronLayout
from mlx_flash.flash.host_arrays import to_bytes, to_numpy
from mlx_flash.flash.in_place import InPlaceFiles, TensorParts
from mlx_flash.flash.inflight import InFlightReads
from mlx_flash.flash.layer_ring import BUFFERS, LayerRing, lay_out
from mlx_flash.flash.neurons import NeuronFile, NeuronSlots
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.rows import PackedRows
from mlx_flash.flash.stats import Counters
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.layers.neurons import StreamedNeurons

from .tools import disk, topk
from .tools.report import describe, environment, writable_folder

PARTS = ("gate", "up", "down")
SIDES = ((1.0, 0.1), (0.4, 0.1), (0.2, 0.25))  # share of the active neurons that are missing, slots / neurons
TURN = 2  # tokens; the ring reads ahead from one to the next
Rows = mx.array | PackedRows  # (F, D)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=topk.SHAPES, default="e4b", help="shape of the FFN (default: %(default)s)")
    parser.add_argument(
        "--bits",
        type=lambda text: [int(part) for part in text.split(",")],
        default=sorted(BITS, reverse=True),
        help="comma-separated list of bits per number (default: 16,8,4)",
    )
    parser.add_argument(
        "--layers", type=whole_number(BUFFERS + 1), default=BUFFERS + 1, help="sparse layers (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=4, help="turns of every side (default: %(default)s)")
    parser.add_argument(
        "--folder", type=writable_folder, default=Path("."), help="folder for temporary files (default: this one)"
    )


def main(arguments: argparse.Namespace) -> None:
    shape, rows = topk.SHAPES[arguments.shape], []
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="mlx-flash-topk-") as folder:
            rows.append(measure(Path(folder), shape, bits, arguments.layers, arguments.rounds))
        show(rows[-1])
    where = environment(arguments.folder)
    print(describe(where))
    print(json.dumps({"command": "topk-neurons", "environment": where, "shape": arguments.shape, "rows": rows}))


# -- the two sides -------------------------------------------------------------------------------------------


class Side(Protocol):
    """One way to compute the layers. shared: has the counters of its reads."""

    shared: InFlightReads

    def token(self, xs: Sequence[mx.array]) -> None:
        """Computes one token. xs: the input of each layer, (1, D)."""

    def settle(self) -> None:
        """Waits for reads that were begun for the next token."""


class RingOfLayers:
    """Every layer is read whole, the next one while one computes."""

    def __init__(self, path: Path, layout: NeuronLayout) -> None:
        self.shared: InFlightReads = (files := InPlaceFiles([UnitFile(path)], Reader(THREADS)))
        self.layout, offset, layers = layout, 0, []
        for layer in range(layout.layers):
            tensors = []
            for part in PARTS:
                for number, (dtype, elements) in enumerate(layout.components):
                    shape, kind = (layout.neurons, elements), getattr(mx, dtype)
                    place = TensorParts(np.zeros(1, np.int64), np.array([offset]), shape, kind)
                    tensors.append((f"{layer}.{part}.{number}", place))
                    offset += place.nbytes
            layers.append(lay_out(tensors))
        self.ring = LayerRing(files, layers, range(layout.layers), layout.layers)
        self.close = files.close

    def token(self, xs: Sequence[mx.array]) -> None:
        for layer, x in enumerate(xs):
            y = dense(x, *self._parts(self.ring.use(layer)))
            self.ring.release(layer, [y])

    def settle(self) -> None:
        for layer in range(min(BUFFERS, self.layout.layers)):
            self.ring.use(layer)

    def _parts(self, views: list[mx.array]) -> list[Rows]:
        each = len(self.layout.components)
        return [as_rows([view[0] for view in views[i : i + each]], self.layout) for i in range(0, len(views), each)]


class ActiveNeurons:
    """The gate is in memory. `missing`: the share of the active neurons that are not in slots. slots: of the neurons.

    held_bytes: memory of a layer for its gate and its slots.
    """

    def __init__(self, path: Path, layout: NeuronLayout, gate: Rows, missing: float, slots: float) -> None:
        self.shared = NeuronFile(UnitFile(path), Reader(THREADS), layout)
        self.layers = []
        for number in range(layout.layers):
            units = NeuronSlots(self.shared, number, round(slots * layout.blocks), layout.parts)
            layer = StreamedNeurons(units, topk.TopKActivation(), decode_tokens=1, bias=False)  # type: ignore[arg-type]
            layer.predictor = Drawn(TopK(gate), units, missing, number)
            self.layers.append(layer)
        self.held_bytes = layout.neurons * layout.row_bytes + units.cache.slots * units.slot_bytes
        self.close = self.shared.close

    def token(self, xs: Sequence[mx.array]) -> None:
        for layer, x in zip(self.layers, xs, strict=True):
            mx.eval(layer(x[None]))

    def settle(self) -> None:
        """Does nothing: neurons are not known before their token."""


class TopK:
    """The predictor by the rule itself. It returns g - c as activations."""

    def __init__(self, gate: Rows) -> None:
        self.gate = gate

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        gates = project(x, self.gate)
        above = gates - topk.cutoff(gates)
        return above > 0, above


class Drawn:
    """Takes the time of the predictor `inner`, and chooses as many neurons, of which `missing` have no slot.

    The others were chosen for the token before. Its activations are those of `inner`, so the output means nothing.
    """

    def __init__(self, inner: TopK, units: NeuronSlots, missing: float, seed: int) -> None:
        self.inner, self.units, self.rng = inner, units, np.random.default_rng(seed)
        active = round((1 - topk.SPARSITY) * units.layout.neurons)
        self.fresh = round(missing * active)
        self.last = self.rng.choice(units.layout.neurons, active, replace=False)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        mask, above = self.inner(x)
        mx.eval(mask, above)
        layout = self.units.layout
        absent = np.flatnonzero(self.units.slot_of[np.arange(layout.neurons) // layout.neurons_per_block] < 0)
        kept = self.rng.choice(self.last, len(self.last) - self.fresh, replace=False)
        self.last = np.concatenate([kept, self.rng.choice(np.setdiff1d(absent, kept), self.fresh, replace=False)])
        drawn = np.zeros((1, layout.neurons), np.bool_)
        drawn[0, self.last] = True
        return mx.array(drawn), above


def as_rows(components: list[mx.array], layout: NeuronLayout) -> Rows:
    if not layout.quantised:
        return components[0]
    packed, scales, biases = components
    return PackedRows(packed, scales, biases, layout.group_size, layout.bits)


def project(x: mx.array, rows: Rows) -> mx.array:
    """(N, D) -> (N, F)"""
    return rows.project(x) if isinstance(rows, PackedRows) else x @ rows.astype(x.dtype).T


def dense(x: mx.array, gate: Rows, up: Rows, down: Rows) -> mx.array:
    """The FFN over all neurons. x: (N, D) -> (N, D)"""
    gates = project(x, gate)
    h = topk.TopKActivation()(gates - topk.cutoff(gates), project(x, up))
    return down.combine(h) if isinstance(down, PackedRows) else h @ down.astype(h.dtype)


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass
class SideTimes:
    """Per token and layer, one entry for every turn. The counters are sums of all turns."""

    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)


def measure(folder: Path, shape: topk.LayerShape, bits: int, layers: int, rounds: int) -> dict[str, Any]:
    """One number of bits: writes the files, compares the results, and times both sides."""
    layout = NeuronLayout.plan("float16", layers, shape.neurons, shape.width, PARTS[1:], bits)
    whole, neurons = folder / "layers.bin", folder / Manifest.neurons_file
    rows = write_files(whole, layout)
    gate = rows[0] if isinstance(rows[0], PackedRows) else rows[0].astype(mx.float32)
    checked = check(neurons, layout, [gate, *rows[1:]])
    state = disk.prepare([whole, neurons])
    with ExitStack() as stack:
        sides: dict[str, Any] = {"whole layers": RingOfLayers(whole, layout)}
        stack.callback(sides["whole layers"].close)
        for missing, slots in SIDES:
            sides[f"{missing:.0%} missing"] = side = ActiveNeurons(neurons, layout, gate, missing, slots)
            stack.callback(side.close)
        samples = time_sides(sides, layers, shape.width, rounds, f"{bits} bits")
    first, layer_bytes = samples["whole layers"], len(PARTS) * shape.neurons * layout.row_bytes
    found = []
    for name, sample in samples.items():
        held = 0 if sample is first else sides[name].held_bytes
        row = {"side": name} | summary(sample, first, rounds * TURN * layers)
        found.append(row | {"held_bytes": held, "equal_ratio": row["read_ratio"] / (1 - held / layer_bytes)})
    sizes = {"layer_bytes": layer_bytes, "gate_bytes": layer_bytes // 3, "neuron_bytes": layout.bundle_bytes}
    return {"bits": bits, "layers": layers, "disk": state, **sizes, "check": checked, "sides": found}


def summary(side: SideTimes, whole: SideTimes, computed: int) -> dict[str, Any]:
    """Means of bytes and reads, medians of the times and of their ratios to whole layers. computed: tokens x layers."""
    counters = side.counters
    row: dict[str, Any] = {
        "missing": None if side is whole else counters.misses / (counters.hits + counters.misses),
        "bytes": counters.bytes / computed,
        "reads": counters.reads / computed,
    }
    times = {
        "read": (side.busy, whole.busy),
        "wait": (side.waited, whole.waited),
        "total": (side.seconds, whole.seconds),
    }
    for name, (own, others) in times.items():
        row |= {f"{name}_s": float(np.median(own)), f"{name}_ratio": float(np.median(np.divide(own, others)))}
    return row


def write_files(whole: Path, layout: NeuronLayout) -> list[Rows]:
    """Writes layers of the same random numbers to `whole`, and up and down by neurons beside it. Returns the parts."""
    keys, scale = mx.random.split(mx.random.key(0), len(PARTS)), layout.width**-0.5
    numbers = [(scale * mx.random.normal((layout.neurons, layout.width), key=key)).astype(mx.float16) for key in keys]
    parts = [list(quantised(layout, matrix)) if layout.quantised else [matrix] for matrix in numbers]
    with whole.open("wb") as file:
        for _ in range(layout.layers):
            for part in parts:
                for component in part:
                    file.write(to_bytes(component).reshape(-1).data)
    write_neurons(whole.parent, layout, lambda _: (numbers[1], numbers[2]), lambda _: None)
    return [as_rows(part, layout) for part in parts]


def time_sides(sides: dict[str, Side], layers: int, width: int, rounds: int, name: str) -> dict[str, SideTimes]:
    """Lets the sides take turns of TURN tokens. The first round warms up."""
    samples = {side: SideTimes() for side in sides}
    for turn in tqdm(range(rounds + 1), desc=name, unit="round", dynamic_ncols=True):
        tokens = mx.random.normal((TURN, layers, 1, width), key=mx.random.key(turn))
        mx.eval(tokens)
        order = list(sides) if turn % 2 else list(sides)[::-1]  # no side always comes first
        for side in order:
            before, began = sides[side].shared.counters.copy(), time.perf_counter()
            for token in tokens:
                sides[side].token(list(token))
            sides[side].settle()
            seconds = time.perf_counter() - began
            spent = sides[side].shared.counters - before
            if turn:
                samples[side].seconds.append(seconds / (TURN * layers))
                samples[side].busy.append(spent.read_s / (TURN * layers))
                samples[side].waited.append(spent.wait_s / (TURN * layers))
                samples[side].counters += spent
    return samples


def check(path: Path, layout: NeuronLayout, rows: list[Rows]) -> dict[str, float]:
    """Compares the active neurons' sum with that of all neurons, for one token. rows: gate, up and down."""
    shared = NeuronFile(UnitFile(path), Reader(THREADS), layout)
    units = NeuronSlots(shared, 0, max(1, layout.blocks // 4), layout.parts)
    layer = StreamedNeurons(units, topk.TopKActivation(), decode_tokens=1, bias=False)  # type: ignore[arg-type]
    layer.predictor = rule = TopK(rows[0])
    x = mx.random.normal((1, layout.width), key=mx.random.key(1))
    sparse, expected = layer(x[None])[0, 0], dense(x, *rows)[0]
    mask, above = rule(x)
    assert above is not None
    h = topk.TopKActivation()(above, project(x, rows[1]))
    zeros = (h == 0) == ~mask
    mx.eval(sparse, expected, h)
    down = rows[2].dequantised(mx.float32) if isinstance(rows[2], PackedRows) else rows[2].astype(mx.float32)
    exact = mx.array((to_numpy(h).astype(np.float64) @ to_numpy(down).astype(np.float64))[0].astype(np.float32))
    shared.close()
    found = {"active": float(to_numpy(mask).mean()), "exact_zeros": bool(zeros.all().item())}
    return found | topk.other_outputs(sparse, expected, exact)


def show(row: dict[str, Any]) -> None:
    disk_rate = row["disk"]["bytes"] / row["disk"]["seconds"] / 1e9
    print(
        f"\n{row['bits']} bits: a layer has {row['layer_bytes'] / 1e6:.1f} MB, its gate {row['gate_bytes'] / 1e6:.1f}\n"
        f"and a neuron {row['neuron_bytes']} bytes; the disk reads {disk_rate:.2f} GB/s in sequence"
    )
    print(
        "Per token and layer: reads and MB from the disk, ms that the disk was busy, that the token waited, and of\n"
        "all (medians of the turns); the same relative to whole layers; MB held for gate and slots, and busy\n"
        "relative to whole layers of which that memory holds as many as fit (computed)."
    )
    heads = ("missing", "reads", "MB", "busy", "waited", "all", "busy x", "waited x", "all x", "held MB", "equal x")
    print(f"{'':<16}" + "".join(f"{head:>10}" for head in heads))
    for side in row["sides"]:
        missing = "" if side["missing"] is None else f"{side['missing']:.0%}"
        cells = [missing, f"{side['reads']:.0f}", f"{side['bytes'] / 1e6:.2f}"]
        cells += [f"{1e3 * side[key]:.1f}" for key in ("read_s", "wait_s", "total_s")]
        cells += [f"{side[key]:.2f}" for key in ("read_ratio", "wait_ratio", "total_ratio")]
        cells += [f"{side['held_bytes'] / 1e6:.1f}", f"{side['equal_ratio']:.2f}"]
        print(f"{side['side']:<16}" + "".join(f"{cell:>10}" for cell in cells))
    found = row["check"]
    print(
        f"The rule keeps {found['active']:.2%}; the others are exactly zero: {found['exact_zeros']}. "
        f"{found['differ']:.0%} of the outputs have other bits\nthan with all neurons, by at most {found['error']:.1e} "
        f"of the largest (from float64: {found['own']:.1e} and {found['theirs']:.1e})."
    )
