"""A path or a Hugging Face id -> (model, tokenizer), as mlx-lm gives them, with the FFN streamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..defaults import CONTEXT, IO_MODES, PREDICTORS, STORED_PREDICTORS, THREADS
from ..errors import CheckpointError, CorruptStoreError, FlashError, ReadError, UsageError
from ..flash.files import AGAIN, CHECKSUM_BYTES, Manifest, is_store, read_manifest
from ..flash.plain_files import reading, unreadable
from ..flash.random_state import kept_random_state
from ..flash.system import READ_ALIGNMENT, usable_memory_bytes
from ..layers.activations import Activation
from ..layers.recall import Setting
from ..source.checkpoint_files import MAX_SMALL_BYTES, files_in, small_files, small_files_in
from ..source.checkpoint_tensors import extent_of
from ..source.compared_copies import compared_copies, name_themselves
from ..source.config_counts import count_problem
from ..source.model_kind import is_mixture, refuse_own_code, said
from ..source.resolve import find_source, store_of
from ..text.encoding import is_from_library
from ..text.generation_config import check_end_tokens, read_generation_config, vocabulary_of
from ..text.tokenizer_files import WITHOUT_VOCABULARY, fault_in
from . import dense
from .expert_files import open_mixture
from .memory_needs import Call, needs_of
from .mixture import load_mixture
from .model_types import CONFIG_ERRORS, activation_of, first_line, model_arguments, model_classes
from .plan import MLX_CACHE_BYTES, Demand, Notes, Plan, blocks_needed, make_plan, parse_memory
from .runtime import BUFFER_CACHE
from .streaming_needs import loading_excess_bytes, neurons_need, process_bytes, reading_bytes, scratch_bytes
from .verification import compare_small_file

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


# -- the pieces of a model -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """mlx-lm's TokenizerWrapper, with our Detokenizer. Raises CheckpointError if no tokenizer files are usable."""
    from mlx_lm.utils import load_tokenizer as load_mlx_lm_tokenizer

    from ..text.detokenizer import used_by_mlx_lm

    if not is_store(folder):
        files_in(folder)  # raises for what is not a file, or leads out of the folder
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer files (expected one of {', '.join(TOKENIZER_FILES)}).")
    # Families that transformers lacks bring code of their own: it would ask whether to run it, or warn of them.
    warns = logging.getLogger("transformers.configuration_utils")
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        eos_token_ids = (config or {}).get("eos_token_id")
        with used_by_mlx_lm():
            extra = {"trust_remote_code": False} | _older_template(folder)
            tokenizer = load_mlx_lm_tokenizer(folder, extra, eos_token_ids=eos_token_ids)
        # It warns once of a text that is longer than `model_max_length`; what is too long is refused here, by the plan.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return tokenizer
    except BaseException as error:  # tokenizers raises plain ones, which name no file
        if not is_from_library(error):
            raise
        raise _tokenizer_error(folder, error) from None
    finally:
        warns.setLevel(level)


def _tokenizer_error(folder: Path, error: BaseException) -> FlashError:
    """What to raise for another library's error: one that names the file, if one of them cannot be read."""
    present = [name for name in small_files([path.name for path in folder.iterdir() if path.is_file()])]
    for name in present:
        try:
            with reading(folder / name):
                (folder / name).read_bytes()
        except ReadError as found:
            return found
    remedy = (
        "Convert the checkpoint again, with sound files." if is_store(folder) else "Correct it, or download it again."
    )
    with reading(folder):
        if fault := fault_in(folder):
            return CheckpointError(f"the tokenizer in {folder} cannot be loaded: {fault}. {remedy}")
    if isinstance(error, OSError) or (isinstance(error, Exception) and "os error" in str(error)):  # Rust's
        return unreadable(folder, error, f"one of {', '.join(present)}")
    if set(present) <= WITHOUT_VOCABULARY:
        return CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: no file there has a vocabulary (expected tokenizer.json, "
            f"tokenizer.model, vocab.json or another; found {', '.join(present)}). {remedy}"
        )
    problem = said(error) if isinstance(error, Exception) else first_line(error)
    return CheckpointError(
        f"the tokenizer in {folder} cannot be loaded: {problem}. Download its files ({', '.join(present)}) again."
    )


def _older_template(folder: Path) -> dict[str, Any]:
    """The chat template of chat_template.json, which transformers reads for processors only; {} beside a newer one."""
    path, settings = folder / "chat_template.json", folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "chat_template.jinja").is_file():
        return {}
    if settings.is_file() and json.loads(settings.read_bytes()).keys() & {"chat_template", "chat_template_type"}:
        return {}
    return {"chat_template": json.loads(path.read_bytes())["chat_template"]}


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    memory: str | int | None = None,
    predictor: str = "auto",
    recall: float | None = None,
    window: int | None = None,
    threads: int = THREADS,
    context: int = CONTEXT,
    io: str = "direct",
    verify: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Any, Any]:
    """Loads a store (or converts a checkpoint first) within a memory budget.

    Args:
        path: folder of a store or of a checkpoint, or a Hugging Face id; None for the packaged demo model.
        revision: of the Hugging Face repository: a branch, a tag or a commit; None for its main branch.
        memory: budget for the whole process, "6GB" or bytes; None for a share of what is free.
        predictor: "auto" (the store's default), "none", "exact", "lowrank", "shadow" or "imported".
        recall: share of the active neurons that a stored predictor is to catch; None for what the store was made for.
        window: evict by a sliding window of so many tokens; None for the least used lately.
        threads: reader threads.
        context: tokens the plan makes room for (at most the model's positions).
        io: "direct" past the page cache, or "buffered".
        verify: compare what is read of a mixture's checkpoint with checksums, every expert at every read; the first
            such load makes them: it reads the whole checkpoint.
        say: called with the plan and notes, before anything large is allocated.

    Returns:
        (model, tokenizer) for `mlx_flash.stream_generate` or mlx-lm's own functions. `model.flash` is the Runtime.

    A mixture of experts is read from the checkpoint as it is, without a conversion.

    What is read of a store is compared with its checksums, always.

    MLX's settings are the process's. Until the last model is closed (`model.flash.close()`), MLX keeps at most 32 MiB
    of freed buffers (`mx.set_cache_limit`); where there is no g++, `mx.compile` is switched off for good on the CPU
    backend, which cannot compile without one. Its random state (`mx.random.state`) is left as it was.

    Raises:
        BudgetError, UsageError, StoreError and its kinds, CheckpointError, ConversionError, ReadError.
    """
    _check_arguments(predictor, window, threads, context, io)
    budget = None if memory is None else parse_memory(memory)
    name = None if path is None else os.fspath(path)
    source = find_source(name, revision, say)
    _import_mlx_lm()  # a second, which a name that is refused does not take
    with BUFFER_CACHE.limited(), kept_random_state(), contextlib.ExitStack() as copies:
        return _load(source, name, budget, predictor, recall, window, threads, context, io, say, verify, copies)


def _load(
    source: Path,
    name: str | None,
    budget: int | None,
    predictor: str,
    recall: float | None,
    window: int | None,
    threads: int,
    context: int,
    io: str,
    say: Callable[[str], None],
    verify: bool,
    copies: contextlib.ExitStack,
) -> tuple[Any, Any]:
    """`load` of a folder. name: what a user called it. copies: keeps those of small files until all is loaded."""
    if problem := _unencodable(source):
        raise UsageError(f"{source!s} cannot be used: {problem}. Rename it.")
    small = source
    if verify and not is_store(source):
        files_in(source)  # raises for what is not a file, or leads out of the folder
        small = copies.enter_context(compared_copies(source, small_files_in(source), compare_small_file))
    if holds_mixture(source, small):
        if predictor != "auto":
            raise UsageError(f"{source} is a mixture of experts: its router chooses, no predictor ({predictor}) does.")
        if recall is not None:
            raise UsageError(f"{source} is a mixture of experts: its router misses nothing. Leave recall out.")
        _check_compiler(say)
        config, defaults = _read_config(small), read_generation_config(small)
        tokenizer = load_tokenizer(small, config)  # first: the plan counts what the process has by then
        name_themselves(tokenizer, small, source)
        mixture = open_mixture(source, small)
        copies.close()  # the first time, all weights are read and compared now
        model = load_mixture(source, mixture, budget, window, threads, context, io, say, verify)
        model.flash.defaults = defaults
        return model, tokenizer
    if not is_store(source):
        config = _read_config(source)
        activation_of(config, source)  # refused here, before a conversion is begun
        read_generation_config(source)
    folder = store_of(source, name, say)
    manifest = read_manifest(folder)
    small = copies.enter_context(_copies_of_a_store(folder, manifest))
    config, defaults = _read_config(small), read_generation_config(small)
    kind = manifest.default_predictor if predictor == "auto" else predictor
    if kind in STORED_PREDICTORS and kind not in manifest.predictors:
        have = ", ".join(["none", "exact", *manifest.predictors])
        raise UsageError(f"{folder} has no {kind} predictor; it has: {have}.")
    setting = None
    if kind in STORED_PREDICTORS:
        setting = Setting.of(kind, manifest.predictors[kind], recall)
    elif recall is not None:
        raise UsageError(f"recall is for a predictor that may miss a neuron; {kind} has no threshold. Leave it out.")
    _check_counts(config, manifest, folder)
    model_class, args_class = model_classes(config)
    try:
        args = model_arguments(args_class, config)
        model = model_class(args)  # its random weights are never evaluated
        context = min(context, getattr(args, "max_position_embeddings", context))
    except CONFIG_ERRORS as error:
        raise CorruptStoreError(
            f"{folder / 'config.json'}: {first_line(error)}. Convert the checkpoint again."
        ) from None
    tokenizer = load_tokenizer(small, config)
    name_themselves(tokenizer, small, folder)
    _check_compiler(say)
    if len(model.layers) != manifest.layout.layers:
        raise CorruptStoreError(
            f"{folder / 'config.json'} speaks of {len(model.layers)} layers, the manifest of "
            f"{manifest.layout.layers}. Convert the checkpoint again."
        )
    _check_ffn(model.layers[0].mlp, manifest, folder)
    plan = _plan(model, manifest, kind, setting, folder, budget, context, threads)
    say(plan.describe())
    if setting is not None:
        say(setting.describe())
    model = dense.build(model, manifest, plan, kind, setting, folder, window, threads, io, say)
    model.flash.defaults = defaults
    return model, tokenizer


def _unencodable(path: Path) -> str | None:
    """Why MLX, which wants UTF-8, cannot open what lies at a path; None: it can."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        return "its name, or that of a folder above it, is not UTF-8 text"
    return None


def _copies_of_a_store(folder: Path, manifest: Manifest) -> contextlib.AbstractContextManager[Path]:
    """Of its configuration and tokenizer, compared with the manifest; a file that was put beside them is compared with
    nothing, and passed over where it cannot be one of theirs. Raises CorruptStoreError or ReadError.
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
    """Before a model is built from them. Raises CorruptStoreError."""
    layout = manifest.layout
    tensors = len(manifest.files[Manifest.resident_file]["crc32"]) + layout.layers * len(layout.parts)
    longest = max(layout.neurons, layout.width)
    if problem := count_problem(config, tensors, longest):
        raise CorruptStoreError(
            f"{folder / 'config.json'} does not describe this store: {problem}. Convert the checkpoint again."
        )


def _check_ffn(ffn: Any, manifest: Manifest, folder: Path) -> None:
    """Neurons of another shape or activation than the model's give wrong text. Raises CorruptStoreError."""
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
            f"{folder / 'config.json'} speaks of an FFN {sorted(found)} with {own}, the manifest of {sorted(expected)} "
            f"with {activation}. Convert the checkpoint again."
        )


def _import_mlx_lm() -> None:
    try:
        import_module("mlx_lm.utils")
    except ValueError as error:  # it raises the limit of open files when it is imported
        raise FlashError(f"mlx-lm cannot be loaded: {error}. Allow 4096 open files: `ulimit -Hn 4096`.") from None


def _check_compiler(say: Callable[[str], None]) -> None:
    """`mx.compile` on the CPU backend runs g++; where there is none, compile is switched off."""
    folder = os.environ.get("TMPDIR")
    if mx.default_device() == mx.cpu and folder and not os.access(folder, os.W_OK | os.X_OK):
        raise FlashError(
            f"TMPDIR is {folder}, which is not a folder that can be written to; MLX compiles there. Set it to one, or "
            "unset it."
        )
    if mx.default_device() == mx.cpu and shutil.which("g++") is None:
        mx.disable_compile()
        say("note: there is no g++ here, so mx.compile is off (on Debian or Ubuntu: apt-get install g++)")


def _check_arguments(predictor: str, window: int | None, threads: int, context: int, io: str) -> None:
    if predictor not in PREDICTORS:
        raise UsageError(f"predictor is {predictor!r}, expected one of {', '.join(PREDICTORS)}.")
    if window is not None and not 1 <= window <= 10**6:
        raise UsageError(f"window is {window}, expected 1 to 1000000 tokens.")
    if not 1 <= threads <= 256:
        raise UsageError(f"threads is {threads}, expected 1 to 256.")
    if context < 1:
        raise UsageError(f"context is {context}, expected at least 1 token.")
    if io not in IO_MODES:
        raise UsageError(f"io is {io!r}, expected 'direct' or 'buffered'.")


def holds_mixture(source: Path, small: Path | None = None) -> bool:
    """Whether a folder is the checkpoint of a mixture of experts. small: where its configuration and its index are
    read; None: in the folder. Raises CheckpointError or UnsupportedModelError.
    """
    if is_store(source):
        return False
    config = _read_config(small or source)
    refuse_own_code(config, source)
    extent = extent_of(source, small)
    if problem := count_problem(config, extent.tensors, extent.longest):
        raise CheckpointError(
            f"{source / 'config.json'} does not describe this checkpoint: {problem}. Download it again."
        )
    return is_mixture(config, source)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it, with the stop tokens of generation_config.json. Errors name the file."""
    from mlx_lm.utils import load_config

    if not is_store(folder):
        files_in(folder)  # raises for what is not a file, or is too large
    vocabulary, ends = None, None
    for name in CONFIG_FILES:
        path = folder / name
        if not path.exists() and name != CONFIG_FILES[0]:
            continue
        with reading(path):
            content = path.read_bytes()
        try:
            if not isinstance(found := json.loads(content), dict):
                raise ValueError(f"it holds no JSON object but {found!r:.20}")
        except (ValueError, RecursionError) as error:
            if is_store(folder):
                raise CorruptStoreError(f"{path}: {error}. Convert the checkpoint again.") from None
            raise CheckpointError(f"{path} cannot be used: {error}. Download the checkpoint again.") from None
        if name == CONFIG_FILES[0]:
            vocabulary = vocabulary_of(found)
        check_end_tokens(path, found, vocabulary)
        ends = found.get("eos_token_id")
    try:
        config: dict[str, Any] = load_config(folder)
        if ends == 0:  # of generation_config.json: mlx-lm takes it for none
            config["eos_token_id"] = 0
    except (OSError, TypeError, ValueError, RecursionError) as error:  # now, and not a moment ago
        raise unreadable(folder, error, " or ".join(CONFIG_FILES)) from None
    return config


def _plan(
    model: Any,
    manifest: Manifest,
    kind: str,
    setting: Setting | None,
    folder: Path,
    budget: int | None,
    context: int,
    threads: int,
) -> Plan:
    layout = manifest.layout
    dtype = dense.compute_dtype(manifest.resident_dtype)
    sizes = dense.resident_sizes(folder, manifest, dtype.size)
    parts = dense.slot_parts(manifest, kind)
    selects_up_to = 0 if kind == "none" else manifest.decode_tokens
    need = neurons_need(layout, selects_up_to)
    try:
        needs = needs_of(model, [(layer, "mlp", need) for layer in model.layers], context, dtype)
    except CONFIG_ERRORS as error:
        raise CorruptStoreError(
            f"{folder / 'config.json'} describes a model that cannot be called: {first_line(error)}. "
            "Convert the checkpoint again."
        ) from None
    offset, slot_bytes = layout.part_range(parts)
    computing = needs.workspace + reading_bytes(threads, aligned=(offset | slot_bytes) % READ_ALIGNMENT == 0)
    if kind == "exact":
        matrix = layout.neurons * layout.width * dtype.size
        predictor_bytes = layout.layers * matrix
        # The last matrix is put together of its pieces.
        computing = max(computing, matrix + need(Call(0, layout.width, dtype.size, 1)) - needs.kv_cache)
    else:
        tensors = dense.predictor_tensors(folder, manifest, kind)
        stored = {} if tensors is None else tensors.arrays
        predictor_bytes = sum(dense.as_used(name, tensor, dtype).nbytes for name, tensor in stored.items())
    loading = loading_excess_bytes(sizes) - needs.kv_cache - predictor_bytes
    sums = 2 * layout.layers * layout.blocks * CHECKSUM_BYTES  # of blocks, and of what slots hold of them
    demand = Demand(
        process=process_bytes(),
        resident=sum(sizes),
        predictors=predictor_bytes,
        kv_cache=needs.kv_cache,
        workspace=scratch_bytes(layout) + sums + MLX_CACHE_BYTES + max(computing, loading),
    )
    free = usable_memory_bytes()
    shares = _need(manifest, kind, setting)
    notes = _notes(manifest, kind)
    return make_plan(demand, layout, slot_bytes, budget, free, context, kind != "none", shares, notes)


def _notes(manifest: Manifest, kind: str) -> Notes:
    resident = Notes().resident
    if manifest.resident_bits < 16:
        resident += f", {manifest.resident_bits} bits" + ("" if dense.keeps_packed() else " widened")
    predictors = kind
    if kind == "exact" and len(manifest.layout.parts) == 3:
        predictors += ": all gates, a third of the FFN; the other two thirds are streamed"
    elif kind == "exact":
        predictors += ": all up projections, half of the FFN; the other half is streamed"
    return Notes(resident, predictors, f", {manifest.layout.bits} bits" if manifest.layout.quantised else "")


def _need(manifest: Manifest, kind: str, setting: Setting | None) -> list[float]:
    """Share of each layer's blocks that a token is expected to need, measured on calibration text."""
    report = manifest.predictors[manifest.default_predictor]
    shares = report["active" if kind == "exact" else "predicted"] if setting is None else setting.predicted
    every = range(manifest.layout.layers) if kind == "none" else manifest.all_neurons_layers
    if kind != "exact":
        shares = [1.0 if layer in every else share for layer, share in enumerate(shares)]
    return blocks_needed(shares, manifest.layout)
