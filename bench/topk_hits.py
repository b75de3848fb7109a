"""Which neurons does Gemma 3n's rule choose, token by token, and what would reading them bring on a given disk?

The model runs in memory over a held-out text, and the choice of every sparse layer is recorded. A model without the
rule runs unchanged; the rule then says what it would choose in each layer, of gates that were not trained for it. Of
these layers the first ones count, as many in proportion as are sparse in Gemma 3n, because later ones choose more
alike from token to token. The last table is computed, not measured: it takes the misses found here, a published shape,
and the disk's two rates.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import BITS
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import ALIGNMENT, NeuronLayout
from mlx_flash.flash.slot_cache import SlotCache

from .eviction import per_token
from .routing import habits
from .tools import policies, topk
from .tools.report import environment
from .tools.score import windows
from .tools.texts import read_text
from .traces import LEAST_TOKENS, LayerTrace, packed

SHARES = (0.1, 0.125, 0.25, 0.375, 0.5, 0.75)  # slots / neurons
MEMORY = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # memory for layers / bytes of all layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of a model with gated FFNs")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text that the model was not trained on")
    parser.add_argument(
        "--tokens", type=whole_number(LEAST_TOKENS), default=2000, help="tokens to trace (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=whole_number(2), default=256, help="tokens that see each other (default: %(default)s)"
    )
    parser.add_argument(
        "--shape", choices=topk.SHAPES, default="e4b", help="shape of the computed table (default: %(default)s)"
    )
    parser.add_argument(
        "--small", type=float, default=1.1, help="GB/s that the disk gives in reads of 4 KiB (default: %(default)s)"
    )
    parser.add_argument(
        "--large", type=float, default=17.0, help="GB/s that the disk gives in megabytes (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=float, default=100.0, help="GB/s at which weights are multiplied (default: %(default)s)"
    )
    parser.add_argument(
        "--read-back", type=float, default=0.3, help="ms in which a layer tells its choice (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    from mlx_lm import load

    text = read_text(arguments.text)
    loaded: Any = load(str(arguments.model))
    model, tokenizer = loaded[:2]
    ids = list(tokenizer.encode(text, add_special_tokens=False))[: arguments.tokens]
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    found, of_the_model = trace(model, ids, prefix, arguments.window)
    rows = [layer_row(each) for each in tqdm(found, desc="caches", unit="layer", dynamic_ncols=True)]
    shape = topk.SHAPES[arguments.shape]
    counted = rows if of_the_model else rows[: -(-len(rows) * shape.sparse // shape.layers)]
    misses = np.mean([row["misses"] for row in counted], axis=0).tolist()
    machine = MachineRates(
        arguments.small * 1e9, arguments.large * 1e9, arguments.memory * 1e9, arguments.read_back / 1e3
    )
    table = [compute(shape, bits, share, misses, machine) for bits in sorted(BITS, reverse=True) for share in MEMORY]
    result = {"command": "topk-hits", "environment": environment(arguments.model), "model": arguments.model.name}
    result |= {"text": arguments.text.name, "tokens": len(ids), "trained_for_it": of_the_model, "layers": rows}
    result |= {"counted": len(counted), "shares": SHARES, "misses": misses, "shape": arguments.shape, "computed": table}
    result["break_even"] = {bits: break_even(shape, bits, machine) for bits in sorted(BITS, reverse=True)}
    show(result)
    print(json.dumps(result))


# -- what a model chooses ------------------------------------------------------------------------------------


class GateTap:
    """Wraps a gate projection and records the neurons that the rule chooses."""

    def __init__(self, inner: Any, layer: int, sparsity: float) -> None:
        self.inner, self.layer, self.sparsity = inner, layer, sparsity
        self.rows: list[np.ndarray] = []
        self.neurons = 0

    def __call__(self, x: mx.array) -> mx.array:
        gates: mx.array = self.inner(x)
        self.neurons = gates.shape[-1]
        flat = gates.reshape(-1, self.neurons)
        self.rows.append(packed(flat > topk.cutoff(flat, self.sparsity)))
        return gates


def trace(model: Any, ids: list[int], prefix: list[int], window: int) -> tuple[list[LayerTrace], bool]:
    """The choices of every layer that has the rule, and True; or what it would choose in every layer, and False."""
    mlps = {i: layer.mlp for i, layer in enumerate(model.layers) if "gate_proj" in getattr(layer, "mlp", {})}
    if not mlps:
        raise UsageError("no layer of this model has a gate (`mlp.gate_proj`), which the rule chooses by.")
    sparse = {i: mlp.activation_sparsity for i, mlp in mlps.items() if getattr(mlp, "activation_sparsity", 0) > 0}
    taps = [GateTap(mlps[i].gate_proj, i, share) for i, share in (sparse or dict.fromkeys(mlps, topk.SPARSITY)).items()]
    for tap in taps:
        mlps[tap.layer].gate_proj = tap
    with tqdm(total=len(ids), desc="tracing", unit="token", dynamic_ncols=True) as bar:
        for given, _ in windows(ids, prefix, window):
            mx.eval(model(mx.array(given)[None]))
            bar.update(len(given))
    return [LayerTrace(tap.layer, tap.neurons, 1, tap.rows) for tap in taps], bool(sparse)


def layer_row(trace: LayerTrace) -> dict[str, Any]:
    """One layer's share of active neurons, their return, and its misses for every share of slots, over those needed."""
    chosen = trace.chosen
    needed = chosen.sum(axis=1)
    sets = [np.flatnonzero(row) for row in chosen]
    counted = per_token([needed])[0]
    slots = [max(1, round(share * trace.neurons)) for share in SHARES]
    fading = per_token([policies.run(SlotCache(trace.neurons, n), sets) for n in slots])
    best = per_token([policies.clairvoyant(chosen, n) for n in slots])
    shares = needed / trace.neurons
    return {
        "layer": trace.layer,
        "active": float(shares.mean()),
        "active_p1_p99": np.percentile(shares, (1, 99)).tolist(),
        **habits(chosen),
        "misses": [value / counted for value in fading],
        "misses_clairvoyant": [value / counted for value in best],
    }


# -- what reading them would bring ---------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineRates:
    """Bytes per second of the disk in reads of 4 KiB and of megabytes, and of products; seconds of a read-back."""

    small: float
    large: float
    products: float
    read_back_s: float


@dataclass(frozen=True)
class TokenCost:
    """A token's cost. read_s: the disk's time. total_s: with products, of which only those of certain layers overlap
    with reading, and with read-backs."""

    read_s: float
    total_s: float
    bytes: float
    reads: float = 0.0
    slots: float = 0.0


def compute(
    shape: topk.LayerShape, bits: int, share: float, misses: list[float], machine: MachineRates
) -> dict[str, Any]:
    """A token of a whole model, in the same memory: whole layers against neurons in the sparse ones.

    share: memory over the bytes of all layers. misses: of the neurons needed, for SHARES of slots. A neuron's read
    costs as much as one of 4 KiB, whatever its size.
    """
    layout = NeuronLayout.plan("float16", 1, shape.neurons, shape.width, ("up", "down"), bits)
    matrix, number = shape.neurons * layout.row_bytes, layout.row_bytes / shape.width  # bytes of a gate, of a number
    layer = 3 * matrix + shape.others * number
    total, memory = shape.layers * layer, share * shape.layers * layer
    multiplied = total + shape.head * number
    whole = TokenCost((total - memory) / machine.large, 0.0, total - memory)
    whole = replace(whole, total_s=max(whole.read_s, multiplied / machine.products))
    active = (1 - topk.SPARSITY) * shape.neurons
    rest = total - shape.sparse * 3 * matrix  # what is pinned or read whole, when neurons are read
    sparse_products = multiplied - topk.SPARSITY * shape.sparse * 2 * matrix
    computing = sparse_products / machine.products + shape.sparse * machine.read_back_s
    ways = []
    for slots, missing in zip((*SHARES, 1.0), (*misses, 0.0), strict=True):
        left = memory - shape.sparse * (matrix + slots * shape.neurons * layout.block_bytes)
        if left >= 0:
            reads, certain = shape.sparse * active * missing, max(0.0, rest - left)
            waited, ahead = reads * ALIGNMENT / machine.small, certain / machine.large
            read = certain + reads * layout.bundle_bytes
            ways.append(TokenCost(waited + ahead, waited + max(ahead, computing), read, reads, slots))
    # The bound: no neuron is ever missing, and slots take no memory. Only the gates do.
    bound_s = max(0.0, rest - max(0.0, memory - shape.sparse * matrix)) / machine.large
    row = {"bits": bits, "memory": share, "memory_bytes": memory, "whole": asdict(whole)}
    row["bound"] = whole.read_s / bound_s if bound_s else None
    if not ways:
        return row | {"neurons": None}
    best, quickest = min(ways, key=lambda way: way.read_s), min(ways, key=lambda way: way.total_s)
    read_gain = whole.read_s / best.read_s if best.read_s else None
    gains = {"read_gain": read_gain, "gain": whole.total_s / quickest.total_s}
    return row | {"neurons": asdict(best), "quickest": asdict(quickest), **gains}


def break_even(shape: topk.LayerShape, bits: int, machine: MachineRates) -> float:
    """Neurons are read faster than whole layers in the same memory while misses / (1 - slots) is below this number.

    Without reading up and down whole, a layer saves all their bytes but those that its slots could have pinned.
    """
    layout = NeuronLayout.plan("float16", 1, shape.neurons, shape.width, ("up", "down"), bits)
    active = (1 - topk.SPARSITY) * shape.neurons
    return shape.neurons * layout.bundle_bytes / machine.large / (active * ALIGNMENT / machine.small)


def show(result: dict[str, Any]) -> None:
    rows = result["layers"]
    print("chosen by the model's own rule" if result["trained_for_it"] else "what the rule would choose; not trained")
    heads = ("active", "p1", "p99", "again", "chance", *(f"{share:.1%}" for share in SHARES))
    print(f"{'':<14}" + "".join(f"{head:>8}" for head in heads))

    def line(name: str, picked: list[dict[str, Any]], key: str = "misses") -> None:
        cells = [np.mean([row["active"] for row in picked])]
        cells += np.mean([row["active_p1_p99"] for row in picked], axis=0).tolist()
        cells += [np.mean([row[part] for row in picked]) for part in ("again", "again_by_chance")]
        cells += np.mean([row[key] for row in picked], axis=0).tolist()
        print(f"{name:<14}" + "".join(f"{cell:>8.1%}" for cell in cells))

    for row in rows:
        line(f"layer {row['layer']}", [row])
    counted = rows[: result["counted"]]
    if len(counted) < len(rows):
        line("mean of all", rows)
    line(f"mean of {len(counted)}", counted)
    line("clairvoyant", counted, "misses_clairvoyant")
    print(
        "Share of active neurons: mean, 1st and 99th percentile of the tokens; of them, share that the token before\n"
        "used, and by popularity alone; then the share that is missing, by slots over neurons."
    )
    print(
        f"\ncomputed for {result['shape']}, with these mean misses: per token in the same memory.\n"
        "Whole layers: MB read, ms to read them, ms with products. Neurons: the share of slots that reads fastest,\n"
        "reads of neurons, MB, ms to read, and ms with products (of the share of slots that is quickest). Then the\n"
        "gain in reading, its bound if no neuron were missing, and the gain in all."
    )
    heads = ("bits", "memory", "MB", "whole MB", "read", "all", "slots", "reads", "MB", "read", "all")
    print("".join(f"{head:>9}" for head in (*heads, "read x", "bound", "all x")))
    for row in result["computed"]:
        whole, neurons = row["whole"], row["neurons"]
        cells = [str(row["bits"]), f"{row['memory']:.0%}", f"{row['memory_bytes'] / 1e6:.0f}"]
        cells += [f"{whole['bytes'] / 1e6:.0f}", *(f"{1e3 * whole[key]:.1f}" for key in ("read_s", "total_s"))]
        if neurons is None:
            cells += ["-"] * 6
        else:
            cells += [f"{neurons['slots']:.1%}", f"{neurons['reads']:.0f}", f"{neurons['bytes'] / 1e6:.0f}"]
            cells += [f"{1e3 * neurons['read_s']:.1f}", f"{1e3 * row['quickest']['total_s']:.1f}"]
            cells.append("-" if row["read_gain"] is None else f"{row['read_gain']:.2f}")
        cells.append("-" if row["bound"] is None else f"{row['bound']:.2f}")
        cells.append("-" if neurons is None else f"{row['gain']:.2f}")
        print("".join(f"{cell:>9}" for cell in cells))
    limits = ", ".join(f"{limit:.2f} in {bits} bits" for bits, limit in result["break_even"].items())
    print(f"Neurons are read faster while misses / (1 - slots) is below {limits}.")
