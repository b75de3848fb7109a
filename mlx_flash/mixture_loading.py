"""A mixture-of-experts checkpoint -> a model whose experts are streamed from it, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import CheckpointError, ReadError
from .flash.checksums import crc32_of, read_header
from .flash.experts import ExpertStreamer
from .flash.plain_files import reading, unreadable
from .flash.reader import Reader, UnitFile
from .flash.system import usable_memory_bytes
from .flash.unit_sums import Ranges
from .kinds import said
from .memory_needs import StreamedNeed, needs_of
from .mixture import Mixture, open_mixture, parent_of
from .plan import MLX_CACHE_BYTES, Demand, Notes, Units, share_budget
from .runtime import Runtime, evaluate_constants
from .streaming_needs import experts_need, loading_excess_bytes, process_bytes, reading_bytes
from .verification import attach_sums


def load_mixture(
    folder: Path,
    budget: int | None,
    window: int | None,
    threads: int,
    context: int,
    io: str,
    say: Callable[[str], None],
    verify: bool = False,
) -> Any:
    """The model of the checkpoint in `folder`, its experts streamed; its `flash` is the Runtime.

    Args:
        folder: of the checkpoint; its config.json is that of a mixture (`is_mixture`).
        budget: bytes for the whole process; None for a share of what is free.
        window: evict by a sliding window of so many tokens; None for the least used lately.
        threads: of the reader.
        context: tokens that the plan makes room for, at most the model's positions.
        io: "direct" past the page cache, or "buffered".
        say: called with the plan, before anything large is allocated.
        verify: compare every expert that is read with a checksum, made now if this was not done before.

    Raises BudgetError, CheckpointError, UnsupportedModelError or ReadError.
    """
    mixture = open_mixture(folder)
    positions = number_of(mixture.config, "max_position_embeddings", context)
    context = min(context, positions)
    try:
        needs = needs_of(mixture.model, streamed_layers(mixture), context)
    except Exception as error:  # mlx-lm's model and MLX raise plain ones
        raise CheckpointError(
            f"mlx-lm cannot run the model that {folder / 'config.json'} describes: {said(error)}. "
            "Download the checkpoint again."
        ) from None
    layers = len(mixture.switches)
    resident = [array.nbytes for _, array in mixture.resident()]
    computing = needs.workspace + reading_bytes(threads, aligned=False)  # experts lie anywhere in their files
    loading = loading_excess_bytes(resident) - needs.kv_cache - layers * mixture.expert_bytes  # before there are slots
    demand = Demand(
        process=process_bytes(),
        resident=sum(resident) + mixture.table_bytes,
        predictors=0,
        kv_cache=needs.kv_cache,
        workspace=MLX_CACHE_BYTES + max(computing, loading),
    )
    free = usable_memory_bytes()
    units = Units(layers, mixture.experts, 1, "experts of each layer")
    notes = Notes("attention, routers, shared experts, embeddings", "none: the router chooses")
    plan = share_budget(demand, units, mixture.expert_bytes, budget, free, context, notes=notes)
    say(plan.describe())
    files = open_files(mixture.files, direct=io == "direct")
    if io == "direct" and not all(file.direct for file in files):
        say(f"note: the file system of {folder} does not read past the page cache; the budget does not count that")
    reader = Reader(threads)
    if verify:
        attach_sums(files, units_in(mixture), reader, say)
    read_resident(mixture)
    streamer = ExpertStreamer(files, reader)
    mixture.stream(streamer, plan.slots, window)
    evaluate_constants(mixture.model)
    model = mixture.model
    model.flash = Runtime(plan, streamer, mixture.layers(), "router", needs.vocabulary, positions)
    return model


def streamed_layers(mixture: Mixture) -> list[tuple[Any, Any, StreamedNeed]]:
    """Those of a mixture, as `needs_of` wants them."""
    drops_late = mx.default_device() != mx.cpu
    needs = {path: experts_need(tensors, drops_late) for path, tensors in mixture.switches.items()}
    return [(*parent_of(mixture.model, path), need) for path, need in needs.items()]


def open_files(files: Sequence[Path], direct: bool) -> list[UnitFile]:
    """Opens all of them or, if one cannot be opened, none. direct: past the page cache, where the disk allows it."""
    opened: list[UnitFile] = []
    try:
        for file in files:
            opened.append(UnitFile(file, direct))
    except BaseException:
        for unit in opened:
            unit.close()
        raise
    return opened


def units_in(mixture: Mixture) -> list[Ranges]:
    """For each file of a mixture, the parts of experts that are read from it."""
    tensors = [tensor for layer in mixture.switches.values() for tensor in layer.values()]
    found = []
    for number in range(len(mixture.files)):
        offsets = [tensor.offsets[tensor.file_of == number] for tensor in tensors]
        lengths = [np.full(len(here), tensor.nbytes) for here, tensor in zip(offsets, tensors, strict=True)]
        found.append(Ranges.of_units(np.concatenate(offsets), np.concatenate(lengths)))
    return found


def read_resident(mixture: Mixture) -> None:
    """Reads every parameter that is not an expert's, tensor by tensor, the largest first. Raises ReadError."""
    from tqdm import tqdm

    arrays = sorted(mixture.resident(), key=lambda item: item[1].nbytes, reverse=True)
    total = sum(array.nbytes for _, array in arrays)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for name, array in arrays:
            try:
                mx.eval(array)
            except RuntimeError as error:  # MLX names neither file nor tensor
                raise _unreadable(mixture, name, error) from None
            bar.update(array.nbytes)


def _unreadable(mixture: Mixture, parameter: str, error: RuntimeError) -> ReadError:
    """What to say when a parameter could not be read: the tensor that it is, or the first one that cannot be read."""
    prefixes = tuple(f"{path}." for path in mixture.switches)
    of_experts = {name for key, names in mixture.sources.items() if key.startswith(prefixes) for name in names}
    wanted = mixture.sources.get(parameter)
    known: list[tuple[Path, str]] = []
    for path in mixture.files:
        try:
            with reading(path):
                entries = read_header(path)[1]
                names = [name for name in entries if name in (wanted or entries.keys() - of_experts)]
                known += [(path, name) for name in names]
            for name in names:
                with reading(path, f"tensor {name}"), path.open("rb") as file:
                    file.seek(entries[name].begin)
                    crc32_of(file, entries[name].end - entries[name].begin)
        except ReadError as found:
            return found
        except ValueError as changed:
            return unreadable(path, EOFError(str(changed)))
    if wanted and known:
        return unreadable(known[0][0], error, f"tensor {known[0][1]}")
    return unreadable(mixture.files[0].parent, error, f"what {parameter} is made of")


def number_of(config: dict[str, Any], key: str, otherwise: int) -> int:
    """From a configuration, or from the part of it that is for the text model; `otherwise` if it is in neither.

    Raises CheckpointError for what is no positive whole number.
    """
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    if value is None:
        return otherwise
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive whole number.")
    return value
