"""Writes a synthetic store of an OPT shape, with activations of the published statistics, for measuring speed.

The store has random weights, and its forward pass and predictor work as in a real one. Only the activation pattern is
planted. For an FFN input x of unit spread, neuron i of a layer has the up row

    sqrt(v) Q s_i + sqrt(1 - v) n_i        Q: (D, r) orthonormal, s_i a unit vector, n_i noise

and the bias m + t g_i with a normal g_i, so that some neurons are hot and others cold. The predictor knows Q, s_i and
the bias, but not the noise. It is the paper's low-rank predictor (section 3.1), as good as v allows. m, v, t and the
predictor's threshold follow in closed form from the published shares. The position table, a slow walk plus noise,
makes the sets change from token to token. Sources of the figures: paper, sections 3.1 and 3.2, figures 3 and 4.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.neuron_file import write_neurons
from mlx_flash.convert.output import publish
from mlx_flash.convert.tensors import write_safetensors
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.files import Manifest, NeuronLayout
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.safetensors_file import sha256_of
from mlx_flash.layers.activations import Activation

from ..tools.report import writable_folder
from .opt_checkpoint import POSITIONS, SHAPES, copy_tokenizer, opt_config

# Published shares of a layer's neurons for OPT 6.7B.
FIRST_ACTIVE, LAST_ACTIVE, MEAN_ACTIVE = 0.016, 0.054, 0.033
PREDICTED_PER_ACTIVE = 3.0
RECALL = 0.95
IN_WINDOW, NEW_PER_TOKEN = 0.24, 0.024  # predicted within a window of 4 tokens; newly predicted per token

# Fitted to the last two shares: the spread of the biases in units of the predictable part, and the position table's
# slow share and its correlation from one position to the next.
HETEROGENEITY = 1.15
SLOW_SHARE, SLOW_MEMORY = 0.2, 0.95
TOKEN_SPREAD = 0.3  # spread of the token table; the position table has 1
BRANCH_SPREAD = 0.1  # spread of the output that attention and FFN each add to the residual
SEED = 0

NORMAL = NormalDist()


@dataclass(frozen=True)
class LayerStatistics:
    """The parameters of a layer with the published shares: `bias_mean` m, `predictable` v, `bias_spread` t."""

    active: float
    bias_mean: float
    predictable: float
    bias_spread: float
    threshold: float

    @staticmethod
    def of(active: float) -> LayerStatistics:
        """Solves for the parameters that give a share of active neurons.

        The score X and the pre-activation Y are jointly normal with correlation r. The conditions are
        P(Y > 0) = active, P(X > threshold) = PREDICTED_PER_ACTIVE * active and P(X > threshold | Y > 0) = RECALL.
        Bisection finds r.
        """
        on, chosen = -NORMAL.inv_cdf(active), -NORMAL.inv_cdf(PREDICTED_PER_ACTIVE * active)
        low, high = 0.0, 1.0
        for _ in range(40):
            r = (low + high) / 2
            low, high = (r, high) if _joint(chosen, on, r) < RECALL * active else (low, r)
        h2, r2 = HETEROGENEITY**2, low**2
        v = r2 / (1 + h2 - h2 * r2)  # from r^2 = (v + t^2) / (1 + t^2) and t^2 = h^2 v
        t2 = h2 * v
        mean = -on * math.sqrt(1 + t2)
        return LayerStatistics(active, mean, v, math.sqrt(t2), mean + chosen * math.sqrt(v + t2))

    @property
    def mean_square(self) -> float:
        """E[relu(y)^2] for a pre-activation y."""
        spread = math.sqrt(1 + self.bias_spread**2)
        z = self.bias_mean / spread
        return (self.bias_mean**2 + spread**2) * NORMAL.cdf(z) + self.bias_mean * spread * NORMAL.pdf(z)


def _joint(chosen: float, on: float, r: float) -> float:
    """P(X > chosen, Y > on) for standard normals with correlation r < 1."""
    width = 0.02
    return width * sum(
        NORMAL.pdf(x) * NORMAL.cdf((r * x - on) / math.sqrt(1 - r * r))
        for x in np.arange(chosen + width / 2, chosen + 8, width).tolist()
    )


def active_shares(layers: int) -> list[float]:
    """The share of active neurons by layer, rising from the first to the last, with the published mean."""
    power = (LAST_ACTIVE - FIRST_ACTIVE) / (MEAN_ACTIVE - FIRST_ACTIVE) - 1
    steps = max(1, layers - 1)
    return [FIRST_ACTIVE + (LAST_ACTIVE - FIRST_ACTIVE) * (i / steps) ** power for i in range(layers)]


def rank_of(width: int) -> int:
    """The predictor's rank: the paper's 128, or less for the narrow models of tests."""
    return min(128, width // 4)


# -- the command ---------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="size of OPT (default: %(default)s)")
    parser.add_argument("--output", type=writable_folder, required=True, help="folder to write the store to")
    parser.add_argument(
        "--seed", type=whole_number(0), default=SEED, help="seed of the random numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(16, POSITIONS),
        default=160,
        help="tokens to measure the statistics on (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    try:
        write_store(arguments.output, arguments.shape, arguments.seed)
    except OSError as error:
        raise FlashError(
            f"{arguments.output} cannot be written ({error.strerror}). Free some room, or choose another --output."
        ) from None
    measured = measure(arguments.output, arguments.tokens)
    print(f"synthetic store of OPT-{arguments.shape}'s shape; shares of the neurons over {arguments.tokens} tokens:")
    published = (FIRST_ACTIVE, LAST_ACTIVE, MEAN_ACTIVE, PREDICTED_PER_ACTIVE, RECALL, IN_WINDOW, NEW_PER_TOKEN)
    for (name, value), goal in zip(measured.items(), published, strict=True):
        print(f"  {name:<22}{value:>8.4f}   published {goal}")
    print(json.dumps({"command": "synthetic", "shape": arguments.shape, "seed": arguments.seed, **measured}))


def is_synthetic(manifest: Manifest) -> bool:
    return "synthetic" in manifest.source


def shape_label(manifest: Manifest) -> str | None:
    """The name of a synthetic store in the outputs; None for a real one."""
    if not is_synthetic(manifest):
        return None
    shape = tuple(manifest.source["synthetic"]["shape"])
    names = [f"OPT-{name.upper()}" for name, dims in SHAPES.items() if dims == shape]
    return f"synthetic weights of {names[0] if names else ' x '.join(map(str, shape))} shape"


# -- writing -------------------------------------------------------------------------------------------------


def write_store(
    output: Path, shape: str | tuple[int, int, int], seed: int = SEED, vocabulary: int | None = None
) -> Manifest:
    """Writes a float32 store to a temporary folder and renames it. shape: a name, or (hidden size, layers, heads).

    Raises UsageError if the output exists or the disk has too little room.
    """
    hidden, layers, heads = SHAPES[shape] if isinstance(shape, str) else shape
    config = opt_config(hidden, layers, heads, vocabulary)
    layout = NeuronLayout.plan("float32", layers, 4 * hidden, hidden, ("up", "down"))
    statistics = [LayerStatistics.of(active) for active in active_shares(layers)]
    resident = _resident_tensors(config, statistics, seed)
    predictor = _predictor_tensors(hidden, statistics, seed)
    totals = [sum(math.prod(dims) for _, dims, _ in tensors) * 4 for tensors in (resident, predictor)]
    needed = layout.file_bytes + sum(totals)
    partial_folder = output.with_name(output.name + ".partial")
    if output.exists() or partial_folder.exists():
        raise UsageError(f"{output} or {partial_folder} exists already. Choose another --output, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < needed * 1.02:
        raise UsageError(
            f"{output} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there. Choose another --output."
        )
    partial_folder.mkdir()
    sums: dict[str, dict[str, int]] = {}
    try:
        with tqdm(total=needed, unit="B", unit_scale=True, desc="synthetic weights", dynamic_ncols=True) as bar:
            write_neurons(
                partial_folder, layout, lambda layer: _neurons(hidden, statistics[layer], seed, layer), bar.update
            )
            for name, tensors in ((Manifest.resident_file, resident), (Manifest.predictor_file("lowrank"), predictor)):
                entries = [(key, dims, mx.float32, load) for key, dims, load in tensors]
                sums[name] = write_safetensors(partial_folder / name, entries, bar.update)
        copy_tokenizer(partial_folder)
        (partial_folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        predicted = [round(PREDICTED_PER_ACTIVE * s.active, 5) for s in statistics]
        report = {
            "recall": [RECALL] * layers,
            "predicted": predicted,
            "active": [round(s.active, 5) for s in statistics],
            "bytes": totals[1],
            "target": RECALL,
            "table": {
                "recall": [RECALL],
                "threshold": [[0.0]] * layers,
                "caught": [[RECALL]] * layers,
                "predicted": [[share] for share in predicted],
            },
            "perplexity": None,  # meaningless for random weights
        }
        manifest = Manifest(
            model_type="opt",
            source={"synthetic": {"shape": [hidden, layers, heads], "seed": seed}},
            layout=layout,
            activation=asdict(Activation()),
            resident_dtype="float32",
            decode_tokens=8,
            all_neurons_layers=(),
            predictors={"lowrank": report},
            default_predictor="lowrank",
            files={path.name: store_entry(path, sums) for path in sorted(partial_folder.iterdir())},
        )
        publish(partial_folder, manifest)
        partial_folder.rename(output)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    return manifest


def store_entry(path: Path, sums: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The manifest's entry for a file. sums: file name -> checksums, for files of tensors."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.name in sums:
        return entry | {"crc32": sums[path.name]}
    return entry if path.name == Manifest.neurons_file else entry | {"sha256": sha256_of(path)}


Tensors = list[tuple[str, tuple[int, ...], Callable[[], mx.array]]]


def _rng(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed, *place])


def _normal(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(spread)
    return values


def _planted(hidden: int, layer: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts that a layer's weights and its predictor share: Q (D, r), s (F, r), g (F,)."""
    rng, rank = _rng(seed, 1, layer), rank_of(hidden)
    q = np.linalg.qr(_normal(rng, (hidden, rank), 1.0))[0]
    s = _normal(rng, (4 * hidden, rank), 1.0)
    s /= np.linalg.norm(s, axis=1, keepdims=True)
    return q, s, _normal(rng, (4 * hidden,), 1.0)


def _neurons(hidden: int, statistics: LayerStatistics, seed: int, layer: int) -> tuple[mx.array, mx.array]:
    """Up and down rows of a layer: (F, D) each."""
    q, s, _ = _planted(hidden, layer, seed)
    rng = _rng(seed, 2, layer)
    v = statistics.predictable
    up = _normal(rng, (4 * hidden, hidden), math.sqrt((1 - v) / hidden))
    up += (np.float32(math.sqrt(v)) * s) @ q.T  # (F, r) @ (r, D)
    down = _normal(rng, (4 * hidden, hidden), BRANCH_SPREAD / math.sqrt(4 * hidden * statistics.mean_square))
    return mx.array(up), mx.array(down)


def _up_bias(hidden: int, statistics: LayerStatistics, seed: int, layer: int) -> np.ndarray:
    return np.float32(statistics.bias_mean) + np.float32(statistics.bias_spread) * _planted(hidden, layer, seed)[2]


def _positions(rows: int, hidden: int, seed: int) -> mx.array:
    """The position table (rows, D) of unit spread: a slow walk plus noise."""
    rng = _rng(seed, 3)
    table = _normal(rng, (rows, hidden), math.sqrt(1 - SLOW_SHARE))
    walk = _normal(rng, (hidden,), 1.0)
    for row in range(rows):
        walk = SLOW_MEMORY * walk + _normal(rng, (hidden,), math.sqrt(1 - SLOW_MEMORY**2))
        table[row] += math.sqrt(SLOW_SHARE) * walk
    return mx.array(table)


def _resident_tensors(config: dict[str, Any], statistics: list[LayerStatistics], seed: int) -> Tensors:
    hidden, rows = config["hidden_size"], config["max_position_embeddings"] + 2

    def normal(place: int, index: int, dims: tuple[int, ...], spread: float) -> Callable[[], mx.array]:
        return lambda: mx.array(_normal(_rng(seed, place, index), dims, spread))

    decoder = "model.decoder."
    words = (config["vocab_size"], hidden)
    square = (hidden, hidden)
    tensors: Tensors = [
        (f"{decoder}embed_tokens.weight", words, normal(4, 0, words, TOKEN_SPREAD)),
        (f"{decoder}embed_positions.weight", (rows, hidden), partial(_positions, rows, hidden, seed)),
    ]
    norms = [f"{decoder}final_layer_norm"]
    for i, layer_statistics in enumerate(statistics):
        layer = f"{decoder}layers.{i}."
        norms += [f"{layer}self_attn_layer_norm", f"{layer}final_layer_norm"]
        for j, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
            spread = (BRANCH_SPREAD if name == "out_proj" else 1.0) * hidden**-0.5
            tensors.append((f"{layer}self_attn.{name}.weight", square, normal(5 + j, i, square, spread)))
            tensors.append((f"{layer}self_attn.{name}.bias", (hidden,), partial(mx.zeros, (hidden,))))
        bias = partial(_up_bias, hidden, layer_statistics, seed, i)
        tensors.append((f"{layer}mlp.up_bias", (4 * hidden,), lambda bias=bias: mx.array(bias())))  # type: ignore[misc]
        tensors.append((f"{layer}mlp.down_bias", (hidden,), partial(mx.zeros, (hidden,))))
    for name in norms:
        tensors.append((f"{name}.weight", (hidden,), partial(mx.ones, (hidden,))))
        tensors.append((f"{name}.bias", (hidden,), partial(mx.zeros, (hidden,))))
    return sorted(tensors, key=lambda tensor: tensor[0])


def _predictor_tensors(hidden: int, statistics: list[LayerStatistics], seed: int) -> Tensors:
    """The low-rank predictor's tensors: a = Q, b = sqrt(v) s^T, c = bias - threshold."""
    rank = rank_of(hidden)
    tensors: Tensors = []
    for i, layer in enumerate(statistics):

        def part(name: str, i: int = i, layer: LayerStatistics = layer) -> mx.array:
            q, s, _ = _planted(hidden, i, seed)
            if name == "a":
                return mx.array(q)
            if name == "b":
                return mx.array(s.T.copy() * np.float32(math.sqrt(layer.predictable)))
            return mx.array(_up_bias(hidden, layer, seed, i) - np.float32(layer.threshold))

        for name, dims in (("a", (hidden, rank)), ("b", (rank, 4 * hidden)), ("c", (4 * hidden,))):
            tensors.append((f"{i}.{name}", dims, partial(part, name)))
    return tensors


# -- measuring -----------------------------------------------------------------------------------------------


class _InputRecorder:
    """Wraps a layer's FFN and records the active and the predicted neurons of every position."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.active = self.predicted = np.empty((0, 0), np.bool_)

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        self.predicted = to_numpy(self.mlp.predictor(flat)[0])
        parts = []
        for start, stop, (up, _) in self.mlp.units.whole_bundles():
            parts.append(to_numpy(flat @ up.T + self.mlp.up_bias[start:stop] > 0))
        self.active = np.concatenate(parts, axis=1)
        return self.mlp(x)  # type: ignore[no-any-return]


def measure(store: Path, tokens: int, window: int = 4) -> dict[str, float]:
    """Statistics of a real forward pass over `tokens` random tokens, in the order of the published shares."""
    from mlx_flash.loading.load import load

    model, _ = load(store, context=tokens)
    recorders = [_InputRecorder(layer.mlp) for layer in model.layers]
    for layer, recorder in zip(model.layers, recorders, strict=True):
        layer.mlp = recorder
    ids = np.random.default_rng(1).integers(0, model.args.vocab_size, (1, tokens))
    mx.eval(model(mx.array(ids)))
    model.flash.close()
    active = np.array([recorder.active.mean() for recorder in recorders])
    predicted = np.array([recorder.predicted.mean() for recorder in recorders])
    caught = np.array([(recorder.predicted & recorder.active).mean() for recorder in recorders])
    touched, new = [], []
    for recorder in recorders:
        for t in range(window, tokens):
            before = recorder.predicted[t - window : t].any(axis=0)
            touched.append(before.mean())
            new.append((recorder.predicted[t] & ~before).mean())
    return {
        "active, first layer": float(active[0]),
        "active, last layer": float(active[-1]),
        "active": float(active.mean()),
        "predicted / active": float(predicted.mean() / active.mean()),
        "recall": float(caught.mean() / active.mean()),
        f"in a window of {window}": float(np.mean(touched)),
        "new per token": float(np.mean(new)),
    }
