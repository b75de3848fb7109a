"""A path or a Hugging Face id -> (model, tokenizer), as mlx-lm gives them, with the FFN streamed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .convert.families import family_of
from .defaults import CONTEXT, IO_MODES, PREDICTORS, STORED_PREDICTORS, THREADS
from .errors import (
    CheckpointError,
    CorruptStoreError,
    FlashError,
    MissingTensorError,
    StoreError,
    UnsupportedModelError,
    UsageError,
)
from .finding import find_source, store_of
from .flash.files import Manifest, is_store, read_manifest
from .flash.reader import BOUNCE_BYTES_PER_THREAD, Reader, UnitFile
from .flash.stream import LayerStream, Streamer
from .flash.system import READ_ALIGNMENT, current_memory_bytes, usable_memory_bytes
from .kinds import is_mixture, refuse_own_code
from .layers.activations import Activation
from .layers.neurons import StreamedNeurons
from .layers.pace import Pace
from .layers.predictors import ImportedPredictor, LowRankPredictor, Predictor, ShadowPredictor
from .layers.quantised import companions, matrices_of, widen
from .layers.recall import Setting
from .mixture_loading import load_mixture
from .plan import (
    MLX_CACHE_BYTES,
    PROCESS_MARGIN_BYTES,
    Demand,
    Notes,
    Plan,
    blocks_needed,
    kv_cache_bytes,
    make_plan,
    parse_memory,
    workspace_bytes,
)
from .runtime import Runtime

# Cheap enough to be asked twice. Nothing depends on a guess but time.
LOOK_AHEAD_PREDICTORS = STORED_PREDICTORS
# What mlx-lm's models raise for a configuration that describes none.
CONFIG_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError)


# -- the pieces of a model -----------------------------------------------------------------------------------


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """(Model, ModelArgs) for a configuration, in mlx-lm's form. Raises UnsupportedModelError."""
    model_type = str(config.get("model_type"))
    if not model_type.isidentifier() or find_spec(f"mlx_flash.models.{model_type}") is None:
        raise UnsupportedModelError(f"no model of type {model_type!r} is known here.")
    module = import_module(f"mlx_flash.models.{model_type}")
    return module.Model, module.ModelArgs


def first_line(error: Exception) -> str:
    """Of its message; MLX's list every way to call a function."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """mlx-lm's TokenizerWrapper. Raises CheckpointError if there are no usable tokenizer files."""
    from mlx_lm.utils import load_tokenizer as load_mlx_lm_tokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} has no tokenizer files (expected one of {', '.join(names)}).")
    # Families that transformers lacks bring code of their own: it would ask whether to run it, or warn of them.
    warns = logging.getLogger("transformers.configuration_utils")
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        eos_token_ids = (config or {}).get("eos_token_id")
        return load_mlx_lm_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
    except Exception as error:  # tokenizers raises plain ones
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from None
    finally:
        warns.setLevel(level)


def compute_dtype(stored: str) -> mx.Dtype:
    """Metal computes in the stored type; on MLX's CPU backend anything but float32 is slow."""
    return mx.float32 if mx.default_device() == mx.cpu else getattr(mx, stored)


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
        say: called with the plan and notes, before anything large is allocated.

    Returns:
        (model, tokenizer) for `mlx_flash.stream_generate` or mlx-lm's own functions. `model.flash` is the Runtime.

    A mixture of experts is read from the checkpoint as it is, without a conversion.

    Raises:
        BudgetError, UsageError, StoreError and its kinds, CheckpointError, ConversionError.
    """
    _check_arguments(predictor, window, threads, context, io)
    _import_mlx_lm()
    budget = None if memory is None else parse_memory(memory)
    name = None if path is None else os.fspath(path)
    source = find_source(name, revision, say)
    if not is_store(source):
        config = _read_config(source)
        refuse_own_code(config, source)
        if is_mixture(config):
            if predictor != "auto":
                raise UsageError(
                    f"{source} is a mixture of experts: its router chooses, no predictor ({predictor}) does."
                )
            if recall is not None:
                raise UsageError(f"{source} is a mixture of experts: its router misses nothing. Leave recall out.")
            _check_compiler(say)
            tokenizer = load_tokenizer(source, config)  # first: the plan counts what the process has by then
            return load_mixture(source, budget, window, threads, context, io, say), tokenizer
        family_of(config, source).activation(config, source)  # refused here, before a conversion is begun
    folder = store_of(source, name, say)
    manifest = read_manifest(folder)
    config = _read_config(folder)
    kind = manifest.default_predictor if predictor == "auto" else predictor
    if kind in STORED_PREDICTORS and kind not in manifest.predictors:
        have = ", ".join(["none", "exact", *manifest.predictors])
        raise UsageError(f"{folder} has no {kind} predictor; it has: {have}.")
    setting = None
    if kind in STORED_PREDICTORS:
        setting = Setting.of(kind, manifest.predictors[kind], recall)
    elif recall is not None:
        raise UsageError(f"recall is for a predictor that may miss a neuron; {kind} has no threshold. Leave it out.")
    tokenizer = load_tokenizer(folder, config)
    model_class, args_class = model_classes(config)
    try:
        args = args_class.from_dict(config)
        model = model_class(args)  # its random weights are never evaluated
        context = min(context, getattr(args, "max_position_embeddings", context))
    except CONFIG_ERRORS as error:
        raise CorruptStoreError(
            f"{folder / 'config.json'}: {first_line(error)}. Convert the checkpoint again."
        ) from None
    _check_compiler(say)
    mx.set_cache_limit(MLX_CACHE_BYTES)
    if len(model.layers) != manifest.layout.layers:
        raise CorruptStoreError(
            f"{folder / 'config.json'} speaks of {len(model.layers)} layers, the manifest of "
            f"{manifest.layout.layers}. Convert the checkpoint again."
        )
    _check_ffn(model.layers[0].mlp, manifest, folder)
    plan = _plan(model, args, manifest, kind, setting, folder, budget, context, threads)
    say(plan.describe())
    if setting is not None:
        say(setting.describe())
    return _build(model, manifest, plan, kind, setting, folder, window, threads, io, say), tokenizer


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


def _read_config(folder: Path) -> dict[str, Any]:
    from mlx_lm.utils import load_config

    try:
        if isinstance(config := load_config(folder), dict):
            return config
        raise ValueError(f"it holds no JSON object but {config!r:.20}")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        path = folder / "config.json"
        if not is_store(folder):
            raise CheckpointError(f"{path} cannot be used: {error}. Download the checkpoint again.") from None
        raise CorruptStoreError(f"{path}: {error}. Convert the checkpoint again.") from None


def _slot_parts(manifest: Manifest, kind: str) -> tuple[str, ...]:
    """What a slot holds: the exact predictor has the first projection (up, or the gate) resident already."""
    return manifest.layout.parts[1:] if kind == "exact" else manifest.layout.parts


def _predictor_tensors(folder: Path, kind: str) -> dict[str, mx.array]:
    return _tensors(folder / Manifest.predictor_file(kind)) if kind in STORED_PREDICTORS else {}


def _tensors(path: Path) -> dict[str, mx.array]:
    """Not yet read. Raises StoreError."""
    try:
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except RuntimeError as error:
        raise StoreError(f"{path} cannot be read: {error}. Convert the checkpoint again.") from None


def _as_used(name: str, tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """A predictor's tensor in the type it is computed with, not yet read: packed bits and thresholds stay."""
    packed = not mx.issubdtype(tensor.dtype, mx.floating)
    return tensor if packed or name.endswith(".c") else tensor.astype(dtype)


def _plan(
    model: Any,
    args: Any,
    manifest: Manifest,
    kind: str,
    setting: Setting | None,
    folder: Path,
    budget: int | None,
    context: int,
    threads: int,
) -> Plan:
    layout = manifest.layout
    item_bytes = compute_dtype(manifest.resident_dtype).size
    resident = _resident_bytes(folder, manifest, item_bytes)
    if kind == "exact":
        predictor_bytes = layout.layers * layout.neurons * layout.width * item_bytes
    else:
        tensors = _predictor_tensors(folder, kind)
        dtype = compute_dtype(manifest.resident_dtype)
        predictor_bytes = sum(_as_used(name, tensor, dtype).nbytes for name, tensor in tensors.items())
    heads = getattr(args, "num_attention_heads", 1)
    on_cpu = mx.default_device() == mx.cpu
    fused = not on_cpu and not getattr(args, "alibi", False)  # biases are an array as large as the scores
    workspace = workspace_bytes(layout, heads, context, item_bytes, fused_attention=fused)
    if kind == "exact":
        workspace += layout.neurons * layout.width * item_bytes  # one layer's rows twice, while they are put together
    part_offset, slot_bytes = layout.part_range(_slot_parts(manifest, kind))
    if (part_offset | slot_bytes) % READ_ALIGNMENT:
        workspace += threads * BOUNCE_BYTES_PER_THREAD
    demand = Demand(
        process=current_memory_bytes() + PROCESS_MARGIN_BYTES,
        resident=resident,
        predictors=predictor_bytes,
        kv_cache=kv_cache_bytes(layout.layers, model.kv_width, context, item_bytes),
        workspace=workspace,
    )
    free = usable_memory_bytes()
    need = _need(manifest, kind, setting)
    notes = _notes(manifest, kind)
    return make_plan(demand, layout, slot_bytes, budget, free, context, kind != "none", need, notes)


def _notes(manifest: Manifest, kind: str) -> Notes:
    resident = Notes().resident
    if manifest.resident_bits < 16:
        resident += f", {manifest.resident_bits} bits" + ("" if keeps_packed() else " widened")
    predictors = kind
    if kind == "exact" and len(manifest.layout.parts) == 3:
        predictors += ": all gates, a third of the FFN; the other two thirds are streamed"
    elif kind == "exact":
        predictors += ": all up projections, half of the FFN; the other half is streamed"
    return Notes(resident, predictors, f", {manifest.layout.bits} bits" if manifest.layout.quantised else "")


def _resident_bytes(folder: Path, manifest: Manifest, item_bytes: int) -> int:
    """Of all resident weights, as they will lie in memory."""
    tensors = _tensors(folder / Manifest.resident_file)
    packed = {name: tensor for name, tensor in tensors.items() if tensor.dtype == mx.uint32}
    plain = sum(tensor.size for name, tensor in tensors.items() if name not in packed)
    if keeps_packed():
        return plain * item_bytes + sum(tensor.nbytes for tensor in packed.values())
    plain -= sum(tensors[own].size for name in packed for own in companions(name) if own in tensors)
    return item_bytes * (plain + sum(tensor.size * 32 // manifest.resident_bits for tensor in packed.values()))


def _need(manifest: Manifest, kind: str, setting: Setting | None) -> list[float]:
    """Share of each layer's blocks that a token is expected to need, measured on calibration text."""
    report = manifest.predictors[manifest.default_predictor]
    shares = report["active" if kind == "exact" else "predicted"] if setting is None else setting.predicted
    every = range(manifest.layout.layers) if kind == "none" else manifest.all_neurons_layers
    if kind != "exact":
        shares = [1.0 if layer in every else share for layer, share in enumerate(shares)]
    return blocks_needed(shares, manifest.layout)


def _build(
    model: Any,
    manifest: Manifest,
    plan: Plan,
    kind: str,
    setting: Setting | None,
    folder: Path,
    window: int | None,
    threads: int,
    io: str,
    say: Callable[[str], None],
) -> Any:
    layout = manifest.layout
    dtype = compute_dtype(manifest.resident_dtype)
    file = UnitFile(folder / Manifest.neurons_file, direct=io == "direct")
    if io == "direct" and not file.direct:
        say(
            f"note: the file system of {folder} does not read past the page cache; the budget does not count that cache"
        )
    activation = Activation(**manifest.activation)
    streamer = Streamer(file, Reader(threads), layout)
    bias = any(name.endswith(".up_bias") for name in _tensors(folder / Manifest.resident_file))
    for index, layer in enumerate(model.layers):
        stream = LayerStream(streamer, index, plan.slots[index], _slot_parts(manifest, kind), window)
        layer.mlp = StreamedNeurons(stream, activation, manifest.decode_tokens, bias)
    _load_resident(model, folder, manifest, dtype)
    tensors = _predictor_tensors(folder, kind)
    for index, layer in enumerate(model.layers):
        if kind == "exact" or (kind in STORED_PREDICTORS and index not in manifest.all_neurons_layers):
            layer.mlp.predictor = _make_predictor(kind, index, manifest, setting, tensors, layer.mlp, dtype)
    pace = Pace()
    if kind in LOOK_AHEAD_PREDICTORS and (norms := model.ffn_norms) is not None and "weight" in norms[0]:
        for (layer, norm), (following, following_norm) in pairwise(zip(model.layers, norms, strict=True)):
            layer.mlp.look_ahead(following.mlp, norm, following_norm, pace)
        for layer in [layer for layer in model.layers if layer.mlp._ahead is not None][:1]:
            layer.mlp._ahead.leads = True
    model.flash = Runtime(
        plan,
        streamer,
        [layer.mlp for layer in model.layers],
        kind,
        model.args.vocab_size,
        model.args.max_position_embeddings,
        manifest,
        setting,
    )
    return model


def _load_resident(model: Any, folder: Path, manifest: Manifest, dtype: mx.Dtype) -> None:
    """Reads and widens tensor by tensor, the largest first: there is never a second copy beside all of them.

    Quantised matrices stay so where products with them are quick. On the CPU backend, what tokens are multiplied with
    is laid out input by input, which is quicker: the output matrix of OPT-1.3B takes 27 ms instead of 45
    (bench/RESULTS.md).
    """
    from mlx.utils import tree_flatten
    from tqdm import tqdm

    path = folder / Manifest.resident_file
    stored = _tensors(path)
    bits, group_size = manifest.resident_bits, manifest.resident_group_size
    packed = {name for name in matrices_of(model) if name in stored and stored[name].dtype == mx.uint32}
    if packed and bits == 16:
        raise CorruptStoreError(f"{path} is quantised, the manifest says it is not. Convert the checkpoint again.")
    turned = _multiplied(model) if mx.default_device() == mx.cpu else set()
    if keeps_packed() and packed:
        turned -= packed
        nn.quantize(model, group_size, bits, class_predicate=lambda name, _: f"{name}.weight" in packed)
    wanted = dict(tree_flatten(model.parameters()))
    for name, parameter in wanted.items():
        needed = [name] if name not in packed else [name, *companions(name)]
        if lacking := [own for own in needed if own not in stored]:
            raise MissingTensorError(f"{path} lacks the tensor {lacking[0]}. Convert the checkpoint again.")
        shapes = [stored[own].shape for own in needed]
        if name in packed and not keeps_packed():
            rows, columns = parameter.shape
            expected = [(rows, columns * bits // 32), *[(rows, columns // group_size)] * 2]
        else:
            shapes, expected = shapes[:1], [parameter.shape]
        if shapes != expected:
            found = ", ".join(map(str, shapes))
            raise CorruptStoreError(
                f"{path}: {name} has shape {found}, expected {', '.join(map(str, expected))}. "
                "Convert the checkpoint again."
            )
    total = sum(parameter.size for parameter in wanted.values()) * dtype.size
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for name in sorted(wanted, key=lambda name: wanted[name].size, reverse=True):
            tensor = stored.pop(name)
            if name not in packed:
                tensor = tensor.astype(dtype)
            elif not keeps_packed():
                scales, biases = (stored.pop(own) for own in companions(name))
                tensor = widen(tensor, scales, biases, group_size, bits).astype(dtype)
            if name in turned:
                tensor = _turned(tensor)
            mx.eval(tensor)
            model.load_weights([(name, tensor)], strict=False)
            bar.update(tensor.nbytes)


def keeps_packed() -> bool:
    """Whether quantised matrices stay so in memory: not on MLX's CPU backend, whose products with them are slow."""
    return bool(mx.default_device() != mx.cpu)


def _turned(matrix: mx.array) -> mx.array:
    """The same float32 matrix (n, m), laid out column by column; four times as fast as MLX's own copy does it."""
    result = mx.zeros(matrix.shape[::-1])
    mx.eval(result, matrix)
    target, source = np.array(result, copy=False), np.array(matrix, copy=False)
    for row in range(0, len(source), 16):  # 16 numbers: a line of the processor's cache
        target[:, row : row + 16] = source[row : row + 16].T
    return result.T


def _multiplied(model: Any) -> set[str]:
    """Names of the matrices that every token is multiplied with."""
    tied = getattr(model.args, "tie_word_embeddings", False)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (tied and name.endswith(("embed_tokens", "word_embeddings")))
    }


def _make_predictor(
    kind: str,
    layer: int,
    manifest: Manifest,
    setting: Setting | None,
    tensors: dict[str, mx.array],
    mlp: StreamedNeurons,
    dtype: mx.Dtype,
) -> Predictor:
    if kind == "exact":
        return mlp.exact_predictor(dtype)
    prefix = f"{layer}."
    names = [name for name in tensors if name.startswith(prefix)]
    own = {name.removeprefix(prefix): _as_used(name, tensors.pop(name), dtype) for name in names}
    if setting is not None and "c" in own:
        own["c"] = own["c"] - setting.shifts[layer]
    mx.eval(own)
    try:
        for name, shape in _predictor_shapes(kind, own, manifest).items():
            if own[name].shape != shape:
                raise CorruptStoreError(
                    f"{Manifest.predictor_file(kind)}: {prefix}{name} has shape {own[name].shape}, expected {shape}. "
                    "Convert the checkpoint again."
                )
        if kind == "lowrank":
            return LowRankPredictor(own["a"], own["b"], own["c"])
        if kind == "imported":
            return ImportedPredictor(own["a"], own["h"], own["b"], own["c"])
        report = manifest.predictors[kind]
        shadow = ShadowPredictor(
            own["weight"], own["scales"], own["biases"], own["c"], report["bits"], report["group_size"]
        )
    except KeyError as error:
        raise MissingTensorError(
            f"{Manifest.predictor_file(kind)} lacks the tensor {prefix}{error.args[0]}. Convert the checkpoint again."
        ) from None
    if layer == 0 and mx.default_device() != mx.cpu:
        shadow.self_test()
    return shadow


def _predictor_shapes(kind: str, own: dict[str, mx.array], manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """What the tensors of one layer's predictor must be, by their names."""
    width, neurons = manifest.layout.width, manifest.layout.neurons
    if kind == "shadow":
        report = manifest.predictors[kind]
        groups = width, neurons // report["group_size"]
        return {"weight": (width, neurons * report["bits"] // 32), "scales": groups, "biases": groups, "c": (neurons,)}
    rank = own["a"].shape[-1]
    bias = {"h": (rank,)} if kind == "imported" else {}
    return {"a": (width, rank), "b": (rank, neurons), "c": (neurons,), **bias}
