"""Plans and loads a checkpoint as it is, with its experts and layers streamed, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, UsageError
from ..flash.in_place import InPlaceFiles
from ..flash.layer_ring import LayerMap, LayerRing
from ..flash.reader import Reader
from ..flash.system import usable_memory_bytes
from ..layers.streamed_layers import evaluate_prompts
from ..source.model_kind import error_line
from ..text.image_prompts import ImageProcessor
from ..text.images import HELD_BYTES
from .context import plan_context
from .expert_files import Mixture, parent_of
from .forecast import Forecast, forecast
from .image_needs import image_bytes
from .in_place_plan import InPlacePlan, WeightBytes, divide_in_place
from .layer_weights import stream_layers
from .memory_needs import Needs, StreamedNeed, needs_of
from .options import LoadOptions
from .plan import MLX_CACHE_BYTES, Demand, Plan, PlanNotes, UnitCounts, grammar_bytes, plan_for_budget
from .quantised_cache import quantise_cache
from .resident_weights import compare_headers, open_files, ranges_in, read_resident
from .runtime import Runtime, WholeLayers, evaluate_constants
from .streaming_needs import experts_need, loading_excess_bytes, process_bytes, reading_bytes
from .verification import attach_sums


def plan_mixture(
    folder: Path, mixture: Mixture, options: LoadOptions, images: ImageProcessor | None = None
) -> tuple[InPlacePlan, Callable[[Callable[[str], None]], Any], Callable[[], Forecast | None]]:
    """The plan for the checkpoint in `folder`, a function that loads its model, and one that makes the forecast.

    The model's `flash` is the Runtime.

    Experts are streamed where not all of them fit. Layers are streamed where the rest does not fit either.

    folder: the checkpoint's folder. mixture: the checkpoint's, from `open_mixture`. images: its processor, if the model
    is to read images. With `options.verify`, everything
    that is read is compared with checksums: tensors that are loaded once, and every unit at every read. Loading makes
    the checksums if they were not made before.

    Raises BudgetError, CheckpointError, UnsupportedModelError or UsageError. Loading raises ReadError.
    """
    positions = number_of(mixture.config, "max_position_embeddings")
    streamed = streamed_layers(mixture)
    try:
        kv_bits = "" if options.kv_bits is None else f", {quantise_cache(mixture.model, streamed, options.kv_bits)}"
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_run(folder, error) from None
    dense = not mixture.switches

    @cache
    def needs_at(context: int) -> Needs:
        evaluated = [layer.module for layer in mixture.layers] if dense else []
        try:
            return needs_of(mixture.model, streamed, context, evaluated=evaluated)
        except Exception as error:  # mlx-lm's model and MLX raise plain exceptions
            raise _cannot_run(folder, error) from None

    weights = WeightBytes.of(mixture)
    try:
        seeing = 0 if images is None else image_bytes(mixture.model, images.largest())
        decoding = 0 if images is None else HELD_BYTES
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_run(folder, error) from None
    process = cache(process_bytes)  # measured once, so that plans for several contexts can be compared

    def demand_at(context: int) -> Demand:
        needs = needs_at(context)
        # Units lie anywhere in their files. Slots come after loading.
        computing = max(needs.workspace, seeing) + decoding + reading_bytes(options.threads, aligned=False)
        loading = loading_excess_bytes(weights.resident) - needs.kv_cache - weights.expert_layers * weights.expert
        return Demand(
            process=process(),
            resident=sum(weights.resident) + weights.tables,
            predictors=0,
            kv_cache=needs.kv_cache,
            workspace=MLX_CACHE_BYTES + max(computing, loading),
            grammars=grammar_bytes(needs.vocabulary),
        )

    free = usable_memory_bytes()

    def divide(demand: Demand, context: int, note: str) -> InPlacePlan:
        def divided(units: UnitCounts, demand: Demand, slot_bytes: int, resident: str, budget: int | None) -> Plan:
            chooser = "none: every token needs every layer" if dense else "none: the router chooses"
            resident += "" if images is None else ", the vision part"
            notes = PlanNotes(resident, chooser, kv_cache=note + kv_bits)
            caches = options.prompt_cache_bytes
            return plan_for_budget(demand, units, slot_bytes, budget, free, context, notes=notes, prompt_caches=caches)

        return divide_in_place(divided, weights, demand, needs_at(context).choices, options.budget)

    plan = plan_context(options.context, positions, demand_at, divide, options.budget, free)

    def build(say: Callable[[str], None]) -> Any:
        files = open_files(mixture.files, direct=options.io == "direct")
        if options.io == "direct" and not all(file.direct for file in files):
            say(f"note: the file system of {folder} does not read past the page cache; the budget does not count that")
        reader = Reader(options.threads)
        if options.verify:
            attach_sums(files, ranges_in(mixture, files), reader, say)
            compare_headers(mixture, files)
        numbers, layers = mixture.layers_to_stream(plan.pinned)
        read_resident(mixture, files if options.verify else None)
        streamer = InPlaceFiles(files, reader)
        if mixture.switches:
            mixture.stream_experts(streamer, plan.expert_slots, options.window)
        held = LayerMap(len(mixture.layers))
        if layers:
            ring = LayerRing(streamer, [layer.tensors for layer in layers], numbers, len(mixture.layers))
            stream_layers(layers, ring)
            held = ring.map
        if dense:
            for layer in mixture.layers:
                if layer not in layers:
                    evaluate_prompts(layer.module)
        evaluate_constants(mixture.model)
        model, vocabulary = mixture.model, needs_at(plan.context).vocabulary
        watched, chooser = ([WholeLayers(held)], "every layer") if dense else (mixture.streamed_experts(), "router")
        model.flash = Runtime(plan, streamer, watched, chooser, vocabulary, positions or plan.context, images=images)
        return model

    def foresee() -> Forecast | None:
        return forecast(mixture, plan, needs_at(plan.context).choices, options.io == "direct", options.threads)

    return plan, build, foresee


def _cannot_run(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"mlx-lm cannot run the model that {folder / 'config.json'} describes: {error_line(error)}. "
        "Download the checkpoint again."
    )


def streamed_layers(mixture: Mixture) -> list[tuple[Any, Any, StreamedNeed]]:
    """The streamed layers of a mixture, in the form of `needs_of`."""
    drops_late = mx.default_device() != mx.cpu
    needs = {path: experts_need(tensors, drops_late) for path, tensors in mixture.switches.items()}
    return [(*parent_of(mixture.model, path), need) for path, need in needs.items()]


def number_of(config: dict[str, Any], key: str) -> int | None:
    """A number from a configuration, or from its part for the text model; None if it is in neither.

    Raises CheckpointError if it is not a positive whole number.
    """
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive whole number.")
    return value
