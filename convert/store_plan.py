"""Plans the contents of a store from the checkpoint and the settings, and checks them before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_flash.defaults import CALIBRATION_TOKENS, DTYPES
from mlx_flash.errors import CheckpointError, UnsupportedModelError, UsageError
from mlx_flash.flash.files import GROUP_SIZE, NeuronLayout, group_problem
from mlx_flash.layers.activations import Activation
from mlx_flash.models.family import Family

from . import fitting, imported
from .checkpoint import Checkpoint, Tensor
from .numpy_matrix import row_pieces
from .resident import ResidentTensors

LEAST_POSITIONS = 3  # an opening token, a second one, and one to predict
RESIDENT_GROUP = 64  # mlx-lm's default


@dataclass(frozen=True)
class Settings:
    """The choices of a user. All of them change the bytes of the store."""

    dtype: str | None = None  # None: the checkpoint's own
    calibration_text: Path | None = None  # None: the packaged text
    calibration_tokens: int = CALIBRATION_TOKENS
    recall: float = 0.99  # share of the active neurons that a predictor should find (bench/results/predictors.md)
    shadow_bits: int = 3  # bench/results/predictors.md
    predictor_memory: int | None = None  # bytes for the low-rank predictors of all layers; None: a share of the FFN's
    predictor_from: Path | None = None  # a folder of PowerInfer's predictor files to import
    bits: int = 16  # bits per number of the neurons; 16: not quantised
    resident_bits: int = 16  # bits per number of the other matrices; 16: not quantised
    group_size: int = GROUP_SIZE  # quantised numbers that share a scale and a bias


class StorePlan:
    """The plan of a store: the model, the layout of its neurons, the other tensors and the kinds of predictors.

    It also loads every tensor in its stored form.

    Raises CheckpointError if the checkpoint does not match its configuration, UnsupportedModelError for a foreign
    quantisation, UsageError for settings that do not fit the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, activation: Activation, settings: Settings) -> None:
        from mlx_flash.loading.model_types import CONFIG_ERRORS, model_arguments, model_classes
        from mlx_flash.source.model_kind import first_line

        self.checkpoint, self.family, self.activation = checkpoint, family, activation
        self.settings = settings
        if quantised := checkpoint.foreign_quantisation():
            raise UnsupportedModelError(
                f"{checkpoint.folder} is quantised ({quantised}), which cannot be unpacked here. Use the unquantised "
                "checkpoint: --bits and --resident-bits of `mlxflash convert` quantise the store."
            )
        model_class, args_class = model_classes(checkpoint.config)
        try:
            args = model_arguments(args_class, checkpoint.config)
            self.layers = int(args.num_hidden_layers)
            self.positions = int(args.max_position_embeddings)
            if not 0 < self.layers <= len(checkpoint.tensors):
                raise ValueError(f"num_hidden_layers is {self.layers}, with {len(checkpoint.tensors)} tensors")
            if self.positions < LEAST_POSITIONS:
                raise ValueError(f"max_position_embeddings is {self.positions}, expected at least {LEAST_POSITIONS}")
            self.model = model_class(args)  # Its random weights are never evaluated.
            self.model(mx.zeros((1, 2), mx.int32))  # Not evaluated either, but it checks the shapes.
            self.original = self._original_names()
        except CONFIG_ERRORS as error:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'} does not describe a model: {first_line(error)}"
            ) from None
        self.layout, self.dtype = self._plan_layout()
        bits = settings.resident_bits
        self.resident = ResidentTensors(
            self.model,
            self._resident_tensors(),
            bits,
            RESIDENT_GROUP if bits < 16 else 0,
            getattr(mx, self.dtype),
            self._finite_pieces,
        )
        self.kinds = ["lowrank"]
        if self.layout.neurons % fitting.SHADOW_GROUP == 0:
            self.kinds.append("shadow")
        self.predictor_files: list[Path] = []
        if settings.predictor_from is not None:
            self.predictor_files = imported.find_files(settings.predictor_from, self.layers)
            imported.check_files(self.predictor_files, self.layout.neurons, self.layout.width)
            self.kinds.append("imported")
        # The user's own predictors, or else those that lose least (bench/results/predictors.md).
        self.default_kind = self.kinds[-1]
        self.lowrank_memory = fitting.lowrank_memory(self.layout, settings.predictor_memory)

    def _original_names(self) -> dict[str, str]:
        """The model's name of each tensor -> the checkpoint's name.

        As in transformers, a name may lack the prefix of the model's body, or have it twice. If the embedding and the
        output matrix are tied, the checkpoint may store either of them.
        """
        from mlx.utils import tree_flatten

        wanted = dict(tree_flatten(self.model.parameters()))
        prefix = self.family.ffn.split(".")[0] + "."
        result: dict[str, str] = {}
        for old in self.checkpoint.tensors:
            for name in (old, prefix + old, old.removeprefix(prefix)):
                if new := next((n for n in self.model.sanitize({name: mx.array(0)}) if n in wanted), None):
                    if not self._are_same(result.setdefault(new, old), old):
                        raise CheckpointError(
                            f"{self.checkpoint.folder}: {result[new]} and {old} are the same tensor of the model, but "
                            "hold different numbers. Download the checkpoint again."
                        )
                    break
        if getattr(self.model.args, "tie_word_embeddings", False):
            heads = [old for old in self.checkpoint.tensors if old.removeprefix(prefix) == "lm_head.weight"]
            embeddings = [name for name in wanted if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))]
            for embedding, head in product(embeddings, heads):
                if not self._are_same(result.setdefault(embedding, head), head):
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: config.json ties {head} to {result[embedding]}, but they hold "
                        'different numbers. Set "tie_word_embeddings" to false in config.json to use both.'
                    )
        return result

    def _are_same(self, one: str, other: str) -> bool:
        """Whether two of the checkpoint's tensors are equal. Only a few rows are in memory at a time."""
        shape = self.checkpoint.tensors[one].shape
        return one == other or (
            shape == self.checkpoint.tensors[other].shape
            and all(
                mx.array_equal(self.checkpoint.load(one, *rows), self.checkpoint.load(other, *rows)).item()
                for rows in row_pieces(shape, 4)
            )
        )

    def _plan_layout(self) -> tuple[NeuronLayout, str]:
        from mlx.utils import tree_flatten

        *first, down = (self.find(name) for name in self.family.weights(0))
        up = first[-1]
        if len(up.shape) != 2 or not all(up.shape) or {m.shape for m in first} | {down.shape[::-1]} != {up.shape}:
            shapes = ", ".join(f"{part} {m.shape}" for part, m in zip(self.family.parts, [*first, down], strict=True))
            raise CheckpointError(
                f"{self.checkpoint.folder}: the FFN's matrices do not fit together: {shapes}; expected (F, D), and "
                "(D, F) for the last. Download the checkpoint again."
            )
        neurons, width = up.shape
        found = {self.find(name).dtype for name in dict(tree_flatten(self.model.parameters()))}
        dtype = self.settings.dtype or (up.dtype if len(found) == 1 else "float32")
        if others := found - {*DTYPES}:  # Integers are from another quantisation; without its scales they are useless.
            names = ", ".join(sorted(others))
            raise CheckpointError(f"{self.checkpoint.folder} is stored in {names}; expected {', '.join(DTYPES)}.")
        if len(found) > 1 and self.settings.dtype is None:
            note = f"note: {self.checkpoint.folder} mixes {', '.join(sorted(found))}; it is stored in {dtype} (--dtype)"
            tqdm.write(note, file=sys.stderr)
        bits, group = self.settings.bits, self.settings.group_size
        if problem := group_problem(bits, group if bits < 16 else 0, width):
            raise UsageError(f"{self.checkpoint.folder} cannot be stored with --bits {bits}: {problem}. Use --bits 16.")
        return NeuronLayout.plan(dtype, self.layers, neurons, width, self.family.parts, bits, group), dtype

    def _resident_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored name -> (model's name, shape) of every tensor that is not streamed.

        Raises CheckpointError if one is missing or has another shape.
        """
        from mlx.utils import tree_flatten

        wanted = dict(tree_flatten(self.model.parameters()))
        result = {}
        for name in sorted(wanted):
            shape = self.find(name).shape
            if shape != wanted[name].shape:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {self.original[name]} has shape {shape}, expected {wanted[name].shape}."
                )
            result[name] = (name, shape)
        for layer in range(self.layers):
            for name in self.family.weights(layer):
                result.pop(name)
            for old, new in self.family.biases_of(layer).items():
                if old in result:
                    result[new] = result.pop(old)
        return result

    def find(self, name: str) -> Tensor:
        if name not in self.original:
            raise CheckpointError(f"{self.checkpoint.folder} has no tensor {name}. Is the checkpoint complete?")
        return self.checkpoint.tensors[self.original[name]]

    def load(self, name: str) -> mx.array:
        return self.checkpoint.load(self.original[name])

    def layer_rows(self, layer: int) -> tuple[mx.array, ...]:
        *first, down = (self._load_finite(name) for name in self.family.weights(layer))
        return *first, down.T

    def _load_finite(self, name: str) -> mx.array:
        """A tensor in the store's type. Raises CheckpointError if a number is not finite in that type."""
        tensor = self.load(name).astype(getattr(mx, self.dtype))
        for begin, end in row_pieces(tensor.shape, tensor.itemsize):
            self._check_finite(name, tensor[begin:end])
        return tensor

    def _finite_pieces(self, name: str) -> Iterator[mx.array]:
        """The same as `_load_finite`, a few rows at a time, because an embedding may be larger than a layer."""
        for begin, end in row_pieces(self.find(name).shape, 4):
            piece = self.checkpoint.load(self.original[name], begin, end).astype(getattr(mx, self.dtype))
            self._check_finite(name, piece)
            yield piece

    def _check_finite(self, name: str, tensor: mx.array) -> None:
        if not mx.isfinite(tensor).all().item():
            raise CheckpointError(
                f"{self.checkpoint.folder}: {self.original[name]} has numbers that are not finite in {self.dtype}. "
                "Download the checkpoint again, or choose a wider --dtype."
            )
