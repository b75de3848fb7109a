"""Puts an adapter that mlx-lm trained (LoRA or DoRA) into a lazily loaded model, with mlx-lm's own modules.

What an adapter adds stays in memory. The weights that it is added to may still be streamed with their layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError, UnsupportedModelError
from ..flash.plain_files import reading
from ..flash.safetensors_file import TensorEntry, read_header
from ..flash.stored_tensors import evaluated, is_as_entered, lazily_loaded
from ..source.adapter_files import FUSE, WEIGHTS, AdapterConfig, read_adapter_config
from ..source.model_kind import error_line
from .provenance import Provenance

AGAIN = "Use an adapter that was trained for this model, or get it again."
INSTEAD = (
    "Train it with `keys` of lora_parameters that name other modules, such as self_attn.q_proj, or write the changed "
    f"model once, {FUSE}, and run FUSED."
)


@dataclass(frozen=True)
class Adapter:
    """An adapter whose tensors are not read yet. entries: those of its file's header, by name."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, mx.array]
    entries: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def note(self) -> str:
        """The note for the plan."""
        return f"{self.config.kind} {self.folder.resolve().name}"

    def read(self) -> None:
        """Reads the tensors into memory. Raises ReadError."""
        for name, array in self.tensors.items():
            evaluated(array, self.folder / WEIGHTS, name, self.entries[name])

    def put_into(self, model: Any, provenance: Provenance, experts: Collection[str], tables: Collection[str]) -> None:
        """Replaces the adapted modules of a model, which stay inside the new ones, and names them so in `provenance`.

        experts, tables: paths of switch layers, and of lookup tables whose rows may be read. They cannot be adapted.

        Raises UnsupportedModelError, or CheckpointError for an adapter that does not fit the model.
        """
        before = dict(model.named_modules())
        self._replace_modules(model)
        moved = dict(_moved(before, model))
        if not moved:
            raise CheckpointError(f"{self.folder}: it adapts no module that this model has. {AGAIN}")
        for path in moved:
            if path in tables:
                raise self._streamed(path, "are rows of a table, which are read where they do not fit into memory")
            if any(path == switch or path.startswith(f"{switch}.") for switch in experts):
                raise self._streamed(path, "are experts, which are read where they do not fit into memory")
        self._check_tensors(model, moved)
        model.load_weights(list(self.tensors.items()), strict=False)
        model.eval()  # A new module would drop numbers out, as in training.
        provenance.rename(lambda name: _inside(name, moved))

    def _replace_modules(self, model: Any) -> None:
        from mlx_lm.tuner.utils import linear_to_lora_layers

        dora = self.config.kind == "dora"
        try:
            linear_to_lora_layers(model, self.config.layers, self.config.as_mlx_lm(), use_dora=dora)
        except Exception as error:  # mlx-lm raises plain exceptions
            raise CheckpointError(
                f"{self.folder}: mlx-lm cannot put this adapter into the model: {error_line(error)}. {AGAIN}"
            ) from None

    def _streamed(self, path: str, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.folder}: it adapts weights of {path}, but these {what}. {INSTEAD}")

    def _check_tensors(self, model: Any, moved: dict[str, str]) -> None:
        """Raises CheckpointError unless the tensors are those that the adapted modules need."""
        needed = dict(_added(model, moved))
        file = self.folder / WEIGHTS
        if lacking := [name for name in needed if name not in self.tensors]:
            raise CheckpointError(f"{file} lacks {len(lacking)} tensors, the first is {lacking[0]}. {AGAIN}")
        if foreign := [name for name in self.tensors if name not in needed]:
            raise CheckpointError(
                f"{file} has {len(foreign)} tensors that this model has no place for, the first is {foreign[0]:.200}. "
                f"{AGAIN}"
            )
        for name, array in needed.items():
            found = self.tensors[name]
            if found.shape != array.shape or not mx.issubdtype(found.dtype, mx.floating):
                raise CheckpointError(
                    f"{file}: {name} is {found.dtype} {found.shape}, expected numbers with a fraction of shape "
                    f"{array.shape}. {AGAIN}"
                )


def open_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, with its tensors unread. Raises CheckpointError or ReadError."""
    config, path = read_adapter_config(folder), folder / WEIGHTS
    try:
        with reading(path, "its header"):
            entries = read_header(path)[1]
        tensors = lazily_loaded(path)
        if tensors.keys() != entries.keys():
            raise ValueError("MLX finds other tensors in it than its header names")
        for name, array in tensors.items():
            if not is_as_entered(array, entries[name]):
                raise ValueError(f"MLX finds a different tensor {name:.200} in it")
    except ValueError as error:
        raise CheckpointError(f"{path} is not a file of tensors: {error}. {AGAIN}") from None
    return Adapter(folder, config, tensors, entries)


def _moved(before: dict[str, nn.Module], model: Any) -> Iterator[tuple[str, str]]:
    """(path, name of the child that holds the module from before) of every module that was replaced.

    Raises UnsupportedModelError for a module that does not hold the one that it replaced.
    """
    for path, module in model.named_modules():
        if (old := before.get(path)) is None or old is module:
            continue
        inner = next((name for name, child in module.children().items() if child is old), None)
        if inner is None:
            raise UnsupportedModelError(f"mlx-lm adapts {path} in a way of its own, which is not supported. {INSTEAD}")
        yield path, inner


def _added(model: Any, moved: dict[str, str]) -> Iterator[tuple[str, mx.array]]:
    """(path in the model, array) of every parameter of the new modules, without those of the modules inside them."""
    from mlx.utils import tree_flatten

    modules = dict(model.named_modules())
    for path, inner in sorted(moved.items()):
        parameters: Any = tree_flatten(modules[path].parameters())
        yield from ((f"{path}.{name}", array) for name, array in parameters if not name.startswith(f"{inner}."))


def _inside(name: str, moved: dict[str, str]) -> str:
    """The path of a parameter after its module was moved into another one."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{moved[owner]}.{leaf}" if owner in moved else name
