"""Plans and loads a mixture-of-experts checkpoint, with its experts streamed, within a memory budget."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ReadError, UnsupportedModelError, UsageError
from ..flash.host_arrays import to_bytes
from ..flash.in_place import InPlaceFiles
from ..flash.plain_files import reading, unreadable
from ..flash.reader import Reader
from ..flash.safetensors_file import crc32_of, read_header
from ..flash.system import usable_memory_bytes
from ..flash.unit_file import UnitFile
from ..flash.unit_sums import Ranges
from ..layers.experts import most_positions
from ..source.model_kind import error_line
from .config import number_of
from .context import plan_context
from .draft_model import PlannedDrafts
from .expert_files import Mixture, parent_of
from .memory_needs import Needs, StreamedNeed, needs_of
from .options import LoadOptions
from .plan import MLX_CACHE_BYTES, Demand, Plan, PlanNotes, UnitCounts, grammar_bytes, plan_for_budget
from .provenance import primitives_of
from .quantised_cache import quantise_cache
from .runtime import Runtime, evaluate_constants
from .streaming_needs import experts_need, loading_excess_bytes, process_bytes, reading_bytes
from .verification import attach_sums, differs


def plan_mixture(
    folder: Path, mixture: Mixture, options: LoadOptions, drafts: PlannedDrafts | None = None
) -> tuple[Plan, Callable[[Callable[[str], None]], Any]]:
    """The plan for the checkpoint in `folder`, and a function that loads its model. The model's `flash` is the Runtime.

    folder: the checkpoint's folder, whose config.json is that of a mixture (`is_mixture`). mixture: the checkpoint's,
    from `open_mixture`. With `options.verify`, everything that is read is compared with checksums: tensors that are
    loaded once, and every expert at every read. Loading makes the checksums if they were not made before.
    drafts: what will draft tokens; None for nothing.

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

    @cache
    def needs_at(context: int) -> Needs:
        try:
            return needs_of(mixture.model, streamed, context)
        except Exception as error:  # mlx-lm's model and MLX raise plain exceptions
            raise _cannot_run(folder, error) from None

    layers = len(mixture.switches)
    resident = [array.nbytes for _, array in mixture.resident()]
    process = cache(process_bytes)  # measured once, so that plans for several contexts can be compared

    def demand_at(context: int) -> Demand:
        needs = needs_at(context)
        # Experts lie anywhere in their files.
        computing = needs.workspace + reading_bytes(options.threads, aligned=False)
        loading = loading_excess_bytes(resident) - needs.kv_cache - layers * mixture.expert_bytes  # slots come later
        return Demand(
            process=process(),
            resident=sum(resident) + mixture.table_bytes,
            predictors=0,
            kv_cache=needs.kv_cache,
            workspace=MLX_CACHE_BYTES + max(computing, loading),
            grammars=grammar_bytes(needs.vocabulary),
            drafts=0 if drafts is None else drafts.bytes_at(context, needs, most_positions(needs.choices)),
        )

    free = usable_memory_bytes()
    units = UnitCounts(layers, mixture.experts, 1, "experts of each layer")

    def divide(demand: Demand, context: int, note: str) -> Plan:
        notes = PlanNotes(
            "attention, routers, shared experts, embeddings",
            "none: the router chooses",
            kv_cache=note + kv_bits,
            drafts="" if drafts is None else drafts.note,
        )
        return plan_for_budget(
            demand,
            units,
            mixture.expert_bytes,
            options.budget,
            free,
            context,
            notes=notes,
            prompt_caches=options.prompt_cache_bytes,
        )

    plan = plan_context(options.context, positions, demand_at, divide, options.budget, free)

    def build(say: Callable[[str], None]) -> Any:
        files = open_files(mixture.files, direct=options.io == "direct")
        if options.io == "direct" and not all(file.direct for file in files):
            say(f"note: the file system of {folder} does not read past the page cache; the budget does not count that")
        reader = Reader(options.threads)
        if options.verify:
            attach_sums(files, ranges_in(mixture, files), reader, say)
            compare_headers(mixture, files)
        read_resident(mixture, files if options.verify else None)
        streamer = InPlaceFiles(files, reader)
        mixture.stream(streamer, plan.slots, options.window)
        evaluate_constants(mixture.model)
        model = mixture.model
        needs = needs_at(plan.context)
        model.flash = Runtime(
            plan,
            streamer,
            mixture.layers(),
            "router",
            needs.vocabulary,
            positions or plan.context,
            most_positions=most_positions(needs.choices),
        )
        return model

    return plan, build


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


def open_files(files: Sequence[Path], direct: bool) -> list[UnitFile]:
    """Opens all files, or none if one cannot be opened. direct: read past the page cache, where the disk allows it."""
    opened: list[UnitFile] = []
    try:
        for file in files:
            opened.append(UnitFile(file, direct))
    except BaseException:
        for unit in opened:
            unit.close()
        raise
    return opened


def ranges_in(mixture: Mixture, files: Sequence[UnitFile]) -> list[Ranges]:
    """The ranges that are read of each file of a mixture: its header, its parts of experts, its other tensors.

    Raises ReadError, also for a header that changed after the model was built.
    """
    tensors = [tensor for layer in mixture.switches.values() for tensor in layer.values()]
    of_experts = mixture.of_experts
    found = []
    for number, file in enumerate(files):
        header = _header_of(mixture, number, file)
        counted = {name: entry for name, (holder, entry) in mixture.entries.items() if holder == number}
        others = [entry for name, entry in counted.items() if name not in of_experts]
        offsets = [tensor.offsets[tensor.file_of == number] for tensor in tensors]
        lengths = [np.full(len(here), tensor.nbytes) for here, tensor in zip(offsets, tensors, strict=True)]
        offsets.append(np.array([0, *(entry.begin for entry in others)]))
        lengths.append(np.array([len(header), *(entry.end - entry.begin for entry in others)]))
        found.append(Ranges.of_units(np.concatenate(offsets), np.concatenate(lengths)))
    return found


def _header_of(mixture: Mixture, number: int, file: UnitFile) -> bytes:
    """The header of a mixture's file, read again. Raises ReadError if the model was built from another one."""
    counted = {name: entry for name, (holder, entry) in mixture.entries.items() if holder == number}
    with reading(file.path, "its header"):
        try:
            header, entries = read_header(file.path)
        except ValueError:
            raise differs(file.path, "its header") from None
    if not counted.items() <= entries.items():
        raise differs(file.path, "its header")
    return header


def compare_headers(mixture: Mixture, files: Sequence[UnitFile]) -> None:
    """Compares the headers that the model was built from with the sums of the files. Raises ReadError."""
    for number, file in enumerate(files):
        if not _matches(file, 0, _header_of(mixture, number, file)):
            raise differs(file.path, "its header")


def _matches(file: UnitFile, offset: int, found: bytes | memoryview) -> bool:
    """Whether bytes match the sums of a file at `offset`."""
    assert file.sums is not None
    if not len(found):
        return True
    try:
        checks = file.sums.checks(np.array([offset]), len(found))
    except ValueError:  # the file has no sums for this range
        return False
    return all(zlib.crc32(found[at : at + count]) == expected for at, count, expected in checks.tolist())


def read_resident(mixture: Mixture, files: Sequence[UnitFile] | None = None) -> None:
    """Reads every parameter that is not an expert's, tensor by tensor, the largest first.

    files: the mixture's files, whose sums are compared with all tensors; None to compare nothing.
    Raises ReadError, or UnsupportedModelError if a tensor cannot be compared.
    """
    from tqdm import tqdm

    if files is None:
        mixture.tensors.clear()  # each would stay in memory beside the arrays made of it
    known = {source for names in mixture.sources.values() for source in names}
    unknown = [name for name in mixture.tensors if name not in known]
    arrays = sorted(mixture.resident(), key=lambda item: item[1].nbytes, reverse=True)
    total = sum(array.nbytes for _, array in arrays)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for name, array in arrays:
            try:
                mx.eval(array)
            except RuntimeError as error:  # MLX names neither file nor tensor
                raise _unreadable(mixture, name, error) from None
            if files is not None:
                _compare_read(mixture, files, mixture.sources.get(name, unknown))
            bar.update(array.nbytes)
    if files is not None:
        of_experts = mixture.of_experts
        _compare_read(mixture, files, [name for name in mixture.tensors if name not in of_experts])
        for name, tensor in mixture.tensors.items():
            if name in of_experts and not primitives_of(tensor):
                raise UnsupportedModelError(
                    f"{mixture.files[0].parent}: mlx-lm makes more than experts of {name}, and --verify cannot compare "
                    "the bytes that it reads of it. Run it without --verify."
                )
    mixture.tensors.clear()


def _compare_read(mixture: Mixture, files: Sequence[UnitFile], names: Sequence[str]) -> None:
    """Compares the checkpoint's tensors that were read with their sums, and releases them. Raises ReadError."""
    for name in names:
        if (tensor := mixture.tensors.get(name)) is not None and not primitives_of(tensor):
            number, entry = mixture.entries[name]
            if not _matches(files[number], entry.begin, to_bytes(tensor).data):
                raise differs(files[number].path, f"tensor {name}")
            del mixture.tensors[name], tensor


def _unreadable(mixture: Mixture, parameter: str, error: RuntimeError) -> ReadError:
    """The error for a parameter that cannot be read. It names the parameter's tensor, or the first unreadable one."""
    of_experts = mixture.of_experts
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
    return unreadable(mixture.files[0].parent, error, f"a tensor of {parameter}")
