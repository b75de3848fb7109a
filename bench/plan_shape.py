"""Computes the memory plan of an OPT model on Metal from its shape alone, without the model."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.conversion import DECODE_TOKENS
from mlx_flash.convert.fitting import shadow_bytes
from mlx_flash.convert.resident import ResidentTensors
from mlx_flash.convert.store_plan import RESIDENT_GROUP, Settings
from mlx_flash.defaults import BITS, CONTEXT, THREADS
from mlx_flash.flash.files import NeuronLayout
from mlx_flash.loading.memory_needs import needs_of
from mlx_flash.loading.model_types import family_of, model_classes
from mlx_flash.loading.plan import PlanNotes, make_plan, parse_memory
from mlx_flash.loading.store import demand_of
from mlx_flash.loading.streaming_needs import neurons_need, process_bytes

from .synthetic.opt_checkpoint import SHAPES, opt_config

DTYPE = "float16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="6.7b", help="size of OPT (default: %(default)s)")
    for name, of in (("--bits", "the neurons"), ("--resident-bits", "the resident matrices")):
        parser.add_argument(
            name, type=int, choices=BITS, default=16, help=f"bits per weight of {of} (default: %(default)s)"
        )
    parser.add_argument("--memory", required=True, metavar="SIZE", help="budget, such as 5GB")
    parser.add_argument(
        "--context",
        type=whole_number(1),
        default=CONTEXT,
        metavar="N",
        help="tokens of context to plan for (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    import_module("mlx_lm.utils")  # the measured size of the process must include it
    budget = parse_memory(arguments.memory)
    hidden, layers, heads = SHAPES[arguments.shape]
    config = opt_config(hidden, layers, heads)
    layout = NeuronLayout.plan(DTYPE, layers, 4 * hidden, hidden, ("up", "down"), arguments.bits)
    context = min(arguments.context, config["max_position_embeddings"])
    model = _empty_model(config)
    need = neurons_need(layout, DECODE_TOKENS)
    layers_of = [(layer, "mlp", need) for layer in model.layers]
    needs = needs_of(model, layers_of, context, getattr(mx, DTYPE), as_on_metal=True)
    sizes = resident_sizes(config, arguments.resident_bits)
    predictors = shadow_bytes(layout, Settings().shadow_bits)
    demand = demand_of(layout, layout.parts, sizes, predictors, needs, THREADS, process_bytes())
    resident = f", {arguments.resident_bits} bits" if arguments.resident_bits < 16 else ""
    slots = f", {layout.bits} bits" if layout.quantised else ""
    notes = PlanNotes(PlanNotes().resident + resident, "shadow", slots)
    slot_bytes = layout.block_bytes
    plan = make_plan(demand, layout, slot_bytes, budget, budget, context, selects=True, notes=notes, prompt_caches=0)
    print(f"OPT-{arguments.shape} with the shadow predictor: computed from the shape, not run. Weights, rows and KV")
    print(f"cache are {DTYPE}, as on Metal. The process is as large as this one. Every layer gets the same slots.")
    print(plan.describe())
    store_bytes = layout.file_bytes + demand.resident + demand.predictors
    print(f"store on disk: {store_bytes / 1e9:.2f} GB; one read: {slot_bytes} bytes")
    budgets = plan.budgets()
    print("budgets: " + ", ".join(f"{name} {-(-size // 10**6)} MB" for name, size in budgets.items()))
    keys = ("command", "shape", "bits", "resident_bits", "context")
    print(
        json.dumps(
            {
                **{key: getattr(arguments, key) for key in keys},
                **plan.as_dict(),
                "slot_share": plan.slot_share,
                "slot_bytes": slot_bytes,
                "store_bytes": store_bytes,
                "budgets": budgets,
            }
        )
    )


def resident_sizes(config: dict[str, Any], bits: int) -> list[int]:
    """The bytes of each tensor in the `model.safetensors` of such a model's store, in DTYPE or quantised."""
    model = _empty_model(config)
    parameters: Any = tree_flatten(model.parameters())
    family = family_of(config, config["model_type"])
    streamed = {name for layer in range(config["num_hidden_layers"]) for name in family.weights(layer)}
    tensors = {name: (name, value.shape) for name, value in parameters if name not in streamed}
    group = RESIDENT_GROUP if bits < 16 else 0
    resident = ResidentTensors(model, tensors, bits, group, getattr(mx, DTYPE), load=_nothing)
    return [int(np.prod(shape)) * dtype.size for _, shape, dtype, _ in resident.entries()]


def _empty_model(config: dict[str, Any]) -> Any:
    model_class, args_class = model_classes(config)
    return model_class(args_class.from_dict(config))  # its random weights are never evaluated


def _nothing(name: str) -> mx.array:
    raise NotImplementedError(name)  # only shapes are needed
