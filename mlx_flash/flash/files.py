"""The files of a store: layout of the bundle file, the manifest, and opening them safely.

`convert/FORMAT.md` defines the format. This module reads it; `mlx_flash.convert` writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..defaults import BITS
from ..errors import CorruptStoreError, NewerFormatError, NotAStoreError, OlderFormatError, TruncatedStoreError
from .dataless import refuse_dataless, refuse_placeholders
from .plain_files import reading
from .safetensors_file import sha256_of

FORMAT = "mlx_flash store"
VERSION = 2
MANIFEST = "manifest.json"
RECORD = "conversion.json"  # in the folder of an unfinished conversion: records the conversion's input
MAX_MANIFEST_BYTES = 64 << 20
ALIGNMENT = 4096  # page size of most disks; a shorter read costs as much
LAYER_ALIGNMENT = 16384  # every layer starts at a multiple of this, the page size of Apple silicon
BLOCK_ALIGNMENT = 16  # every block's size is a multiple of this
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WORD_BYTES = 4  # bytes of the integers that quantised numbers are packed into
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64  # the default (bench/results/bits.md)
# Quantised neurons are padded to a page if their block is at most this many times their size (bench/results/bits.md).
TIGHT_PADDING = 1.25
PARTS = (("up", "down"), ("gate", "up", "down"))
CHECKSUM_BYTES = 4  # a CRC-32
AGAIN = "Convert the checkpoint again: `mlxflash convert --model ... --output ... --overwrite`."


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def group_problem(bits: int, group_size: int, width: int) -> str | None:
    """Returns why rows of `width` numbers cannot be stored in `bits` bits, or None if they can."""
    if bits not in BITS:
        return f"bits is {bits}, expected one of {', '.join(map(str, BITS))}"
    if group_size not in (GROUP_SIZES if bits < 16 else (0,)):
        return f"group_size is {group_size} at {bits} bits"
    if bits < 16 and width % group_size:
        return f"rows of {width} numbers do not divide into groups of {group_size}"
    return None


@dataclass(frozen=True)
class NeuronLayout:
    """The places of the neurons' bytes in the bundle file.

    A *block* is the unit of reading. It holds `neurons_per_block` neurons, part after part: all their up rows, then all
    their down columns. A block is padded to a multiple of 4096 bytes, or of 16 bytes if that would waste too much
    space on small quantised neurons. A layer is a run of blocks.
    """

    dtype: str
    layers: int
    neurons: int  # per layer
    width: int  # elements of one part of one neuron: the model's hidden size
    parts: tuple[str, ...]  # ("up", "down") or ("gate", "up", "down")
    neurons_per_block: int
    block_bytes: int
    piece_neurons: int  # neurons multiplied at once; fixed here, so that the sums never depend on a budget
    bits: int = 16  # bits per number; below 16, rows are quantised in MLX's affine mode
    group_size: int = 0  # numbers of a row that share a scale and a bias; 0 if rows are not quantised

    @property
    def quantised(self) -> bool:
        return self.bits < 16

    @property
    def components(self) -> tuple[tuple[str, int], ...]:
        """(dtype, elements) of each component of a row, in order."""
        if not self.quantised:
            return ((self.dtype, self.width),)
        groups = self.width // self.group_size
        return ("uint32", self.width * self.bits // 32), (self.dtype, groups), (self.dtype, groups)

    @property
    def row_bytes(self) -> int:
        """Bytes of one part of one neuron."""
        return sum(elements * ITEM_BYTES.get(dtype, WORD_BYTES) for dtype, elements in self.components)

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
        """(offset, bytes) of neighbouring `parts` within a block. Raises ValueError if they are not neighbours."""
        part_bytes = self.neurons_per_block * self.row_bytes
        first = self.parts.index(parts[0])
        if parts != self.parts[first : first + len(parts)]:
            raise ValueError(f"expected neighbouring parts out of {self.parts}, got {parts}")
        if parts == self.parts:
            return 0, self.block_bytes
        return first * part_bytes, len(parts) * part_bytes

    def name_blocks(self, layer: int, begin: int, end: int) -> str:
        """Names the neurons in blocks `begin` .. `end` - 1 of a layer: "layer 3, neurons 24-31"."""
        first = begin * self.neurons_per_block
        last = min(end * self.neurons_per_block, self.neurons) - 1
        return f"layer {layer}, " + (f"neuron {first}" if first == last else f"neurons {first}-{last}")

    def name_bytes(self, offset: int, length: int) -> str:
        """Names the neurons that own any of `length` bytes at `offset` of the bundle file, all in one layer."""
        layer, within = divmod(offset, self.layer_bytes)
        begin, end = within // self.block_bytes, -(-(within + length) // self.block_bytes)
        return self.name_blocks(layer, begin, min(end, self.blocks))

    @staticmethod
    def plan(
        dtype: str,
        layers: int,
        neurons: int,
        width: int,
        parts: tuple[str, ...],
        bits: int = 16,
        group_size: int = GROUP_SIZE,
    ) -> NeuronLayout:
        """Chooses the sizes of blocks and pieces for a model.

        A block holds the smallest number of neurons whose padding stays under a tenth. A quantised neuron has a block
        of its own, which is not padded to a page if that would cost more than a quarter. A piece takes about 16 MiB
        when it is multiplied, and is never larger than a layer.
        """
        group_size = group_size if bits < 16 else 0
        one = NeuronLayout(dtype, layers, neurons, width, parts, 1, ALIGNMENT, 1, bits, group_size)
        count, bundle = 1, one.bundle_bytes
        if bits < 16:
            block = round_up(bundle, ALIGNMENT)
            if block > TIGHT_PADDING * bundle:
                block = round_up(bundle, BLOCK_ALIGNMENT)
        else:
            while round_up(count * bundle, ALIGNMENT) > 1.1 * count * bundle and count < min(64, neurons):
                count += 1
            block = round_up(count * bundle, ALIGNMENT)
        blocks = -(-neurons // count)
        widened = count * width * ITEM_BYTES[dtype] * len(parts)  # bytes of a block, dequantised
        piece = max(1, min((16 << 20) // max(block, widened), blocks))
        aligned = ALIGNMENT // math.gcd(block, ALIGNMENT)  # blocks until a read starts on a page boundary again
        if aligned < piece < blocks:
            piece -= piece % aligned
        return replace(one, neurons_per_block=count, block_bytes=block, piece_neurons=piece * count)

    def problem(self) -> str | None:
        """Returns what is wrong with these numbers, or None. A manifest may hold anything."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dtype", "parts")}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or not (name != "group_size") <= value < 1 << 40:
                return f"{name} is {value!r:.80}"
        if self.dtype not in ITEM_BYTES:
            return f"dtype is {self.dtype!r:.80}, expected one of {', '.join(ITEM_BYTES)}"
        if self.parts not in PARTS:
            return f"parts are {self.parts!r:.80}"
        if problem := group_problem(self.bits, self.group_size, self.width):
            return problem
        alignment = BLOCK_ALIGNMENT if self.quantised else ALIGNMENT
        if self.block_bytes % alignment or self.block_bytes < self.neurons_per_block * self.bundle_bytes:
            return f"block_bytes is {self.block_bytes} for {self.neurons_per_block} x {self.bundle_bytes} bytes"
        if self.piece_neurons % self.neurons_per_block:
            return f"piece_neurons is {self.piece_neurons}, expected a multiple of {self.neurons_per_block}"
        if self.neurons_per_block > self.neurons or self.piece_blocks > self.blocks:
            return f"a block has {self.neurons_per_block} neurons, a piece {self.piece_neurons}, a layer {self.neurons}"
        return None


@dataclass(frozen=True)
class Manifest:
    """The contents of a store. It is written last, so that its presence means that the store is complete."""

    model_type: str
    source: dict[str, Any]  # the checkpoint's files (name -> bytes) and header checksums
    layout: NeuronLayout
    activation: dict[str, Any]  # kind and threshold, as in layers/activations.py
    resident_dtype: str
    decode_tokens: int  # calls with at most this many tokens per sequence take the decode path
    all_neurons_layers: tuple[int, ...]  # layers so dense that selecting neurons does not pay
    predictors: dict[str, dict[str, Any]]  # kind -> measured report, thresholds
    default_predictor: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> bytes, sha256, tensors' crc32
    resident_bits: int = 16  # bits per number of the matrices in `resident_file`; below 16, packed by mlx.nn.quantize
    resident_group_size: int = 0

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

    def problem(self) -> str | None:
        """Returns what is wrong with these fields, whatever their types, or None. The layout must be valid."""
        layout = self.layout
        if type(self.model_type) is not str or type(self.source) is not dict:
            return "model_type or source has the wrong type"
        if not isinstance(self.activation, dict) or set(self.activation) != {"kind", "threshold"}:
            return f"activation is {self.activation!r:.80}"
        if self.resident_dtype not in ITEM_BYTES:
            return f"resident_dtype is {self.resident_dtype!r:.80}"
        resident = self.resident_bits, self.resident_group_size
        if not all(map(_is_count, resident)) or group_problem(*resident, width=self.resident_group_size):
            return f"resident_bits and resident_group_size are {resident!r:.80}"
        if not _is_count(self.decode_tokens, 1):
            return f"decode_tokens is {self.decode_tokens!r:.80}"
        chosen = self.all_neurons_layers
        if not all(_is_count(i) for i in chosen) or list(chosen) != sorted({i for i in chosen if i < layout.layers}):
            return f"all_neurons_layers is {list(chosen)!r:.80}"
        if self.default_predictor not in self.predictors:
            return f"default_predictor is {self.default_predictor!r:.80}"
        for kind, report in self.predictors.items():
            if problem := _predictor_problem(kind, report, layout.layers):
                return problem
        for name, entry in self.files.items():
            if problem := _file_problem(name, entry):
                return problem
        required = ["config.json", self.neurons_file, self.neurons_checksums_file, self.resident_file]
        for name in required + [self.predictor_file(kind) for kind in self.predictors]:
            if name not in self.files:
                return f"files lacks {name}"
        sizes = {
            self.neurons_file: layout.file_bytes,
            self.neurons_checksums_file: layout.layers * layout.blocks * CHECKSUM_BYTES,
        }
        for name, size in sizes.items():
            if self.files[name]["bytes"] != size:
                return f"{name} has {self.files[name]['bytes']} bytes where the layout needs {size}"
        return None


def _digest(body: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own checksum, in canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a store's manifest, and checks that the files it names have their full size.

    Raises NotAStoreError, NewerFormatError, OlderFormatError, CorruptStoreError, TruncatedStoreError, or
    ReadError if the system cannot read a file, or if it is in iCloud.
    """
    manifest = parse_manifest(folder)
    with reading(folder, "the list of its files"):
        refuse_placeholders(folder, [path.name for path in folder.iterdir()], manifest.files.__contains__)
    for name, entry in manifest.files.items():
        file = folder / name
        expected = entry["bytes"]
        if not file.is_file():
            raise TruncatedStoreError(f"{folder} lacks {name} ({expected} bytes). {AGAIN}")
        status = file.stat()
        refuse_dataless(file, status)
        if (found := status.st_size) != expected:
            raise TruncatedStoreError(f"{file} has {found} bytes, expected {expected}. {AGAIN}")
        if "sha256" in entry:  # The configuration and the tokenizer are small, and everything depends on them.
            with reading(file):
                found_sha256 = sha256_of(file)
            if found_sha256 != entry["sha256"]:
                raise CorruptStoreError(f"{file} does not match its checksum. {AGAIN}")
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """Like `read_manifest`, without checking the other files."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotAStoreError(
            f"{folder} is not a store (no {MANIFEST}). Make one with `mlxflash convert`; "
            "a mixture of experts needs no store."
        )
    with reading(path), path.open("rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CorruptStoreError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes. {AGAIN}")
    try:
        body = json.loads(text)
        checksum = _digest(body) if isinstance(body, dict) else None
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is not valid JSON ({error}). {AGAIN}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT or type(body.get("version")) is not int:
        raise CorruptStoreError(f"{path} is not the manifest of an mlx_flash store. {AGAIN}")
    if body["version"] > VERSION:
        raise NewerFormatError(
            f"{folder} has format version {body['version']}, this mlx_flash reads version {VERSION}. "
            "Upgrade mlx_flash: `pip install -U mlx-flash-runtime`."
        )
    if body["version"] < VERSION:
        raise OlderFormatError(f"{folder} has format version {body['version']}, expected {VERSION}. {AGAIN}")
    if body.pop("checksum", None) != checksum:
        raise CorruptStoreError(f"{path} does not match its own checksum. {AGAIN}")
    return _parse(body, path)


def _parse(body: dict[str, Any], path: Path) -> Manifest:
    try:
        numbers = dict(body["layout"])
        layout = NeuronLayout(**{**numbers, "parts": tuple(numbers["parts"])})
        kept = {f.name: body[f.name] for f in fields(Manifest) if f.name in body or f.default is MISSING}
        manifest = Manifest(**{**kept, "layout": layout, "all_neurons_layers": tuple(kept["all_neurons_layers"])})
        problem = layout.problem() or manifest.problem()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptStoreError(
            f"{path} lacks or misstates a field ({type(error).__name__}: {error}). {AGAIN}"
        ) from None
    if problem:
        raise CorruptStoreError(f"{path} contradicts itself: {problem}. {AGAIN}")
    return manifest


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 62


def _file_problem(name: str, entry: Any) -> str | None:
    """Returns what is wrong with a file's entry, or None. Its name must stay inside the folder, and must be valid on
    every file system."""
    sound_name = name.isprintable() and not set(name) & set("/\\:") and name.strip(" .") and len(name.encode()) <= 255
    if not sound_name or name == MANIFEST:
        return f"a file is named {name!r}"
    if not isinstance(entry, dict) or not _is_count(entry.get("bytes")):
        return f"the size of {name} is {entry!r:.80}"
    sums = {key: entry[key] for key in ("crc32", "sha256") if key in entry}
    kind = None if name == Manifest.neurons_file else "crc32" if name.endswith(".safetensors") else "sha256"
    sound = list(sums) == ([kind] if kind else [])
    if kind == "crc32" and sound:
        sound = isinstance(sums[kind], dict) and all(type(s) is int and 0 <= s < 1 << 32 for s in sums[kind].values())
    if kind == "sha256" and sound:
        sound = isinstance(sums[kind], str) and len(sums[kind]) == 64
    return None if sound else f"the checksums of {name} are malformed or of the wrong kind"


def _predictor_problem(kind: str, report: Any, layers: int) -> str | None:
    if not kind.isidentifier() or not kind.isascii() or not isinstance(report, dict):
        return f"a predictor is {kind!r}"
    for key in ("recall", "predicted", "active"):
        values = report.get(key)
        if not isinstance(values, list) or len(values) != layers or not _are_shares(values):
            return f"{key} of predictor {kind} is not one number from 0 to 1 per layer"
    if problem := _recall_problem(report, layers):
        return f"{problem} of predictor {kind} is missing or invalid"
    for key in ("bytes", *(key for key in ("bits", "group_size") if key in report)):
        if not _is_count(report.get(key)):
            return f"{key} of predictor {kind} is {report.get(key)!r:.80}"
    if kind == "shadow" and (
        report.get("bits") not in (2, 3, 4, 5, 6, 8) or report.get("group_size") not in (32, 64, 128)
    ):
        return f"predictor {kind} has {report.get('bits')!r:.20} bits in groups of {report.get('group_size')!r:.20}"
    return None


def _recall_problem(report: dict[str, Any], layers: int) -> str | None:
    """Returns the name of a field about other recalls that is invalid, or None."""
    table = report.get("table")
    targets = table.get("recall") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not _are_numbers(targets):
        return "table"
    if not targets or list(targets) != sorted(set(targets)) or not 0 < targets[0] <= targets[-1] <= 1:
        return "recall in the table"
    if report.get("target") not in targets:
        return "target"
    for key in ("threshold", "caught", "predicted"):
        rows = table.get(key)
        if not isinstance(rows, list) or len(rows) != layers:
            return f"{key} in the table"
        sound = _are_numbers if key == "threshold" else _are_shares
        if not all(sound(row) and len(row) == len(targets) for row in rows):
            return f"{key} in the table"
    perplexity = report.get("perplexity", 0)
    if perplexity is not None:
        names = ("dense", "predicted", "tokens")
        if not isinstance(perplexity, dict) or not _are_numbers([perplexity.get(name) for name in names]):
            return "perplexity"
        if not perplexity["dense"] > 0:
            return "perplexity"
    return None


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(is_finite_number(value) for value in values)


def _are_shares(values: Any) -> bool:
    return _are_numbers(values) and all(0 <= value <= 1 for value in values)


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold. `math.isfinite` raises for a larger integer."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
