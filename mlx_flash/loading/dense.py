"""Builds the model of a store by its memory plan: reads the resident weights, streams the FFNs, adds predictors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..defaults import STORED_PREDICTORS
from ..errors import CorruptStoreError, MissingTensorError
from ..flash.files import Manifest
from ..flash.host_arrays import to_numpy
from ..flash.neurons import NeuronFile, NeuronSlots
from ..flash.stored_tensors import StoredTensors
from ..flash.system import mark_in_use
from ..flash.unit_file import UnitFile
from ..flash.unit_sums import read_block_sums
from ..layers.activations import Activation
from ..layers.neurons import StreamedNeurons
from ..layers.predictors import ImportedPredictor, LowRankPredictor, Predictor, ShadowPredictor
from ..layers.quantised import companions, matrices_of, widen
from ..layers.ranked_neurons import RankedNeurons
from ..layers.recall import PredictorSetting
from .load_progress import tell_progress
from .neuron_ranks import DividedNeurons
from .options import LoadOptions
from .plan import Plan
from .ranked_loading import Ranks
from .reading_trials import reader_for, reading_trials
from .runtime import Runtime, evaluate_constants

# Predictors that are cheap enough to run twice. Only time depends on a guess.
LOOK_AHEAD_PREDICTORS = STORED_PREDICTORS


def build(
    model: Any,
    manifest: Manifest,
    plan: Plan,
    kind: str,
    setting: PredictorSetting | None,
    folder: Path,
    options: LoadOptions,
    say: Callable[[str], None],
    ranks: Ranks | None = None,
    divided: DividedNeurons | None = None,
) -> Any:
    """Turns a model with random, never evaluated weights into the one that runs. Its `flash` is the Runtime.

    kind: the kind of predictor, with its `setting` if it is a stored one. say: called with notes.
    ranks: those that hold neurons, as they are `divided`; None for this process alone.

    Raises CorruptStoreError or MissingTensorError if the contents of the store in `folder` do not match the model or
    the checksums, ReadError if they cannot be read.
    """
    layout = manifest.layout
    dtype = compute_dtype(manifest.resident_dtype)
    file = UnitFile(folder / Manifest.neurons_file, direct=options.io != "buffered")
    mark_in_use(file.fd)
    if options.io != "buffered" and not file.direct:
        say(
            f"note: the file system of {folder} does not read past the page cache; the budget does not count that cache"
        )
    activation = Activation(**manifest.activation)
    file.sums = read_block_sums(folder, manifest)
    streamer = NeuronFile(file, reader_for(options), layout)
    bias = any(name.endswith(".up_bias") for name in manifest.files[Manifest.resident_file]["crc32"])
    share = None if divided is None else divided.of(0)
    for index, layer in enumerate(model.layers):
        stream = NeuronSlots(streamer, index, plan.slots[index], slot_parts(manifest, kind), options.window, share)
        if ranks is None:
            layer.mlp = StreamedNeurons(stream, activation, manifest.decode_tokens, bias)
        else:
            last = index + 1 == len(model.layers)
            layer.mlp = RankedNeurons(stream, activation, manifest.decode_tokens, bias, index, last, ranks.group)
    _load_resident(model, folder, manifest, dtype)
    tensors = predictor_tensors(folder, manifest, kind)
    for index, layer in enumerate(model.layers):
        if kind == "exact" or (kind in STORED_PREDICTORS and index not in manifest.all_neurons_layers):
            layer.mlp.predictor = _make_predictor(kind, index, manifest, setting, tensors, layer.mlp, dtype)
    if kind in LOOK_AHEAD_PREDICTORS and (norms := model.ffn_norms) is not None and "weight" in norms[0]:
        for (layer, norm), (following, following_norm) in pairwise(zip(model.layers, norms, strict=True)):
            layer.mlp.look_ahead(following.mlp, norm, following_norm)
    streamer.look_ahead = True
    evaluate_constants(model)
    layers = [layer.mlp for layer in model.layers]
    model.flash = Runtime(
        plan,
        streamer,
        layers,
        kind,
        model.args.vocab_size,
        model.args.max_position_embeddings,
        manifest,
        setting,
        most_positions=manifest.decode_tokens,
        prefill_tokens=options.prefill_chunk,
        trials=reading_trials(streamer, layers, options, folder, plan.slot_share, "neurons"),
        ranks=ranks,
    )
    return model


def _load_resident(model: Any, folder: Path, manifest: Manifest, dtype: mx.Dtype) -> None:
    """Reads, verifies and widens tensor by tensor, the largest first, so that there is never a second copy of them all.

    Quantised matrices stay packed where their products are fast. On the CPU backend, the matrices that tokens are
    multiplied with are laid out input by input, which is faster: the output matrix of OPT-1.3B takes 27 ms instead of
    45 (bench/results/host.md).
    """
    from mlx.utils import tree_flatten
    from tqdm import tqdm

    tensors = stored_tensors(folder, manifest, Manifest.resident_file)
    path, stored = tensors.path, tensors.arrays
    bits, group_size = manifest.resident_bits, manifest.resident_group_size
    packed = {name for name in matrices_of(model) if name in stored and stored[name].dtype == mx.uint32}
    if packed and bits == 16:
        raise CorruptStoreError(f"{path} is quantised, but the manifest says it is not. Convert the checkpoint again.")
    turned = _matmul_weights(model) if mx.default_device() == mx.cpu else set()
    if backend_multiplies_packed() and packed:
        turned -= packed
        nn.quantize(model, group_size, bits, class_predicate=lambda name, _: f"{name}.weight" in packed)
    wanted = dict(tree_flatten(model.parameters()))
    for name, parameter in wanted.items():
        needed = [name] if name not in packed else [name, *companions(name)]
        if lacking := [own for own in needed if own not in stored]:
            raise MissingTensorError(f"{path} lacks the tensor {lacking[0]}. Convert the checkpoint again.")
        shapes = [stored[own].shape for own in needed]
        if name in packed and not backend_multiplies_packed():
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
    total, done = sum(parameter.size for parameter in wanted.values()) * dtype.size, 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for name in sorted(wanted, key=lambda name: wanted[name].size, reverse=True):
            tensor = tensors.take(name)
            if name not in packed:
                tensor = tensor.astype(dtype)
            elif not backend_multiplies_packed():
                scales, biases = (tensors.take(own) for own in companions(name))
                tensor = widen(tensor, scales, biases, group_size, bits).astype(dtype)
            if name in turned:
                tensor = _column_major(tensor)
            mx.eval(tensor)
            model.load_weights([(name, tensor)], strict=False)
            bar.update(tensor.nbytes)
            done += tensor.nbytes
            tell_progress("reading weights", done, total)


def backend_multiplies_packed() -> bool:
    """Whether quantised matrices stay packed in memory. MLX's CPU backend is slow at products with them."""
    return bool(mx.default_device() != mx.cpu)


def _column_major(matrix: mx.array) -> mx.array:
    """The same float32 matrix (n, m), laid out column by column. This is four times as fast as MLX's own copy."""
    mx.eval(matrix)  # first, so that its inputs are freed before there is a second matrix
    result = mx.zeros(matrix.shape[::-1])
    mx.eval(result)
    target, source = to_numpy(result, copy=False), to_numpy(matrix, copy=False)
    for row in range(0, len(source), 16):  # 16 numbers fill a line of the processor's cache
        target[:, row : row + 16] = source[row : row + 16].T
    return result.T


def _matmul_weights(model: Any) -> set[str]:
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
    setting: PredictorSetting | None,
    tensors: StoredTensors | None,
    mlp: StreamedNeurons,
    dtype: mx.Dtype,
) -> Predictor:
    if tensors is None:
        return mlp.exact_predictor(dtype)
    prefix = f"{layer}."
    names = [name for name in tensors.arrays if name.startswith(prefix)]
    own = {name.removeprefix(prefix): in_compute_dtype(name, tensors.take(name), dtype) for name in names}
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
    """The expected shapes of the tensors of one layer's predictor, by name."""
    width, neurons = manifest.layout.width, manifest.layout.neurons
    if kind == "shadow":
        report = manifest.predictors[kind]
        groups = width, neurons // report["group_size"]
        return {"weight": (width, neurons * report["bits"] // 32), "scales": groups, "biases": groups, "c": (neurons,)}
    rank = own["a"].shape[-1]
    bias = {"h": (rank,)} if kind == "imported" else {}
    return {"a": (width, rank), "b": (rank, neurons), "c": (neurons,), **bias}


def compute_dtype(stored: str) -> mx.Dtype:
    """The dtype to compute in: the stored one on Metal, float32 on MLX's CPU backend, where any other is slow."""
    return mx.float32 if mx.default_device() == mx.cpu else getattr(mx, stored)


def slot_parts(manifest: Manifest, kind: str) -> tuple[str, ...]:
    """The parts that a slot holds. The exact predictor already has the first projection (up, or the gate) resident."""
    return manifest.layout.parts[1:] if kind == "exact" else manifest.layout.parts


def stored_tensors(folder: Path, manifest: Manifest, name: str) -> StoredTensors:
    """The tensors of one of a store's files, not yet read. Raises ReadError or CorruptStoreError."""
    return StoredTensors(folder / name, manifest.files[name]["crc32"])


def predictor_tensors(folder: Path, manifest: Manifest, kind: str) -> StoredTensors | None:
    """The tensors of a stored predictor; None for the other kinds. Raises ReadError or CorruptStoreError."""
    return stored_tensors(folder, manifest, Manifest.predictor_file(kind)) if kind in STORED_PREDICTORS else None


def in_compute_dtype(name: str, tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """A predictor's tensor, not yet read, in the dtype to compute in. Packed bits and thresholds keep their own."""
    packed = not mx.issubdtype(tensor.dtype, mx.floating)
    return tensor if packed or name.endswith(".c") else tensor.astype(dtype)


def resident_sizes(folder: Path, manifest: Manifest, item_bytes: int) -> list[int]:
    """Bytes of every resident weight in memory. The scales and biases of a packed weight are listed separately."""
    tensors = stored_tensors(folder, manifest, Manifest.resident_file).arrays
    packed = {name for name, tensor in tensors.items() if tensor.dtype == mx.uint32}
    if backend_multiplies_packed():
        return [tensor.nbytes if name in packed else tensor.size * item_bytes for name, tensor in tensors.items()]
    merged = {own for name in packed for own in companions(name)}
    per_word = 32 // manifest.resident_bits
    counts = {name: tensor.size * (per_word if name in packed else 1) for name, tensor in tensors.items()}
    return [item_bytes * count for name, count in counts.items() if name not in merged]
