"""Converts a checkpoint into MLX's own form: what the zoo's model makes of its tensors, quantised if wanted.

The zoo builds the model without reading a weight. Tensors that it only moves are read a few rows at a time, so that a
stack of experts never lies in memory as a whole. Tensors that it computes (from FP8) are evaluated one at a time, and a
stack of such tensors part by part. The output is a checkpoint that mlx-lm and this package run.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.errors import UnsupportedModelError, UsageError
from mlx_flash.flash.plain_files import read_at, reading, unreadable
from mlx_flash.flash.random_state import kept_random_state
from mlx_flash.loading.lazy_model import MODELOPT, LazyModel, open_lazily
from mlx_flash.loading.moves import TensorPiece
from mlx_flash.loading.provenance import is_in_place, moved_pieces
from mlx_flash.source.checkpoint_files import read_config
from mlx_flash.source.model_kind import refuse_own_code, switch_layers
from mlx_flash.source.zoos import MLX_LM, zoo_of

from .output import INDEX, LAST_FILE, PartialFolder, fsync, is_our_store, taken
from .small_copies import SmallCopies
from .sums import SUMS
from .tensors import write_safetensors

GROUP_SIZE = 64  # numbers that share a scale and a bias
SHARD_BYTES = 5 << 30  # most bytes in a file, unless one tensor has more
PIECE_BYTES = 32 << 20  # bytes that are read at once, unless one expert or row has more
DESCRIPTIONS = (LAST_FILE, MODELOPT, "quantize_config.json", "quant_config.json")  # written anew, or no longer true


@dataclass(frozen=True)
class Wanted:
    """How the tensors are stored. bits: of every matrix that mlx-lm quantises; 16: not quantised."""

    bits: int = 16
    expert_bits: int | None = None  # of the experts' matrices; None: as `bits`
    dtype: str | None = None  # of numbers that are not quantised, and of scales; None: the checkpoint's own

    @property
    def changes_numbers(self) -> bool:
        return self.bits < 16 or self.dtype is not None or (self.expert_bits or 16) < 16


@dataclass
class _Source:
    """Where a parameter's numbers come from: pieces in the files, or arrays that are evaluated one after another."""

    dtype: mx.Dtype
    pieces: tuple[TensorPiece, ...] | None
    arrays: list[mx.array] = field(default_factory=list)


def convert_to_mlx(source: Path, output: Path, wanted: Wanted, overwrite: bool = False) -> int:
    """Converts the checkpoint in `source` into a checkpoint in MLX's form in the folder `output`. Returns its bytes.

    Everything is written into the folder `output` + ".partial" beside it, which is renamed when it is complete. A later
    run continues an unfinished one, file by file.

    overwrite: replace an existing store. Raises CheckpointError, UnsupportedModelError, UsageError (the output exists,
    or the checkpoint already has the form), NoSpaceError or ConversionError.
    """
    if is_our_store(source):
        raise UsageError(f"{source} is already a store. Run it, or give the checkpoint that it was made from.")
    refuse_own_code(config := read_config(source), source)
    if zoo_of(config) != MLX_LM:
        raise UnsupportedModelError(
            f"{source} ({config.get('model_type')}) is not a type that mlx-lm knows, so it cannot be converted here. "
            "If mlx-vlm knows it, use `mlx_vlm.convert`."
        )
    with taken(output, source, overwrite) as output, kept_random_state():
        lazy = open_lazily(source, zoo=MLX_LM)
        if not wanted.changes_numbers and _runs_as_it_is(lazy):
            raise UsageError(
                f"{source} needs no conversion: it is already in the form that runs. Run it as it is, or quantise it "
                "with --bits."
            )
        form = _MlxForm(lazy, wanted, PartialFolder(output))
        del lazy  # Its model would keep every array that is evaluated.
        return form.run()


def _runs_as_it_is(lazy: LazyModel) -> bool:
    """Whether the experts, or every matrix of a dense model, are read in place."""
    parameters = _parameters(lazy.model)
    prefixes = tuple(f"{path}." for path, _ in switch_layers(lazy.model))
    return all(
        is_in_place(name, array, lazy.provenance, lazy.entries)
        for name, array in parameters.items()
        if (name.startswith(prefixes) if prefixes else array.ndim > 1)
    )


def _parameters(model: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


class _MlxForm:
    def __init__(self, lazy: LazyModel, wanted: Wanted, folder: PartialFolder) -> None:
        self.files, self.entries, self.folder = lazy.files, lazy.entries, folder
        self.small = SmallCopies(lazy.folder, lambda name: name in DESCRIPTIONS)
        self.key = {
            "versions": [version(name) for name in ("mlx-flash-runtime", "mlx-lm", "mlx")],
            "source": str(lazy.folder.resolve()),
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in lazy.files],
            "small_files": self.small.sums,
            "config": lazy.config,
            "wanted": asdict(wanted),
        }
        provenance = lazy.provenance
        self.sources = {
            name: _Source(
                array.dtype,
                moved_pieces(name, array, provenance),
                provenance.stacks.get(name) or [array],
            )
            for name, array in _parameters(lazy.model).items()
        }
        self.model, self.config, self.types = _quantised(lazy, wanted)
        for kept in (provenance.arrays, provenance.tensors, provenance.stacks):
            kept.clear()

    def run(self) -> int:
        """Writes the output. Returns its bytes."""
        from mlx_lm.utils import get_total_parameters, save_config

        shards, total = self._shards(), sum(array.nbytes for array in _parameters(self.model).values())
        parameters = int(get_total_parameters(self.model))
        self.model = None  # so that an evaluated array is only kept where it is needed
        for source in self.sources.values():
            if source.pieces is not None:
                source.arrays.clear()
        self.folder.claim(self.key, self.files)
        self.folder.check_free_space(total, "the converted checkpoint")
        weight_map: dict[str, str] = {}
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", dynamic_ncols=True) as bar:
            for name, tensors in shards.items():
                weight_map |= {tensor: name for tensor, *_ in tensors}
                if self.folder.is_finished(name):
                    bar.update(sum(int(np.prod(shape, dtype=np.int64)) * dtype.size for _, shape, dtype, _ in tensors))
                else:
                    note = partial(self.folder.written.add, name)
                    write_safetensors(self.folder.path / name, tensors, bar.update, written=note)
        self.folder.check_sources()
        self.small.copy_to(self.folder.path)
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
        (self.folder.path / INDEX).write_text(json.dumps(index, indent=4, sort_keys=True), encoding="utf-8")
        save_config(self.config, self.folder.path / LAST_FILE)
        for path in self.folder.path.iterdir():
            fsync(path)
        fsync(self.folder.path)
        self.folder.rename(lambda name: name == SUMS or name.endswith(".partial"))
        return total

    def _shards(self) -> dict[str, list[tuple[str, tuple[int, ...], mx.Dtype, Callable[[], Any]]]]:
        """File -> its tensors, in the form of `write_safetensors`. A matrix and its scales are in one file."""
        left = _parameters(self.model)
        modules = dict(self.model.named_modules())
        groups = []
        for name in list(left):
            if (array := left.pop(name, None)) is None:
                continue
            path, _, last = name.rpartition(".")
            if last in ("scales", "biases") and name not in self.sources:
                continue  # It comes with its matrix.
            loads: dict[str, tuple[mx.array, Callable[[], Any]]] = {name: (array, partial(self._numbers, name))}
            scales = f"{path}.scales"
            if last == "weight" and scales in left and scales not in self.sources:
                module = modules[path]
                matrix = _Matrix(partial(self._numbers, name), module.group_size, module.bits, module.mode)
                loads[name] = (array, matrix.packed)
                parts = [f"{path}.{part}" for part in ("scales", "biases") if f"{path}.{part}" in left]
                loads |= {part: (left.pop(part), partial(matrix.rest, n)) for n, part in enumerate(parts)}
            groups.append([(key, tuple(a.shape), a.dtype, load) for key, (a, load) in loads.items()])
        shards: list[list[Any]] = []
        room = 0
        for group in groups:
            size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.size for _, shape, dtype, _ in group)
            if not shards or size > room:
                shards.append([])
                room = SHARD_BYTES
            shards[-1] += group
            room -= size
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}

    def _numbers(self, name: str) -> Iterator[mx.array]:
        """Yields a parameter in pieces along its first axis, before it is quantised. It can be done once."""
        for array in self._loaded(name, self.sources.pop(name)):
            yield array.astype(self.types[name])

    def _loaded(self, name: str, source: _Source) -> Iterator[mx.array]:
        if source.pieces is not None:
            for piece in source.pieces:
                yield from self._read(piece, source.dtype)
            return
        stacked = len(source.arrays) > 1
        source.arrays.reverse()
        while source.arrays:
            array = source.arrays.pop()
            try:
                mx.eval(array)
            except RuntimeError as error:  # MLX names neither file nor tensor
                raise unreadable(self.files[0].parent, error, f"a tensor of {name}") from None
            yield array[None] if stacked else array

    def _read(self, piece: TensorPiece, dtype: mx.Dtype) -> Iterator[mx.array]:
        number, entry = self.entries[piece.source]
        view = piece.view if piece.view.ndim else piece.view[None]
        rows = max(1, PIECE_BYTES // max(1, view[:1].nbytes))
        with reading(self.files[number], f"tensor {piece.source}"), self.files[number].open("rb") as file:
            if piece.view.size and _span(view[:rows])[1] > 4 * view[:rows].nbytes + PIECE_BYTES:
                rows = len(view)  # Each row is scattered over the tensor.
            for begin in range(0, len(view), rows):
                part = view[begin : begin + rows]
                start, nbytes = _span(part)
                raw = np.empty(nbytes, np.uint8)
                read_at(file, entry.begin + start - piece.start, raw)
                found = np.ndarray(part.shape, part.dtype, raw, part.ctypes.data - start, part.strides)
                array = mx.array(found).view(dtype)
                yield array if piece.view.ndim else array[0]


class _Matrix:
    """A matrix, or a stack of them, that is quantised while it is written; its scales follow."""

    def __init__(self, numbers: Callable[[], Iterator[mx.array]], group_size: int, bits: int, mode: str) -> None:
        self._numbers, self._quantise = numbers, partial(mx.quantize, group_size=group_size, bits=bits, mode=mode)
        self._rest: list[list[mx.array]] = []

    def packed(self) -> Iterator[mx.array]:
        for numbers in self._numbers():
            packed, *rest = self._quantise(numbers)
            mx.eval(packed, *rest)
            self._rest.append(rest)
            yield packed

    def rest(self, number: int) -> Iterator[mx.array]:
        """The scales (0) or the biases (1)."""
        for rest in self._rest:
            yield rest[number]
            rest[number] = mx.array(0)  # The file's list of tensors keeps this object.


def _span(view: np.ndarray) -> tuple[int, int]:
    """(address of the first byte of a view, bytes from there to the end of its last)."""
    low, high = np.lib.array_utils.byte_bounds(view)
    return low, high - low


def _quantised(lazy: LazyModel, wanted: Wanted) -> tuple[Any, dict[str, Any], dict[str, mx.Dtype]]:
    """The model as wanted, its configuration, and the types that its parameters have before they are quantised.

    Nothing is evaluated. Raises UsageError if there is nothing to quantise.
    """
    from mlx.utils import tree_map_with_path
    from mlx_lm.utils import quantize_model

    model, config = lazy.model, lazy.config
    if wanted.dtype is not None:
        dtype, casts = getattr(mx, wanted.dtype), getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, array: mx.array) -> mx.array:
            return array.astype(dtype) if casts(name) and mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map_with_path(cast, model.parameters()))
    types = {name: array.dtype for name, array in _parameters(model).items()}
    expert_bits = wanted.expert_bits or wanted.bits
    if (base := min(wanted.bits, expert_bits) if 16 in (wanted.bits, expert_bits) else wanted.bits) == 16:
        if "quantization" not in config:  # A foreign quantisation is gone.
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part.pop("quantization_config", None)
        return model, config, types
    experts = tuple(f"{path}." for path, _ in switch_layers(model))
    own = getattr(model, "quant_predicate", None)

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        bits = expert_bits if path.startswith(experts) else wanted.bits
        chosen: bool | dict[str, Any] = own(path, module) if own is not None else True
        if bits == 16 or not chosen:
            return False
        return chosen if bits == base else {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the average of the bits
        model, config = quantize_model(model, config, GROUP_SIZE, base, quant_predicate=choose)
    if not _parameters(model).keys() - types.keys():
        raise UsageError(
            f"{lazy.folder} has no matrix to quantise: they are quantised already, or their rows do not divide into "
            f"groups of {GROUP_SIZE}. Leave --bits and --expert-bits out."
        )
    return model, config, types
