"""The files of a store: layout of the bundle file, the manifest, and opening them safely.

The law of the format is `convert/FORMAT.md`; this module reads it, `mlx_flash.convert` writes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    CorruptStoreError,
    NewerFormatError,
    NotAStoreError,
    OlderFormatError,
    TruncatedStoreError,
)

FORMAT = "mlx_flash store"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
ALIGNMENT = 4096  # every block begins and ends on a multiple of it
LAYER_ALIGNMENT = 16384  # every layer begins on a multiple of it (a page of Apple silicon)
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class NeuronLayout:
    """Where the bytes of every neuron lie in the bundle file.

    A *block* is what one read brings: `neurons_per_block` neurons, part after part (all their up rows,
    then all their down columns), padded to a multiple of 4096 bytes. A layer is a run of blocks.
    """

    dtype: str
    layers: int
    neurons: int  # per layer
    width: int  # elements of one part of one neuron: the model's hidden size
    parts: tuple[str, ...]  # ("up", "down"), with "gate" in front where there is one
    neurons_per_block: int
    block_bytes: int
    piece_neurons: int  # neurons multiplied at once: fixed here, so that the sums never depend on a budget

    @property
    def row_bytes(self) -> int:
        """Bytes of one part of one neuron."""
        return self.width * ITEM_BYTES[self.dtype]

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron, without padding."""
        return self.row_bytes * len(self.parts)

    @property
    def blocks(self) -> int:
        """Blocks of one layer."""
        return -(-self.neurons // self.neurons_per_block)

    @property
    def layer_bytes(self) -> int:
        """Bytes from the start of one layer to the start of the next."""
        return round_up(self.blocks * self.block_bytes, LAYER_ALIGNMENT)

    @property
    def file_bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def piece_blocks(self) -> int:
        return self.piece_neurons // self.neurons_per_block

    def part_range(self, parts: tuple[str, ...]) -> tuple[int, int]:
        """(offset, bytes) within a block of neighbouring `parts`."""
        part_bytes = self.neurons_per_block * self.row_bytes
        first = self.parts.index(parts[0])
        if parts != self.parts[first : first + len(parts)]:
            raise ValueError(f"expected neighbouring parts out of {self.parts}, got {parts}")
        if parts == self.parts:
            return 0, self.block_bytes
        return first * part_bytes, len(parts) * part_bytes

    @staticmethod
    def plan(dtype: str, layers: int, neurons: int, width: int, parts: tuple[str, ...]) -> NeuronLayout:
        """Chooses the block for a model.

        The smallest number of neurons per block whose padding stays under a tenth; pieces of about 16 MiB,
        but no more than the layer.
        """
        bundle = width * ITEM_BYTES[dtype] * len(parts)
        count = 1
        while round_up(count * bundle, ALIGNMENT) > 1.1 * count * bundle and count < min(64, neurons):
            count += 1
        block = round_up(count * bundle, ALIGNMENT)
        piece = max(1, min((16 << 20) // block, -(-neurons // count))) * count
        return NeuronLayout(dtype, layers, neurons, width, parts, count, block, piece)

    def problem(self) -> str | None:
        """What is wrong with these numbers (a manifest may lie), or None."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dtype", "parts")}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
                return f"{name} is {value!r}"
        if self.dtype not in ITEM_BYTES:
            return f"dtype is {self.dtype!r}, expected one of {', '.join(ITEM_BYTES)}"
        if not self.parts or len(set(self.parts)) != len(self.parts):
            return f"parts are {self.parts!r}"
        if self.block_bytes % ALIGNMENT or self.block_bytes < self.neurons_per_block * self.bundle_bytes:
            return f"block_bytes is {self.block_bytes} for {self.neurons_per_block} x {self.bundle_bytes} bytes"
        if self.piece_neurons % self.neurons_per_block:
            return f"piece_neurons is {self.piece_neurons}, no multiple of {self.neurons_per_block}"
        return None


@dataclass(frozen=True)
class Manifest:
    """What a store holds; written last, so that its presence means the store is whole."""

    model_type: str
    source: dict[str, Any]  # files of the checkpoint: name -> bytes; header checksums
    layout: NeuronLayout
    resident_dtype: str
    decode_tokens: int  # calls with at most so many tokens per sequence go the decode way
    all_neurons_layers: tuple[int, ...]  # layers too dense to be worth selecting in
    predictors: dict[str, dict[str, Any]]  # kind -> measured report, thresholds
    default_predictor: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> bytes, sha256, tensors' crc32

    neurons_file = "neurons.bin"
    neurons_checksums_file = "neurons.crc32"
    resident_file = "model.safetensors"

    def to_json(self) -> str:
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["checksum"] = _digest(body)
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def predictor_file(kind: str) -> str:
        return f"predictor-{kind}.safetensors"


def _digest(body: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own checksum, in canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a store's manifest, and that the files it names are there in full size.

    Raises NotAStoreError, NewerFormatError, OlderFormatError, CorruptStoreError or TruncatedStoreError.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotAStoreError(
            f"{folder} has no {MANIFEST}: it is no store. Make one with `python -m mlx_flash.convert`."
        )
    again = "Convert the checkpoint again: `python -m mlx_flash.convert --model ... --output ... --overwrite`."
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CorruptStoreError(
            f"{path} has {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}. {again}"
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptStoreError(f"{path} is not valid JSON ({error}). {again}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("version"), int):
        raise CorruptStoreError(f"{path} is not the manifest of an mlx_flash store. {again}")
    if body["version"] > VERSION:
        raise NewerFormatError(
            f"{folder} has format version {body['version']}, this mlx_flash reads version {VERSION}. "
            "Upgrade mlx_flash: `pip install -U mlx-flash-runtime`."
        )
    if body["version"] < VERSION:
        raise OlderFormatError(f"{folder} has format version {body['version']}, expected {VERSION}. {again}")
    if body.pop("checksum", None) != _digest(body):
        raise CorruptStoreError(f"{path} does not match its own checksum. {again}")
    manifest = _parse(body, path, again)
    for name, entry in manifest.files.items():
        file = folder / name
        expected = entry["bytes"]
        if not file.is_file():
            raise TruncatedStoreError(f"{folder} lacks {name} ({expected} bytes). {again}")
        if (found := file.stat().st_size) != expected:
            raise TruncatedStoreError(f"{file} has {found} bytes, expected {expected}. {again}")
    return manifest


def _parse(body: dict[str, Any], path: Path, again: str) -> Manifest:
    try:
        numbers = dict(body["layout"])
        layout = NeuronLayout(**{**numbers, "parts": tuple(numbers["parts"])})
        problem = layout.problem()
        kept = {f.name: body[f.name] for f in fields(Manifest)}
        manifest = Manifest(**{**kept, "layout": layout, "all_neurons_layers": tuple(kept["all_neurons_layers"])})
        for name, entry in manifest.files.items():
            if Path(name).name != name or not isinstance(entry["bytes"], int):
                problem = problem or f"a file entry {name!r}"
        if manifest.files[Manifest.neurons_file]["bytes"] != layout.file_bytes:
            problem = problem or f"{Manifest.neurons_file} has {manifest.files[Manifest.neurons_file]['bytes']} bytes"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptStoreError(
            f"{path} lacks or misstates a field ({type(error).__name__}: {error}). {again}"
        ) from None
    if problem:
        raise CorruptStoreError(f"{path} contradicts itself: {problem}. {again}")
    return manifest


def read_block_checksums(folder: Path, layout: NeuronLayout) -> np.ndarray:
    """CRC-32 of every block: uint32 (layers, blocks)."""
    table = np.fromfile(folder / Manifest.neurons_checksums_file, dtype="<u4")
    if table.size != layout.layers * layout.blocks:
        raise TruncatedStoreError(
            f"{folder / Manifest.neurons_checksums_file} has {table.size} checksums, "
            f"expected {layout.layers * layout.blocks}. Convert the checkpoint again."
        )
    return table.reshape(layout.layers, layout.blocks)
