"""Builds the model of a store without weights, and its plan."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..defaults import STORED_PREDICTORS, THREADS
from ..errors import CorruptStoreError, UsageError
from ..flash.files import AGAIN, CHECKSUM_BYTES, Manifest, NeuronLayout, read_manifest
from ..flash.plain_files import reading
from ..flash.system import READ_ALIGNMENT, usable_memory_bytes
from ..layers.activations import Activation
from ..layers.recall import PredictorSetting
from ..source.checkpoint_files import MAX_SMALL_BYTES, small_files_in
from ..source.compared_copies import compared_copies, name_themselves
from ..source.config_counts import count_problem
from ..source.model_kind import first_line
from ..text.batch_generation import require_batches
from ..text.generation_config import read_generation_config
from ..text.tokenizer import load_tokenizer
from . import dense
from .config import read_config
from .context import plan_context
from .draft_model import PlannedDrafts
from .memory_needs import InputShape, Needs, needs_of
from .model_types import CONFIG_ERRORS, model_arguments, model_classes
from .neuron_ranks import divide_neurons, exchanged_bytes
from .options import LoadOptions
from .plan import MLX_CACHE_BYTES, Demand, Plan, PlanNotes, blocks_needed, grammar_bytes, make_plan
from .planned import Planned
from .quantised_cache import quantise_cache
from .ranked_loading import Ranks
from .streaming_needs import loading_excess_bytes, neurons_need, process_bytes, reading_bytes, scratch_bytes


def plan_store(
    folder: Path,
    options: LoadOptions,
    copies: contextlib.ExitStack,
    drafts: PlannedDrafts | None,
    ranks: Ranks | None = None,
) -> Planned:
    """The plan for the store in `folder`, ready to be loaded.

    copies: keeps copies of small files until all is loaded. ranks: those that the neurons are divided among; None for
    this process alone. Raises StoreError and its subclasses, BudgetError and
    UsageError.
    """
    manifest = read_manifest(folder)
    small = copies.enter_context(_small_files_of(folder, manifest))
    config = read_config(small)
    kind = manifest.default_predictor if options.predictor == "auto" else options.predictor
    if kind in STORED_PREDICTORS and kind not in manifest.predictors:
        have = ", ".join(["none", "exact", *manifest.predictors])
        raise UsageError(f"{folder} has no {kind} predictor; it has: {have}.")
    setting = None
    if kind in STORED_PREDICTORS:
        setting = PredictorSetting.of(kind, manifest.predictors[kind], options.recall)
    elif options.recall is not None:
        raise UsageError(f"recall is for a predictor that may miss neurons; {kind} has no threshold. Leave recall out.")
    _check_counts(config, manifest, folder)
    model_class, args_class = model_classes(config)
    try:
        args = model_arguments(args_class, config)
        model = model_class(args)  # its random weights are never evaluated
    except CONFIG_ERRORS as error:
        raise CorruptStoreError(
            f"{folder / 'config.json'}: {first_line(error)}. Convert the checkpoint again."
        ) from None
    tokenizer = load_tokenizer(small, config)
    name_themselves(tokenizer, small, folder)
    if len(model.layers) != manifest.layout.layers:
        raise CorruptStoreError(
            f"{folder / 'config.json'} has {len(model.layers)} layers, but the manifest has "
            f"{manifest.layout.layers}. Convert the checkpoint again."
        )
    _check_ffn(model.layers[0].mlp, manifest, folder)
    size = 1 if ranks is None else ranks.group.size
    plan, divided = _plan(model, manifest, kind, setting, folder, options, drafts, size), None
    if ranks is not None:
        plan, divided = divide_neurons(ranks, manifest, plan, _need(manifest, kind, setting), folder, options)

    def build(say: Callable[[str], None]) -> Any:
        if setting is not None:
            say(setting.describe())
        if ranks is not None and divided is not None:
            ranks.begin({"counts": divided.counts, "need": divided.need})
        return dense.build(model, manifest, plan, kind, setting, folder, options, say, ranks, divided)

    def plan_for(total: int, context: int | str | None = options.context) -> Plan:
        asked = replace(options, memory=total, context=context)
        return _plan(model, manifest, kind, setting, folder, asked, drafts, size)

    return Planned(plan, tokenizer, read_generation_config(small), build, plan_for, drafts=drafts)


def _small_files_of(folder: Path, manifest: Manifest) -> contextlib.AbstractContextManager[Path]:
    """Copies of the files of the configuration and the tokenizer, after comparing them with the manifest.

    A file that is not in the manifest is not compared. It is ignored if it is a link or too large. Raises
    CorruptStoreError or ReadError.
    """

    def compare(path: Path, _: os.stat_result, content: bytes) -> None:
        expected = manifest.files.get(str(path.relative_to(folder)), {}).get("sha256")
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise CorruptStoreError(f"{path} does not match its checksum. {AGAIN}")

    def counts(name: str) -> bool:
        path = folder / name
        return name in manifest.files or (not path.is_symlink() and path.stat().st_size <= MAX_SMALL_BYTES)

    with reading(folder):
        names = [name for name in small_files_in(folder) if counts(name)]
    return compared_copies(folder, names, compare)


def _check_counts(config: dict[str, Any], manifest: Manifest, folder: Path) -> None:
    """Checks the counts in the configuration before a model is built from them. Raises CorruptStoreError."""
    layout = manifest.layout
    tensors = len(manifest.files[Manifest.resident_file]["crc32"]) + layout.layers * len(layout.parts)
    longest = max(layout.neurons, layout.width)
    if problem := count_problem(config, tensors, longest):
        raise CorruptStoreError(
            f"{folder / 'config.json'} does not describe this store: {problem}. Convert the checkpoint again."
        )


def _check_ffn(ffn: Any, manifest: Manifest, folder: Path) -> None:
    """Checks the neurons' shape and activation, because wrong ones give wrong text. Raises CorruptStoreError."""
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(ffn.parameters())
    layout = manifest.layout
    expected = [(layout.neurons, layout.width)] * (len(layout.parts) - 1) + [(layout.width, layout.neurons)]
    found = [value.shape for _, value in parameters if value.ndim == 2]
    try:
        activation = Activation(**manifest.activation)
    except ValueError as error:
        raise CorruptStoreError(f"{folder}: {error}. Convert the checkpoint again.") from None
    own = getattr(ffn, "_activation", Activation())
    if sorted(found) != sorted(expected) or activation != own:
        raise CorruptStoreError(
            f"{folder / 'config.json'} has an FFN {sorted(found)} with {own}, but the manifest has {sorted(expected)} "
            f"with {activation}. Convert the checkpoint again."
        )


def _plan(
    model: Any,
    manifest: Manifest,
    kind: str,
    setting: PredictorSetting | None,
    folder: Path,
    options: LoadOptions,
    drafts: PlannedDrafts | None,
    ranks: int,
) -> Plan:
    """ranks: the number of those that hold neurons."""
    layout = manifest.layout
    dtype = dense.compute_dtype(manifest.resident_dtype)
    sizes = dense.resident_sizes(folder, manifest, dtype.size)
    parts = dense.slot_parts(manifest, kind)
    selects_up_to = 0 if kind == "none" else manifest.decode_tokens
    need = neurons_need(layout, selects_up_to)
    streamed = [(layer, "mlp", need) for layer in model.layers]
    try:
        kv_bits = "" if options.kv_bits is None else f", {quantise_cache(model, streamed, options.kv_bits)}"
    except CONFIG_ERRORS as error:
        raise _cannot_call(folder, error) from None

    @cache
    def needs_at(context: int) -> Needs:
        try:
            needs = needs_of(model, streamed, context, dtype, chunk=options.prefill_chunk)
        except CONFIG_ERRORS as error:
            raise _cannot_call(folder, error) from None
        return needs.of_rows(options.parallel)

    if options.parallel > 1:
        require_batches(model)
    at_load = 0
    if kind == "exact":
        matrix = layout.neurons * layout.width * dtype.size
        predictor_bytes = layout.layers * matrix
        # The last matrix is concatenated from its pieces.
        at_load = matrix + need(InputShape(0, layout.width, dtype.size, 1))
    else:
        tensors = dense.predictor_tensors(folder, manifest, kind)
        stored = {} if tensors is None else tensors.arrays
        predictor_bytes = sum(dense.in_compute_dtype(name, tensor, dtype).nbytes for name, tensor in stored.items())
    process = cache(process_bytes)  # measured once, so that plans for several contexts can be compared
    slot_bytes = layout.part_range(parts)[1]
    free = usable_memory_bytes()
    shares = _need(manifest, kind, setting)

    def demand_at(context: int) -> Demand:
        needs = needs_at(context)
        threads = options.threads or THREADS
        demand = demand_of(layout, parts, sizes, predictor_bytes, needs, threads, process(), at_load, options.parallel)
        drafting = 0 if drafts is None else drafts.bytes_at(context, needs, manifest.decode_tokens)
        exchanged = exchanged_bytes(layout, options.prefill_chunk, ranks) if ranks > 1 else 0
        return replace(demand, drafts=drafting, workspace=demand.workspace + exchanged)

    def divide(demand: Demand, context: int, note: str) -> Plan:
        notes = replace(_notes(manifest, kind, note + kv_bits), drafts="" if drafts is None else drafts.note)
        return make_plan(
            demand,
            layout,
            slot_bytes,
            options.budget,
            free,
            context,
            kind != "none",
            shares,
            notes,
            options.prompt_cache_bytes,
        )

    positions = getattr(model.args, "max_position_embeddings", None)
    return plan_context(options.context, positions, demand_at, divide, options.budget, free)


def _cannot_call(folder: Path, error: Exception) -> CorruptStoreError:
    return CorruptStoreError(
        f"{folder / 'config.json'} describes a model that cannot be called: {first_line(error)}. "
        "Convert the checkpoint again."
    )


def demand_of(
    layout: NeuronLayout,
    parts: tuple[str, ...],
    resident: Sequence[int],
    predictors: int,
    needs: Needs,
    threads: int,
    process: int,
    at_load: int = 0,
    parallel: int = 1,
) -> Demand:
    """The memory that a store's model needs apart from its slots.

    parts: kept in slots. resident: bytes of each resident tensor, as it is in memory. predictors: bytes of all of them.
    threads: of the reader. process: bytes of the process. at_load: bytes that loading needs at most beside what stays.
    parallel: number of answers at once, which `needs` are for.
    """
    offset, slot_bytes = layout.part_range(parts)
    computing = needs.workspace + reading_bytes(threads, aligned=(offset | slot_bytes) % READ_ALIGNMENT == 0)
    # The KV cache is empty while the model is loaded, and the predictors come last.
    loading = max(at_load, loading_excess_bytes(resident) - predictors) - needs.kv_cache
    sums = 2 * layout.layers * layout.blocks * CHECKSUM_BYTES  # sums of blocks and of the slots' parts
    return Demand(
        process=process,
        resident=sum(resident),
        predictors=predictors,
        kv_cache=needs.kv_cache,
        workspace=scratch_bytes(layout) + sums + MLX_CACHE_BYTES + max(computing, loading),
        grammars=grammar_bytes(needs.vocabulary, parallel),
        parallel=parallel,
    )


def _notes(manifest: Manifest, kind: str, kv_cache: str) -> PlanNotes:
    resident = PlanNotes().resident
    if manifest.resident_bits < 16:
        resident += f", {manifest.resident_bits} bits" + ("" if dense.backend_multiplies_packed() else " widened")
    predictors = kind
    if kind == "exact" and len(manifest.layout.parts) == 3:
        predictors += ": all gates, a third of the FFN; the other two thirds are streamed"
    elif kind == "exact":
        predictors += ": all up projections, half of the FFN; the other half is streamed"
    slots = f", {manifest.layout.bits} bits" if manifest.layout.quantised else ""
    return PlanNotes(resident, predictors, slots, kv_cache)


def _need(manifest: Manifest, kind: str, setting: PredictorSetting | None) -> list[float]:
    """Share of each layer's blocks that a token is expected to need, measured on calibration text."""
    report = manifest.predictors[manifest.default_predictor]
    shares = report["active" if kind == "exact" else "predicted"] if setting is None else setting.predicted
    every = range(manifest.layout.layers) if kind == "none" else manifest.all_neurons_layers
    if kind != "exact":
        shares = [1.0 if layer in every else share for layer, share in enumerate(shares)]
    return blocks_needed(shares, manifest.layout)
