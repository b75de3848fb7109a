"""At which density is it faster to use all neurons? Times one layer with every neuron in a slot."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.neuron_file import write_neurons
from mlx_flash.flash.files import Manifest, NeuronLayout
from mlx_flash.flash.neurons import NeuronFile, NeuronSlots
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.layers.activations import Activation
from mlx_flash.layers.neurons import StreamedNeurons

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)


class _Fixed:
    """A predictor that chooses random neurons, others for every call, at a fixed share."""

    def __init__(self, neurons: int, share: float) -> None:
        rng = np.random.default_rng(0)
        self.masks = [mx.array(rng.random((1, neurons)) < share) for _ in range(8)]
        self.calls = 0

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        self.calls += 1
        return self.masks[self.calls % len(self.masks)], None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width",
        type=whole_number(64, 16384),
        default=2048,
        help="hidden size; the FFN is 4 x wider (default: %(default)s, as in OPT-1.3B)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16"), help="type of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=whole_number(1), default=30, help="rounds to take the median of (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    layout = NeuronLayout.plan(arguments.dtype, 1, 4 * arguments.width, arguments.width, ("up", "down"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), layout, arguments.repeat)
    print(f"{'density':>8}{'ms':>9}{'x all neurons':>15}")
    for row in rows:
        print(f"{row['density']:>8}{row['ms']:>9.2f}{row['ratio']:>15.2f}")
    print(json.dumps({"command": "density", "width": layout.width, "dtype": layout.dtype, "rows": rows}))


def measure(folder: Path, layout: NeuronLayout, repeat: int) -> list[dict[str, float]]:
    """Medians over interleaved rounds of every density and of all neurons."""
    dtype = getattr(mx, layout.dtype)
    matrices = tuple(mx.random.normal((layout.neurons, layout.width)).astype(dtype) for _ in layout.parts)
    write_neurons(folder, layout, lambda _: matrices, lambda _: None)
    streamer = NeuronFile(UnitFile(folder / Manifest.neurons_file), Reader(16), layout)
    layer = StreamedNeurons(
        NeuronSlots(streamer, 0, layout.blocks, layout.parts), Activation(), decode_tokens=8, bias=False
    )
    x = mx.random.normal((1, 1, layout.width))
    choices = {"all": None, **{str(share): _Fixed(layout.neurons, share) for share in DENSITIES}}
    times: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(repeat + 1):
        for name, predictor in choices.items():
            layer.predictor = predictor
            began = time.perf_counter()
            mx.eval(layer(x))
            times[name].append(time.perf_counter() - began)
    streamer.close()
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    return [
        {"density": name, "ms": value * 1e3, "ratio": value / medians["all"]}  # type: ignore[dict-item]
        for name, value in medians.items()
    ]
