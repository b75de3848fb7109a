"""The two files of an adapter that mlx-lm trained: where they are, and what the configuration says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..flash.plain_files import reading
from .checkpoint_files import files_in
from .hub_listing import Choose

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MAX_CONFIG_BYTES = 1 << 20
MOST_RANK = 1 << 16
KINDS = ("lora", "dora")
FUSE = "`mlx_lm.fuse --model MODEL --adapter-path ADAPTER --save-path FUSED`"
MERGE = "Merge it into its model once (PEFT's `merge_and_unload`), and run the merged checkpoint without an adapter."


@dataclass(frozen=True)
class AdapterConfig:
    """What decides which modules of a model are adapted, and how, in mlx-lm's terms.

    kind: "lora" or "dora". layers: how many of the last layers; all if it is not positive. keys: names of the adapted
    modules; None for every linear module and embedding of the layers.
    """

    kind: str
    layers: int
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...] | None

    def as_mlx_lm(self) -> dict[str, Any]:
        """The configuration in the form that `linear_to_lora_layers` takes."""
        keys = None if self.keys is None else list(self.keys)
        return {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": keys}


def find_adapter(name: str | os.PathLike[str], say: Callable[[str], None] = lambda _: None, fetch: bool = True) -> Path:
    """The folder of an adapter, named by a local folder or a Hugging Face repository id.

    Raises UsageError, CheckpointError, NoSpaceError and ConversionError, as `find_checkpoint` does.
    """
    text = os.fspath(name)
    try:
        folder = Path(text).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~ of an unknown user, a zero byte
        raise UsageError(f"the adapter {text!r:.80} cannot be a folder: {error}.") from None
    if text and is_folder:
        return folder
    if exists or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UsageError(
            f"the adapter {text!r:.200} is neither a folder nor a Hugging Face repository id (owner/name)."
        )
    from .hub import download

    return download(text, None, say, wanted, fetch=fetch)


def wanted(names: Collection[str], _: Callable[[str], str], where: object) -> list[str]:
    """The files of an adapter, out of `names`. Raises CheckpointError if they are not there."""
    lacking = [name for name in (CONFIG, WEIGHTS) if name not in names]
    if lacking and any(name in names for name in PEFT_WEIGHTS):
        raise CheckpointError(f"{where} is an adapter of PEFT, and mlx-lm's form is expected. {MERGE}")
    if lacking:
        raise CheckpointError(
            f"{where} has no {' and no '.join(lacking)}: expected an adapter as `mlx_lm.lora` writes it, with "
            f"{CONFIG} and {WEIGHTS}."
        )
    return [CONFIG, WEIGHTS]


_: Choose = wanted


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in `folder`, whose two files are there.

    Raises CheckpointError or ReadError.
    """
    wanted(files_in(folder), lambda _: "", folder)
    path = folder / CONFIG
    with reading(path):
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes; an adapter's configuration has at most {MAX_CONFIG_BYTES}. "
                "Get the adapter again."
            )
        content = path.read_bytes()
    try:
        return _parsed(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe an adapter that can be used: {error}.") from None


def _parsed(config: Any) -> AdapterConfig:
    """Raises ValueError with the reason and what to do."""
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    if "peft_type" in config:
        raise ValueError(f"it is one of PEFT, and mlx-lm's form is expected. {MERGE.rstrip('.')}")
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise ValueError(
            f"it holds whole weights (fine_tune_type full), which take the place of the model's. Write the changed "
            f"model once, {FUSE}, and run FUSED"
        )
    if kind not in KINDS:
        raise ValueError(f"fine_tune_type is {kind!r:.40}, expected {' or '.join(KINDS)}")
    layers, parameters = config.get("num_layers"), config.get("lora_parameters")
    if type(layers) is not int:
        raise ValueError(f"num_layers is {layers!r:.40}, expected a whole number")
    if not isinstance(parameters, dict):
        raise ValueError(f"lora_parameters is {parameters!r:.40}, expected an object with rank and scale")
    rank, scale, dropout = (_number(parameters, name) for name in ("rank", "scale", "dropout"))
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ValueError(f"the rank is {rank!r:.40}, expected a whole number from 1 to {MOST_RANK}")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout is {dropout!r:.40}, expected a number from 0 to below 1")
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise ValueError(f"the keys are {keys!r:.40}, expected a list of names")
    return AdapterConfig(kind, layers, rank, scale, dropout, None if keys is None else tuple(keys))


def _number(parameters: dict[str, Any], name: str) -> float:
    """Raises ValueError if it is not a finite number."""
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"the {name} is {value!r:.40}, expected a number")
    return value
