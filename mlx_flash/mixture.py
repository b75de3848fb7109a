"""A mixture-of-experts checkpoint as it is -> a model whose experts are read from its own files.

mlx-lm builds the model, lazily; where each expert's bytes lie is learnt by watching its `sanitize`: a tensor that it
passes on is found by identity, one that it makes with `mx.stack` by what was stacked. No family is named here.
"""

from __future__ import annotations

import glob
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .checkpoint_files import weights_in
from .defaults import PREFILL_TOKENS
from .errors import CheckpointError, ReadError, UnsupportedModelError
from .flash.checksums import TensorEntry, read_header
from .flash.experts import ExpertStream, ExpertStreamer, ExpertTensor
from .flash.files import round_up
from .flash.reader import BOUNCE_BYTES_PER_THREAD, Reader, UnitFile
from .flash.system import READ_ALIGNMENT, current_memory_bytes, usable_memory_bytes
from .layers.experts import StreamedExperts, is_widened
from .plan import KV_STEP_TOKENS, MLX_CACHE_BYTES, PROCESS_MARGIN_BYTES, Demand, Notes, Units, share_budget
from .runtime import Runtime

WATCHING = threading.Lock()  # held while `mx.stack` is another function


@dataclass
class Provenance:
    """Which of the checkpoint's tensors a model's parameter is: one, or as many as were stacked along a new axis."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    arrays: dict[str, Any] = field(default_factory=dict)  # as `sanitize` gave them back: what is changed later is seen

    def watch(self, sanitize: Callable[[dict[str, Any]], dict[str, Any]], weights: dict[str, Any]) -> dict[str, Any]:
        """Calls `sanitize`, and notes what became of every tensor. One at a time, whatever the threads."""
        kept = dict(weights)  # alive, so that no identity is given to another array
        name_of = {id(array): name for name, array in kept.items()}
        stacks: dict[int, tuple[Any, list[Any]]] = {}

        def noting(arrays: Sequence[Any], axis: int = 0, **options: Any) -> Any:
            parts = list(arrays)
            result = stack(parts, axis, **options)
            if axis == 0:
                stacks[id(result)] = (result, parts)
            return result

        with WATCHING:
            stack = mx.stack
            mx.stack = noting  # type: ignore[assignment]
            try:
                result = sanitize(weights)
            finally:
                mx.stack = stack
        self.arrays = dict(result)
        for name, array in result.items():
            if id(array) in name_of:
                self.sources[name] = [name_of[id(array)]]
            elif id(array) in stacks and all(id(part) in name_of for part in stacks[id(array)][1]):
                self.sources[name] = [name_of[id(part)] for part in stacks[id(array)][1]]
                self.stacked.add(name)
        return result


@dataclass
class Mixture:
    """A lazily loaded model, and where the experts of each of its switch layers lie."""

    model: Any
    config: dict[str, Any]
    files: list[Path]
    switches: dict[str, dict[str, ExpertTensor]]  # path in the model -> "up_proj.weight" -> ...

    @property
    def experts(self) -> int:
        """Experts of a layer, the most."""
        return max(len(next(iter(tensors.values())).offsets) for tensors in self.switches.values())

    @property
    def expert_bytes(self) -> int:
        """One expert of a layer, the largest."""
        return max(sum(tensor.nbytes for tensor in tensors.values()) for tensors in self.switches.values())

    @property
    def table_bytes(self) -> int:
        """What is kept of all layers' small tensors, beside the slots."""
        tensors = [tensor for tensors in self.switches.values() for tensor in tensors.values()]
        return sum(tensor.nbytes * len(tensor.offsets) for tensor in tensors if tensor.is_table)

    def resident(self) -> Iterator[tuple[str, mx.array]]:
        """Every parameter that is not an expert's, not yet read."""
        from mlx.utils import tree_flatten

        prefixes = tuple(f"{path}." for path in self.switches)
        parameters: Any = tree_flatten(self.model.parameters())
        for name, array in parameters:
            if not name.startswith(prefixes):
                yield name, array

    def stream(self, shared: ExpertStreamer, slots: Sequence[int], window: int | None) -> None:
        """Puts a streamed layer in every switch layer's place; `slots` for each, in the order of `switches`."""
        for (path, tensors), count in zip(self.switches.items(), slots, strict=True):
            parent, name = _parent(self.model, path)
            parent[name] = StreamedExperts(parent[name], ExpertStream(shared, tensors, count, window))

    def layers(self) -> list[StreamedExperts]:
        return [module for _, module in self.model.named_modules() if isinstance(module, StreamedExperts)]


def is_mixture(config: dict[str, Any]) -> bool:
    """Whether mlx-lm's model for this configuration has switch layers. Cheap: nothing is read or evaluated.

    Raises CheckpointError if mlx-lm has a family of models with such layers for it, and cannot build one.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
    except Exception:  # whatever it lacks: then it is none that could be run
        return False
    try:
        return any(True for _ in _switches(model_class(args_class.from_dict(config))))
    except Exception as error:
        family = sys.modules[model_class.__module__]
        if not any(hasattr(family, name) for name in ("SwitchGLU", "SwitchMLP")):
            return False
        raise CheckpointError(
            f"mlx-lm cannot build the model that config.json describes ({config['model_type']}): {_said(error)}. "
            "Download the checkpoint again."
        ) from None


def open_mixture(folder: Path) -> Mixture:
    """Builds the model without reading a weight. Raises CheckpointError or UnsupportedModelError."""
    from mlx_lm.utils import _get_classes, load_model

    entries, files = _tensor_entries(folder)
    provenance = Provenance()

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = _get_classes(config)

        class Watched(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                inherited = getattr(super(), "sanitize", lambda same: same)
                return provenance.watch(inherited, weights)

        return Watched, args_class

    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes)
    except Exception as error:  # mlx-lm raises plain ones
        raise CheckpointError(
            f"mlx-lm cannot load {folder}: {_said(error)}. Are all shards there, and config.json theirs?"
        ) from None
    switches = {}
    for path, module in _switches(model):
        tensors = {}
        for projection, child in module.children().items():
            if not isinstance(child, nn.Module):
                continue
            for name, array in child.items():
                if isinstance(array, mx.array):
                    key = f"{path}.{projection}.{name}"
                    tensors[f"{projection}.{name}"] = _locate(folder, key, array, provenance, entries)
        switches[path] = tensors
    if not switches:
        raise UnsupportedModelError(f"{folder} has no mixture-of-experts layers.")
    return Mixture(model, config, files, switches)


def _switches(model: Any) -> Iterator[tuple[str, Any]]:
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, (SwitchGLU, SwitchMLP))]
    yield from sorted(found, key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")])


def _locate(
    folder: Path,
    key: str,
    array: mx.array,
    provenance: Provenance,
    entries: dict[str, tuple[int, TensorEntry]],
) -> ExpertTensor:
    """Where each expert's part of the parameter `key`, (E, ...), lies. Raises UnsupportedModelError."""
    experts, shape = array.shape[0], tuple(array.shape[1:])
    part = int(np.prod(shape, dtype=np.int64)) * array.dtype.size
    found = [entries[name] for name in provenance.sources.get(key, []) if name in entries]
    whole = part * experts if key not in provenance.stacked else part
    wanted = experts if key in provenance.stacked else 1
    changed = provenance.arrays.get(key) is not array
    if changed or len(found) != wanted or any(entry.end - entry.begin != whole for _, entry in found):
        raise UnsupportedModelError(
            f"the experts of {folder} ({key}) do not lie in the checkpoint as they are computed with: mlx-lm changes "
            f"them when it loads them. Convert it once: `mlx_lm.convert --hf-path {folder} --mlx-path OUTPUT` (with -q "
            "--q-bits 4 for 4 bits), and run OUTPUT."
        )
    if key in provenance.stacked:
        file_of = np.array([number for number, _ in found], np.int64)
        offsets = np.array([entry.begin for _, entry in found], np.int64)
    else:
        number, entry = found[0]
        file_of = np.full(experts, number, np.int64)
        offsets = entry.begin + np.arange(experts, dtype=np.int64) * part
    return ExpertTensor(file_of, offsets, shape, array.dtype)


def _tensor_entries(folder: Path) -> tuple[dict[str, tuple[int, TensorEntry]], list[Path]]:
    """Name -> (number of the file, entry), as mlx-lm finds them: in model*.safetensors.

    Of a name that several files have, mlx-lm takes the last one's tensor, in the order that the file system gives.
    """
    files = [Path(name) for name in glob.glob(str(folder / "model*.safetensors"))]
    entries: dict[str, tuple[int, TensorEntry]] = {}
    for number, file in enumerate(files):
        try:
            _, found = read_header(file)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} is no readable safetensors file: {error}. Download it again.") from None
        entries.update({name: (number, entry) for name, entry in found.items()})
    if not files:
        raise CheckpointError(f"{folder} has no weights: expected model*.safetensors.")
    weights_in(folder)  # none of those that an index names is lacking
    return entries, files


def open_files(files: Sequence[Path], direct: bool) -> list[UnitFile]:
    opened: list[UnitFile] = []
    try:
        for file in files:
            opened.append(UnitFile(file, direct))
    except BaseException:
        for unit in opened:
            unit.close()
        raise
    return opened


def _parent(model: Any, path: str) -> tuple[Any, Any]:
    """The module, or list, that holds what `path` names, and its key there."""
    *parents, last = path.split(".")
    where = model
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    return where, int(last) if isinstance(where, list) else last


# -- within a budget -----------------------------------------------------------------------------------------


def load_mixture(
    folder: Path,
    budget: int | None,
    window: int | None,
    threads: int,
    context: int,
    io: str,
    say: Callable[[str], None],
) -> Any:
    """The model of the checkpoint in `folder`, its experts streamed, within `budget` bytes; arguments as `load`'s.

    Raises BudgetError, CheckpointError, UnsupportedModelError or ReadError.
    """
    mx.set_cache_limit(MLX_CACHE_BYTES)
    mixture = open_mixture(folder)
    positions = _number(mixture.config, "max_position_embeddings", context)
    context = min(context, positions)
    try:
        shape = trace(mixture, context)
    except Exception as error:  # mlx-lm's model and MLX raise plain ones
        raise CheckpointError(
            f"mlx-lm cannot run the model that {folder / 'config.json'} describes: {_said(error)}. "
            "Download the checkpoint again."
        ) from None
    layers = len(mixture.switches)
    process = current_memory_bytes() + PROCESS_MARGIN_BYTES
    demand = Demand(
        process=process,
        resident=sum(array.nbytes for _, array in mixture.resident()) + mixture.table_bytes,
        predictors=0,
        kv_cache=shape.kv_bytes,
        workspace=_workspace_bytes(mixture, shape, context, threads),
    )
    free = usable_memory_bytes()
    units = Units(layers, mixture.experts, 1, "experts of each layer")
    notes = Notes("attention, routers, shared experts, embeddings", "none: the router chooses")
    plan = share_budget(demand, units, mixture.expert_bytes, budget, free, context, notes=notes)
    say(plan.describe())
    files = open_files(mixture.files, direct=io == "direct")
    if io == "direct" and not all(file.direct for file in files):
        say(f"note: the file system of {folder} does not read past the page cache; the budget does not count that")
    _read_resident(mixture)
    streamer = ExpertStreamer(files, Reader(threads))
    mixture.stream(streamer, plan.slots, window)
    model = mixture.model
    model.flash = Runtime(plan, streamer, mixture.layers(), "router", shape.vocabulary, positions)
    return model


@dataclass(frozen=True)
class Shape:
    """What a call of the model is like, learnt by building its graph once."""

    kv_bytes: int  # of the prompt cache for the planned context
    width: int  # of what enters a switch layer
    choices: int  # experts per token
    pair_bytes: int  # made of one (token, expert) pair within a switch layer
    vocabulary: int  # tokens that it has logits for


def trace(mixture: Mixture, context: int) -> Shape:
    """Calls the model on one token without evaluating anything; the switch layers must still be mlx-lm's."""
    from mlx_lm.models.cache import make_prompt_cache

    seen: list[tuple[int, int]] = []

    class Looking(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self._inner = inner

        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            seen.append((x.shape[-1], indices.shape[-1]))
            result: mx.array = self._inner(x, indices)
            return result

    places = [_parent(mixture.model, path) for path in mixture.switches]
    inner = [parent[name] for parent, name in places]
    try:
        for parent, name in places:
            parent[name] = Looking(parent[name])
        cache = make_prompt_cache(mixture.model)
        logits = mixture.model(mx.zeros((1, 1), mx.int32), cache=cache)
    finally:
        for (parent, name), switch in zip(places, inner, strict=True):
            parent[name] = switch
    width = max(width for width, _ in seen)
    hidden = max(
        tensor.shape[0] for tensors in mixture.switches.values() for tensor in tensors.values() if len(tensor.shape) > 1
    )
    choices, pair_bytes = max(k for _, k in seen), 4 * (3 * width + 4 * hidden)
    return Shape(_cache_bytes(cache, context), width, choices, pair_bytes, logits.shape[-1])


def _cache_bytes(cache: Sequence[Any], context: int) -> int:
    """What a prompt cache will take, from one that has seen a token: some parts grow with the tokens, some do not."""
    from mlx.utils import tree_flatten

    total = largest = 0
    for part in (part for entry in cache for part in getattr(entry, "caches", [entry])):
        growing = [a for a in (getattr(part, "keys", None), getattr(part, "values", None)) if isinstance(a, mx.array)]
        if growing:  # (B, heads, tokens, width)
            most = min(context, getattr(part, "max_size", context) + PREFILL_TOKENS)
            size = sum(array.nbytes // array.shape[2] for array in growing) * round_up(most, KV_STEP_TOKENS)
            largest = max(largest, size)  # there twice while it grows
        else:
            state: Any = tree_flatten(part.state)
            size = sum(array.nbytes for _, array in state if isinstance(array, mx.array))
        total += size
    return total + largest


def _workspace_bytes(mixture: Mixture, shape: Shape, context: int, threads: int) -> int:
    """Readers' buffers, the activations of a prompt chunk, widened experts, MLX's buffer cache."""
    tokens = min(PREFILL_TOKENS, context)
    bounce = threads * min(BOUNCE_BYTES_PER_THREAD, mixture.expert_bytes + 2 * READ_ALIGNMENT)
    activations = tokens * (4 * 16 * shape.width + shape.choices * shape.pair_bytes)
    scores = widened = 0
    if mx.default_device() == mx.cpu:
        heads = _number(mixture.config, "num_attention_heads", 1)
        scores = 3 * heads * tokens * context * 4
    named = [item for tensors in mixture.switches.values() for item in tensors.items()]
    if any(is_widened(name.rsplit(".", 1)[1], tensor.dtype) for name, tensor in named):
        widened = 2 * mixture.expert_bytes * min(mixture.experts, tokens * shape.choices)
    return bounce + activations + scores + widened + MLX_CACHE_BYTES


def _read_resident(mixture: Mixture) -> None:
    """Reads tensor by tensor, the largest first."""
    from tqdm import tqdm

    arrays = sorted((array for _, array in mixture.resident()), key=lambda array: array.nbytes, reverse=True)
    total = sum(array.nbytes for array in arrays)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for array in arrays:
            try:
                mx.eval(array)
            except RuntimeError as error:
                raise ReadError(f"the checkpoint cannot be read: {_said(error)}. Was it changed meanwhile?") from None
            bar.update(array.nbytes)


def _number(config: dict[str, Any], key: str, otherwise: int) -> int:
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


def _said(error: Exception) -> str:
    """What another library's error says, in a line; its name where the rest is only a key, or nothing."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, RuntimeError)) and text
    return (text if plain else f"{type(error).__name__}: {text}")[:300].rstrip(".")
