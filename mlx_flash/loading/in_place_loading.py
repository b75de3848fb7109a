"""Plans and loads a checkpoint as it is, with its experts and layers streamed, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..defaults import THREADS
from ..errors import CheckpointError, UsageError
from ..flash.in_place import InPlaceFiles
from ..flash.layer_ring import LayerMap, LayerRing
from ..flash.system import usable_memory_bytes
from ..layers.experts import most_positions
from ..layers.shared_reading import SharedReading, bytes_to_share
from ..layers.streamed_layers import evaluate_prompts
from ..source.model_kind import error_line
from ..source.zoos import MLX_LM, zoo_of
from ..text.batch_generation import require_batches
from ..text.draft_depth import MOST_DEPTH
from ..text.image_prompts import ImageProcessor
from ..text.images import HELD_BYTES, MOST_WAITING
from .config import number_of
from .context import plan_context
from .draft_model import PlannedDrafts
from .expert_ranks import divide_experts, exchange_bytes, stream_shares
from .forecast import Foresight
from .image_needs import NO_IMAGES, image_needs, prompt_bytes
from .in_place_model import InPlaceModel, parent_of
from .in_place_plan import (
    InPlacePlan,
    WeightBytes,
    divide_with_tables,
    with_spare_for_chunks,
    with_spare_for_rows,
)
from .layer_weights import stream_layers
from .lookup_tables import stream_tables
from .memory_needs import Needs, OneRow, StreamedNeed, needs_of, stand_ins
from .options import LoadOptions
from .plan import MLX_CACHE_BYTES, Demand, Plan, PlanNotes, UnitCounts, grammar_bytes, plan_for_budget
from .quantised_cache import plain_cache, quantise_cache
from .ranked_loading import Ranks
from .reading_trials import reader_for, reading_trials
from .resident_weights import compare_headers, open_files, ranges_in, read_resident
from .runtime import Runtime, WholeLayers, evaluate_constants
from .streaming_needs import experts_need, loading_excess_bytes, process_bytes, reading_bytes
from .trial_calls import nothing_scheduled
from .verification import attach_sums

SOME_TEXT = " and so on" * 64  # to find what a token of a prompt with images takes


@nothing_scheduled()
def plan_in_place(
    folder: Path,
    mixture: InPlaceModel,
    options: LoadOptions,
    drafts: PlannedDrafts | None = None,
    images: ImageProcessor | None = None,
    ranks: Ranks | None = None,
    zoo: str | None = None,
) -> tuple[InPlacePlan, Callable[[Callable[[str], None]], Any], Callable[[int, int], InPlacePlan], Foresight]:
    """The plan for the checkpoint in `folder`, a function that loads its model, one that makes the plan of another
    budget or context, and what forecasts the speed of either.

    The model's `flash` is the Runtime.

    Experts are streamed where not all of them fit. Layers are streamed where the rest does not fit either.

    folder: the checkpoint's folder. mixture: the checkpoint's, from `open_in_place`. With `options.verify`, everything
    that is read is compared with checksums: tensors that are loaded once, and every unit at every read. Loading makes
    the checksums if they were not made before. drafts: what will draft tokens; None for nothing. images: the
    checkpoint's processor, if the model is to read images. ranks: those that the experts are divided among; None for
    this process alone. zoo: see `open_in_place`.

    Raises BudgetError, CheckpointError, UnsupportedModelError or UsageError. Loading raises ReadError.
    """
    positions = number_of(mixture.config, "max_position_embeddings")
    streamed = streamed_layers(mixture)
    try:
        kv_bits = "" if options.kv_bits is None else f", {quantise_cache(mixture.model, streamed, options.kv_bits)}"
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_run(folder, mixture.config, error) from None
    dense = not mixture.switches

    @cache
    def needs_at(context: int) -> Needs:
        evaluated = [layer.module for layer in mixture.layers] if dense else []
        try:
            needs = needs_of(mixture.model, streamed, context, evaluated=evaluated, chunk=options.prefill_chunk)
        except Exception as error:  # mlx-lm's model and MLX raise plain exceptions
            raise _cannot_run(folder, mixture.config, error) from None
        return needs.of_rows(options.parallel)

    if options.parallel > 1:
        require_batches(mixture.model)
    try:
        largest = None if images is None else images.largest()
        seen = NO_IMAGES
        if images is not None and largest is not None:
            seen = image_needs(mixture.model, largest, images.largest(SOME_TEXT))
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_run(folder, mixture.config, error) from None
    decoding = 0 if largest is None else HELD_BYTES + MOST_WAITING * prompt_bytes(largest)

    def at_once(needs: Needs) -> int:
        """Most tokens of a pass that verifies drafts."""
        most = getattr(mixture.model, "most_positions", MOST_DEPTH + 1)
        return most if dense else min(most, most_positions(needs.choices))

    whole_weights, tables = WeightBytes.of(mixture), mixture.lookup_tables
    process = cache(process_bytes)  # measured once, so that plans for several contexts can be compared

    adapter = mixture.adapter
    added = 0 if adapter is None else adapter.nbytes

    def demand_of(context: int, weights: WeightBytes) -> Demand:
        needs = needs_at(context)
        # Units lie anywhere in their files. Slots come after loading.
        seeing, held = seen.at(context)
        computing = max(needs.workspace + held, seeing) + decoding
        computing += reading_bytes(options.threads or THREADS, aligned=False) + weights.rows_work
        computing += 0 if ranks is None else exchange_bytes(mixture, options, needs.choices)
        loading = loading_excess_bytes(weights.resident) - needs.kv_cache - weights.expert_layers * weights.expert
        return Demand(
            process=process(),
            resident=sum(weights.resident) + weights.tables - added,
            predictors=0,
            kv_cache=needs.kv_cache,
            workspace=MLX_CACHE_BYTES + max(computing, loading),
            grammars=grammar_bytes(needs.vocabulary, options.parallel),
            drafts=0 if drafts is None else drafts.bytes_at(context, needs, at_once(needs)),
            table_rows=weights.rows_kept,
            parallel=options.parallel,
            adapter=added,
        )

    def demand_at(context: int) -> Demand:
        return demand_of(context, whole_weights)

    free = usable_memory_bytes()

    def divide(total: int | None, demand: Demand, context: int, note: str) -> InPlacePlan:
        def divided(units: UnitCounts, demand: Demand, slot_bytes: int, resident: str, budget: int | None) -> Plan:
            chooser = "none: every token needs every layer" if dense else "none: the router chooses"
            resident += "" if images is None else ", the vision part"
            resident += mixture.part and f"; {mixture.part}"
            drafting = "" if drafts is None else drafts.note
            added_note = "" if adapter is None else adapter.note
            notes = PlanNotes(resident, chooser, kv_cache=note + kv_bits, drafts=drafting, adapter=added_note)
            caches = options.prompt_cache_bytes
            return plan_for_budget(demand, units, slot_bytes, budget, free, context, notes=notes, prompt_caches=caches)

        choices = needs_at(context).choices
        return divide_with_tables(divided, whole_weights, tables, partial(demand_of, context), choices, total)

    def plan_for(total: int | None, context: int | str | None = options.context) -> InPlacePlan:
        made = plan_context(context, positions, demand_at, partial(divide, total), total, free)
        made = replace(made, parameters_bytes=whole_weights.everything)
        # In a shared reading, the model returns no hidden states, and other ranks' layers are not called.
        if made.layer_bytes_per_token and not mixture.part and not (drafts is not None and drafts.of_own_head):
            each = bytes_of_a_shared_token(mixture, streamed)
            made = with_spare_for_chunks(made, each, options.prefill_chunk)
        return with_spare_for_rows(made, tables)

    plan, divided_experts = plan_for(options.budget), None
    if ranks is not None:
        divided_experts = divide_experts(ranks, mixture, plan, needs_at(plan.context).choices, options, zoo)
        plan = divided_experts.plan

    def build(say: Callable[[str], None]) -> Any:
        files = open_files(mixture.files, direct=options.io != "buffered")
        if options.io != "buffered" and not all(file.direct for file in files):
            say(f"note: the file system of {folder} does not read past the page cache; the budget does not count that")
        reader = reader_for(options)
        if options.verify:
            attach_sums(files, ranges_in(mixture, files), reader, say)
            compare_headers(mixture, files)
        if divided_experts is not None and ranks is not None:
            ranks.begin({"counts": divided_experts.counts})
        numbers, layers = mixture.layers_to_stream(plan.pinned)
        if plan.reads_rows:
            mixture.streamed |= mixture.of_tables()
        if adapter is not None:
            adapter.read()
        read_resident(mixture, files if options.verify else None)
        streamer = InPlaceFiles(files, reader)
        if divided_experts is not None and ranks is not None:
            stream_shares(mixture, streamer, divided_experts, ranks, options)
        elif mixture.switches:
            mixture.stream_experts(streamer, plan.expert_slots, options.window)
        if plan.reads_rows:
            stream_tables(tables, streamer, plan.demand.table_rows, compared=options.verify)
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
        model, needs = mixture.model, needs_at(plan.context)
        watched, chooser = ([WholeLayers(held)], "every layer") if dense else (mixture.streamed_experts(), "router")
        attended, most = positions or plan.context, at_once(needs)
        model.flash = Runtime(
            plan, streamer, watched, chooser, needs.vocabulary, attended, images=images, most_positions=most
        )
        model.flash.prefill_tokens = options.prefill_chunk
        share = plan.slot_share
        if plan.layer_bytes_per_token:
            share = 1 - plan.layer_bytes_per_token / plan.parameters_bytes
        kind = "layers" if dense else "experts"
        model.flash.trials = reading_trials(streamer, watched, options, folder, share, kind)
        model.flash.ranks = ranks
        model.flash.adapter = None if adapter is None else adapter.folder
        if plan.chunks_at_once > 1:
            modules = [layer.module for layer in mixture.layers]
            model.flash.shared_reading = SharedReading(modules, plan.chunks_at_once)
        return model

    foresight = Foresight(mixture, lambda: needs_at(plan.context).choices, options)
    return plan, build, plan_for, foresight


def bytes_of_a_shared_token(mixture: InPlaceModel, streamed: list[tuple[Any, Any, StreamedNeed | OneRow]]) -> int:
    """The memory that a token of a prompt takes while other chunks pass a layer; 0 if this model's chunks cannot share
    a reading. streamed: the streamed experts, in the form of `needs_of`."""
    try:
        with stand_ins(streamed):
            modules = [layer.module for layer in mixture.layers]
            return bytes_to_share(mixture.model, modules, plain_cache(mixture.model))
    except Exception:  # whatever a model raises that is called in another way than it expects
        return 0


def _cannot_run(folder: Path, config: dict[str, Any], error: Exception) -> CheckpointError:
    zoo = zoo_of(config) or MLX_LM
    return CheckpointError(
        f"{zoo} cannot run the model that {folder / 'config.json'} describes: {error_line(error)}. "
        "Download the checkpoint again."
    )


def streamed_layers(mixture: InPlaceModel) -> list[tuple[Any, Any, StreamedNeed | OneRow]]:
    """The streamed layers and the lookup tables of a mixture, in the form of `needs_of`."""
    drops_late = mx.default_device() != mx.cpu
    needs = {path: experts_need(tensors, drops_late) for path, tensors in mixture.switches.items()}
    layers = [(*parent_of(mixture.model, path), need) for path, need in needs.items()]
    return [*layers, *(stand_in for table in mixture.lookup_tables for stand_in in table.stand_ins)]
